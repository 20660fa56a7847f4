"""How logits lie in memory, and which operators read them there.

(N, C) and channels-last logits are rows (N * S, C), classes next to each other; contiguous
(N, C, d1, ...) logits are class planes (N, C, S), positions next to each other. Anything else is
copied once.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..errors import ArgumentError
from .reference import accumulate_dtype
from .schemas import DENSE, ROW, UPSAMPLE, Layout


def _one_stride(tensor: Tensor, first: int, last: int) -> bool:
    """Whether the dimensions [first, last) are one dimension with one stride."""
    kept = [d for d in range(first, last) if tensor.shape[d] != 1]
    return all(
        tensor.stride(d) == tensor.stride(after) * tensor.shape[after]
        for d, after in itertools.pairwise(kept)
    )


def rows(input: Tensor) -> Tensor:
    """The input as rows (N * S, C), in whatever memory order; a copy only where there must be."""
    if input.dim() == 1:
        return input.unsqueeze(0)
    return input if input.dim() == 2 else input.movedim(1, -1).reshape(-1, input.shape[1])


def flatten(input: Tensor) -> tuple[Layout, Tensor, bool]:
    """The operators for this input, the input as they take it, and whether that took a copy."""
    if input.dim() > 2:
        moved = input.movedim(1, -1)
        neighbours = moved.stride(-1) == 1 or moved.shape[-1] == 1
        if not (neighbours and _one_stride(moved, 0, moved.dim() - 1)):
            planes = input.flatten(2)
            single = planes.shape[2] == 1
            copied = not _one_stride(input, 2, input.dim())
            if planes.stride(2) != 1 and not single:
                planes, copied = planes.contiguous(), True
            return DENSE, planes, copied
    flat = rows(input)
    if flat.stride(1) != 1 and flat.shape[1] > 1:
        return ROW, flat.contiguous(), True
    return ROW, flat, False


def probabilities(layout: Layout, flat: Tensor, target: Tensor) -> Tensor:
    """Class probabilities of an input's shape as the operators of its layout take them: with the
    neighbours of its logits `flat`, of their dtype or their arithmetic's. A copy only where there
    must be.
    """
    found = rows(target) if layout is ROW else target.flatten(2)
    dtype = accumulate_dtype(flat.dtype)
    if found.dtype not in (flat.dtype, dtype):
        found = found.to(dtype)
    if found.stride(-1) != 1 and found.shape[-1] != 1:
        found = found.contiguous()
    return found.unflatten(2, target.shape[2:]) if layout is UPSAMPLE else found


def check_in_place(input: Tensor, flat: Tensor, copied: bool) -> bool:
    """Whether backward is to write over the logits, which must be possible if it is asked for."""
    if torch.compiler.is_compiling():
        raise ArgumentError("inplace_backward must be False under torch.compile, got True")
    if not (input.requires_grad and torch.is_grad_enabled()):
        return False
    if input.is_leaf or (input._is_view() and input._base is not None and input._base.is_leaf):
        raise ArgumentError(
            "input must be made by an operation where inplace_backward is True, got a leaf, or a "
            "view of one: its values would be lost"
        )
    if copied:
        raise ArgumentError(
            "input must have neighbouring classes, or neighbouring positions of each class, where "
            f"inplace_backward is True, got shape {tuple(input.shape)} and strides {input.stride()}"
        )
    # Strides sorted, each dimension must step over all that lies below it.
    reach = 1
    for stride, size in sorted((flat.stride(d), flat.shape[d]) for d in range(flat.dim())):
        if size > 1:
            if stride < reach:
                raise ArgumentError(
                    "input must have memory of its own for each row where inplace_backward is "
                    f"True, got strides {input.stride()}"
                )
            reach = stride * (size - 1) + reach
    return True
