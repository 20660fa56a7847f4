"""Prediction and entropy of a position in Triton, of the loss's own read of its logits."""

from __future__ import annotations

import triton
import triton.language as tl

from .position import exp, lowest

# Added to the classes of numbers among those of NaN, which come first: more than there are classes.
_OF_NUMBERS = tl.constexpr(1 << 28)


@triton.jit
def nothing_known(zeros, POSITIONS: tl.constexpr):
    """Before the first tile."""
    return zeros - float("inf"), tl.full([POSITIONS], _OF_NUMBERS, tl.int32), zeros, zeros


@triton.jit
def add_details(u, first, known, ENTROPY: tl.constexpr, POSITIONS: tl.constexpr,
                CLASSES: tl.constexpr):  # fmt: skip
    """Adds a tile of u, the margin not taken off, to what is asked of a position beside its loss.

    known: the largest u, its first class or the first NaN's, and sum_j x_j and sum_j x_j log x_j of
    x_j = exp(u_j - the largest).
    """
    largest, at, total, times_log = known
    number = u == u
    top = tl.max(tl.where(number, u, -float("inf")), 1)
    columns = tl.arange(0, CLASSES)[None, :] + tl.zeros([POSITIONS, CLASSES], tl.int32)
    here = tl.where(u == top[:, None], columns + _OF_NUMBERS, 2 * _OF_NUMBERS)
    here = tl.min(tl.where(number, here, columns), 1)
    of_number = here >= _OF_NUMBERS
    takes = (at >= _OF_NUMBERS) & ((of_number == 0) | (top > largest))
    at = tl.where(takes, here + first, at)
    m = tl.maximum(largest, top)
    if ENTROPY:
        least = lowest(m)
        shift, below = tl.maximum(m, least), tl.maximum(largest, least)
        ratio = exp(below - shift)
        # Not 0 * -inf: times `total` it is finite.
        below = tl.maximum(below - shift, least * (1.0 / _OF_NUMBERS))
        x = exp(u - shift[:, None])
        times_log = ratio * (times_log + total * below)
        times_log += tl.sum(x * tl.maximum(u - shift[:, None], least[:, None]), 1)
        total = ratio * total + tl.sum(x, 1)
    return m, at, total, times_log


@triton.jit
def write_details(prediction, entropy, known, i, inside, valid):
    _largest, at, total, times_log = known
    if prediction is not None:
        found = tl.where(at >= _OF_NUMBERS, at - _OF_NUMBERS, at)
        tl.store(prediction + i, found.to(tl.int64), mask=inside)
    if entropy is not None:
        nothing = total == 0.0  # all classes are masked
        total = tl.where(nothing, 1.0, total)
        found = tl.where(nothing, 0.0, tl.log(total) - times_log / total)
        tl.store(entropy + i, tl.where(valid, found, 0.0), mask=inside)
