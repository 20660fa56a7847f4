"""Counts in the forms that people hold them, numbers of numpy and torch, and a default device."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from disalign_ops import class_stats, functional, losses, metrics, plots, segmentation_metrics
from disalign_ops import nn as dnn
from disalign_ops.class_stats import grw_weights
from disalign_ops.errors import ArgumentError
from disalign_ops.integrations._openmm import GRWCrossEntropyLoss
from support.ade20k import ADE20K_RATIOS


class Series:
    """What pandas' Series has of use here."""

    def __init__(self, index: Any, values: Any) -> None:
        self.index, self.values = index, np.asarray(values)

    def to_numpy(self) -> Any:
        return self.values


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers())
def test_every_form_gives_the_weights_of_the_list(counts: list[int], seed: int) -> None:
    pairs = list(enumerate(counts))
    random.Random(seed).shuffle(pairs)
    labels = [label for label, n in pairs for _ in range(n)]
    wanted = grw_weights(counts)
    for form in (
        dict(pairs),
        {np.int64(label): n for label, n in pairs},
        Counter(labels),
        Series([label for label, _ in pairs], [n for _, n in pairs]),
        SimpleNamespace(targets=labels),
        SimpleNamespace(targets=torch.tensor(labels, dtype=torch.uint8)),
    ):
        assert torch.equal(grw_weights(form), wanted)  # type: ignore[arg-type]
        assert torch.equal(dnn.GRWCrossEntropyLoss(form).weight, wanted)  # type: ignore[arg-type]
        assert torch.equal(
            losses.balanced_softmax(form).prior, losses.balanced_softmax(counts).prior
        )  # type: ignore


