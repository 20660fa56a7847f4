"""The upsampled loss of class probabilities, forward: upsample.py without a target's class. The
probabilities are those of the outputs, each read once; backward_kernel of upsample_backward.py
reads each for the four nodes around.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .position import exp, lowest
from .soft import STRIDES as TARGET_STRIDES
from .soft import UNALIGNED
from .tiles import class_indices, divisor_share, entries, inverse_of, write_block_sums
from .upsample import SIZES, STRIDES, between, corners, masked, outputs_of


@triton.jit
def weights_of_outputs(
    probabilities, first, stride, columns, there, own, weight, keep, share, ACC: tl.constexpr
):
    """b of outputs x classes, from the element of each output's class 0; 0 where there is none."""
    mask = there[:, None] & own[None, :]
    at = first[:, None] + columns.to(tl.int64)[None, :] * stride
    y = tl.load(probabilities + at, mask=mask, other=0.0).to(ACC)
    b = tl.fma(y, keep, share) * entries(weight, columns, own, 1.0, ACC)[None, :]
    return tl.where(own[None, :], b, 0.0)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *TARGET_STRIDES, "by_weights"],
            do_not_specialize_on_alignment=UNALIGNED)  # fmt: skip
def soft_upsample_kernel(
    logits, probabilities, weight, scale, bias, confidence, prior, sample_weight,
    y_source, y_weight, x_source, x_weight,
    loss, row_max, row_sum, row_total, block_sums,
    images: tl.int64, classes: tl.int32, height: tl.int32, width: tl.int32,
    out_height: tl.int32, out_width: tl.int32, image_stride: tl.int64, class_stride: tl.int64,
    y_stride: tl.int64, x_stride: tl.int64,
    target_outer_stride: tl.int64, target_stride: tl.int64,
    keep: tl.float64, share: tl.float64, by_weights: tl.int32,
    POSITIONS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of every output. share: of all classes together."""
    keep = tl.full((), keep, ACC)
    share = tl.full((), share, ACC) / tl.full((), classes, ACC)
    loss_sum = tl.zeros([POSITIONS], tl.float64)
    share_sum = tl.zeros([POSITIONS], tl.float64)
    inner = out_height.to(tl.int64) * out_width
    blocks = images * tl.cdiv(inner, POSITIONS)
    low = (logits, confidence, scale, bias, prior, height, width,
           image_stride, class_stride, y_stride, x_stride)  # fmt: skip

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        image, y, x, i, inside = outputs_of(block, out_height, out_width, POSITIONS)
        top, left = tl.load(y_source + y), tl.load(x_source + x)
        bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
        down, across = tl.load(y_weight + y), tl.load(x_weight + x)
        output = i + image * (target_outer_stride - inner)

        total = tl.zeros([POSITIONS], ACC)
        maximum, spread, soft = lowest(total), total, total
        for first in range(0, classes, CLASSES):
            columns = class_indices(first, CLASSES)
            own = columns < classes
            ul, ur, ll, lr = corners(
                low, columns, inside, own, image, top, bottom, left, right, ACC
            )
            u = between(ul, ur, ll, lr, down[:, None], across[:, None])
            u = tl.where(own[None, :], u, -float("inf"))
            b = weights_of_outputs(
                probabilities, output, target_stride, columns, inside, own, weight, keep, share, ACC
            )
            m = tl.maximum(maximum, tl.max(u, 1))
            # Finite also from the first tile on, where nothing is lost: 0 * infinity is no number.
            lost = maximum - m
            lost = tl.maximum(lost, lowest(lost))
            distance = u - m[:, None]
            total = tl.fma(total, exp(lost), tl.sum(exp(distance), 1))
            soft = tl.fma(spread, lost, soft)
            soft += tl.sum(tl.where(b == 0.0, 0.0, b * distance), 1)
            spread += tl.sum(b, 1)
            maximum = m
        # Of an output that no class is left for, everything is NaN.
        maximum = tl.where(maximum > masked(maximum) * 0.0625, maximum, float("nan"))

        v = tl.where(inside, entries(sample_weight, i, inside, 1.0, ACC), 0.0)
        value = v * (spread * tl.log(total) - soft)
        value = tl.where(inside, tl.where(maximum == maximum, value, float("nan")), 0.0)
        if loss is not None:
            tl.store(loss + i, value, mask=inside)
        tl.store(row_max + i, maximum, mask=inside)
        tl.store(row_sum + i, total, mask=inside)
        tl.store(row_total + i, spread, mask=inside)
        loss_sum += value.to(tl.float64)
        share_sum += divisor_share(inside, 1.0, v, by_weights)

    if block_sums is not None:
        write_block_sums(block_sums, loss_sum, share_sum)


@triton.jit(do_not_specialize=["positions", "upstream_stride"],
            do_not_specialize_on_alignment=UNALIGNED)  # fmt: skip
def soft_factors_kernel(
    sample_weight, upstream, row_max, row_sum, row_total, denominator, factors,
    positions: tl.int64, upstream_stride: tl.int64, POSITIONS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """factors[3][positions]: maximum, softmax and soft of q_j = softmax exp(u_j - maximum) -
    soft b_j.
    """
    inverse = inverse_of(denominator, ACC)
    i = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = i < positions
    total = tl.load(row_sum + i, mask=inside, other=1.0)
    spread = tl.load(row_total + i, mask=inside, other=0.0)
    soft = entries(sample_weight, i, inside, 1.0, ACC)
    if upstream is not None:
        soft *= tl.load(upstream + i * upstream_stride, mask=inside, other=0.0)
    # Denominator 0: gradients are 0, whatever the numerator.
    soft = tl.where(inverse == 0.0, 0.0, soft * inverse)
    maximum = tl.load(row_max + i, mask=inside, other=0.0)
    tl.store(factors + i, maximum, mask=inside)
    tl.store(factors + positions + i, soft * (spread / total), mask=inside)
    tl.store(factors + 2 * positions + i, soft, mask=inside)
