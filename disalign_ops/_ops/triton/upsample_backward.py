"""The kernels of the upsampled loss, backward: gradients of the low-resolution logits and of their
calibration.

- factors_kernel: what the classes of an output share.
- backward_kernel: a program owns NODES neighbouring nodes of a row and CLASSES classes. A cell is
  what lies between four nodes: of each of the four cells around its nodes it goes through the
  outputs and adds up its nodes' share, so nobody writes what another adds to.
- Memory: the nodes around and their gradient; the factors of the outputs, once for the classes of a
  program and each of the four nodes around an output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .position import exp, row_terms, sigmoid
from .soft import STRIDES as TARGET_STRIDES
from .soft_upsample import weights_of_outputs
from .tiles import (
    UNALIGNED,
    class_indices,
    du_dc,
    entries,
    inverse_of,
    targets_of,
    write_class_sums,
)
from .upsample import OPTIONS, SIZES, STRIDES, between, corners, masked, node, outputs_of


@triton.jit
def target_node(low, t, valid, image, y, x, ACC: tl.constexpr):
    """u of nodes, each in a class of its own (vectors y, x, t)."""
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
    at = image * i_stride + y.to(tl.int64) * y_stride + x.to(tl.int64) * x_stride
    u = tl.load(logits + at + t.to(tl.int64) * c_stride, mask=valid, other=0.0).to(ACC)
    if confidence is not None:
        c = sigmoid(tl.load(confidence + (image * height + y) * width + x, mask=valid, other=0.0))
        u = u * (entries(scale, t, valid, 0.0, ACC) * c + 1.0)
        u += entries(bias, t, valid, 0.0, ACC) * c
    u += entries(prior, t, valid, 0.0, ACC)
    least = masked(u)
    return tl.where(u < least, least, u)


@triton.jit(debug=True, do_not_specialize=[*SIZES, *STRIDES, *OPTIONS, "upstream_stride"],
            do_not_specialize_on_alignment=UNALIGNED)  # fmt: skip
def factors_kernel(
    logits, target, weight, scale, bias, confidence, prior, margin, sample_weight, weights,
    y_source, y_weight, x_source, x_weight, upstream, row_max, row_sum, denominator,
    targets, factors,
    images: tl.int64, classes: tl.int32, height: tl.int32, width: tl.int32,
    out_height: tl.int32, out_width: tl.int32, image_stride: tl.int64, class_stride: tl.int64,
    y_stride: tl.int64, x_stride: tl.int64, upstream_stride: tl.int64,
    ignore_index: tl.int64, smoothing: tl.float64, gamma: tl.float64,
    POSITIONS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """targets[positions], -1 of an ignored one, and factors[4][positions]: maximum, softmax,
    smooth and at_target of q_j = softmax exp(u_j - maximum) - smooth w_j - at_target [j = t].
    """
    e = tl.full((), smoothing, ACC)
    g = tl.full((), gamma, ACC)
    count = tl.full((), classes, ACC)
    all_weights = count if weights is None else tl.load(weights)
    inverse = inverse_of(denominator, ACC)
    low = (logits, confidence, scale, bias, prior, height, width,
           image_stride, class_stride, y_stride, x_stride)  # fmt: skip
    image, y, x, i, inside = outputs_of(tl.program_id(0), out_height, out_width, POSITIONS)
    t = targets_of(target, i, inside, ignore_index, classes, False)
    valid = t >= 0
    maximum = tl.load(row_max + i, mask=valid, other=0.0)
    total = tl.load(row_sum + i, mask=valid, other=1.0)
    nll = tl.zeros([POSITIONS], ACC)
    if gamma > 0:
        top, left = tl.load(y_source + y), tl.load(x_source + x)
        down, across = tl.load(y_weight + y), tl.load(x_weight + x)
        bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
        u_t = between(
            target_node(low, t, valid, image, top, left, ACC),
            target_node(low, t, valid, image, top, right, ACC),
            target_node(low, t, valid, image, bottom, left, ACC),
            target_node(low, t, valid, image, bottom, right, ACC),
            down, across,
        )  # fmt: skip
        u_t -= entries(margin, t, valid, 0.0, ACC)
        nll = (maximum - u_t) + tl.log(total)
    w_t = entries(weight, t, valid, 1.0, ACC)
    softmax, at_target, share, _value = row_terms(nll, w_t, all_weights, e, count, g)
    factor = entries(sample_weight, i, valid, 1.0, ACC)
    if upstream is not None:
        factor *= tl.load(upstream + i * upstream_stride, mask=valid, other=0.0)
    # Denominator 0 (no valid position): gradients are 0, whatever the numerator.
    factor = tl.where(inverse == 0.0, 0.0, factor * inverse)
    positions = images * out_height * out_width
    tl.store(targets + i, t, mask=inside)
    tl.store(factors + i, maximum, mask=inside)
    tl.store(factors + positions + i, factor * softmax / total, mask=inside)
    tl.store(factors + 2 * positions + i, factor * share, mask=inside)
    tl.store(factors + 3 * positions + i, factor * at_target, mask=inside)


@triton.jit(debug=True, do_not_specialize=SIZES + STRIDES + TARGET_STRIDES)
def backward_kernel(
    logits, probabilities, weight, scale, bias, confidence, prior, margin,
    y_weight, y_first, x_weight, x_first, targets, factors,
    grad_logits, class_sums, confidence_sums,
    images: tl.int64, classes: tl.int32, height: tl.int32, width: tl.int32,
    out_height: tl.int32, out_width: tl.int32, image_stride: tl.int64, class_stride: tl.int64,
    y_stride: tl.int64, x_stride: tl.int64,
    target_outer_stride: tl.int64, target_stride: tl.int64, keep: tl.float64, smoothing: tl.float64,
    NODES: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad_logits, contiguous; class_sums [programs][2: scale, bias][classes]; confidence_sums
    [tiles of classes][nodes].

    factors: of factors_kernel, with its targets; of soft_factors_kernel with class probabilities.
    """
    SOFT: tl.constexpr = probabilities is not None
    if SOFT:
        keep = tl.full((), keep, ACC)
        uniform = tl.full((), smoothing, ACC) / tl.full((), classes, ACC)
    columns = class_indices(tl.program_id(1) * CLASSES, CLASSES)
    own = columns < classes
    margins = entries(margin, columns, own, 0.0, ACC)[None, :]
    grad_scale = tl.zeros([NODES, CLASSES], ACC)
    grad_bias = tl.zeros([NODES, CLASSES], ACC)
    inner = out_height.to(tl.int64) * out_width
    positions = images * out_height * out_width
    per_row = tl.cdiv(width, NODES)
    blocks = images * height * per_row
    low = (logits, confidence, scale, bias, prior, height, width,
           image_stride, class_stride, y_stride, x_stride)  # fmt: skip

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block // per_row
        image, y = (row // height).to(tl.int64), (row % height).to(tl.int32)
        x = (block % per_row).to(tl.int32) * NODES + tl.arange(0, NODES)
        inside = x < width
        sum_u = tl.zeros([NODES, CLASSES], ACC)
        for side_y in tl.static_range(2):
            # The cells above (0) and below (1) the nodes: outputs between the rows top and bottom.
            top = y - 1 + side_y
            bottom = tl.minimum(top + 1, height - 1)
            begin_y = tl.load(y_first + tl.maximum(top, 0))
            end_y = tl.load(y_first + tl.maximum(top + 1, 0))
            end_y = tl.where(top < 0, begin_y, end_y)
            rows = tl.zeros([NODES], tl.int32)
            for side_x in tl.static_range(2):
                left = x - 1 + side_x
                has_node = inside & (left >= 0)
                left = tl.where(has_node, left, 0)
                right = tl.minimum(left + 1, width - 1)
                begin_x = tl.load(x_first + left, mask=has_node, other=0)
                end_x = tl.load(x_first + left + 1, mask=has_node, other=0)
                longest = tl.max(end_x - begin_x, 0)
                up = tl.maximum(top, 0)
                ul, ur, ll, lr = corners(
                    low, columns, has_node, own, image, rows + up, rows + bottom, left, right, ACC
                )
                for out_y in range(begin_y, end_y):
                    down = tl.load(y_weight + out_y)
                    share_y = 1.0 - down if side_y == 1 else down
                    for k in range(0, longest):
                        out_x = begin_x + k
                        there = out_x < end_x
                        i = (image * out_height + out_y) * out_width + out_x
                        valid = there
                        if not SOFT:
                            t = tl.load(targets + i, mask=there, other=-1)
                            valid = t >= 0
                        maximum = tl.load(factors + i, mask=valid, other=0.0)
                        softmax = tl.load(factors + positions + i, mask=valid, other=0.0)
                        if not SOFT:
                            at_target = tl.load(factors + 3 * positions + i, mask=valid, other=0.0)
                        across = tl.load(x_weight + out_x, mask=there, other=0.0)
                        if not SOFT:
                            is_target = columns[None, :] == t[:, None]
                        u = between(ul, ur, ll, lr, down, across[:, None])
                        if not SOFT:
                            u = tl.where(is_target, u - margins, u)
                        q = softmax[:, None] * exp(u - maximum[:, None])
                        if SOFT:
                            soft = tl.load(factors + 2 * positions + i, mask=valid, other=0.0)
                            b = weights_of_outputs(
                                probabilities, i + image * (target_outer_stride - inner),
                                target_stride, columns, there, own, weight, keep, uniform, ACC,
                            )  # fmt: skip
                            q -= soft[:, None] * b
                        else:
                            if smoothing > 0:
                                share = tl.load(factors + 2 * positions + i, mask=valid, other=0.0)
                                w = entries(weight, columns, own, 1.0, ACC)[None, :]
                                q -= share[:, None] * w
                            q -= tl.where(is_target, at_target[:, None], 0.0)
                        share_x = 1.0 - across if side_x == 1 else across
                        q = q * (share_y * share_x)[:, None]
                        sum_u += tl.where(valid[:, None], q, 0.0)

        mask = inside[:, None] & own[None, :]
        sum_u = tl.where(mask, sum_u, 0.0)
        y_of_all = tl.zeros([NODES], tl.int32) + y
        z, _u, c = node(low, columns, inside, own, image, y_of_all, tl.where(inside, x, 0), ACC)
        if confidence_sums is not None:
            d = du_dc(z, columns, own, scale, bias, ACC)
            sums = c * (1.0 - c) * tl.sum(sum_u * d, 1)
            nodes = images * height * width
            at = tl.program_id(1) * nodes + (image * height + y) * width + x
            tl.store(confidence_sums + at, sums, mask=inside)
        if class_sums is not None:
            g_c = sum_u * c[:, None]
            # A masked class adds 0, not 0 * -inf.
            grad_scale += g_c * tl.where(z == -float("inf"), 0.0, z)
            grad_bias += g_c
        if grad_logits is not None:
            if scale is not None:
                sum_u *= entries(scale, columns, own, 0.0, ACC)[None, :] * c[:, None] + 1.0
            at = ((image * classes + columns.to(tl.int64))[None, :] * height + y) * width
            tl.store(grad_logits + (at + x[:, None]), sum_u.to(grad_logits.dtype.element_ty),
                     mask=mask)  # fmt: skip

    if class_sums is not None:
        write_class_sums(class_sums, grad_scale, grad_bias, classes, columns)
