"""The loss of class probabilities in Triton, over rows and over class planes: loss.py without a
target's class. y_j is read beside the logit of the class, and each is read once.

b_j = w_j (keep y_j + share) takes the place of the target's weight and of smoothing:
docs/math.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .details import add_details, nothing_known, write_details
from .position import exp, lowest
from .tiles import (
    RUN_TIME,
    blocks_of,
    bounds,
    class_entries,
    class_indices,
    confidences_of,
    divisor_share,
    elements,
    entries,
    positions_of,
    tile_of,
    write_block_sums,
    write_class_sums,
)

STRIDES = ["target_outer_stride", "target_stride"]
# The rows of `statistics` after the first: their alignment changes with N.
UNALIGNED = ["row_sum", "row_total"]


@triton.jit
def weights_of(
    probabilities, base, first, inside, weight, keep, share, classes, stride,
    PLANES: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """b of a tile; 0 where there is no class."""
    at = elements(probabilities, base, first, stride, PLANES, CLASSES)
    own = (class_indices(first, CLASSES) < classes)[None, :]
    if WHOLE and POSITIONS == 1:
        y = tl.load(at)
    elif WHOLE:
        y = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        y = tl.load(at, mask=inside[:, None] & own, other=0.0)
    b = tl.fma(y.to(ACC), keep, share)
    if weight is not None:
        b *= class_entries(weight, first, classes, 0.0, CLASSES, WHOLE, ACC)
    elif not WHOLE:
        b = tl.where(own, b, 0.0)
    return b


@triton.jit
def read_and_add(
    given, base, target_base, first, inside, c, keep, share, classes, stride, target_stride, sums,
    known, DU_DC: tl.constexpr, DETAILS: tl.constexpr, ENTROPY: tl.constexpr, PLANES: tl.constexpr,
    POSITIONS: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds a tile to `sums`, of exp(u - M), of it times d, and of b, b (u - M) and b d, where M is
    the maximum so far. A row alone has them element by element: they are added up at the end.

    DETAILS: also to `known` (details.py). Returns both, and z, the exponentials and b of the tile.
    """
    logits, probabilities, weight, scale, bias, prior = given
    maximum, total, total_du_dc, spread, soft, soft_du_dc = sums
    z, u, d = tile_of(logits, base, first, inside, c, scale, bias, prior, classes, stride,
                      PLANES, POSITIONS, CLASSES, WHOLE, ACC)  # fmt: skip
    if DETAILS:
        known = add_details(u, first, known, ENTROPY, POSITIONS, CLASSES)
    b = weights_of(probabilities, target_base, first, inside, weight, keep, share, classes,
                   target_stride, PLANES, POSITIONS, CLASSES, WHOLE, ACC)  # fmt: skip
    m = tl.maximum(maximum, tl.max(u, 1))
    # Finite also from the first tile on, where nothing is lost: 0 * infinity is no number.
    lost = maximum - m
    lost = tl.maximum(lost, lowest(lost))[:, None]
    ratio = exp(lost)
    distance = u - m[:, None]
    x = exp(distance)
    # A masked class that nothing is asked of adds 0, not 0 * -inf.
    asked = tl.where(b == 0.0, 0.0, b * distance)
    if POSITIONS == 1:
        total = tl.fma(total, ratio, x)
        soft = tl.fma(spread, lost, soft) + asked
        spread += b
        if DU_DC:
            total_du_dc = tl.fma(total_du_dc, ratio, x * d)
            soft_du_dc = tl.fma(b, d, soft_du_dc)
    else:
        total = tl.fma(total, ratio, tl.sum(x, 1)[:, None])
        soft = tl.fma(spread, lost, soft) + tl.sum(asked, 1)[:, None]
        spread += tl.sum(b, 1)[:, None]
        if DU_DC:
            total_du_dc = tl.fma(total_du_dc, ratio, tl.sum(x * d, 1)[:, None])
            soft_du_dc += tl.sum(b * d, 1)[:, None]
    return (m, total, total_du_dc, spread, soft, soft_du_dc), known, z, x, b


@triton.jit(do_not_specialize=[*RUN_TIME, *STRIDES, "by_weights"],
            do_not_specialize_on_alignment=UNALIGNED)  # fmt: skip
