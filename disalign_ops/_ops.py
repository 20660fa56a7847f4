"""Schemas, fakes and autograd of the native operators; the compiled library registers the kernels.

`row_forward` reads the logits once. With a scalar reduction it also yields the gradients of scale,
bias and confidence for an upstream gradient of 1, which backward multiplies by the real one, so a
second read is never needed for them. The gradient of the logits is made by `row_backward`, or, in
eager mode on the CPU for float32 and float64, in forward while the row is in the cache (which
costs one read of the logits and one exponential less) and handed over by the first backward.

Below autograd an operator cannot know which gradients are wanted, so it is told by flags.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends, reference

NORMALIZERS = {"weights": 0, "valid": 1, "count": 2}
_GIVEN_NORMALIZER = 3
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

_INPUTS = (
    "logits, Tensor target, Tensor? weight, Tensor? scale, Tensor? bias, Tensor? confidence, "
    "Tensor? prior, Tensor? margin, Tensor? sample_weight"
)
_OPTIONS = "int ignore_index, float label_smoothing, float focal_gamma"
_WANTED = "bool want_logits, bool want_scale, bool want_bias, bool want_confidence"
_STATISTICS = "Tensor row_max, Tensor row_sum, Tensor denominator"

_library = torch.library.Library("disalign_ops", "DEF")
_library.define("build_info() -> str")
_library.define(
    f"row_forward(Tensor {_INPUTS}, Tensor? denominator, {_OPTIONS}, int reduction, "
    f"int normalizer, {_WANTED}) -> (Tensor loss, {_STATISTICS}, Tensor grad_logits, "
    "Tensor grad_scale, Tensor grad_bias, Tensor grad_confidence)"
)
_library.define(
    f"row_backward(Tensor grad_loss, Tensor {_INPUTS}, {_STATISTICS}, {_OPTIONS}, {_WANTED})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
# Writes the gradient over the logits; the first of the four results stays empty.
_library.define(
    f"row_backward_(Tensor grad_loss, Tensor(a!) {_INPUTS}, {_STATISTICS}, {_OPTIONS}, {_WANTED})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "row_calibrate(Tensor logits, Tensor scale, Tensor bias, Tensor confidence) -> Tensor"
)
_library.define(
    "row_calibrate_backward(Tensor grad_output, Tensor logits, Tensor scale, Tensor bias, "
    f"Tensor confidence, {_WANTED}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_backends.load_native()

_ops = torch.ops.disalign_ops

# Of row_forward's arguments.
_DIFFERENTIABLE = (0, 3, 4, 5)  # logits, scale, bias, confidence
_ARGUMENTS = 19


def _gradient_fakes(logits: Tensor, want: tuple[bool, ...]) -> tuple[Tensor, ...]:
    dtype = reference.accumulate_dtype(logits.dtype)
    rows, classes = logits.shape
    shapes = ((rows, classes), (classes,), (classes,), (rows,))
    dtypes = (logits.dtype, dtype, dtype, dtype)
    return tuple(
        logits.new_empty(shape if wanted else (0,), dtype=dt)
        for shape, dt, wanted in zip(shapes, dtypes, want, strict=True)
    )


@torch.library.register_fake("disalign_ops::row_forward", lib=_library)
def _row_forward_fake(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    reduction, want = args[12], args[14:]
    dtype = reference.accumulate_dtype(logits.dtype)
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    statistics = (
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((), dtype=torch.float64),
    )
    return (loss, *statistics, *_gradient_fakes(logits, want))


@torch.library.register_fake("disalign_ops::row_backward", lib=_library)
def _row_backward_fake(grad_loss: Tensor, logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _gradient_fakes(logits, args[-4:])


@torch.library.register_fake("disalign_ops::row_backward_", lib=_library)
def _row_backward_in_place_fake(
    grad_loss: Tensor, logits: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return _gradient_fakes(logits, (False, *args[-3:]))


@torch.library.register_fake("disalign_ops::row_calibrate", lib=_library)
def _row_calibrate_fake(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("disalign_ops::row_calibrate_backward", lib=_library)
def _row_calibrate_backward_fake(
    grad_output: Tensor, logits: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return _gradient_fakes(logits, args[-4:])


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keeps what backward needs: the operator's tensors, its statistics, the gradients it made."""
    ctx.options = inputs[10:13]
    ctx.reduction = inputs[13]
    ctx.normalizer = inputs[14]
    ctx.taken = False  # whether a backward has given away the gradient of the logits made here
    made = [outputs[4 + k] if inputs[15 + k] else None for k in range(4)]
    ctx.save_for_backward(*inputs[:10], *outputs[1:4], *made)


