"""A fused cross-entropy as the Triton libraries write it, to count beside ours; it is not shipped.

A program has a row. The first pass over its blocks keeps a running maximum and sum, the second
writes the gradient in the place of the logits: two reads and one write, in one kernel. Weights a
class and an ignored class are what our plain step has, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

Config = tuple[int, int, int]  # positions and classes of a block, warps

# Those with the fewest instructions: `python -m machine_code.triton_kernels peers` tries them.
BEST: dict[tuple[str, int, str], Config] = {
    ("rows", 1203, "float32"): (1, 256, 1),
    ("rows", 1203, "bfloat16"): (1, 256, 1),
    ("rows", 8142, "float32"): (1, 1024, 1),
    ("rows", 8142, "bfloat16"): (1, 2048, 1),
    ("rows", 8192, "float32"): (1, 1024, 1),
    ("rows", 8192, "bfloat16"): (1, 2048, 1),
    ("planes", 19, "float32"): (256, 4, 1),
    ("planes", 19, "bfloat16"): (512, 4, 2),
    ("planes", 150, "float32"): (256, 4, 1),
    ("planes", 150, "bfloat16"): (512, 4, 2),
}


@triton.jit
def fused_kernel(
    logits, target, weight, loss, inverse_denominator, stride, classes, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    t = tl.load(target + row)
    columns = tl.arange(0, BLOCK)
    if t == ignore_index:
        for first in range(0, classes, BLOCK):
            at = first + columns
            tl.store(logits + at, 0.0, mask=at < classes)
        return
    w = tl.load(weight + t)
    target_logit = tl.load(logits + t).to(tl.float32)
    maximum, total = float("-inf"), 0.0
    for first in range(0, classes, BLOCK):
        at = first + columns
        z = tl.load(logits + at, mask=at < classes, other=float("-inf")).to(tl.float32)
        m = tl.maximum(maximum, tl.max(z))
        total = total * tl.exp(maximum - m) + tl.sum(tl.exp(z - m))
        maximum = m
    scale = w * tl.load(inverse_denominator)
    tl.store(loss + row, (maximum + tl.log(total) - target_logit) * scale)
    for first in range(0, classes, BLOCK):
        at = first + columns
        z = tl.load(logits + at, mask=at < classes, other=float("-inf")).to(tl.float32)
        q = tl.exp(z - maximum) / total
        q = tl.where(at == t, q - 1.0, q) * scale
        tl.store(logits + at, q.to(logits.dtype.element_ty), mask=at < classes)


@triton.jit
def fused_planes_kernel(
    logits, target, weight, loss, inverse_denominator, outer_stride, stride, classes, ignore_index,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of logits (N, C, S), a program for POSITIONS neighbours. stride: S."""
    image = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    inside = s < stride
    logits += image * outer_stride + s
    t = tl.load(target + image * stride + s, mask=inside, other=ignore_index)
    valid = t != ignore_index
    w = tl.load(weight + t, mask=valid, other=0.0)
    target_logit = tl.load(logits + t * stride, mask=valid, other=0.0).to(tl.float32)
    maximum = tl.full([POSITIONS], float("-inf"), tl.float32)
    total = tl.zeros([POSITIONS], tl.float32)
    for first in range(0, classes, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = (at < classes)[:, None] & inside[None, :]
        to = logits[None, :] + at[:, None] * stride
        z = tl.load(to, mask=mask, other=float("-inf")).to(tl.float32)
        m = tl.maximum(maximum, tl.max(z, 0))
        total = total * tl.exp(maximum - m) + tl.sum(tl.exp(z - m[None, :]), 0)
        maximum = m
    scale = w * tl.load(inverse_denominator)
    value = (maximum + tl.log(total) - target_logit) * scale
    tl.store(loss + image * stride + s, value, mask=inside)
    for first in range(0, classes, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = (at < classes)[:, None] & inside[None, :]
        to = logits[None, :] + at[:, None] * stride
        z = tl.load(to, mask=mask, other=float("-inf")).to(tl.float32)
        q = tl.exp(z - maximum[None, :]) / total[None, :]
        q = tl.where(at[:, None] == t[None, :], q - 1.0, q) * scale[None, :]
        tl.store(to, q.to(logits.dtype.element_ty), mask=mask)
