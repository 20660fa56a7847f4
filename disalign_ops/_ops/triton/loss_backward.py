"""The loss's gradients in Triton: backward_kernel, over rows and over class planes; its tiles:
tiles.py.

- A program goes round over the positions, of which it passes through the classes in tiles; where it
  is to sum over the positions, a program of axis 1 has one tile of the classes.
- Memory: one read, and one write of the gradient, which may be over the logits: a program reads a
  tile before it writes it, and what it needs of the target's logit, which may be another's, comes
  in target_logits then.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .position import exp, row_terms
from .tiles import (
    OPTIONS,
    RUN_TIME,
    UNALIGNED,
    add_at_targets,
    blocks_of,
    bounds,
    class_entries,
    class_indices,
    classes_read,
    confidences_of,
    elements,
    entries,
    existing,
    inverse_of,
    positions_of,
    target_logits_of,
    target_terms,
    targets_of,
    tile_of,
    write_class_sums,
    write_tile,
)


@triton.jit
def gradients(
    given, base, to, first, t, inside, valid, classes, stride, grad_stride, smoothing, factors,
    du_dc_sums, ALONE: tl.constexpr, DU_DC: tl.constexpr, PLANES: tl.constexpr,
    POSITIONS: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a tile's logits; z, q = dloss/du, and du_dc_sums with those of q d.

    given: as backward_kernel puts it together. factors: of the positions. ALONE: a row that counts.
    """
    logits, weight, scale, bias, prior, margin, grad_logits = given
    maximum, softmax, smooth, at_target, target_du_dc, c = factors
    z, u, d = tile_of(logits, base, first, inside, c, scale, bias, prior, classes, stride,
                      PLANES, POSITIONS, CLASSES, WHOLE, ACC)  # fmt: skip
    if margin is not None:
        margin_t = entries(margin, t, t >= 0, 0.0, ACC)
        u = add_at_targets(u, -margin_t, first, t, POSITIONS, CLASSES)
    x = exp(u - maximum[:, None])
    if not ALONE:
        x = tl.where(valid[:, None], x, 0.0)  # what an ignored position holds goes no further
    if POSITIONS == 1:
        q = add_at_targets(softmax[:, None] * x, -at_target, first, t, POSITIONS, CLASSES)
    else:
        nothing = tl.zeros([POSITIONS, CLASSES], ACC)
        subtracted = add_at_targets(nothing, -at_target, first, t, POSITIONS, CLASSES)
        q = tl.fma(softmax[:, None], x, subtracted)
    if smoothing > 0:
        own = (class_indices(first, CLASSES) < classes)[None, :]
        w = class_entries(weight, first, classes, 1.0, CLASSES, WHOLE, ACC)
        q -= tl.where(own, smooth[:, None] * w, 0.0)
    if DU_DC:
        du_dc_sums += q * (d - target_du_dc[:, None])
    if grad_logits is not None:
        grad = q
        if scale is not None:
            a = class_entries(scale, first, classes, 0.0, CLASSES, WHOLE, ACC)
            grad = q * (a * c[:, None] + 1.0)
        at = elements(grad_logits, to, first, grad_stride, PLANES, CLASSES)
        write_tile(at, grad, first, inside, classes, POSITIONS, CLASSES, WHOLE)
    return z, q, du_dc_sums


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
    shard_factors: [5][positions], of a shard in the place of all that (_ops/shard_reference.py),
    or None.
    """
    SHARD: tl.constexpr = shard_factors is not None
    DU_DC: tl.constexpr = confidence_sums is not None
    inner, classes = bounds(inner, classes, PLANES, UNIT)
    outer_stride, stride = outer_stride * UNIT, stride * UNIT
    grad_outer_stride, grad_stride = grad_outer_stride * UNIT, grad_stride * UNIT
    e = tl.full((), smoothing, ACC)
    g = tl.full((), gamma, ACC)
    count = classes.to(ACC)
    all_weights = count if weights is None else tl.load(weights)
    inverse = inverse_of(denominator, ACC)
    # What `upstream_stride` guards would be compiled for upstream of None, too.
    whole_upstream = tl.full((), 1.0, ACC)
    if upstream is not None:  # noqa: SIM102
        if upstream_stride == 0:
            whole_upstream = tl.load(upstream)
    grad_scale = tl.zeros([POSITIONS, CLASSES], ACC)
    grad_bias = tl.zeros([POSITIONS, CLASSES], ACC)
    given = (logits, weight, scale, bias, prior, margin, grad_logits)
    blocks = blocks_of(outer, inner, PLANES, POSITIONS)

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i, inside, base = positions_of(block, inner, outer_stride, stride, PLANES, POSITIONS)
        t = targets_of(target, i, inside, ignore_index, classes, SHARD)
        valid, named = t >= -1, t >= 0
        c = confidences_of(confidence, i, valid, ACC)

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
            at, mask = existing(t, named, SHARD)
            w_t = entries(weight, at, mask, 1.0, ACC)
            nll = tl.zeros([POSITIONS], ACC)
            if (gamma > 0) | (confidence_sums is not None):
                if target_logits is not None:
                    z_t = tl.load(target_logits + i, mask=named, other=0.0)
                else:
                    z_t = target_logits_of(logits, base, at, inside, stride, PLANES, ACC)
                u_t, target_du_dc = target_terms(z_t, at, mask, c, scale, bias, prior, margin, ACC)
                nll = (maximum - u_t) + tl.log(total)
            softmax, at_target, share, _value = row_terms(nll, w_t, all_weights, e, count, g)
            factor = entries(sample_weight, i, valid, 1.0, ACC)
            if upstream is not None:  # noqa: SIM102
                if upstream_stride != 0:
                    factor *= tl.load(upstream + i * upstream_stride, mask=valid, other=0.0)
            # Denominator 0 (no valid position): gradients are 0, whatever the numerator.
            factor = tl.where(inverse == 0.0, 0.0, factor * (whole_upstream * inverse))
            softmax *= factor / total
            smooth = factor * share
            at_target *= factor

        softmax, smooth = tl.where(valid, softmax, 0.0), tl.where(valid, smooth, 0.0)
        factors = (maximum, softmax, smooth, at_target, target_du_dc, c)
        _, _, to = positions_of(block, inner, grad_outer_stride, grad_stride, PLANES, POSITIONS)
        du_dc_sums = tl.zeros([POSITIONS, CLASSES], ACC)
        if class_sums is not None:
            first = tl.program_id(1) * CLASSES
            z, q, du_dc_sums = gradients(
                given, base, to, first, t, inside, valid, classes, stride, grad_stride, smoothing,
                factors, du_dc_sums, False, DU_DC, PLANES, POSITIONS, CLASSES, False, ACC,
            )  # fmt: skip
            q_c = q * c[:, None]
            # A masked class adds 0, not 0 * -inf, and so does what an ignored position holds.
            grad_scale += q_c * tl.where(valid[:, None] & (z != -float("inf")), z, 0.0)
            grad_bias += q_c
        else:
            read = classes_read(classes, valid, POSITIONS)
            whole = read & -CLASSES
            for first in range(0, whole, CLASSES):
                _z, _q, du_dc_sums = gradients(
                    given, base, to, first, t, inside, valid, classes, stride, grad_stride,
                    smoothing, factors, du_dc_sums, POSITIONS == 1, DU_DC, PLANES, POSITIONS,
                    CLASSES, True, ACC,
                )  # fmt: skip
            if whole < read:
                _z, _q, du_dc_sums = gradients(
                    given, base, to, whole, t, inside, valid, classes, stride, grad_stride,
                    smoothing, factors, du_dc_sums, POSITIONS == 1, DU_DC, PLANES, POSITIONS,
                    CLASSES, False, ACC,
                )  # fmt: skip
            if grad_logits is not None:
                for first in range(read, classes, CLASSES):
                    there = elements(grad_logits, to, first, grad_stride, PLANES, CLASSES)
                    zeros = tl.zeros([POSITIONS, CLASSES], ACC)
                    write_tile(there, zeros, first, inside, classes, POSITIONS, CLASSES, False)
        if confidence_sums is not None:
            sums = c * (1.0 - c) * tl.sum(du_dc_sums, 1)
            tl.store(confidence_sums + tl.program_id(1) * outer * inner + i, sums, mask=inside)

    if class_sums is not None:
        columns = class_indices(tl.program_id(1) * CLASSES, CLASSES)
        write_class_sums(class_sums, grad_scale, grad_bias, classes, columns)
