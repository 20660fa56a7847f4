"""What is known when all programs of a loss are done: finish_kernel.cuh in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ..codes import NORMALIZERS, REDUCTIONS

# As the operators number them: _ops/schemas.py.
MEAN = tl.constexpr(REDUCTIONS["mean"])
BY_WEIGHTS = tl.constexpr(NORMALIZERS["weights"])
BY_COUNT = tl.constexpr(NORMALIZERS["count"])


@triton.jit
def total_of(block_sums, programs, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of [programs][2], in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        total += tl.load(block_sums + 2 * program + WHAT, mask=program < programs, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["programs", "positions", "reduction", "normalizer"])
def loss_kernel(
    block_sums, given, loss, denominator,
    programs: tl.int32, positions: tl.int64, reduction: tl.int32, normalizer: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The denominator, and the reduced loss. given: the caller's. block_sums and loss are None
    together, for reduction 'none'.
    """
    divisor = tl.full((), 1.0, tl.float64)
    # `reduction` is a run-time value, so what it guards is compiled for block_sums of None too.
    if block_sums is not None:  # noqa: SIM102
        if reduction == MEAN:
            if given is not None:
                divisor = tl.load(given).to(tl.float64)
            elif normalizer == BY_COUNT:
                divisor = tl.full((), positions, tl.float64)
            else:
                divisor = total_of(block_sums, programs, 1, BLOCK)
    tl.store(denominator, divisor)
    if loss is not None:
        total = total_of(block_sums, programs, 0, BLOCK)
        # Nothing left to divide by: 'weights' is 0 / 0 = NaN as in PyTorch, a count is 0.
        nothing = divisor == 0.0
        left = tl.where(normalizer == BY_WEIGHTS, float("nan"), 0.0)
        value = tl.where(nothing, left, total / tl.where(nothing, 1.0, divisor))
        tl.store(loss, value.to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["programs", "entries", "stride"])
def sum_kernel(
    sums, denominator, out, programs: tl.int64, entries: tl.int64, stride: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[j] = sum of sums[p * stride + j] over the programs p in their order, divided by the
    denominator (None: 1); 0 where nothing is left to divide by.
    """
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for program in range(0, programs):
        total += tl.load(sums + program * stride + j, mask=j < entries, other=0.0)
    if denominator is not None:
        divisor = tl.load(denominator)
        nothing = divisor == 0.0
        total = tl.where(nothing, 0.0, total / tl.where(nothing, 1.0, divisor))
    tl.store(out + j, total.to(out.dtype.element_ty), mask=j < entries)