def test_a_background_takes_class_0() -> None:
    for weights in (grw_weights, class_stats.class_balanced_weights):
        wanted = weights([5, 3], background="first")
        assert torch.equal(weights({2: 3, 1: 5}, background="first"), wanted)
        assert torch.equal(weights({1: 3, 0: 5}, background="first"), wanted)
        with pytest.raises(ValueError, match="every class from 0 to 2, got none for class 0"):
            weights({2: 3, 1: 5}, background="last")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({0: 5, 3: 1}, r"every class from 0 to 3, got none for class 1, 2 \(2 missing\)"),
        ({0: 5, 10**12: 1}, r"got none for class 1, 2, 3, 4, 5, \.\.\."),
        ({"cat": 5}, "class indices 0 to C - 1, got 'cat'; pass a list"),
        ({-1: 5}, "class indices 0 to C - 1, got -1"),
        ({True: 5}, "class indices 0 to C - 1, got True"),
        ({}, "got no entries"),
        (Series([0, 0], [1, 2]), "got class 0 twice"),
        (Series([0], [[1, 2]]), "one column"),
        (SimpleNamespace(targets=[0, -1]), r"labels from 0 to 0, got -1"),
        (SimpleNamespace(targets=[0, 2], classes=["a", "b"]), "labels from 0 to 1, got 2"),
        (SimpleNamespace(targets=[0, 2]), "counts must have .*, got 0 for class 1"),
    ],
)
def test_what_is_refused(counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grw_weights(counts)


def test_targets_that_are_no_labels() -> None:
    for targets in ([0.5], [{"boxes": 1}], []):
        with pytest.raises(TypeError, match="one integer label per sample"):
            grw_weights(SimpleNamespace(targets=targets))


def test_absent_classes_count_0_where_the_number_of_classes_is_given() -> None:
    metric = segmentation_metrics.SegmentationIoU(4, counts={0: 100, 3: 1})
    wanted = segmentation_metrics.SegmentationIoU(4, counts=[100, 0, 0, 1])
    for name, mask in wanted._splits.items():
        assert torch.equal(metric._splits[name], mask)
    dataset = SimpleNamespace(targets=[0, 0, 1], classes=["a", "b", "c"])
    assert torch.equal(grw_weights(dataset, empty="max"), grw_weights([2, 1, 0], empty="max"))
    with pytest.raises(ValueError, match="classes 0 to 3, got class 4"):
        segmentation_metrics.SegmentationIoU(4, counts={0: 100, 4: 1})


NUMBERS = (np.int64, np.float32, torch.tensor)


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_numpy_and_torch(number: Any) -> None:
    counts = [500, 60, 3]
    assert torch.equal(grw_weights(counts, number(1)), grw_weights(counts, 1))
    assert torch.equal(class_stats.log_prior(counts, number(2)), class_stats.log_prior(counts, 2))
    assert [m.tolist() for m in metrics.split_classes(counts, number(100), number(20))] == [
        m.tolist() for m in metrics.split_classes(counts)
    ]
    if number is not np.float32:
        logits, target = torch.eye(3), torch.tensor([0, 1, 9])
        for topk in (number(2), [number(2)]):
            metric = metrics.LongTailAccuracy(counts, topk, ignore_index=number(9))
            metric.update(logits, target)
            assert metric.compute()["top2_overall"] == 1.0
        iou = segmentation_metrics.SegmentationIoU(number(3), ignore_index=number(9))
        iou.update(torch.tensor([0, 1, 2]), target)
        assert iou.compute()["mean"] == 1.0
        p = torch.tensor([[0.25, 0.75]])
        assert plots.calibration_error(p, torch.tensor([1]), number(15)) == 0.25


@pytest.mark.parametrize("normalizer", ["weights", "valid", "count"])
@pytest.mark.parametrize("class_weight", [None, [1.0, 2.0, 0.0]])
def test_the_mean_of_no_positions_is_0_in_the_frameworks(
    normalizer: str, class_weight: list[float] | None
) -> None:
    loss = GRWCrossEntropyLoss(class_weight=class_weight, normalizer=normalizer)
    for label in (torch.full((2, 4, 4), 255, dtype=torch.uint8), torch.full((2, 4, 4), 2)):
        if label.dtype == torch.int64 and class_weight is None:
            continue  # its positions count
        z = torch.randn(2, 3, 4, 4, requires_grad=True)
        found = loss(z, label, ignore_index=255)
        found.backward()
        assert found.item() == 0.0
        assert z.grad is not None
        assert not z.grad.any()
    z, label = torch.randn(2, 3), torch.tensor([0, 1])
    assert loss(z, label, torch.zeros(2)).item() == 0.0
    assert loss(z, label, torch.zeros(2), avg_factor=0).item() == 0.0
    assert loss(z * torch.nan, label).isnan()


def test_class_weights_of_a_file(tmp_path: Any) -> None:
    weights = [1.0, 2.0, 3.0]
    np.save(tmp_path / "w.npy", np.array(weights))
    (tmp_path / "w.json").write_text("[1, 2, 3.0]")
    z, t = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    for path in (tmp_path / "w.npy", str(tmp_path / "w.json")):
        found = GRWCrossEntropyLoss(class_weight=path)(z, t)
        assert torch.allclose(found, F.cross_entropy(z, t, torch.tensor(weights)))
    for name, content in (("w.pkl", "x"), ("x.json", '{"a": 1}'), ("y.json", "[1"), ("z.npy", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ArgumentError, match=f"class_weight must be numbers, .*{name}"):
            GRWCrossEntropyLoss(class_weight=tmp_path / name)


@pytest.mark.parametrize(("ignored", "factor"), [(0.0, 1.79), (0.1, 1.99)])
def test_pytorchs_mean_is_larger_than_the_released_one_on_ade20k(
    ignored: float, factor: float
) -> None:
    """docs/segmentation.md: by so much, where a mask has the data set's shares of the classes."""
    ratios = torch.tensor([n for n, classes in ADE20K_RATIOS for _ in range(classes)])
    labels = torch.repeat_interleave(torch.arange(150), ratios)
    pixels = torch.cat([labels, torch.full((round(len(labels) * ignored / (1 - ignored)),), 255)])
    z, weight = torch.zeros(len(pixels), 150), class_stats.grw_weights(ratios, 0.2)
    by_weights, by_count = (
        functional.cross_entropy(z, pixels, weight, ignore_index=255, normalizer=normalizer)
        for normalizer in ("weights", "count")
    )
    assert round(float(by_weights / by_count), 2) == factor
