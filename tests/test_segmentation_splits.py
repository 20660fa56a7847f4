"""Head, body and tail of the segmentation metrics: split_pixels, and ADE20K's published split."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disalign_ops.segmentation_metrics import ADE20K_SPLIT, split_pixels
from support.ade20k import ADE20K_RATIOS


def test_split_pixels_bounds() -> None:
    head, body, tail = split_pixels([9880, 100, 10, 9, 1, 0])
    assert head.tolist() == [True, True, False, False, False, False]
    assert body.tolist() == [False, False, True, False, False, False]
    assert tail.tolist() == [False, False, False, True, True, True]
    assert head.dtype == body.dtype == tail.dtype == torch.bool
    masks = split_pixels(np.array([0.5, 0.3, 0.2]), head=0.4, tail=0.25)
    assert [mask.tolist() for mask in masks] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@given(
    st.lists(st.integers(0, 10**9), min_size=1).filter(any), st.floats(0, 0.5), st.floats(0, 0.5)
)
def test_every_class_is_in_one_split(counts, tail, more) -> None:
    masks = torch.stack(split_pixels(counts, head=tail + more, tail=tail))
    assert masks.sum(dim=0).tolist() == [1] * len(counts)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"counts": [3, -1]}, ValueError, "counts must be .*, got negative for class 1"),
        ({"counts": "ab"}, TypeError, "counts must be a 1-D tensor.*, got str of <U2"),
        (
            {"counts": [0, 0]},
            ValueError,
            "counts must have a class with pixels, got 0 for all 2 classes",
        ),
        ({"tail": 0.1}, ValueError, "head and tail must have .*, got tail = 0.1 and head = 0.01"),
        (
            {"head": 2, "tail": 1},
            ValueError,
            r"must have .* <= 1 \(shares, not percent\), got tail = 1 and head = 2",
        ),
        ({"tail": -0.1}, ValueError, "head and tail must have 0 <= tail .*, got tail = -0.1"),
        ({"head": math.nan}, ValueError, "must have .*, got tail = 0.001 and head = nan"),
    ],
)
def test_split_pixels_errors(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        split_pixels(**{"counts": [5, 1], **arguments})


def test_the_ade20k_split_follows_the_printed_ratios_except_on_the_bound() -> None:
    ratios = [ratio for ratio, classes in ADE20K_RATIOS for _ in range(classes)]
    assert len(ratios) == 150
    head, body, tail = ADE20K_SPLIT
    assert [*head, *body, *tail] == list(range(150))
    assert (len(head), len(body), len(tail)) == (20, 55, 75)
    assert [j for j in range(150) if ratios[j] >= 100] == list(head)
    assert [j for j in range(150) if 10 < ratios[j] < 100] == list(body)
    assert [j for j in range(150) if ratios[j] <= 10] == list(tail)
    assert [j for j in range(150) if ratios[j] == 10] == [75]  # 0.0010 is a rounded number
    # What the docstring of split_pixels says about them:
    assert sum(ratios) == 9275
    masks = split_pixels(ratios)
    published = torch.tensor([0] * 20 + [1] * 55 + [2] * 75)
    group = torch.stack(masks).int().argmax(dim=0)
    assert (group != published).nonzero().flatten().tolist() == [20, 75]
