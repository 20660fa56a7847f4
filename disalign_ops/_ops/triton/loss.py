"""The kernels of the loss and of the calibrated logits, over rows and over class planes.

- Maps: a program works on tiles of POSITIONS x CLASSES. PLANES: positions lie next to each other
  (outer_stride, then `stride` from class to class); else classes do (`stride` from row to row, and
  `outer` is 1). Programs go round over the positions: each ends with one partial sum a class.
- forward_kernel: a tile has all classes, or, TILED, the classes pass in tiles whose sums are added.
  Memory: one read of the logits. Untiled it also yields the sums of the calibration's gradients.
- backward_kernel: a program of axis 1 has one tile of the classes. Memory: one read, and one write
  of the gradient, which may be over the logits: a program reads a tile before it writes it, and
  what it needs of the target's logit, which may be another's, comes in target_logits then.
- Sizes, strides and options are run-time values; absent tensors (None) and tile sizes are not.
- UNIT: 16 where all strides, and the size of the dimension whose entries are neighbours, are
  multiples of 16: they are given divided by it, which tells the compiler that vectors are aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .position import add_sums, finite_or_zero, log1p, lowest, position_loss, row_terms, sigmoid

RUN_TIME = ["outer", "inner", "classes", "outer_stride", "stride"]
OPTIONS = ["ignore_index", "by_weights"]
# The second row of `statistics`: its alignment changes with N, and must compile nothing again.
UNALIGNED = ["row_sum"]


@triton.jit
def bounds(inner, classes, PLANES: tl.constexpr, UNIT: tl.constexpr):
    """Both as they are: the one whose entries are neighbours is given in units."""
    if PLANES:
        inner *= UNIT
    else:
        classes *= UNIT
    return inner, classes


@triton.jit
def positions_of(block, inner, outer_stride, stride, PLANES: tl.constexpr,
                 POSITIONS: tl.constexpr):  # fmt: skip
    """A block's positions: their numbers, which of them exist, and the element of their class 0."""
    per_outer = tl.cdiv(inner, POSITIONS)
    outer_index = (block // per_outer).to(tl.int64)
    s = (block % per_outer).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    base = outer_index * outer_stride + (s if PLANES else s * stride)
    return outer_index * inner + s, s < inner, base


@triton.jit
def class_indices(first, CLASSES: tl.constexpr):
    # Not a sum that is checked for overflow, as device_assert's debug mode would have it.
    return tl.add(first, tl.arange(0, CLASSES), sanitize_overflow=False)


@triton.jit
def elements(base, columns, stride, PLANES: tl.constexpr):
    """Offsets of a tile."""
    if PLANES:
        at = base[:, None] + columns.to(tl.int64)[None, :] * stride
    else:
        at = base[:, None] + columns[None, :]
    return at


@triton.jit
def targets_of(target, i, inside, ignore_index, classes, SHARD: tl.constexpr):
    """Classes of the positions i, -2 where they count nothing; SHARD: -1 where another shard has
    them.
    """
    t = tl.load(target + i, mask=inside, other=0).to(tl.int64)
    valid = inside & (t != ignore_index)
    known = (t >= (-1 if SHARD else 0)) & (t < classes)
    tl.device_assert((valid == 0) | known, "target is no class")
    return tl.where(valid & known, t, -2).to(tl.int32)


@triton.jit
def entries(vector, i, mask, absent, ACC: tl.constexpr):
    """vector[i]; `absent` where there is no vector or no entry."""
    if vector is None:
        found = tl.full(i.shape, absent, ACC)
    else:
        found = tl.load(vector + i, mask=mask, other=absent)
    return found


@triton.jit
def affine(z, c, columns, own, scale, bias, prior, ACC: tl.constexpr):
    """u = (1 + c a) z + c b + o."""
    u = z
    if scale is not None:
        a = entries(scale, columns, own, 0.0, ACC)[None, :]
        b = entries(bias, columns, own, 0.0, ACC)[None, :]
        u = z * (a * c[:, None] + 1.0) + b * c[:, None]
    if prior is not None:
        u += entries(prior, columns, own, 0.0, ACC)[None, :]
    return u


@triton.jit
def du_dc(z, columns, own, scale, bias, ACC: tl.constexpr):
    """d = a z + b, 0 where that is not finite: a masked class has no share in what sums it."""
    a = entries(scale, columns, own, 0.0, ACC)[None, :]
    b = entries(bias, columns, own, 0.0, ACC)[None, :]
    return finite_or_zero(a * z + b)


@triton.jit(debug=True, do_not_specialize=RUN_TIME + OPTIONS,
            do_not_specialize_on_alignment=UNALIGNED)  # fmt: skip
def forward_kernel(
    logits, target, weight, scale, bias, confidence, prior, margin, sample_weight, weights,
    loss, row_max, row_sum, block_sums, class_sums, grad_confidence, shard_sums,
    outer: tl.int64, inner: tl.int64, classes: tl.int32, outer_stride: tl.int64, stride: tl.int64,
    ignore_index: tl.int64, smoothing: tl.float64, gamma: tl.float64, by_weights: tl.int32,
    PLANES: tl.constexpr, UNIT: tl.constexpr, TILED: tl.constexpr,
    POSITIONS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of every position; sums a program: see finish.py.

    weights: sum_j w_j, one entry; None: there are no weights. block_sums: [programs][2: loss,
    denominator]; class_sums: [programs][2: scale, bias][classes]; None where not wanted.
    shard_sums: [5][positions], the only result of a shard (_ops/reference.py, shard_sums), or None.
    """
    SHARD: tl.constexpr = shard_sums is not None
    DU_DC: tl.constexpr = scale is not None and (SHARD or grad_confidence is not None)
    inner, classes = bounds(inner, classes, PLANES, UNIT)
    outer_stride, stride = outer_stride * UNIT, stride * UNIT
    e = tl.full((), smoothing, ACC)
    g = tl.full((), gamma, ACC)
    count = classes.to(ACC)
    all_weights = count if weights is None else tl.load(weights)
    loss_sum = tl.zeros([POSITIONS], tl.float64)
    share_sum = tl.zeros([POSITIONS], tl.float64)
    grad_scale = tl.zeros([POSITIONS, CLASSES], ACC)
    grad_bias = tl.zeros([POSITIONS, CLASSES], ACC)
    blocks = outer * tl.cdiv(inner, POSITIONS)

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i, inside, base = positions_of(block, inner, outer_stride, stride, PLANES, POSITIONS)
        t = targets_of(target, i, inside, ignore_index, classes, SHARD)
        valid, named = t >= -1, t >= 0
        c = tl.zeros([POSITIONS], ACC)
        if confidence is not None:
            c = sigmoid(tl.load(confidence + i, mask=valid, other=0.0))
        margin_t = entries(margin, t, named, 0.0, ACC)

        nothing = tl.zeros([POSITIONS], ACC)
        maximum, rest, rest_du_dc = lowest(nothing), nothing, nothing
        target_logit, target_du_dc = nothing, nothing
        smooth, smooth_du_dc, seen = nothing, nothing, nothing
        z = tl.zeros([POSITIONS, CLASSES], ACC)
        x = tl.zeros([POSITIONS, CLASSES], ACC)
        columns = tl.arange(0, CLASSES)
        own = columns < classes
        is_target = columns[None, :] == t[:, None]
        for first in range(0, classes if TILED else 1, CLASSES):
            columns = class_indices(first, CLASSES)
            own = columns < classes
            is_target = columns[None, :] == t[:, None]
            here = valid[:, None] & own[None, :]
            z = tl.load(
                logits + elements(base, columns, stride, PLANES), mask=here, other=-float("inf")
            ).to(ACC)
            u = affine(z, c, columns, own, scale, bias, prior, ACC)
            u = tl.where(is_target, u - margin_t[:, None], u)
            m = tl.max(u, 1)
            m = tl.maximum(m, lowest(m))
            # The target is kept out: see position.py.
            x = tl.where(is_target, 0.0, tl.exp(u - m[:, None]))
            rest_here = tl.sum(x, 1)
            du_dc_here, smooth_here, weight_here = nothing, nothing, nothing
            target_logit += tl.sum(tl.where(is_target, u, 0.0), 1)
            d = tl.zeros([POSITIONS, CLASSES], ACC)
            if DU_DC:
                d = du_dc(z, columns, own, scale, bias, ACC)
                du_dc_here = tl.sum(x * d, 1)
                target_du_dc += tl.sum(tl.where(is_target, d, 0.0), 1)
            if smoothing > 0:
                w = entries(weight, columns, own, 1.0, ACC)[None, :]
                smooth_here = tl.sum(tl.where(own[None, :], w * (u - m[:, None]), 0.0), 1)
                weight_here = nothing + tl.sum(tl.where(own[None, :], w, 0.0), 1)
                smooth_du_dc += tl.sum(tl.where(own[None, :], w * d, 0.0), 1)
            if TILED:
                maximum, rest, rest_du_dc, smooth, seen = add_sums(
                    maximum, rest, rest_du_dc, smooth, seen,
                    m, rest_here, du_dc_here, smooth_here, weight_here,
                )  # fmt: skip
            else:
                maximum, rest, rest_du_dc, smooth = m, rest_here, du_dc_here, smooth_here

        if SHARD:
            to = shard_sums + i
            n = outer * inner
            tl.store(to, tl.where(valid, maximum, 0.0), mask=inside)
            tl.store(to + n, tl.where(valid, rest, 0.0), mask=inside)
            tl.store(to + 2 * n, tl.where(valid, target_logit, 0.0), mask=inside)
            tl.store(to + 3 * n, tl.where(valid, target_du_dc, 0.0), mask=inside)
            tl.store(to + 4 * n, tl.where(valid, smooth, 0.0), mask=inside)
        w_t = entries(weight, t, named, 1.0, ACC)
        v = entries(sample_weight, i, valid, 1.0, ACC)
        v = tl.where(valid, v, 0.0)
        value, total, softmax, share, q_target = position_loss(
            maximum, rest, target_logit, smooth, w_t, all_weights, e, count, g
        )
        value = tl.where(valid, value * v, 0.0)
        if loss is not None:
            tl.store(loss + i, value, mask=inside)
        if row_max is not None:
            tl.store(row_max + i, tl.where(valid, maximum, 0.0), mask=inside)
            tl.store(row_sum + i, tl.where(valid, total, 1.0), mask=inside)
        if grad_confidence is not None:
            q_d = softmax * (rest_du_dc - target_du_dc * rest)
            q_d -= share * (smooth_du_dc - target_du_dc * all_weights)
            tl.store(grad_confidence + i, tl.where(valid, v * c * (1.0 - c) * q_d, 0.0),
                     mask=inside)  # fmt: skip
        loss_sum += value.to(tl.float64)
        share_sum += divisor_share(valid, w_t, v, by_weights)
        if class_sums is not None:
            q = softmax[:, None] * x
            if smoothing > 0:
                q -= share * entries(weight, columns, own, 1.0, ACC)[None, :]
            q = tl.where(is_target, q_target[:, None], q) * (v * c)[:, None]
            q = tl.where(valid[:, None] & own[None, :], q, 0.0)
            # A masked class adds 0, not 0 * -inf.
            grad_scale += q * tl.where(z == -float("inf"), 0.0, z)
            grad_bias += q

    if block_sums is not None:
        write_block_sums(block_sums, loss_sum, share_sum)
    if class_sums is not None:
        write_class_sums(class_sums, grad_scale, grad_bias, classes, tl.arange(0, CLASSES))


@triton.jit
def divisor_share(valid, target_weight, sample_weight, by_weights):
    """Of the denominator that forward adds up."""
    by = tl.where(by_weights != 0, target_weight * sample_weight, 1.0)
    return tl.where(valid, by, 0.0).to(tl.float64)


@triton.jit
def write_block_sums(block_sums, loss_sum, share_sum):
    tl.store(block_sums + 2 * tl.program_id(0), tl.sum(loss_sum, 0))
    tl.store(block_sums + 2 * tl.program_id(0) + 1, tl.sum(share_sum, 0))


@triton.jit
def write_class_sums(class_sums, grad_scale, grad_bias, classes, columns):
    to = class_sums + tl.program_id(0).to(tl.int64) * 2 * classes + columns
    own = columns < classes
    tl.store(to, tl.sum(grad_scale, 0), mask=own)
    tl.store(to + classes, tl.sum(grad_bias, 0), mask=own)


@triton.jit
def inverse_of(denominator, ACC: tl.constexpr):
    """1 / denominator, and 0 where nothing is left to divide by."""
    if denominator is None:
        inverse = tl.full((), 1.0, ACC)
    else:
        divisor = tl.load(denominator)
        nothing = divisor == 0.0
        inverse = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, divisor)).to(ACC)
    return inverse


@triton.jit(debug=True, do_not_specialize=[*RUN_TIME, *OPTIONS, "upstream_stride",
                                           "grad_outer_stride", "grad_stride"],
            do_not_specialize_on_alignment=UNALIGNED)  # fmt: skip
def backward_kernel(
    logits, target, weight, scale, bias, confidence, prior, margin, sample_weight, weights,
    upstream, row_max, row_sum, denominator, target_logits, shard_factors,
    grad_logits, class_sums, confidence_sums,
    outer: tl.int64, inner: tl.int64, classes: tl.int32, outer_stride: tl.int64, stride: tl.int64,
    upstream_stride: tl.int64, grad_outer_stride: tl.int64, grad_stride: tl.int64,
    ignore_index: tl.int64, smoothing: tl.float64, gamma: tl.float64,
    PLANES: tl.constexpr, UNIT: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """What is wanted of grad_logits, class_sums [programs][2][classes] and confidence_sums
    [tiles][positions], where upstream (stride 0 or 1; None: 1) and the denominator are included.
    shard_factors: [5][positions], of a shard in the place of all that (_ops/reference.py,
    shard_gradients), or None.
    """
    SHARD: tl.constexpr = shard_factors is not None
    inner, classes = bounds(inner, classes, PLANES, UNIT)
    outer_stride, stride = outer_stride * UNIT, stride * UNIT
    grad_outer_stride, grad_stride = grad_outer_stride * UNIT, grad_stride * UNIT
    columns = class_indices(tl.program_id(1) * CLASSES, CLASSES)
    own = columns < classes
    e = tl.full((), smoothing, ACC)
    g = tl.full((), gamma, ACC)
    count = classes.to(ACC)
    all_weights = count if weights is None else tl.load(weights)
    inverse = inverse_of(denominator, ACC)
    grad_scale = tl.zeros([POSITIONS, CLASSES], ACC)
    grad_bias = tl.zeros([POSITIONS, CLASSES], ACC)
    blocks = outer * tl.cdiv(inner, POSITIONS)

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i, inside, base = positions_of(block, inner, outer_stride, stride, PLANES, POSITIONS)
        t = targets_of(target, i, inside, ignore_index, classes, SHARD)
        valid, named = t >= -1, t >= 0
        c = tl.zeros([POSITIONS], ACC)
        if confidence is not None:
            c = sigmoid(tl.load(confidence + i, mask=valid, other=0.0))
        margin_t = entries(margin, t, named, 0.0, ACC)

        target_du_dc = tl.zeros([POSITIONS], ACC)
        if SHARD:
            n = outer * inner
            maximum = tl.load(shard_factors + i, mask=valid, other=0.0)
            softmax = tl.load(shard_factors + n + i, mask=valid, other=0.0)
            smooth = tl.load(shard_factors + 2 * n + i, mask=valid, other=0.0)
            at_target = tl.load(shard_factors + 3 * n + i, mask=valid, other=0.0)
            target_du_dc = tl.load(shard_factors + 4 * n + i, mask=valid, other=0.0)
        else:
            maximum = tl.load(row_max + i, mask=valid, other=0.0)
            total = tl.load(row_sum + i, mask=valid, other=1.0)
            w_t = entries(weight, t, named, 1.0, ACC)
            nll = tl.zeros([POSITIONS], ACC)
            if (gamma > 0) | (confidence_sums is not None):
                if target_logits is not None:
                    z_t = tl.load(target_logits + i, mask=named, other=0.0)
                else:
                    at = t.to(tl.int64) * (stride if PLANES else 1)
                    z_t = tl.load(logits + base + at, mask=named, other=0.0).to(ACC)
                a_t = entries(scale, t, named, 0.0, ACC)
                b_t = entries(bias, t, named, 0.0, ACC)
                target_du_dc = finite_or_zero(a_t * z_t + b_t)
                u_t = z_t * (a_t * c + 1.0) + b_t * c + entries(prior, t, named, 0.0, ACC)
                u_t -= margin_t
                nll = (maximum - u_t) + tl.where(u_t == maximum, log1p(total - 1.0), tl.log(total))
            softmax, at_target, share, _value = row_terms(nll, w_t, all_weights, e, count, g)
            factor = entries(sample_weight, i, valid, 1.0, ACC)
            if upstream is not None:
                factor *= tl.load(upstream + i * upstream_stride, mask=valid, other=0.0)
            # Denominator 0 (no valid position): gradients are 0, whatever the numerator.
            factor = tl.where(inverse == 0.0, 0.0, factor * inverse)
            softmax *= factor / total
            smooth = factor * share
            at_target *= factor

        here = valid[:, None] & own[None, :]
        z = tl.load(
            logits + elements(base, columns, stride, PLANES), mask=here, other=-float("inf")
        ).to(ACC)
        is_target = columns[None, :] == t[:, None]
        u = affine(z, c, columns, own, scale, bias, prior, ACC)
        u = tl.where(is_target, u - margin_t[:, None], u)
        q = softmax[:, None] * tl.exp(u - maximum[:, None])
        if smoothing > 0:
            w = entries(weight, columns, own, 1.0, ACC)[None, :]
            q -= smooth[:, None] * w
        q -= tl.where(is_target, at_target[:, None], 0.0)
        q = tl.where(here, q, 0.0)

        if confidence_sums is not None:
            d = du_dc(z, columns, own, scale, bias, ACC) - target_du_dc[:, None]
            sums = c * (1.0 - c) * tl.sum(q * d, 1)
            tl.store(confidence_sums + tl.program_id(1) * outer * inner + i, sums, mask=inside)
        if class_sums is not None:
            q_c = q * c[:, None]
            # A masked class adds 0, not 0 * -inf.
            grad_scale += q_c * tl.where(z == -float("inf"), 0.0, z)
            grad_bias += q_c
        if grad_logits is not None:
            if scale is not None:
                a = entries(scale, columns, own, 0.0, ACC)[None, :]
                q *= a * c[:, None] + 1.0
            _, _, to = positions_of(block, inner, grad_outer_stride, grad_stride, PLANES, POSITIONS)
            tl.store(grad_logits + elements(to, columns, grad_stride, PLANES),
                     q.to(grad_logits.dtype.element_ty),
                     mask=inside[:, None] & own[None, :])  # fmt: skip

    if class_sums is not None:
        write_class_sums(class_sums, grad_scale, grad_bias, classes, columns)
