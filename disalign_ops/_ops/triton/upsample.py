"""The kernels of the upsampled loss, forward: logits at low resolution, target and loss at another.

- axis_kernel: where the outputs of an axis lie between its low-resolution positions ("nodes").
- forward_kernel: a program works on POSITIONS neighbouring outputs, over the classes in tiles whose
  sums are added. Memory: the nodes around, by way of the caches; a few numbers an output.
- Masks: what stands for -inf is finite, so that 0 times it is 0 between two nodes, and so low that
  its exponential is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .position import add_sums, exp, lowest, position_loss, sigmoid
from .tiles import (
    UNALIGNED,
    affine,
    class_indices,
    divisor_share,
    entries,
    targets_of,
    write_block_sums,
)

SIZES = ["images", "classes", "height", "width", "out_height", "out_width"]
STRIDES = ["image_stride", "class_stride", "y_stride", "x_stride"]
OPTIONS = ["ignore_index", "by_weights"]


@triton.jit
def axis_position(i, size, out, align_corners):
    """The position of output i, in units of the low resolution; as F.interpolate's, in double."""
    n, m, at = size.to(tl.float64), out.to(tl.float64), i.to(tl.float64)
    corners = at * ((n - 1.0) / tl.maximum(m - 1.0, 1.0))
    centres = tl.maximum((at + 0.5) * (n / m) - 0.5, 0.0)
    return tl.where(align_corners != 0, corners, centres)


@triton.jit
def axis_source(i, size, out, align_corners):
    return tl.minimum(axis_position(i, size, out, align_corners).to(tl.int32), size - 1)


