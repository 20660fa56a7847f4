"""Tiles of logits in Triton: which positions and classes a program has, and what it reads of them.

- Maps: a tile is POSITIONS x CLASSES. PLANES: positions lie next to each other (outer_stride, then
  `stride` from class to class); else classes do (`stride` from row to row, and `outer` is 1).
- Sizes, strides and options are run-time values; absent tensors (None) and tile sizes are not.
- UNIT: 16 where all strides, and the size of the dimension whose entries are neighbours, are
  multiples of 16: they are given divided by it, which tells the compiler that vectors are aligned.
- WHOLE: all classes of a tile exist, so that nothing asks for each of them whether it does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .position import finite_or_zero, sigmoid

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
def blocks_of(outer, inner, PLANES: tl.constexpr, POSITIONS: tl.constexpr):
    """How many blocks of POSITIONS there are. Of planes their number is divided, in 32 bits."""
    blocks = outer * tl.cdiv(inner, POSITIONS)
    return blocks.to(tl.int32) if PLANES else blocks


@triton.jit
def positions_of(block, inner, outer_stride, stride, PLANES: tl.constexpr,
                 POSITIONS: tl.constexpr):  # fmt: skip
    """A block's positions: their numbers, which of them exist, and the element of their class 0."""
    if PLANES:
        per_outer = tl.cdiv(inner, POSITIONS).to(tl.int32)
        outer_index = (block // per_outer).to(tl.int64)
        s = (block % per_outer).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
        i, base = outer_index * inner + s, outer_index * outer_stride + s
    else:
        s = block * POSITIONS + tl.arange(0, POSITIONS)
        i, base = s, s * stride
    return i, s < inner, base


@triton.jit
def class_indices(first, CLASSES: tl.constexpr):
    # Not a sum that is checked for overflow, as device_assert's debug mode would have it.
    return tl.add(first, tl.arange(0, CLASSES), sanitize_overflow=False)


@triton.jit
def elements(tensor, base, first, stride, PLANES: tl.constexpr, CLASSES: tl.constexpr):
    """Pointers to a tile's elements, from the class `first` on."""
    columns = tl.arange(0, CLASSES)
    if PLANES:
        at = (tensor + first * stride + base)[:, None] + columns.to(tl.int64)[None, :] * stride
    else:
        at = (tensor + first + base)[:, None] + columns[None, :]
    return at


@triton.jit
def targets_of(target, i, inside, ignore_index, classes, SHARD: tl.constexpr):
    """Classes of the positions i, -2 where they count nothing; SHARD: -1 where another shard has
    them.
    """
    t = tl.load(target + i, mask=inside, other=0).to(tl.int64)
    valid = inside & (t != ignore_index)
    # One comparison of 64 bits: a negative number is beyond all classes.
    known = (t + 1).to(tl.uint64) <= classes if SHARD else t.to(tl.uint64) < classes
    tl.device_assert((valid == 0) | known, "target is no class")
    return tl.where(valid & known, t, -2).to(tl.int32)


@triton.jit
def entries(vector, i, mask, absent, ACC: tl.constexpr):
    """vector[i]; `absent` where there is no vector or no entry. mask: None where all have one."""
    if vector is None:
        found = tl.full(i.shape, absent, ACC)
    elif mask is None:
        found = tl.load(vector + i)
    else:
        found = tl.load(vector + i, mask=mask, other=absent)
    return found


@triton.jit
def class_entries(vector, first, classes, absent, CLASSES: tl.constexpr, WHOLE: tl.constexpr,
                  ACC: tl.constexpr):  # fmt: skip
    """A vector's entries of a tile's classes, for all its positions: [1, CLASSES]."""
    columns = tl.arange(0, CLASSES)
    if vector is None:
        found = tl.full([CLASSES], absent, ACC)
    elif WHOLE:
        found = tl.load(vector + first + columns)
    else:
        own = class_indices(first, CLASSES) < classes
        found = tl.load(vector + first + columns, mask=own, other=absent)
    return found[None, :]


@triton.jit
def confidences_of(confidence, i, valid, ACC: tl.constexpr):
    """sigmoid of the confidence; 0 without one."""
    if confidence is None:
        c = tl.zeros(i.shape, ACC)
    else:
        c = sigmoid(tl.load(confidence + i, mask=valid, other=0.0))
    return c


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


@triton.jit
def target_terms(z_t, t, named, c, scale, bias, prior, margin, ACC: tl.constexpr):
    """u and d of the positions' targets, from their logits."""
    u_t, d_t = z_t, tl.zeros(z_t.shape, ACC)
    if scale is not None:
        a = entries(scale, t, named, 0.0, ACC)
        b = entries(bias, t, named, 0.0, ACC)
        d_t = finite_or_zero(a * z_t + b)
        # The same bits as in a tile, whose maximum it is compared with.
        u_t = tl.fma(z_t, tl.fma(a, c, 1.0), b * c)
    u_t += entries(prior, t, named, 0.0, ACC)
    return u_t - entries(margin, t, named, 0.0, ACC), d_t


@triton.jit
def existing(t, named, SHARD: tl.constexpr):
    """Classes to read at, and the mask to read with: an ignored position's target is class 0, which
    takes no mask, as of a shard's where another shard has the class.
    """
    return (t, named) if SHARD else (tl.maximum(t, 0), None)


@triton.jit
def target_logits_of(logits, base, t, named, stride, PLANES: tl.constexpr, ACC: tl.constexpr):
    at = t.to(tl.int64) * (stride if PLANES else 1)
    return tl.load(logits + base + at, mask=named, other=0.0).to(ACC)


@triton.jit
def tile_of(logits, base, first, inside, c, scale, bias, prior, classes, stride,
            PLANES: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
            WHOLE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """z, u and d of a tile; -inf, and 0, where there is no logit. A row alone is inside."""
    at = elements(logits, base, first, stride, PLANES, CLASSES)
    if WHOLE and POSITIONS == 1:
        z = tl.load(at)
    elif WHOLE:
        z = tl.load(at, mask=inside[:, None])
    else:
        own = class_indices(first, CLASSES) < classes
        z = tl.load(at, mask=inside[:, None] & own[None, :], other=-float("inf"))
    z = z.to(ACC)
    u, d = z, tl.zeros([1, CLASSES], ACC)
    if scale is not None:
        a = class_entries(scale, first, classes, 0.0, CLASSES, WHOLE, ACC)
        b = class_entries(bias, first, classes, 0.0, CLASSES, WHOLE, ACC)
        d = finite_or_zero(a * z + b)
        u = tl.fma(z, tl.fma(a, c[:, None], 1.0), b * c[:, None])
    if prior is not None:
        u += class_entries(prior, first, classes, 0.0, CLASSES, WHOLE, ACC)
    return z, u, d


@triton.jit
def but_at_targets(x, instead, first, t, POSITIONS: tl.constexpr, CLASSES: tl.constexpr):
    """x of a tile, with what is `instead` at the target's class.

    A row alone asks once a tile whether it has the class, not for each element.
    """
    # Not of `first` and the columns: the compiler would compare 64 bits, as of addresses.
    here = tl.sub(t, first, sanitize_overflow=False)
    at_target = tl.arange(0, CLASSES)[None, :] == here[:, None]
    if POSITIONS == 1:
        here = tl.max(here, 0)
        if (here >= 0) & (here < CLASSES):
            x = tl.where(at_target, instead, x)
    else:
        x = tl.where(at_target, instead, x)
    return x


@triton.jit
def add_at_targets(x, addend, first, t, POSITIONS: tl.constexpr, CLASSES: tl.constexpr):
    return but_at_targets(x, x + addend[:, None], first, t, POSITIONS, CLASSES)


@triton.jit
def classes_read(classes, valid, POSITIONS: tl.constexpr):
    """How many classes are read: none of a row that does not count."""
    if POSITIONS == 1:
        classes = tl.where(tl.max(valid.to(tl.int32), 0) > 0, classes, 0)
    return classes


@triton.jit
def write_tile(at, x, first, inside, classes, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
               WHOLE: tl.constexpr):  # fmt: skip
    x = x.to(at.dtype.element_ty)
    if WHOLE and POSITIONS == 1:
        tl.store(at, x)
    elif WHOLE:
        tl.store(at, x, mask=inside[:, None])
    else:
        own = class_indices(first, CLASSES) < classes
        tl.store(at, x, mask=inside[:, None] & own[None, :])


@triton.jit
def write_class_sums(class_sums, grad_scale, grad_bias, classes, columns):
    to = class_sums + tl.program_id(0).to(tl.int64) * 2 * classes + columns
    own = columns < classes
    tl.store(to, tl.sum(grad_scale, 0), mask=own)
    tl.store(to + classes, tl.sum(grad_bias, 0), mask=own)


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
def inverse_of(denominator, ACC: tl.constexpr):
    """1 / denominator, and 0 where nothing is left to divide by."""
    if denominator is None:
        inverse = tl.full((), 1.0, ACC)
    else:
        divisor = tl.load(denominator)
        nothing = divisor == 0.0
        inverse = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, divisor)).to(ACC)
    return inverse