def _row_backward(
    ctx: Any, grad_loss: Tensor, need: tuple[bool, ...], in_place: bool
) -> list[Tensor | None]:
    """The gradients of logits, scale, bias and confidence, None where not needed."""
    saved = ctx.saved_tensors
    tensors, statistics, made = saved[:9], saved[10:13], list(saved[13:])
    if torch.is_grad_enabled():
        if in_place:
            raise RuntimeError(
                "inplace_backward=True cannot be differentiated twice (create_graph=True): the "
                "logits are overwritten by their gradient"
            )
        return _differentiable_backward(ctx, grad_loss, tensors, saved[9], need)

    dtype = saved[10].dtype  # of the statistics: the accumulation dtype
    if grad_loss.dtype != dtype:
        grad_loss = grad_loss.to(dtype)
    if grad_loss.dim():
        grad_loss = grad_loss.contiguous()
    if made[0] is not None:
        if ctx.taken:
            made[0] = None  # given away by an earlier backward; the caller may have changed it
        ctx.taken = True
    missing = [need[k] and made[k] is None for k in range(4)]
    grads: list[Tensor | None] = [None] * 4
    if True in missing:
        backward = _ops.row_backward_ if in_place and need[0] else _ops.row_backward
        fresh = backward(grad_loss, *tensors, *statistics, *ctx.options, *missing)
        grads = [fresh[k] if missing[k] else None for k in range(4)]
        if in_place and need[0]:
            grads[0] = tensors[0].data
            torch.autograd.graph.increment_version(tensors[0])
    for k in (1, 2, 3):
        if made[k] is not None:
            grads[k] = made[k] * grad_loss
    if made[0] is not None:
        # .data: a tensor of its own over the same memory, so that autograd may keep it as the
        # leaf's .grad without a copy, and changes to it are not changes to what we saved.
        whole = made[0].data
        if torch._C._functorch.is_legacy_batchedtensor(grad_loss):
            grads[0] = whole * grad_loss  # a batch of upstream gradients: is_grads_batched
        else:
            grads[0] = whole if grad_loss.item() == 1 else whole.mul_(grad_loss)
    return grads


def _differentiable_backward(
    ctx: Any,
    grad_loss: Tensor,
    tensors: tuple[Any, ...],
    given: Tensor | None,
    need: tuple[bool, ...],
) -> list[Tensor | None]:
    """The same gradients through the reference, so that they can be differentiated again."""
    logits, target, weight, scale, bias, confidence, prior, margin, sample_weight = tensors
    names = {code: name for name, code in NORMALIZERS.items()}
    with torch.enable_grad():
        loss = reference.cross_entropy(
            logits,
            target,
            weight=weight,
            scale=scale,
            bias=bias,
            confidence=confidence,
            prior=prior,
            margin=margin,
            sample_weight=sample_weight,
            ignore_index=ctx.options[0],
            label_smoothing=ctx.options[1],
            focal_gamma=ctx.options[2],
            reduction={code: name for name, code in REDUCTIONS.items()}[ctx.reduction],
            normalizer=given if given is not None else names[ctx.normalizer],
        )
    inputs = [t for t, n in zip((logits, scale, bias, confidence), need, strict=True) if n]
    found = iter(torch.autograd.grad(loss, inputs, grad_loss, create_graph=True))
    return [next(found) if n else None for n in need]


