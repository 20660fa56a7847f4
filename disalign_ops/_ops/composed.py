"""The losses and the calibrated logits by PyTorch's own functions: where no kernel serves, and in
the graphs of torch.jit, whose users (ONNX) do not have our operators.

The values are those of reference.py, which makes more passes over the logits. F.cross_entropy alone
gives other gradients, NaN, where an ignored row is not finite or every weight is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .codes import NORMALIZERS, REDUCTIONS
from .problem import Inputs, Problem, is_soft
from .schemas import ROW

torch_cross_entropy = F.cross_entropy  # before `replace_cross_entropy` puts ours there


def is_tracing() -> bool:
    """Whether torch.jit.trace, or ONNX's exporter by it, makes a graph."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing


@contextmanager
def unrecorded() -> Iterator[None]:
    """What happens here is no part of the graph that torch.jit.trace makes: argument checks, for
    which a shape must be numbers.
    """
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def form_vectors(
    scale: Tensor, bias: Tensor, offset: int, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """`CalibrationForm.vectors` without a constant, which would keep its device in a graph.
    torch.jit.script takes it.
    """
    return F.pad(scale - offset, [first, last]), F.pad(bias, [first, last])


def calibrate(
    input: Tensor, confidence: Tensor, scale: Tensor, bias: Tensor, form: str,
    background: str | None,
) -> Tensor:  # fmt: skip
    """`functional.calibrate` without its checks. torch.jit.script takes it."""
    dtype = reference.accumulate_dtype(input.dtype)
    offset, first, last = int(form == "interpolated"), 0, 0
    if background is not None:
        first, last = int(background == "first"), int(background == "last")
    scale, bias = form_vectors(
        scale.reshape(-1).to(dtype), bias.reshape(-1).to(dtype), offset, first, last
    )
    flat = input
    if input.dim() == 1:
        flat = input.unsqueeze(0)
    if input.dim() > 2:
        flat = input.flatten(2)
    out = reference.calibrate(flat, scale, bias, confidence.reshape(-1).to(dtype))
    return out.reshape(input.shape).to(input.dtype)


def _checkable(*tensors: Tensor) -> bool:
    """Whether a look at these values costs no synchronisation and is no part of a graph."""
    return (
        tensors[0].is_cpu
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not torch.compiler.is_compiling()
        and not is_tracing()
        and not torch._C._len_torch_dispatch_stack()
    )


def _ignored_are_finite(logits: Tensor, ignored: Tensor) -> bool:
    """Whether torch's gradient of ignored rows is 0: it is 0 times their softmax."""
    return not ignored.any().item() or bool(logits.movedim(1, -1)[ignored].isfinite().all())


def plain_mean(inputs: Inputs, problem: Problem) -> Tensor | None:
    """The weighted mean of rows on the CPU by F.cross_entropy alone, without a look at the targets'
    range; None where `cross_entropy` below is right, or an error, or more is asked for.
    """
    logits, target, weight, *others = inputs
    ignore_index, label_smoothing, focal_gamma = problem.numbers[:3]
    if (
        problem.layout is not ROW
        or problem.reduction != REDUCTIONS["mean"]
        or problem.normalizer != NORMALIZERS["weights"]
        or focal_gamma
        or any(other is not None for other in others)
        or logits.dtype not in (torch.float32, torch.float64)
        or target.dim() != 1
        or target.dtype != torch.int64
        or not _checkable(logits, target)
    ):
        return None
    # Without ignored rows one operation says so where ignore_index is negative.
    some = ignore_index >= 0 or not target.shape[0] or target.min().item() < 0
    if some and not _ignored_are_finite(logits, target == ignore_index):
        return None
    try:
        loss = torch_cross_entropy(
            logits, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    except IndexError:
        return None
    return loss if weight is None or not math.isnan(loss.item()) else None


def cross_entropy(inputs: Inputs, problem: Problem) -> Tensor:
    """`reference.cross_entropy` of rows (N, C) or class planes (N, C, S)."""
    logits, target, weight, _, _, confidence, prior, margin, sample_weight, _ = inputs
    scale, bias = problem.form.vectors(inputs.scale, inputs.bias)
    ignore_index, label_smoothing, focal_gamma = problem.numbers
    reduction, normalizer = problem.reduction_name, problem.normalizer_of(inputs)
    if is_soft(inputs):
        return _soft_cross_entropy(inputs, problem, scale, bias)
    t = target.reshape((logits.shape[0], *logits.shape[2:]))
    t, valid = reference.class_indices(t, ignore_index)
    checkable = _checkable(logits, target)
    # A calibration may make infinities of finite logits.
    if not (checkable and scale is None and _ignored_are_finite(logits, ~valid)):
        logits = torch.where(valid.unsqueeze(1), logits, 0.0)
    u = reference.calibrated_logits(logits, scale, bias, confidence, prior)
    if margin is not None:
        at = torch.where(valid, t, 0).unsqueeze(1)
        u = u.scatter_add(1, at, -margin[at])

    weighted_mean = reduction == "mean" and isinstance(normalizer, str) and normalizer == "weights"
    if (
        (weighted_mean or reduction != "mean")
        and sample_weight is None
        and not focal_gamma
        # Where all weights are 0 the loss is NaN, and torch's gradients are too; ours are 0.
        and (weight is None or reduction != "mean" or checkable)
    ):
        loss = torch_cross_entropy(
            u, t, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        if weight is None or reduction != "mean" or not math.isnan(loss.item()):
            return loss.reshape(-1) if reduction == "none" else loss

    log_p = F.log_softmax(u, 1)
    losses = F.nll_loss(
        log_p, t, None if focal_gamma else weight, ignore_index=ignore_index, reduction="none"
    )
    if focal_gamma:
        losses = reference._focal(losses, focal_gamma)
        if weight is not None:
            losses = losses * weight[torch.where(valid, t, 0)]
    if label_smoothing > 0:
        each = log_p
        if weight is not None:
            each = log_p * (weight[:, None] if u.dim() == 3 else weight)
        losses = (1 - label_smoothing) * losses - label_smoothing / u.shape[1] * each.sum(1)
    losses = losses.reshape(-1)
    if sample_weight is not None:
        losses = losses * sample_weight
    losses = torch.where(valid.reshape(-1), losses, 0.0)
    if isinstance(normalizer, str) and normalizer == "count":
        divisor = torch.ones_like(losses, dtype=torch.float64).sum()
    else:
        divisor = reference.denominator(
            t.reshape(-1), normalizer, weight=weight, sample_weight=sample_weight,
            ignore_index=ignore_index,
        )  # fmt: skip
    return reference.reduce(losses, reduction, normalizer, divisor)


def _soft_cross_entropy(
    inputs: Inputs, problem: Problem, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The same against class probabilities."""
    u = reference.calibrated_logits(inputs.logits, scale, bias, inputs.confidence, inputs.prior)
    weight, smoothing = inputs.weight, problem.numbers[1]
    if weight is not None and u.dim() == 3:
        weight = weight[:, None]
    b = reference.soft_weights(inputs.target, u, weight, 1 - smoothing, smoothing / u.shape[1])
    # Not F.cross_entropy: a masked class that the target does not ask for adds 0, not 0 * inf.
    losses = torch.where(b == 0, 0.0, -b * u.log_softmax(1)).sum(1).reshape(-1)
    if inputs.sample_weight is not None:
        losses = losses * inputs.sample_weight
    normalizer = problem.normalizer_of(inputs)
    rows = torch.ones_like(losses, dtype=torch.float64)
    divisor = reference.denominator_of(normalizer, rows > 0, rows, inputs.sample_weight)
    return reference.reduce(losses, problem.reduction_name, normalizer, divisor)