def soft_forward_kernel(
    logits, probabilities, weight, scale, bias, confidence, prior, sample_weight,
    loss, row_max, row_sum, row_total, block_sums, class_sums, grad_confidence, shard_sums,
    prediction, entropy,
    outer: tl.int64, inner: tl.int64, classes: tl.int32, outer_stride: tl.int64, stride: tl.int64,
    target_outer_stride: tl.int64, target_stride: tl.int64,
    keep: tl.float64, share: tl.float64, by_weights: tl.int32,
    PLANES: tl.constexpr, UNIT: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of every position; sums a program: see forward_kernel of loss.py.

    share: of all classes together; of each where shard_sums is given.
    """
    SHARD: tl.constexpr = shard_sums is not None
    ENTROPY: tl.constexpr = entropy is not None
    DETAILS: tl.constexpr = prediction is not None or ENTROPY
    DU_DC: tl.constexpr = grad_confidence is not None
    inner, classes = bounds(inner, classes, PLANES, UNIT)
    outer_stride, stride = outer_stride * UNIT, stride * UNIT
    target_outer_stride, target_stride = target_outer_stride * UNIT, target_stride * UNIT
    keep = tl.full((), keep, ACC)
    share = tl.full((), share, ACC)
    if not SHARD:
        share /= classes.to(ACC)
    loss_sum = tl.zeros([POSITIONS], tl.float64)
    share_sum = tl.zeros([POSITIONS], tl.float64)
    grad_scale = tl.zeros([POSITIONS, CLASSES], ACC)
    grad_bias = tl.zeros([POSITIONS, CLASSES], ACC)
    given = (logits, probabilities, weight, scale, bias, prior)
    blocks = blocks_of(outer, inner, PLANES, POSITIONS)

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i, inside, base = positions_of(block, inner, outer_stride, stride, PLANES, POSITIONS)
        _, _, target_base = positions_of(
            block, inner, target_outer_stride, target_stride, PLANES, POSITIONS
        )
        c = confidences_of(confidence, i, inside, ACC)

        nothing = tl.zeros([POSITIONS], ACC)
        least = lowest(nothing)
        empty = tl.zeros([POSITIONS, CLASSES if POSITIONS == 1 else 1], ACC)
        sums = (least, empty, empty, empty, empty, empty)
        known = nothing_known(nothing, POSITIONS)
        if class_sums is not None:
            sums, known, z, x, b = read_and_add(
                given, base, target_base, 0, inside, c, keep, share, classes, stride, target_stride,
                sums, known, DU_DC, DETAILS, ENTROPY, PLANES, POSITIONS, CLASSES, False, ACC,
            )  # fmt: skip
        else:
            whole = classes & -CLASSES  # a power of two
            for first in range(0, whole, CLASSES):
                sums, known, _z, _x, _b = read_and_add(
                    given, base, target_base, first, inside, c, keep, share, classes, stride,
                    target_stride, sums, known, DU_DC, DETAILS, ENTROPY, PLANES, POSITIONS,
                    CLASSES, True, ACC,
                )  # fmt: skip
            if whole < classes:
                sums, known, _z, _x, _b = read_and_add(
                    given, base, target_base, whole, inside, c, keep, share, classes, stride,
                    target_stride, sums, known, DU_DC, DETAILS, ENTROPY, PLANES, POSITIONS,
                    CLASSES, False, ACC,
                )  # fmt: skip
        if DETAILS:
            write_details(prediction, entropy, known, i, inside, inside)
        maximum, total, total_du_dc, spread, soft, soft_du_dc = sums
        total, spread, soft = tl.sum(total, 1), tl.sum(spread, 1), tl.sum(soft, 1)
        if SHARD:
            to = shard_sums + i
            n = outer * inner
            tl.store(to, maximum, mask=inside)
            tl.store(to + n, total, mask=inside)
            tl.store(to + 2 * n, spread, mask=inside)
            tl.store(to + 3 * n, tl.zeros([POSITIONS], ACC), mask=inside)
            tl.store(to + 4 * n, soft, mask=inside)
        v = entries(sample_weight, i, inside, 1.0, ACC)
        value = tl.where(inside, v * (spread * tl.log(total) - soft), 0.0)
        if loss is not None:
            tl.store(loss + i, value, mask=inside)
        if row_max is not None:
            tl.store(row_max + i, maximum, mask=inside)
            tl.store(row_sum + i, total, mask=inside)
            tl.store(row_total + i, spread, mask=inside)
        softmax = spread / total
        if DU_DC:
            q_d = softmax * tl.sum(total_du_dc, 1) - tl.sum(soft_du_dc, 1)
            tl.store(grad_confidence + i, v * c * (1.0 - c) * q_d, mask=inside)
        loss_sum += value.to(tl.float64)
        share_sum += divisor_share(inside, 1.0, v, by_weights)
        if class_sums is not None:
            columns = tl.arange(0, CLASSES)[None, :]
            q = tl.fma(softmax[:, None], x, -b) * (v * c)[:, None]
            q = tl.where(inside[:, None] & (columns < classes), q, 0.0)
            # A masked class adds 0, not 0 * -inf.
            grad_scale += tl.where(z == -float("inf"), 0.0, q * z)
            grad_bias += q

    if block_sums is not None:
        write_block_sums(block_sums, loss_sum, share_sum)
    if class_sums is not None:
        write_class_sums(class_sums, grad_scale, grad_bias, classes, tl.arange(0, CLASSES))