def _operator_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    need = tuple(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE)
    grads: list[Tensor | None] = [None] * _ARGUMENTS
    for i, grad in zip(
        _DIFFERENTIABLE, _row_backward(ctx, grad_loss, need, in_place=False), strict=True
    ):
        grads[i] = grad
    return tuple(grads)


torch.library.register_autograd(
    "disalign_ops::row_forward",
    _operator_backward,
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
    lib=_library,
)


class _EagerRowLoss(torch.autograd.Function):
    """row_forward in eager mode: less overhead than the dispatcher's autograd, and in place."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        confidence: Tensor | None,
        arguments: tuple[Any, ...],
        in_place: bool,
    ) -> Any:
        # The four tensors are those of `arguments`, given apart for autograd to see.
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _ops.row_forward.default(*arguments)
        _save(ctx, arguments, outputs)
        ctx.in_place = in_place
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = _row_backward(ctx, grad_loss, ctx.needs_input_grad[:4], ctx.in_place)
        return (*grads, None, None)


def row_loss(
    tensors: tuple[Tensor | None, ...],
    options: tuple[int, float, float],
    reduction: str,
    normalizer: str | Tensor,
    in_place: bool,
) -> Tensor:
    """The loss of rows through the native operator, in the accumulation dtype.

    tensors: logits (N, C), target (N,), weight, scale, bias, confidence, prior, margin,
    sample_weight, as the operator takes them: vectors contiguous and of the accumulation dtype.
    """
    logits = tensors[0]
    assert logits is not None
    grad = torch.is_grad_enabled()
    learned = [tensors[i] for i in _DIFFERENTIABLE]
    need = [grad and t is not None and t.requires_grad for t in learned]
    scalar = reduction != "none"
    compiling = torch.compiler.is_compiling()
    in_forward = (
        logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.float64)
        and not compiling
        and not in_place
    )
    want = (need[0] and scalar and in_forward, *(n and scalar for n in need[1:]))
    if isinstance(normalizer, Tensor):
        given, code = normalizer, _GIVEN_NORMALIZER
    else:
        given, code = None, NORMALIZERS[normalizer]
    arguments = (*tensors, given, *options, REDUCTIONS[reduction], code, *want)
    if compiling:
        loss: Tensor = _ops.row_forward(*arguments)[0]
        return loss
    try:
        if not any(need):
            with torch._C._AutoDispatchBelowAutograd():
                loss = _ops.row_forward.default(*arguments)[0]
            return loss
        loss = _EagerRowLoss.apply(*learned, arguments, in_place)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        # The stable ABI throws nothing but RuntimeError; F.cross_entropy raises IndexError here.
        message = str(error)
        if message.startswith("IndexError: "):
            raise IndexError(message.removeprefix("IndexError: ")) from None
        raise
    return loss


def _save_calibrate(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _calibrate_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    need = list(ctx.needs_input_grad)
    if torch.is_grad_enabled():
        with torch.enable_grad():
            u = reference.calibrate(*tensors).to(tensors[0].dtype)
        inputs = [t for t, n in zip(tensors, need, strict=True) if n]
        found = iter(torch.autograd.grad(u, inputs, grad_output, create_graph=True))
        return tuple(next(found) if n else None for n in need)
    grads = _ops.row_calibrate_backward(grad_output.contiguous(), *tensors, *need)
    return tuple(g if n else None for g, n in zip(grads, need, strict=True))


torch.library.register_autograd(
    "disalign_ops::row_calibrate",
    _calibrate_backward,
    setup_context=_save_calibrate,
    lib=_library,
)


def row_calibrate(logits: Tensor, scale: Tensor, bias: Tensor, confidence: Tensor) -> Tensor:
    """(1 + c a) z + c b of (N, C) logits, in their dtype; vectors as in `row_loss`."""
    calibrated: Tensor = _ops.row_calibrate(logits, scale, bias, confidence)
    return calibrated
