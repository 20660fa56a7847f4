"""`replace_cross_entropy`: our kernels behind torch.nn.functional.cross_entropy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._call.arguments import LOGITS_DTYPES
from ._ops.dispatch import serving_backend
from .functional import cross_entropy


def _is_covered(input: Any, target: Any, weight: Any, numbers: Iterable[Any]) -> bool:
    """Whether our kernels take the call: else it is torch's own, errors included."""
    tensors = [t for t in (input, target, weight) if t is not None]
    if not all(isinstance(t, Tensor) for t in tensors):
        return False
    if torch.overrides.has_torch_function(tensors):
        return False
    if any(hasattr(type(t), "__tensor_flatten__") for t in tensors):
        return False  # DTensor and other wrappers, which know torch's operators alone
    if not all(_is_at_hand(n) for n in numbers):
        return False
    if input.dtype not in LOGITS_DTYPES:
        return False
    if target.is_floating_point() or (weight is not None and weight.requires_grad):
        return False
    return input.dim() > 0 and serving_backend(input) != "reference"


def _is_at_hand(number: object) -> bool:
    """Whether a number can be read now: torch's function waits for a device, or traces numpy's."""
    if torch.compiler.is_compiling():
        return not isinstance(number, Tensor | np.ndarray)  # np.generic is traced as np.ndarray
    return not isinstance(number, Tensor) or number.is_cpu


_torch_cross_entropy = torch.nn.functional.cross_entropy
_active = 0  # how many replacements hold; the first one puts ours there, the last one torch's back


@functools.wraps(_torch_cross_entropy)
def _replacement(
    input: Any, target: Any, weight: Any = None, *arguments: Any, **options: Any
) -> Tensor:
    ours = _is_covered(input, target, weight, (*arguments, *options.values()))
    function: Callable[..., Tensor] = cross_entropy if ours else _torch_cross_entropy
    return function(input, target, weight, *arguments, **options)


class replace_cross_entropy:  # noqa: N801 - a function to its users, and a context manager
    """`F.cross_entropy` and `nn.CrossEntropyLoss` become ours: a loop gains without an edit.

    `with replace_cross_entropy(): ...`, or `replaced = replace_cross_entropy()` and later
    `replaced.undo()`; where several hold at once, torch's function is back when all are undone, in
    any order. What the kernels do not cover (class probabilities, torch.func transforms, forward
    mode, tensor subclasses such as DTensor, other dtypes and devices) goes to torch's own function,
    and so does what it refuses: a weight that requires a gradient. Code that
    imported the function itself (`from torch.nn.functional import cross_entropy`) before keeps
    torch's.
    """

    def __init__(self) -> None:
        global _active, _torch_cross_entropy
        if _active == 0:
            _torch_cross_entropy = torch.nn.functional.cross_entropy
            torch.nn.functional.cross_entropy = _replacement
        _active += 1
        self._holds = True

    def undo(self) -> None:
        """Put back what stood there before; a second call does nothing."""
        global _active
        if not self._holds:
            return
        self._holds = False
        _active -= 1
        if _active == 0:
            torch.nn.functional.cross_entropy = _torch_cross_entropy

    def __enter__(self) -> replace_cross_entropy:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
