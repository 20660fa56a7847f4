"""SegmentationIoU: arguments and maps that are refused."""

from __future__ import annotations

import math

import pytest
import torch

from disalign_ops.segmentation_metrics import SegmentationIoU


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 3.0}, TypeError, "num_classes must be an integer, got 3.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an integer, got True"),
        ({"num_classes": 0}, ValueError, "num_classes must be 1 or more, got 0"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index must be in the range of int64"),
        (
            {"counts": [1, 2, 3], "split": ([0], [1], [2])},
            ValueError,
            "counts or split must be None, got both",
        ),
        ({"counts": [1, 2]}, ValueError, "counts must have num_classes = 3 entries, got 2"),
        ({"counts": [1, -2, 3]}, ValueError, "counts must be .*, got negative for class 1"),
        (
            {"counts": [0, 0, 0]},
            ValueError,
            "counts must have a class with pixels, got 0 for all 3 classes",
        ),
        (
            {"split": "lvis"},
            ValueError,
            "split must be three collections .* or 'ade20k', got 'lvis'",
        ),
        ({"split": "ade20k"}, ValueError, "num_classes must be 150 with split 'ade20k', got 3"),
        (
            {"split": 3},
            TypeError,
            "split must be three collections of class ids or masks.*, got int",
        ),
        ({"split": {0, 1, 2}}, TypeError, "split must be three collections.*, got set"),
        ({"split": {"head": [0]}}, TypeError, "split must be three collections.*, got dict"),
        ({"split": ([0], [1])}, ValueError, "split must be three collections .*, got 2 groups"),
        (
            {"split": (0, 1, 2)},
            TypeError,
            "split's head must be class ids or a boolean mask.*, got int",
        ),
        ({"split": ([0], "1", [2])}, TypeError, r"split's body must be .* mask \(3,\), got str"),
        (
            {"split": ([0], [1.0], [2])},
            TypeError,
            "split's body must be class ids .*, got list of float64",
        ),
        (
            {"split": ([0], [1], torch.tensor([2.0]))},
            TypeError,
            "split's tail must be class ids .*, got dtype torch.float32",
        ),
        (
            {"split": ([[0], [1, 2]], [], [])},
            ValueError,
            "split's head must be class ids .*, got a ragged list",
        ),
        (
            {"split": ([[0]], [1], [2])},
            ValueError,
            r"head must be class ids .*, got of shape \(1, 1\)",
        ),
        (
            {"split": ([True, False], [1], [2])},
            ValueError,
            r"split's head must be class ids or a boolean mask \(3,\), got a mask of shape \(2,\)",
        ),
        (
            {"split": ([0], [1], [3])},
            ValueError,
            "split's tail must have classes from 0 to 2.*, got 3",
        ),
        (
            {"split": ([0], [-1], [2])},
            ValueError,
            "split's body must have classes from 0 to 2.*, got -1",
        ),
        (
            {"split": ([0, 1, 0], [], [])},
            ValueError,
            "split's head must have each class once, got class 0 again",
        ),
        ({"split": ([0, 1], [1], [2])}, ValueError, "split must have .*, got class 1 in more"),
    ],
)
def test_wrong_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        SegmentationIoU(**{"num_classes": 3, **arguments})


M = torch.tensor([[0, 1, 2], [2, 1, 0]])


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        ([0, 1], M, TypeError, "prediction must be a tensor, got list"),
        (M, M.numpy(), TypeError, "target must be a tensor, got ndarray"),
        (M, M.float(), TypeError, "target must have class indices.*, got dtype torch.float32"),
        (M, M > 0, TypeError, "target must have class indices.*, got dtype torch.bool"),
        (M > 0, M, TypeError, "prediction must have class indices.*, got dtype torch.bool"),
        (M.half(), M, TypeError, r"argmax over the classes\), got dtype torch.float16"),
        (
            M.cfloat(),
            M,
            TypeError,
            "prediction must have class indices.*, got dtype torch.complex64",
        ),
        (
            M[None],
            M,
            ValueError,
            r"prediction must have the target's shape \(2, 3\), got \(1, 2, 3\)",
        ),
        (M, M[:, :1], ValueError, r"must have the target's shape \(2, 1\), got \(2, 3\)"),
        (M, M.to("meta"), ValueError, "must be on the target's device, meta, got cpu"),
        (
            M,
            M + 1,
            IndexError,
            r"target must have classes from 0 to 2 or ignore_index = 255, got 3 at \(0, 2\)$",
        ),
        (M, M - 1, IndexError, r"target must have classes from 0 to 2 or .*, got -1 at \(0, 0\)"),
        (M + 1, M, IndexError, r"prediction must have classes from 0 to 2, got 3 at \(0, 2\)$"),
        (
            M * 255 // 2,
            M,
            IndexError,
            r"prediction must have classes from 0 to 2, got 127 at \(0, 1\)$",
        ),
        (M - 5, M, IndexError, r"prediction must have classes from 0 to 2, got -5 at \(0, 0\)$"),
        (
            torch.full((4,), 255, dtype=torch.uint8),
            torch.tensor([255, 255, 255, 1]),
            IndexError,
            r"prediction must have classes from 0 to 2, got 255 at \(3,\)$",  # the ignored ones may
        ),
        (
            torch.tensor(0),
            torch.tensor(9),
            IndexError,
            r"target must have classes from 0 to 2.*, got 9 at \(\)",
        ),
    ],
)
def test_wrong_updates(prediction, target, error, message) -> None:
    metric = SegmentationIoU(3)
    with pytest.raises(error, match=message):
        metric.update(prediction, target)
    assert math.isnan(metric.compute()["mean"])  # nothing was counted
