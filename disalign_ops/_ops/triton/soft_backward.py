"""The gradients of the loss of class probabilities in Triton: loss_backward.py without a target's
class. Logits and probabilities are read once; the gradient may be over the logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .position import exp
from .soft import STRIDES, UNALIGNED, weights_of
from .tiles import (
    RUN_TIME,
    blocks_of,
    bounds,
    class_entries,
    class_indices,
    confidences_of,
    elements,
    entries,
    inverse_of,
    positions_of,
    tile_of,
    write_class_sums,
    write_tile,
)


@triton.jit
def gradients(
    given, bases, first, inside, c, keep, share, classes, strides, factors, du_dc_sums,
    DU_DC: tl.constexpr, PLANES: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
    WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a tile's logits; z, q = dloss/du, and du_dc_sums with those of q d.

    given: as soft_backward_kernel puts it together. bases, strides: of logits, probabilities and
    gradient. factors: of the positions.
    """
    logits, probabilities, weight, scale, bias, prior, grad_logits = given
    base, target_base, to = bases
    stride, target_stride, grad_stride = strides
    maximum, softmax, soft = factors
    z, u, d = tile_of(logits, base, first, inside, c, scale, bias, prior, classes, stride,
                      PLANES, POSITIONS, CLASSES, WHOLE, ACC)  # fmt: skip
    b = weights_of(probabilities, target_base, first, inside, weight, keep, share, classes,
                   target_stride, PLANES, POSITIONS, CLASSES, WHOLE, ACC)  # fmt: skip
    q = tl.fma(softmax[:, None], exp(u - maximum[:, None]), -soft[:, None] * b)
    if POSITIONS > 1:
        q = tl.where(inside[:, None], q, 0.0)  # where nothing was read
    if DU_DC:
        du_dc_sums = tl.fma(q, d, du_dc_sums)
    if grad_logits is not None:
        grad = q
        if scale is not None:
            a = class_entries(scale, first, classes, 0.0, CLASSES, WHOLE, ACC)
            grad = q * (a * c[:, None] + 1.0)
        at = elements(grad_logits, to, first, grad_stride, PLANES, CLASSES)
        write_tile(at, grad, first, inside, classes, POSITIONS, CLASSES, WHOLE)
    return z, q, du_dc_sums


@triton.jit(do_not_specialize=[*RUN_TIME, *STRIDES, "upstream_stride", "grad_outer_stride",
                               "grad_stride"],
            do_not_specialize_on_alignment=UNALIGNED)  # fmt: skip
def soft_backward_kernel(
    logits, probabilities, weight, scale, bias, confidence, prior, sample_weight,
    upstream, row_max, row_sum, row_total, denominator, shard_factors,
    grad_logits, class_sums, confidence_sums,
    outer: tl.int64, inner: tl.int64, classes: tl.int32, outer_stride: tl.int64, stride: tl.int64,
    target_outer_stride: tl.int64, target_stride: tl.int64,
    upstream_stride: tl.int64, grad_outer_stride: tl.int64, grad_stride: tl.int64,
    keep: tl.float64, share: tl.float64,
    PLANES: tl.constexpr, UNIT: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """What is wanted of grad_logits, class_sums and confidence_sums: see backward_kernel of
    loss_backward.py.

    share: of all classes together; of each where shard_factors is given.
    """
    SHARD: tl.constexpr = shard_factors is not None
    DU_DC: tl.constexpr = confidence_sums is not None
    inner, classes = bounds(inner, classes, PLANES, UNIT)
    outer_stride, stride = outer_stride * UNIT, stride * UNIT
    target_outer_stride, target_stride = target_outer_stride * UNIT, target_stride * UNIT
    grad_outer_stride, grad_stride = grad_outer_stride * UNIT, grad_stride * UNIT
    keep = tl.full((), keep, ACC)
    share = tl.full((), share, ACC)
    if not SHARD:
        share /= classes.to(ACC)
    inverse = inverse_of(denominator, ACC)
    # What `upstream_stride` guards would be compiled for upstream of None, too.
    whole_upstream = tl.full((), 1.0, ACC)
    if upstream is not None:  # noqa: SIM102
        if upstream_stride == 0:
            whole_upstream = tl.load(upstream)
    grad_scale = tl.zeros([POSITIONS, CLASSES], ACC)
    grad_bias = tl.zeros([POSITIONS, CLASSES], ACC)
    given = (logits, probabilities, weight, scale, bias, prior, grad_logits)
    strides = (stride, target_stride, grad_stride)
    blocks = blocks_of(outer, inner, PLANES, POSITIONS)

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i, inside, base = positions_of(block, inner, outer_stride, stride, PLANES, POSITIONS)
        _, _, target_base = positions_of(
            block, inner, target_outer_stride, target_stride, PLANES, POSITIONS
        )
        _, _, to = positions_of(block, inner, grad_outer_stride, grad_stride, PLANES, POSITIONS)
        c = confidences_of(confidence, i, inside, ACC)

        if SHARD:
            n = outer * inner
            maximum = tl.load(shard_factors + i, mask=inside, other=0.0)
            softmax = tl.load(shard_factors + n + i, mask=inside, other=0.0)
            soft = tl.load(shard_factors + 2 * n + i, mask=inside, other=0.0)
        else:
            maximum = tl.load(row_max + i, mask=inside, other=0.0)
            total = tl.load(row_sum + i, mask=inside, other=1.0)
            spread = tl.load(row_total + i, mask=inside, other=0.0)
            soft = entries(sample_weight, i, inside, 1.0, ACC)
            if upstream is not None:  # noqa: SIM102
                if upstream_stride != 0:
                    soft *= tl.load(upstream + i * upstream_stride, mask=inside, other=0.0)
            # Denominator 0: gradients are 0, whatever the numerator.
            soft = tl.where(inverse == 0.0, 0.0, soft * (whole_upstream * inverse))
            softmax = soft * (spread / total)

        bases = (base, target_base, to)
        factors = (maximum, softmax, soft)
        du_dc_sums = tl.zeros([POSITIONS, CLASSES], ACC)
        if class_sums is not None:
            first = tl.program_id(1) * CLASSES
            z, q, du_dc_sums = gradients(
                given, bases, first, inside, c, keep, share, classes, strides, factors, du_dc_sums,
                DU_DC, PLANES, POSITIONS, CLASSES, False, ACC,
            )  # fmt: skip
            q_c = q * c[:, None]
            # A masked class adds 0, not 0 * -inf.
            grad_scale += tl.where(z == -float("inf"), 0.0, q_c * z)
            grad_bias += q_c
        else:
            whole = classes & -CLASSES  # a power of two
            for first in range(0, whole, CLASSES):
                _z, _q, du_dc_sums = gradients(
                    given, bases, first, inside, c, keep, share, classes, strides, factors,
                    du_dc_sums, DU_DC, PLANES, POSITIONS, CLASSES, True, ACC,
                )  # fmt: skip
            if whole < classes:
                _z, _q, du_dc_sums = gradients(
                    given, bases, whole, inside, c, keep, share, classes, strides, factors,
                    du_dc_sums, DU_DC, PLANES, POSITIONS, CLASSES, False, ACC,
                )  # fmt: skip
        if confidence_sums is not None:
            sums = c * (1.0 - c) * tl.sum(du_dc_sums, 1)
            tl.store(confidence_sums + tl.program_id(1) * outer * inner + i, sums, mask=inside)

    if class_sums is not None:
        columns = class_indices(tl.program_id(1) * CLASSES, CLASSES)
        write_class_sums(class_sums, grad_scale, grad_bias, classes, columns)
