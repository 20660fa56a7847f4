"""`replace_cross_entropy`: our kernels behind torch.nn.functional.cross_entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arguments import LOGITS_DTYPES
from .functional import cross_entropy, serving_backend

_torch_cross_entropy = torch.nn.functional.cross_entropy


def _covered(input: Any, target: Any, weight: Any) -> bool:
    """Whether our kernels take the call: else it is torch's own, errors included."""
    tensors = [t for t in (input, target, weight) if t is not None]
    if not all(isinstance(t, Tensor) for t in tensors) or torch.overrides.has_torch_function(
        tensors
    ):
        return False
    if input.dtype not in LOGITS_DTYPES:
        return False
    if target.is_floating_point() or (weight is not None and weight.requires_grad):
        return False
    if input.dim() > 2 and not input.movedim(1, -1).is_contiguous():
        return False
    return input.dim() > 0 and serving_backend(input) == "native"


def _replacement(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    ours = _covered(input, target, weight)
    function = cross_entropy if ours else _torch_cross_entropy
    return function(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )


class replace_cross_entropy:  # noqa: N801 - a function to its users, and a context manager
    """`F.cross_entropy` and `nn.CrossEntropyLoss` become ours: a loop gains without an edit.

    `with replace_cross_entropy(): ...`, or `replaced = replace_cross_entropy()` and later
    `replaced.undo()`. What the kernels do not cover (class probabilities, torch.func transforms,
    tensor subclasses, other dtypes and devices) goes to torch's own function. Code that imported
    the function itself (`from torch.nn.functional import cross_entropy`) before keeps torch's.
    """

    def __init__(self) -> None:
        self._previous = torch.nn.functional.cross_entropy
        torch.nn.functional.cross_entropy = _replacement

    def undo(self) -> None:
        """Put back what stood there before."""
        torch.nn.functional.cross_entropy = self._previous

    def __enter__(self) -> replace_cross_entropy:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
