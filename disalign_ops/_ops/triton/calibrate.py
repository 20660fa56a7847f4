"""The kernels of the calibrated logits u = (1 + c a) z + c b; maps as in tiles.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .position import finite_or_zero
from .tiles import (
    RUN_TIME,
    affine,
    blocks_of,
    bounds,
    class_indices,
    confidences_of,
    elements,
    entries,
    positions_of,
    write_class_sums,
)


@triton.jit(do_not_specialize=[*RUN_TIME, "out_outer_stride", "out_stride"])
def calibrate_kernel(
    logits, scale, bias, confidence, out,
    outer: tl.int64, inner: tl.int64, classes: tl.int32, outer_stride: tl.int64, stride: tl.int64,
    out_outer_stride: tl.int64, out_stride: tl.int64,
    PLANES: tl.constexpr, UNIT: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One read of the logits, one write of u."""
    inner, classes = bounds(inner, classes, PLANES, UNIT)
    outer_stride, stride = outer_stride * UNIT, stride * UNIT
    out_outer_stride, out_stride = out_outer_stride * UNIT, out_stride * UNIT
    first = tl.program_id(1) * CLASSES
    columns = class_indices(first, CLASSES)
    own = columns < classes
    blocks = blocks_of(outer, inner, PLANES, POSITIONS)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i, inside, base = positions_of(block, inner, outer_stride, stride, PLANES, POSITIONS)
        i, inside, to = positions_of(block, inner, out_outer_stride, out_stride, PLANES, POSITIONS)
        mask = inside[:, None] & own[None, :]
        c = confidences_of(confidence, i, inside, ACC)
        z = tl.load(elements(logits, base, first, stride, PLANES, CLASSES), mask=mask, other=0.0)
        u = affine(z.to(ACC), c, columns, own, scale, bias, None, ACC)
        at = elements(out, to, first, out_stride, PLANES, CLASSES)
        tl.store(at, u.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*RUN_TIME, "given_outer_stride", "given_stride",
                               "grad_outer_stride", "grad_stride"])  # fmt: skip
def calibrate_backward_kernel(
    grad_output, logits, scale, bias, confidence, grad_logits, class_sums, confidence_sums,
    outer: tl.int64, inner: tl.int64, classes: tl.int32, outer_stride: tl.int64, stride: tl.int64,
    given_outer_stride: tl.int64, given_stride: tl.int64,
    grad_outer_stride: tl.int64, grad_stride: tl.int64,
    PLANES: tl.constexpr, UNIT: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One read of the logits and of grad_output; outputs as loss_backward.py's.

    given_*: strides of grad_output, which is contiguous. grad_*: of grad_logits.
    """
    inner, classes = bounds(inner, classes, PLANES, UNIT)
    outer_stride, stride = outer_stride * UNIT, stride * UNIT
    given_outer_stride, given_stride = given_outer_stride * UNIT, given_stride * UNIT
    grad_outer_stride, grad_stride = grad_outer_stride * UNIT, grad_stride * UNIT
    first = tl.program_id(1) * CLASSES
    columns = class_indices(first, CLASSES)
    own = columns < classes
    grad_scale = tl.zeros([POSITIONS, CLASSES], ACC)
    grad_bias = tl.zeros([POSITIONS, CLASSES], ACC)
    blocks = blocks_of(outer, inner, PLANES, POSITIONS)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i, inside, base = positions_of(block, inner, outer_stride, stride, PLANES, POSITIONS)
        i, inside, from_ = positions_of(
            block, inner, given_outer_stride, given_stride, PLANES, POSITIONS
        )
        mask = inside[:, None] & own[None, :]
        c = confidences_of(confidence, i, inside, ACC)
        at = elements(logits, base, first, stride, PLANES, CLASSES)
        z = tl.load(at, mask=mask, other=0.0).to(ACC)
        at = elements(grad_output, from_, first, given_stride, PLANES, CLASSES)
        g = tl.load(at, mask=mask, other=0.0).to(ACC)
        masked = z == -float("inf")  # adds 0, not 0 * -inf
        a = entries(scale, columns, own, 0.0, ACC)[None, :]
        if confidence_sums is not None:
            b = entries(bias, columns, own, 0.0, ACC)[None, :]
            g_d = tl.where(masked, 0.0, g * finite_or_zero(a * z + b))
            sums = c * (1.0 - c) * tl.sum(g_d, 1)
            tl.store(confidence_sums + tl.program_id(1) * outer * inner + i, sums, mask=inside)
        if class_sums is not None:
            g_c = g * c[:, None]
            grad_scale += tl.where(masked, 0.0, g_c * z)
            grad_bias += g_c
        if grad_logits is not None:
            g *= a * c[:, None] + 1.0
            _, _, to = positions_of(block, inner, grad_outer_stride, grad_stride, PLANES, POSITIONS)
            at = elements(grad_logits, to, first, grad_stride, PLANES, CLASSES)
            tl.store(at, g.to(grad_logits.dtype.element_ty), mask=mask)
    if class_sums is not None:
        write_class_sums(class_sums, grad_scale, grad_bias, classes, columns)
