"""The loss in Triton: forward_kernel, over rows and over class planes; its tiles: tiles.py.

- A program goes round over the positions, and ends with one partial sum a class. The classes of a
  position pass in tiles, whose sums are kept element by element and added up at the end; where the
  sums over the positions are wanted, which need the exponentials again, one tile has all classes.
- Memory: one read of the logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .details import add_details, nothing_known, write_details
from .position import exp, lowest, position_loss
from .tiles import (
    OPTIONS,
    RUN_TIME,
    UNALIGNED,
    add_at_targets,
    blocks_of,
    bounds,
    but_at_targets,
    class_entries,
    class_indices,
    classes_read,
    confidences_of,
    divisor_share,
    entries,
    existing,
    positions_of,
    target_logits_of,
    target_terms,
    targets_of,
    tile_of,
    write_block_sums,
    write_class_sums,
)


@triton.jit
def read_and_add(
    given, base, first, t, inside, c, classes, stride, smoothing, sums, known,
    DU_DC: tl.constexpr, DETAILS: tl.constexpr, ENTROPY: tl.constexpr, PLANES: tl.constexpr,
    POSITIONS: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds a tile to `sums`, which are relative to the maximum so far: `rest` and `rest_du_dc`,
    element by element, without the target (position.py), and those of smoothing with it.

    DETAILS: also to `known` (add_details). Returns both, and z and the exponentials of the tile.
    """
    logits, weight, scale, bias, prior, margin = given
    maximum, rest, rest_du_dc, smooth, smooth_du_dc, seen = sums
    z, u, d = tile_of(logits, base, first, inside, c, scale, bias, prior, classes, stride,
                      PLANES, POSITIONS, CLASSES, WHOLE, ACC)  # fmt: skip
    if DETAILS:
        known = add_details(u, first, known, ENTROPY, POSITIONS, CLASSES)
    if margin is not None:
        margin_t = entries(margin, t, t >= 0, 0.0, ACC)
        u = add_at_targets(u, -margin_t, first, t, POSITIONS, CLASSES)
    m = tl.maximum(maximum, tl.max(u, 1))
    ratio = exp(maximum - m)[:, None]
    x = exp(u - m[:, None])
    if POSITIONS == 1:
        # Element by element, added up at the end; the target is taken back where it is.
        rest = but_at_targets(tl.fma(rest, ratio, x), rest * ratio, first, t, POSITIONS, CLASSES)
        if DU_DC:
            rest_du_dc = but_at_targets(
                tl.fma(rest_du_dc, ratio, x * d), rest_du_dc * ratio, first, t, POSITIONS, CLASSES
            )
    else:
        x = but_at_targets(x, 0.0, first, t, POSITIONS, CLASSES)
        rest = tl.fma(rest, ratio, tl.sum(x, 1)[:, None])
        if DU_DC:
            rest_du_dc = tl.fma(rest_du_dc, ratio, tl.sum(x * d, 1)[:, None])
    if smoothing > 0:
        own = (class_indices(first, CLASSES) < classes)[None, :]
        w = class_entries(weight, first, classes, 1.0, CLASSES, WHOLE, ACC)
        # Without classes so far weights are 0, and 0 * infinity is no number.
        smooth += tl.where(seen == 0.0, 0.0, seen * (maximum - m))
        smooth += tl.sum(tl.where(own, w * (u - m[:, None]), 0.0), 1)
        seen += tl.sum(tl.where(own, w, 0.0), 1)
        if DU_DC:
            smooth_du_dc += tl.sum(tl.where(own, w * d, 0.0), 1)
    return (m, rest, rest_du_dc, smooth, smooth_du_dc, seen), known, z, x


@triton.jit(debug=True, do_not_specialize=RUN_TIME + OPTIONS,
            do_not_specialize_on_alignment=UNALIGNED)  # fmt: skip
