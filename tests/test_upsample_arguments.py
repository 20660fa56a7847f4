"""Arguments that upsample_cross_entropy and upsample_predict refuse, and their messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disalign_ops import upsample_cross_entropy, upsample_predict
from disalign_ops.errors import ArgumentError, ArgumentTypeError
from support.dense_cases import dense

MISUSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": torch.zeros(2, 5, 3)}, ArgumentError, r"shape \(N, C, h, w\) .*, got \(2, 5, 3\)"),
    ({"input": torch.zeros(2, 5, 0, 3)}, ArgumentError, "h and w above 0"),
    ({"target": torch.zeros(1, 8, 8).long()}, ArgumentError, r"N = 2 .*, got \(1, 8, 8\)"),
    ({"target": torch.zeros(2, 1, 8, 8).long()}, ArgumentError, r"must have shape \(N, H, W\)"),
    ({"target": torch.zeros(2, 0, 8).long()}, ArgumentError, "must have at least one position"),
    ({"target": torch.zeros(2, 8, 8)}, ArgumentError, "class probabilities"),
    ({"target": torch.zeros(2, 8, 8, dtype=torch.bool)}, ArgumentTypeError, "got torch.bool"),
    ({"align_corners": 1}, ArgumentTypeError, "align_corners must be a bool, got a int"),
    ({"confidence": torch.zeros(2, 1, 3, 4)}, ArgumentError, "scale must be a tensor, got None"),
    ({"scale": torch.zeros(5)}, ArgumentError, "(confidence|bias) must be a tensor, got None"),
    ({"background": "first"}, ArgumentError, "background must be None without confidence, scale"),
    (
        {"confidence": torch.zeros(2, 1, 8, 8), "scale": torch.zeros(5), "bias": torch.zeros(5)},
        ArgumentError,
        r"confidence must have shape \(2, 3, 4\) or \(2, 1, 3, 4\) for .*, got \(2, 1, 8, 8\)",
    ),
    ({"sample_weight": torch.ones(2, 3, 4)}, ArgumentError, r"\(2, 8, 8\) or \(2, 1, 8, 8\) for"),
    ({"weight": torch.ones(4)}, ArgumentError, r"weight must have one entry a class \(5\), got 4"),
    ({"reduction": "avg"}, ArgumentError, "reduction must be .*, got 'avg'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), MISUSE)
def test_misuse_says_what_was_given_and_what_is_needed(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"input": torch.zeros(2, 5, 3, 4), "target": torch.zeros(2, 8, 8).long()} | change
    with pytest.raises(error, match=message):
        upsample_cross_entropy(**arguments)


def test_255_as_a_class_and_as_the_default_to_ignore_warns() -> None:
    d = dense((1, 300, 2, 2), (4, 4))
    with pytest.warns(UserWarning, match="class 255 is ignored"):
        upsample_cross_entropy(d.logits, d.target)


@pytest.mark.parametrize("size", [(0, 4), (4,), 7, (4.0, 4)])
def test_predict_refuses_a_size_that_is_none(size: Any) -> None:
    with pytest.raises(ArgumentError, match=r"size must be \(height, width\), .*, got "):
        upsample_predict(torch.zeros(1, 2, 3, 3), size)
