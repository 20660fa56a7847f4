"""The figures: what they show, and the calibration error."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from disalign_ops import nn as dnn
from disalign_ops import plots
from disalign_ops.errors import ArgumentError

COUNTS = [1000, 300, 90, 30, 12, 4]
C = len(COUNTS)


def points(axes: Any) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.asarray(axes.collections[0].get_offsets())
    return found


def test_accuracy_by_count() -> None:
    accuracy = torch.tensor([0.9, 0.8, 0.7, 0.5, float("nan"), 0.1])
    figure = plots.accuracy_by_count(accuracy, COUNTS, "mine")
    axes = figure.axes[0]
    shown = points(axes)
    np.testing.assert_allclose(shown[:, 0], COUNTS)
    np.testing.assert_allclose(shown[:, 1].astype(float), accuracy.numpy(), rtol=1e-6)
    assert axes.get_legend().get_texts()[0].get_text() == "mine"
    mean = axes.lines[0].get_xydata()
    assert len(mean) == 5  # no mean of what has no test samples
    assert axes.get_xlabel() == "training samples of the class"


def test_classes_without_samples_are_shown() -> None:
    axes = plots.accuracy_by_count(torch.rand(3), [0, 10, 2000]).axes[0]
    assert axes.get_xscale() == "symlog"
    assert axes.get_xlim()[0] < 0 < 2000 <= axes.get_xlim()[1]
    assert plots.accuracy_by_count(torch.rand(2), [1, 10]).axes[0].get_xscale() == "log"


@pytest.mark.parametrize("background", [None, "last"])
def test_calibration_by_count(background: str | None) -> None:
    layer = dnn.DisAlignLinear(3, C + (background is not None), background=background)
    with torch.no_grad():
        layer.logit_scale.copy_(torch.linspace(0.5, 1.5, C))
    figure = plots.calibration_by_count(layer, COUNTS)
    assert len(figure.axes) == 2
    for axes, values in zip(figure.axes, (layer.logit_scale, layer.logit_bias), strict=True):
        shown = points(axes)
        np.testing.assert_allclose(shown[:, 0], COUNTS)
        np.testing.assert_allclose(shown[:, 1], values.detach().flatten().numpy(), rtol=1e-6)
    assert figure.axes[0].get_ylabel() == "logit_scale (interpolated)"


def test_confidence_histogram() -> None:
    c = torch.rand(7, 5)
    figure = plots.confidence_histogram(c, bins=10)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == torch.histc(c, 10, 0, 1).tolist()


def test_calibration_error_and_its_diagram() -> None:
    # Two rows at 0.55, one right; two at 0.95, both right: 0.5 |0.5 - 0.55| + 0.5 |1 - 0.95|.
    p = torch.tensor([[0.55, 0.45], [0.45, 0.55], [0.95, 0.05], [0.05, 0.95]])
    target = torch.tensor([0, 0, 0, 1])
    assert plots.calibration_error(p, target, bins=10) == pytest.approx(0.05)
    axes = plots.reliability(p, target, bins=10).axes[0]
    assert axes.get_title() == "expected calibration error 0.050"
    bars = {round(float(bar.get_x()), 6): float(bar.get_height()) for bar in axes.patches}
    assert bars == {0.5: 0.5, 0.9: 1.0}
    edge = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    bar = plots.reliability(edge, torch.tensor([0]), bins=10).axes[0].patches[0]
    assert float(bar.get_x()) == pytest.approx(0.4)  # the upper edge belongs to the bin


def test_calibrated_predictions_have_no_error() -> None:
    torch.manual_seed(0)
    p = torch.softmax(torch.randn(40_000, 4), 1)
    target = torch.multinomial(p, 1)[:, 0]
    assert plots.calibration_error(p, target) < 0.01
    sure = torch.nn.functional.one_hot(p.argmax(1), 4).float()
    expected = 1 - float((p.argmax(1) == target).float().mean())
    assert plots.calibration_error(sure, target) == pytest.approx(expected, rel=1e-5)


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="counts must have 2 entries, as accuracy has, got 6"):
        plots.accuracy_by_count(torch.rand(2), COUNTS)
    with pytest.raises(ArgumentError, match="layer must be a DisAlign layer, got a Linear"):
        plots.calibration_by_count(torch.nn.Linear(2, 2), COUNTS)
    with pytest.raises(ArgumentError, match="apply the sigmoid"):
        plots.confidence_histogram(torch.tensor([0.5, 1.5]))
    with pytest.raises(ArgumentError, match="apply the softmax"):
        plots.calibration_error(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(ArgumentError, match=r"must have shapes \(N, C\) and \(N,\)"):
        plots.reliability(torch.rand(4, 2), torch.tensor([0]))


def test_importing_needs_no_matplotlib() -> None:
    script = "import sys, disalign_ops.plots; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_calibration_error_leaves_ignored_rows_out_and_refuses_other_targets() -> None:
    p = torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.9, 0.1]])
    for ignore_index, ignored in ((-100, -100), (255, 255), (-1, -1)):
        target = torch.tensor([1, ignored, 0])
        found = plots.calibration_error(p, target, ignore_index=ignore_index)
        assert found == pytest.approx(plots.calibration_error(p[[0, 2]], target[[0, 2]]))
        title = plots.reliability(p, target, ignore_index=ignore_index).axes[0].get_title()
        assert title == f"expected calibration error {found:.3f}"
    # 156 is -100 in uint8, and a class of 200.
    wide = torch.eye(200)[[156, 3]]
    assert plots.calibration_error(wide, torch.tensor([156, 3], dtype=torch.uint8)) == 0
    with pytest.raises(IndexError, match=r"Target -1 is out of bounds: target\[1\]"):
        plots.calibration_error(p, torch.tensor([1, -1, 0]))
    with pytest.raises(IndexError, match="Target 2 is out of bounds"):
        plots.reliability(p, torch.tensor([1, 2, 0]))
    with pytest.raises(ArgumentError, match="target must have a row that is not ignored"):
        plots.calibration_error(p, torch.full((3,), -100))
    with pytest.raises(ArgumentError, match="class probabilities"):
        plots.calibration_error(p, torch.ones(3))
