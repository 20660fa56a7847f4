"""With another default device: what reads a file or counts is on the CPU, or where its input is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import disalign_ops
from disalign_ops import class_stats, losses, metrics, plots, segmentation_metrics, sweep
from disalign_ops import nn as dnn

PACKAGE = Path(disalign_ops.__file__).parent
FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def calls_without_a_device() -> Iterator[str]:
    for file in sorted(PACKAGE.rglob("*.py")):
        if "_triton" in file.parts:  # tl.zeros and the like are the compiler's
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in FACTORIES
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                # **factory hands on the device that a module's user asked for, or nothing.
                and not any(k.arg in ("device", None) for k in node.keywords)
            ):
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}"


def test_every_tensor_that_the_package_makes_has_a_device_of_its_own() -> None:
    assert list(calls_without_a_device()) == []


@pytest.fixture(params=["context", "default"])
def meta(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another default device than the CPU, in both ways that torch has."""
    if request.param == "context":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


COUNTS = [500, 60, 3]
TARGET = torch.tensor([0, 1, 2, 1])
LOGITS = torch.eye(3)[[0, 1, 1, 1]]


@pytest.mark.usefixtures("meta")
def test_counts_and_what_is_made_of_them_have_values(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text("class,count\n0,500\n1,60\n2,3\n")
    read = class_stats.read_counts(path)
    assert read.tolist() == COUNTS
    for made in (
        class_stats.grw_weights(COUNTS, background="first"),
        class_stats.class_balanced_weights(read),
        class_stats.log_prior(read),
        class_stats.ldam_margins(COUNTS),
        *metrics.split_classes(COUNTS),
        dnn.GRWCrossEntropyLoss(COUNTS).weight,
        losses.seesaw(3).cumulative_samples,
        losses.balanced_softmax(COUNTS).prior,
        losses.vs(COUNTS).gain,
        losses.ldam(COUNTS).margin,
        losses.label_aware_smoothing(COUNTS).smoothing,
    ):
        assert isinstance(made, Tensor)
        assert made.device.type == "cpu"
    for criterion in (losses.seesaw(3), losses.ldam(COUNTS), losses.label_aware_smoothing(COUNTS)):
        assert criterion(LOGITS, TARGET).isfinite()


@pytest.mark.usefixtures("meta")
def test_metrics_keep_counters_that_have_values() -> None:
    accuracy = metrics.LongTailAccuracy(COUNTS, topk=(2,))
    accuracy.update(LOGITS, TARGET)
    assert float(accuracy.compute()["overall"]) == 0.75  # type: ignore[arg-type]
    iou = segmentation_metrics.SegmentationIoU(3)
    iou.update(LOGITS.argmax(1), TARGET)
    assert iou.compute()["iou"].tolist() == pytest.approx([1, 2 / 3, 0])
    assert plots.calibration_error(LOGITS, TARGET) == pytest.approx(0.25)


@pytest.mark.usefixtures("meta")
def test_what_is_computed_is_where_its_input_is() -> None:
    layer = dnn.DisAlignLinear(3, 3, device="cpu")
    found = sweep.sweep_rho(layer, LOGITS, TARGET, COUNTS, [1.0], epochs=1, batch_size=2)
    assert found[1.0](LOGITS).isfinite().all()
    for loss in (
        disalign_ops.cross_entropy(LOGITS, TARGET, margin=0.5, normalizer=2.0),
        disalign_ops.linear_cross_entropy(LOGITS, LOGITS, TARGET[:4] % 3, normalizer=2.0),
        disalign_ops.upsample_cross_entropy(LOGITS[None, :, :, None], TARGET.reshape(1, 4, 1) % 3),
        layer.loss(LOGITS, TARGET, sample_weight=LOGITS.sum(1)),
    ):
        assert loss.device.type == "cpu"
        assert loss.isfinite()
    bad = TARGET.reshape(1, 4, 1) * 9
    with pytest.raises(IndexError, match=r"target\[0, 1, 0\]"):
        disalign_ops.upsample_cross_entropy(LOGITS[None, :, :, None], bad)


@pytest.mark.usefixtures("meta")
def test_a_layer_is_where_it_is_asked_to_be() -> None:
    assert {p.device.type for p in dnn.DisAlignLinear(3, 3).parameters()} == {"meta"}
    linear = nn.Linear(3, 3, device="cpu")
    assert {p.device.type for p in dnn.convert_to_disalign(linear).parameters()} == {"cpu"}