def forward_kernel(
    logits, target, weight, scale, bias, confidence, prior, margin, sample_weight, weights,
    loss, row_max, row_sum, block_sums, class_sums, grad_confidence, shard_sums,
    prediction, entropy,
    outer: tl.int64, inner: tl.int64, classes: tl.int32, outer_stride: tl.int64, stride: tl.int64,
    ignore_index: tl.int64, smoothing: tl.float64, gamma: tl.float64, by_weights: tl.int32,
    PLANES: tl.constexpr, UNIT: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of every position; sums a program: see finish.py.

    weights: sum_j w_j, one entry; None: there are no weights. block_sums: [programs][2: loss,
    denominator]; class_sums: [programs][2: scale, bias][classes], for which CLASSES must be all;
    None where not wanted. shard_sums: [5][positions], the only result of a shard
    (_ops/shard_reference.py), or None. prediction, entropy: of every position, or None.
    """
    SHARD: tl.constexpr = shard_sums is not None
    ENTROPY: tl.constexpr = entropy is not None
    DETAILS: tl.constexpr = prediction is not None or ENTROPY
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
    given = (logits, weight, scale, bias, prior, margin)
    blocks = blocks_of(outer, inner, PLANES, POSITIONS)

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i, inside, base = positions_of(block, inner, outer_stride, stride, PLANES, POSITIONS)
        t = targets_of(target, i, inside, ignore_index, classes, SHARD)
        valid, named = t >= -1, t >= 0
        # With details an ignored position's logits are looked at.
        looked = inside if DETAILS else valid
        c = confidences_of(confidence, i, looked, ACC)
        at, mask = existing(t, named, SHARD)
        z_t = target_logits_of(logits, base, at, named if SHARD else inside, stride, PLANES, ACC)
        target_logit, target_du_dc = target_terms(z_t, at, mask, c, scale, bias, prior, margin, ACC)

        nothing = tl.zeros([POSITIONS], ACC)
        empty = tl.zeros([POSITIONS, CLASSES if POSITIONS == 1 else 1], ACC)
        least = lowest(nothing)
        maximum = tl.maximum(tl.where(named, target_logit, least), least)
        sums = (maximum, empty, empty, nothing, nothing, nothing)
        known = nothing_known(nothing, POSITIONS)
        if class_sums is not None:
            # Of planes all are read: a mask that differs between neighbours takes vectors apart.
            sums, known, z, x = read_and_add(
                given, base, 0, t, inside if PLANES else looked, c, classes, stride, smoothing,
                sums, known, DU_DC, DETAILS, ENTROPY, PLANES, POSITIONS, CLASSES, False, ACC,
            )  # fmt: skip
        else:
            read = classes_read(classes, looked, POSITIONS)
            whole = read & -CLASSES  # a power of two
            for first in range(0, whole, CLASSES):
                sums, known, _z, _x = read_and_add(
                    given, base, first, t, inside, c, classes, stride, smoothing, sums,
                    known, DU_DC, DETAILS, ENTROPY, PLANES, POSITIONS, CLASSES, True, ACC,
                )  # fmt: skip
            if whole < read:
                sums, known, _z, _x = read_and_add(
                    given, base, whole, t, inside, c, classes, stride, smoothing, sums,
                    known, DU_DC, DETAILS, ENTROPY, PLANES, POSITIONS, CLASSES, False, ACC,
                )  # fmt: skip
        if DETAILS:
            write_details(prediction, entropy, known, i, inside, valid)
        maximum, rest, rest_du_dc, smooth, smooth_du_dc, _ = sums
        rest, rest_du_dc = tl.sum(rest, 1), tl.sum(rest_du_dc, 1)
        w_t = entries(weight, at, mask, 1.0, ACC)
        if SHARD:
            to = shard_sums + i
            n = outer * inner
            tl.store(to, tl.where(valid, maximum, 0.0), mask=inside)
            tl.store(to + n, tl.where(valid, rest, 0.0), mask=inside)
            tl.store(to + 2 * n, tl.where(valid, target_logit, 0.0), mask=inside)
            tl.store(to + 3 * n, tl.where(valid, target_du_dc, 0.0), mask=inside)
            tl.store(to + 4 * n, tl.where(valid, smooth, 0.0), mask=inside)
        v = entries(sample_weight, i, valid, 1.0, ACC)
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
                q -= share * class_entries(weight, 0, classes, 1.0, CLASSES, False, ACC)
            columns = tl.arange(0, CLASSES)[None, :]
            q = tl.where(columns == t[:, None], q_target[:, None], q) * (v * c)[:, None]
            q = tl.where(valid[:, None] & (columns < classes), q, 0.0)
            # A masked class adds 0, not 0 * -inf, and so does what an ignored position holds.
            grad_scale += q * tl.where(valid[:, None] & (z != -float("inf")), z, 0.0)
            grad_bias += q

    if block_sums is not None:
        write_block_sums(block_sums, loss_sum, share_sum)
    if class_sums is not None:
        write_class_sums(class_sums, grad_scale, grad_bias, classes, tl.arange(0, CLASSES))
