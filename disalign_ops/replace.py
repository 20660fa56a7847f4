"""`replace_cross_entropy`: our kernels behind torch.nn.functional.cross_entropy."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._call.arguments import LOGITS_DTYPES, numpy_types
from ._ops.backends import constant_in_graphs
from ._ops.dispatch import serving_backend, transformed
from .functional import cross_entropy

# By __torch_function__ of a subclass or a mode, such as `with torch.device(...)`: it calls again.
_OVERRIDDEN = "overridden"


def _why_torch(input: Any, target: Any, weight: Any, numbers: Iterable[Any]) -> str:
    """Why the call is torch's own, errors included; "" where our kernels take it."""
    tensors = [t for t in (input, target, weight) if t is not None]
    if not all(isinstance(t, Tensor) for t in tensors):
        return "input, target or weight is no tensor"
    if torch.overrides.has_torch_function(tensors):
        return _OVERRIDDEN
    if any(hasattr(type(t), "__tensor_flatten__") for t in tensors):
        return "wrapper of tensors (DTensor)"  # which knows torch's operators alone
    if not all(_is_at_hand(n) for n in numbers):
        return "number on a device"
    if input.dtype not in LOGITS_DTYPES:
        return "dtype of the logits"
    if target.is_floating_point() and target.requires_grad:
        return "class probabilities that require a gradient"
    if weight is not None and weight.requires_grad:
        return "weight that requires a gradient"
    if input.dim() == 0:
        return "logits without a class dimension"
    if serving_backend(input) == "reference":
        if transformed():
            return "torch.func transform, forward-mode differentiation or torch.jit.trace"
        return "no kernels for the device, or backend 'reference': see backend_info()"
    return ""


def _is_at_hand(number: object) -> bool:
    """Whether a number can be read now: torch's function waits for a device, or traces numpy's."""
    if torch.compiler.is_compiling():
        return not isinstance(
            number, (Tensor, *numpy_types()[:1])
        )  # np.generic is traced as np.ndarray
    return not isinstance(number, Tensor) or number.is_cpu


_torch_cross_entropy = torch.nn.functional.cross_entropy
_calls: Counter[str] = Counter()  # by why they were torch's; "" of ours


@constant_in_graphs
def _count(why: str) -> None:
    _calls[why] += 1


_active = 0  # how many replacements hold; the first one puts ours there, the last one torch's back


@functools.wraps(_torch_cross_entropy)
def _replacement(
    input: Any, target: Any, weight: Any = None, *arguments: Any, **options: Any
) -> Tensor:
    why_torch = _why_torch(input, target, weight, (*arguments, *options.values()))
    if why_torch != _OVERRIDDEN:
        _count(why_torch)
    function: Callable[..., Tensor] = _torch_cross_entropy if why_torch else cross_entropy
    return function(input, target, weight, *arguments, **options)


class replace_cross_entropy:  # noqa: N801 - a function to its users, and a context manager
    """`F.cross_entropy` and `nn.CrossEntropyLoss` become ours: a loop gains without an edit.

    `with replace_cross_entropy(): ...`, or `replaced = replace_cross_entropy()` and later
    `replaced.undo()`; where several hold at once, torch's function is back when all are undone, in
    any order. What the kernels do not cover (torch.func transforms, forward
    mode, tensor subclasses such as DTensor, other dtypes and devices) goes to torch's own function,
    and so does what it refuses: a weight that requires a gradient. Code that
    imported the function itself (`from torch.nn.functional import cross_entropy`) before keeps
    torch's.

    Attributes, of the calls since it was made and until it is undone:
        served: how many our kernels took. 0 after a loop: its code keeps torch's function.
        not_served: how many went to torch's function, by the reason.
    Compiled code counts when it is traced, once or more, and not when it runs.
    """

    def __init__(self) -> None:
        global _active, _torch_cross_entropy
        if _active == 0:
            _torch_cross_entropy = torch.nn.functional.cross_entropy
            torch.nn.functional.cross_entropy = _replacement
        _active += 1
        self._holds = True
        self._before, self._after = _calls.copy(), _calls

    def undo(self) -> None:
        """Put back what stood there before; a second call does nothing."""
        global _active
        if not self._holds:
            return
        self._holds = False
        self._after = _calls.copy()
        _active -= 1
        if _active == 0:
            torch.nn.functional.cross_entropy = _torch_cross_entropy

    @property
    def served(self) -> int:
        return self._after[""] - self._before[""]

    @property
    def not_served(self) -> dict[str, int]:
        calls = self._after - self._before
        return {why: n for why, n in calls.items() if why}

    def __enter__(self) -> replace_cross_entropy:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
