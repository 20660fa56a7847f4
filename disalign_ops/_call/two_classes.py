"""u of two classes a position, from logits where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import autograd, dispatch, reference
from .._ops.entries import add_entries
from .._ops.problem import Inputs, Problem


def calibrated_at(
    inputs: Inputs, problem: Problem, t: Tensor, o: Tensor, k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, to be used in place of the inputs', and u_t and u_o, flat. 0 where k is 0."""
    logits = inputs.logits
    classes = torch.stack((t, o)).clamp(min=0)
    classes = torch.where(k == 0, 0, classes)
    positions = logits.shape[2] if logits.dim() == 3 else 1  # -1 is ambiguous in an empty batch
    index = classes.view(2, logits.shape[0], positions).transpose(0, 1).contiguous()  # (N, 2, S)
    if logits.dim() == 2:
        index = index[..., 0]
    of_graph = dispatch.serving_backend(logits) == "reference" or torch.compiler.is_compiling()
    if of_graph or not (logits.requires_grad and torch.is_grad_enabled()):
        z = logits.gather(1, index).to(k.dtype)
    else:
        logits, z = _Entries.apply(logits, index, k.dtype)  # type: ignore[no-untyped-call]
    z = z.unsqueeze(-1) if logits.dim() == 2 else z
    z = z.transpose(0, 1).reshape(classes.shape)
    scale, bias = problem.form.vectors(inputs.scale, inputs.bias)
    # A row a position, of its two classes.
    a, b, prior = (
        None if vector is None else _pick(vector, classes).t()
        for vector in (scale, bias, inputs.prior)
    )
    u = torch.where(k == 0, 0.0, z).t()
    u = reference.calibrated_logits(u, a, b, inputs.confidence, prior)
    return logits, u[:, 0], u[:, 1]


def _pick(vector: Tensor, classes: Tensor) -> Tensor:
    """Entries of a class vector, whose gradient is summed in the same order on every run."""
    if vector.is_cpu:
        return vector.gather(0, classes.reshape(-1)).view(classes.shape)
    return vector[classes]


class _Entries(torch.autograd.Function):
    """The logits, and two of each position's in the arithmetic dtype.

    Their gradient is added to that of the logits where it lies: nothing of the logits' size is made
    for it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, dtype: torch.dtype) -> Any:
        ctx.save_for_backward(index)
        return logits.view_as(logits), logits.gather(1, index).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_entries: Tensor) -> Any:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        if torch.is_grad_enabled() or type(grad) is not Tensor or autograd.is_batched(grad):
            return grad.scatter_add(1, index, of_entries.to(grad.dtype)), None, None
        # Both entries are one where their gradients are 0: either may be written.
        add_entries(grad, index, of_entries)
        return grad, None, None
