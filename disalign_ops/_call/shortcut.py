"""The calls that most training loops make, without the cost of the general way.

The checks of functional.py cost a batch of 64 x 1000 logits a tenth of its step. Whatever is not
plainly what the operators take as it is goes the general way, which accepts, converts or raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import autograd
from .._ops.layouts import WHOLE, Extension
from .._ops.schemas import NORMALIZERS, OPTIONS, REDUCTIONS, ROW
from .arguments import is_probability

_LOGITS_ALONE = (True, False, False, False)
_MEAN = (REDUCTIONS["mean"], NORMALIZERS["weights"])
# `type(x) in`, not isinstance: a subclass may mean anything by its attributes.
_LEARNED = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64)  # whose accumulation dtype is their own


def has_defaults(
    reduction: str,
    sample_weight: object,
    normalizer: object,
    prior: object,
    margin: object,
    focal_gamma: float,
    inplace_backward: bool,
) -> bool:
    """Whether these options are those of F.cross_entropy."""
    return (
        reduction == "mean"
        and sample_weight is None
        and prior is None
        and margin is None
        and type(normalizer) is str
        and normalizer == "weights"
        and type(focal_gamma) is float
        and not focal_gamma
        and inplace_backward is False
    )


def is_plain(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> bool:
    """Whether these are rows on the CPU that pass every check and need no conversion."""
    if type(input) is not Tensor or type(target) is not Tensor:
        return False
    shape, dtype = input.shape, input.dtype
    return (
        len(shape) == 2
        and dtype in _DTYPES
        and type(shape[1]) is int  # under torch.jit.trace a tensor
        and shape[1] > 0
        and input.stride(1) == 1
        and input.is_cpu
        and target.dtype is torch.int64
        and target.shape == shape[:1]
        and target.is_cpu
        and target.is_contiguous()
        and (
            weight is None
            or (
                type(weight) is Tensor
                and weight.dtype is dtype
                and weight.shape == shape[1:]
                and weight.is_cpu
                and weight.is_contiguous()
                and not weight.requires_grad
            )
        )
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and type(label_smoothing) is float
        and 0.0 <= label_smoothing <= 1.0
    )


def is_plain_calibration(
    input: Tensor,
    confidence: Tensor,
    scale: Tensor,
    bias: Tensor,
    form: str,
    background: str | None,
) -> bool:
    """Whether these pass every check and need no conversion, the input being plain."""
    rows, classes = input.shape
    calibrated = (classes if background is None else classes - 1,)
    return (
        (form == "interpolated" or form == "residual")
        and (background is None or background == "first" or background == "last")
        and _is_vector(scale, input, calibrated)
        and _is_vector(bias, input, calibrated)
        and (_is_vector(confidence, input, (rows,)) or _is_vector(confidence, input, (rows, 1)))
        and not is_probability(confidence)
    )


def _is_vector(vector: Tensor, input: Tensor, shape: tuple[int, ...]) -> bool:
    return (
        type(vector) in _LEARNED
        and vector.dtype is input.dtype
        and vector.shape == shape
        and vector.is_cpu
        and vector.is_contiguous()
    )


class _PlainLoss(torch.autograd.Function):
    """What `autograd.loss` does for nothing but the gradient of the logits, made in forward: it
    keeps a third of the tensors, and the first backward hands the gradient over.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = ROW.forward(*arguments)
        ctx.call = ROW, WHOLE, arguments[OPTIONS:]
        ctx.untaken = [True]
        ctx.save_for_backward(*arguments[:3], *outputs[1:5])
        loss: Tensor = outputs[0]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            taken = autograd.take(ctx, saved[6], grad_loss)
            if taken is not None:
                return taken, None
        none = (None,) * (OPTIONS - 3)
        kept = (*saved[:3], *none, *saved[3:], None, None, None)
        return autograd.gradients(ctx, kept, grad_loss, _LOGITS_ALONE, in_place=False)[0], None


def loss(input: Tensor, target: Tensor, weight: Tensor | None, numbers: tuple[Any, ...]) -> Tensor:
    """The weighted mean of rows that are plain; numbers: ignore_index, label_smoothing, gamma."""
    tensors = (input, target, weight, None, None, None, None, None, None)
    if (
        torch.compiler.is_compiling()
        or not (input.requires_grad and torch.is_grad_enabled())
        or not autograd.on_cpu(ROW, input)
    ):
        return autograd.loss(ROW, tensors, numbers, "mean", "weights", False)[0]
    try:
        found: Tensor = _PlainLoss.apply(  # type: ignore[no-untyped-call]
            input, (*tensors, None, *numbers, *_MEAN, True, False, False, False)
        )
    except RuntimeError as error:
        autograd.raise_for_target(error, target)
        raise
    return found


def calibrated_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    numbers: tuple[Any, ...],
    calibration: tuple[Tensor, Tensor, Tensor],
    extension: Extension,
) -> Tensor:
    """The same of calibrated logits; calibration: scale, bias, confidence, which are plain."""
    scale, bias, confidence = calibration
    if confidence.dim() == 2:
        confidence = confidence.reshape(-1)
    tensors = (input, target, weight, scale, bias, confidence, None, None, None)
    return autograd.loss(ROW, tensors, numbers, "mean", "weights", False, extension)[0]