@triton.jit(do_not_specialize=["size", "out", "align_corners"])
def axis_kernel(
    source, weight, first, size: tl.int32, out: tl.int32, align_corners: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """source[out], weight[out] (of the node after the source), and first[size + 1]: the outputs of
    source s are [first[s], first[s + 1]).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = axis_position(i, size, out, align_corners)
    s = axis_source(i, size, out, align_corners)
    share = tl.where(s < size - 1, tl.minimum(at - s.to(tl.float64), 1.0), 0.0)
    tl.store(source + i, s, mask=i < out)
    tl.store(weight + i, share.to(weight.dtype.element_ty), mask=i < out)
    # The first output whose source is i or beyond.
    low, high = i * 0, i * 0 + out
    for _step in range(0, 32):
        middle = low + (high - low) // 2
        below = axis_source(middle, size, out, align_corners) < i
        more = low < high
        low = tl.where(more & below, middle + 1, low)
        high = tl.where(more & (below == 0), middle, high)
    tl.store(first + i, low, mask=i <= size)


@triton.jit
def masked(like):
    """What stands for -inf."""
    return lowest(like) * 0.25


@triton.jit
def node(low, columns, valid, own, image, y, x, ACC: tl.constexpr):
    """z and u of nodes (vectors y, x) x classes, and c of the nodes.

    low: what is read at low resolution, as `forward_kernel` puts it together.
    """
    (
        logits,
        confidence,
        scale,
        bias,
        prior,
        height,
        width,
        i_stride,
        c_stride,
        y_stride,
        x_stride,
    ) = low
    base = image * i_stride + y.to(tl.int64) * y_stride + x.to(tl.int64) * x_stride
    c = tl.zeros(base.shape, ACC)
    if confidence is not None:
        c = sigmoid(tl.load(confidence + (image * height + y) * width + x, mask=valid, other=0.0))
    at = base[:, None] + columns.to(tl.int64)[None, :] * c_stride
    z = tl.load(logits + at, mask=valid[:, None] & own[None, :], other=0.0).to(ACC)
    u = affine(z, c, columns, own, scale, bias, prior, ACC)
    least = masked(u)
    return z, tl.where(u < least, least, u), c


@triton.jit
def corners(low, columns, valid, own, image, top, bottom, left, right, ACC: tl.constexpr):
    """u of the four nodes around something."""
    _z, ul, _c = node(low, columns, valid, own, image, top, left, ACC)
    _z, ur, _c = node(low, columns, valid, own, image, top, right, ACC)
    _z, ll, _c = node(low, columns, valid, own, image, bottom, left, ACC)
    _z, lr, _c = node(low, columns, valid, own, image, bottom, right, ACC)
    return ul, ur, ll, lr


@triton.jit
def between(upper_left, upper_right, lower_left, lower_right, down, across):
    upper = upper_left * (1.0 - across) + upper_right * across
    lower = lower_left * (1.0 - across) + lower_right * across
    return upper * (1.0 - down) + lower * down


@triton.jit
def outputs_of(block, out_height, out_width, POSITIONS: tl.constexpr):
    """A block's outputs: their image, y, x, number, and which of them exist."""
    inner = out_height.to(tl.int64) * out_width
    per_image = tl.cdiv(inner, POSITIONS)
    image = (block // per_image).to(tl.int64)
    s = (block % per_image).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = s < inner
    within = tl.where(inside, s, 0)
    y, x = (within // out_width).to(tl.int32), (within % out_width).to(tl.int32)
    return image, y, x, image * inner + s, inside


@triton.jit(debug=True, do_not_specialize=SIZES + STRIDES + OPTIONS,
            do_not_specialize_on_alignment=UNALIGNED)  # fmt: skip
def forward_kernel(
    logits, target, weight, scale, bias, confidence, prior, margin, sample_weight, weights,
    y_source, y_weight, x_source, x_weight,
    loss, row_max, row_sum, block_sums, probability, prediction,
    images: tl.int64, classes: tl.int32, height: tl.int32, width: tl.int32,
    out_height: tl.int32, out_width: tl.int32, image_stride: tl.int64, class_stride: tl.int64,
    y_stride: tl.int64, x_stride: tl.int64,
    ignore_index: tl.int64, smoothing: tl.float64, gamma: tl.float64, by_weights: tl.int32,
    POSITIONS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss, statistics and details of every output; without a target its prediction alone."""
    e = tl.full((), smoothing, ACC)
    g = tl.full((), gamma, ACC)
    count = tl.full((), classes, ACC)
    all_weights = count if weights is None else tl.load(weights)
    loss_sum = tl.zeros([POSITIONS], tl.float64)
    share_sum = tl.zeros([POSITIONS], tl.float64)
    blocks = images * tl.cdiv(out_height.to(tl.int64) * out_width, POSITIONS)
    low = (logits, confidence, scale, bias, prior, height, width,
           image_stride, class_stride, y_stride, x_stride)  # fmt: skip

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        image, y, x, i, inside = outputs_of(block, out_height, out_width, POSITIONS)
        if target is not None:
            t = targets_of(target, i, inside, ignore_index, classes, False)
        else:
            t = tl.full([POSITIONS], -1, tl.int32)
        valid = t >= 0
        computed = inside if prediction is not None else valid
        top, left = tl.load(y_source + y), tl.load(x_source + x)
        bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
        down, across = tl.load(y_weight + y), tl.load(x_weight + x)
        margin_t = entries(margin, t, valid, 0.0, ACC)

        nothing = tl.zeros([POSITIONS], ACC)
        maximum, greatest = lowest(nothing), lowest(nothing)
        rest, target_logit, smooth, seen = nothing, nothing, nothing, nothing
        best = tl.zeros([POSITIONS], tl.int32)
        for first in range(0, classes, CLASSES):
            columns = class_indices(first, CLASSES)
            own = columns < classes
            is_target = columns[None, :] == t[:, None]
            ul, ur, ll, lr = corners(
                low, columns, computed, own, image, top, bottom, left, right, ACC
            )
            u = between(ul, ur, ll, lr, down[:, None], across[:, None])
            u = tl.where(own[None, :], u, -float("inf"))
            highest, at = tl.max(u, 1, return_indices=True)
            best = tl.where(highest > greatest, first + at, best)
            greatest = tl.maximum(highest, greatest)
            u = tl.where(is_target, u - margin_t[:, None], u)
            m = tl.max(u, 1)
            m = tl.maximum(m, lowest(m))
            rest_here = tl.sum(tl.where(is_target, 0.0, exp(u - m[:, None])), 1)
            target_logit += tl.sum(tl.where(is_target, u, 0.0), 1)
            smooth_here, weight_here = nothing, nothing
            if smoothing > 0:
                w = entries(weight, columns, own, 1.0, ACC)[None, :]
                smooth_here = tl.sum(tl.where(own[None, :], w * (u - m[:, None]), 0.0), 1)
                weight_here = nothing + tl.sum(tl.where(own[None, :], w, 0.0), 1)
            maximum, rest, _du_dc, smooth, seen = add_sums(
                maximum, rest, nothing, smooth, seen,
                m, rest_here, nothing, smooth_here, weight_here,
            )  # fmt: skip
        # Of an output that no class is left for, everything is NaN.
        maximum = tl.where(greatest > masked(greatest) * 0.0625, maximum, float("nan"))

        if prediction is not None:
            tl.store(prediction + i, best.to(tl.int64), mask=inside)
        if target is not None:
            w_t = entries(weight, t, valid, 1.0, ACC)
            v = tl.where(valid, entries(sample_weight, i, valid, 1.0, ACC), 0.0)
            value, total, _softmax, _share, _q = position_loss(
                maximum, rest, target_logit, smooth, w_t, all_weights, e, count, g
            )
            value = tl.where(valid, value * v, 0.0)
            if loss is not None:
                tl.store(loss + i, value, mask=inside)
            tl.store(row_max + i, tl.where(valid, maximum, 0.0), mask=inside)
            tl.store(row_sum + i, tl.where(valid, total, 1.0), mask=inside)
            if probability is not None:
                # Without the margin, which only training knows.
                z_t = target_logit + margin_t
                m = tl.where(z_t > maximum, z_t, maximum)
                own_part = exp(z_t - m)
                p = own_part / (rest * exp(maximum - m) + own_part)
                tl.store(probability + i, tl.where(valid, p, 0.0), mask=inside)
            loss_sum += value.to(tl.float64)
            share_sum += divisor_share(valid, w_t, v, by_weights)

    if block_sums is not None:
        write_block_sums(block_sums, loss_sum, share_sum)
