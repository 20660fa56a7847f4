"""LongTailAccuracy: arguments and updates that are refused."""

from __future__ import annotations

import math

import pytest
import torch

from disalign_ops.metrics import LongTailAccuracy

T3 = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"train_counts": []},
            ValueError,
            "train_counts must have one number per class, got no entries",
        ),
        (
            {"train_counts": [3, -1]},
            ValueError,
            "train_counts must be .*, got negative for class 1",
        ),
        ({"train_counts": "ab"}, TypeError, "train_counts must be a 1-D tensor.*, got str of <U2"),
        ({"topk": (0,)}, ValueError, r"topk must be from 1 to 3 \(the number of classes\), got 0"),
        ({"topk": (1, 4)}, ValueError, "topk must be from 1 to 3 .*, got 4"),
        ({"topk": (1.0,)}, TypeError, "topk must be an integer, got 1.0"),
        ({"topk": (True,)}, TypeError, "topk must be an integer, got True"),
        ({"many": 10}, ValueError, "few must be at most many, got few = 20"),
        ({"few": math.nan}, ValueError, "few must be at most many, got few = nan"),
    ],
)
def test_wrong_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        LongTailAccuracy(**{"train_counts": [1, 2, 3], **arguments})


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        ([0, 1], T3, TypeError, "prediction must be a tensor, got list"),
        (T3, [0, 1], TypeError, "target must be a tensor, got list"),
        (
            torch.eye(3),
            T3.float(),
            TypeError,
            "target must have class indices .*, got dtype torch.float32",
        ),
        (torch.eye(3), T3 > 0, TypeError, "target must have class indices.*, got dtype torch.bool"),
        (T3 > 0, T3, TypeError, "prediction must have class indices.*, got dtype torch.bool"),
        (torch.eye(3), T3[None], ValueError, r"target must have shape \(N,\), got \(1, 3\)"),
        (
            torch.zeros(3, 4),
            T3,
            ValueError,
            r"prediction must have shape \(3, 3\) .*, got \(3, 4\) and dtype torch.float32",
        ),
        (
            torch.zeros(2, 3),
            T3,
            ValueError,
            r"prediction must have shape \(3, 3\) .*, got \(2, 3\)",
        ),
        (T3[:2], T3, ValueError, r"must have shape \(3,\) .*, got \(2,\) and dtype torch.int64"),
        (
            torch.zeros(3, 3, dtype=torch.int64),
            T3,
            ValueError,
            r"shape \(3,\) \(floating logits are \(N, C\), predicted classes \(N,\)\), got",
        ),
        (
            torch.eye(3),
            T3 + 1,
            ValueError,
            "target must have classes from 0 to 2 or ignore_.*, got 3",
        ),
        (
            torch.eye(3),
            T3 - 1,
            ValueError,
            "target must have classes from 0 to 2 or ignore_.*, got -1",
        ),
        (T3 + 1, T3, ValueError, "prediction must have classes from 0 to 2, got 3$"),
        (
            torch.eye(3),
            T3.to("meta"),
            ValueError,
            "prediction must be on the target's device, meta, got cpu",
        ),
    ],
)
def test_wrong_updates(prediction, target, error, message) -> None:
    metric = LongTailAccuracy([1, 2, 3])
    with pytest.raises(error, match=message):
        metric.update(prediction, target)
    assert math.isnan(metric.compute()["overall"])  # nothing was counted


def test_topk_needs_logits() -> None:
    with pytest.raises(ValueError, match=r"must be floating logits \(N, C\) for topk = \(1, 2\)"):
        LongTailAccuracy([1, 2, 3], topk=(1, 2)).update(T3, T3)
