"""Autograd of the operators: what forward keeps, what backward makes of it.

A stem's forward reads the logits once. With a scalar reduction it also yields the gradients of
scale, bias and confidence for an upstream gradient of 1. The gradient of the logits is made by the
stem's backward, or, in eager mode on the CPU for float32 and float64, in forward while the logits
are in the cache (which costs one read of the logits and one exponential less). What forward made,
backward multiplies by the real upstream gradient, without a second read. The gradient of the logits
is handed over by the first backward, the very tensor; a second one makes it anew.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from . import reference
from .layouts import WHOLE, Extension
from .schemas import (
    DENOMINATOR,
    DIFFERENTIABLE,
    GIVEN_NORMALIZER,
    NORMALIZERS,
    OPTIONS,
    REDUCTIONS,
    STEMS,
    TENSORS,
    UPSAMPLE,
    Stem,
    library,
)

_RESULTS = 8  # of every forward; a stem's details follow
_SCALE = DIFFERENTIABLE[1]  # where scale stands among the operators' arguments; bias is next


def _extended(arguments: tuple[Any, ...], extension: Extension) -> tuple[Any, ...]:
    """An operator's arguments, scale and bias of all classes in place of those given."""
    if arguments[_SCALE] is None or extension == WHOLE:
        return arguments
    vectors = extension.vectors(arguments[_SCALE], arguments[_SCALE + 1])
    return (*arguments[:_SCALE], *vectors, *arguments[_SCALE + 2 :])


def _save(
    ctx: Any,
    stem: Stem,
    inputs: tuple[Any, ...],
    outputs: tuple[Tensor, ...],
    extension: Extension = WHOLE,
    given: tuple[Tensor | None, ...] = (),
) -> None:
    """Keeps what backward needs: the operator's tensors, its statistics, the gradients it made; and
    scale and bias as given, of which the operator's are the extension.
    """
    ctx.call = stem, extension, inputs[OPTIONS:]
    ctx.untaken = [True]  # emptied when a backward takes the gradient of the logits made here
    logits, scale, bias, confidence = inputs[-4:]  # wanted of forward
    ctx.save_for_backward(
        *inputs[:OPTIONS],
        *outputs[1:4],
        outputs[4] if logits else None,
        outputs[5] if scale else None,
        outputs[6] if bias else None,
        outputs[7] if confidence else None,
        *given,
    )


def take(ctx: Any, made: Tensor, grad_loss: Tensor) -> Tensor | None:
    """The gradient of the logits that forward made, for an upstream gradient: itself, and so but
    once; None when it is taken.
    """
    functorch = torch._C._functorch
    if (
        type(made) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or functorch.is_legacy_batchedtensor(grad_loss)
        or functorch.is_functorch_wrapped_tensor(grad_loss)
    ):
        # A fake or traced one has no value, and a batch of upstream gradients as many results.
        return None if not ctx.untaken else made * grad_loss
    try:
        ctx.untaken.pop()  # atomic: of several threads' backwards, one has it
    except IndexError:
        return None
    # .data: a tensor of its own over the same memory, so that autograd may keep it as the leaf's
    # .grad without a copy, and changes to it are not changes to what we saved.
    whole = made.data
    return whole if grad_loss.item() == 1 else whole.mul_(grad_loss)


def gradients(
    ctx: Any,
    saved: tuple[Any, ...],
    grad_loss: Tensor,
    need: tuple[bool, ...],
    in_place: bool,
) -> list[Tensor | None]:
    """The gradients of logits, scale, bias and confidence, None where not needed; saved: what _save
    keeps.
    """
    if torch.is_grad_enabled():
        if in_place:
            raise RuntimeError(
                "inplace_backward=True cannot be differentiated twice (create_graph=True): the "
                "logits are overwritten by their gradient"
            )
        return _differentiable_backward(ctx, grad_loss, saved, need)

    dtype = saved[10].dtype  # of the statistics: the accumulation dtype
    if grad_loss.dtype != dtype:
        grad_loss = grad_loss.to(dtype)
    if grad_loss.dim():
        grad_loss = grad_loss.contiguous()
    stem, extension, options = ctx.call
    grads: list[Tensor | None] = [None] * 4
    made = saved[13:17]
    if need[0] and made[0] is not None:
        grads[0] = take(ctx, made[0], grad_loss)
    for k in (1, 2, 3):
        if need[k] and made[k] is not None:
            grads[k] = (extension.gradient(made[k]) if k < 3 else made[k]) * grad_loss
    # The gradient of the logits too where an earlier backward gave it away: the caller may have
    # changed it.
    missing = [n and g is None for n, g in zip(need, grads, strict=True)]
    if True in missing:
        backward = stem.backward(in_place and need[0])
        fresh = backward(
            grad_loss, *saved[:TENSORS], *saved[10:13], *options[: stem.options], *missing
        )
        for k in range(4):
            if missing[k]:
                grads[k] = extension.gradient(fresh[k]) if k in (1, 2) else fresh[k]
        if in_place and need[0]:
            grads[0] = saved[0].data
            torch.autograd.graph.increment_version(saved[0])
    return grads


def _differentiable_backward(
    ctx: Any, grad_loss: Tensor, saved: tuple[Any, ...], need: tuple[bool, ...]
) -> list[Tensor | None]:
    """The same gradients through the reference, so that they can be differentiated again."""
    logits, target, weight, scale, bias, confidence, prior, margin, sample_weight = saved[:TENSORS]
    if saved[17:]:
        scale, bias = saved[17:]
    given = saved[DENOMINATOR]
    stem, extension, options = ctx.call
    ignore_index, smoothing, gamma, *stem_options = options[: stem.options]
    reduction, normalizer = options[stem.options : stem.options + 2]
    names = {code: name for name, code in NORMALIZERS.items()}
    with torch.enable_grad():
        a, b = (scale, bias) if scale is None else extension.vectors(scale, bias)
        loss = stem.reference(
            logits,
            target,
            *stem_options,
            weight=weight,
            scale=a,
            bias=b,
            confidence=confidence,
            prior=prior,
            margin=margin,
            sample_weight=sample_weight,
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            focal_gamma=gamma,
            reduction={code: name for name, code in REDUCTIONS.items()}[reduction],
            normalizer=given if given is not None else names[normalizer],
        )
    inputs = [t for t, n in zip((logits, scale, bias, confidence), need, strict=True) if n]
    found = iter(torch.autograd.grad(loss, inputs, grad_loss, create_graph=True))
    return [next(found) if n else None for n in need]


def _operator_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    need = tuple(ctx.needs_input_grad[i] for i in DIFFERENTIABLE)
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    found = gradients(ctx, ctx.saved_tensors, grad_loss, need, in_place=False)
    for i, grad in zip(DIFFERENTIABLE, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def _operator_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], stem: Stem
) -> None:
    _save(ctx, stem, inputs, output)


def register(stem: Stem, lib: torch.library.Library | None = None) -> None:
    """Autograd of a stem's loss and calibrated logits under the dispatcher, as torch.compile and
    `calibrate` take it.
    """
    name = f"disalign_ops::{stem.prefix}{stem.name}_"
    torch.library.register_autograd(
        name + "forward",
        _operator_backward,
        setup_context=functools.partial(_operator_context, stem=stem),
        lib=lib,
    )
    if stem.name != UPSAMPLE.name:
        torch.library.register_autograd(
            name + "calibrate",
            functools.partial(_calibrate_backward, stem=stem),
            setup_context=_save_calibrate,
            lib=lib,
        )


class _EagerLoss(torch.autograd.Function):
    """A stem in eager mode: less overhead than the dispatcher's autograd, and in place."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        confidence: Tensor | None,
        stem: Stem,
        arguments: tuple[Any, ...],
        in_place: bool,
        extension: Extension,
    ) -> Any:
        # The four tensors are those of `arguments`, given apart for autograd to see.
        with torch._C._AutoDispatchBelowAutograd():
            extended = _extended(arguments, extension)
            outputs = stem.forward(*extended)
        given = () if extended is arguments else (scale, bias)
        _save(ctx, stem, extended, outputs, extension, given)
        ctx.in_place = in_place
        if len(outputs) == _RESULTS:
            return outputs[0]
        details = outputs[_RESULTS:]
        ctx.mark_non_differentiable(*details)
        return (outputs[0], *details)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need = ctx.needs_input_grad[:4]
        grads = gradients(ctx, ctx.saved_tensors, grad_loss, need, ctx.in_place)
        return (*grads, None, None, None, None)


def on_cpu(stem: Stem, logits: Tensor) -> bool:
    """Whether the CPU kernels serve, which make more in forward: the logits are in the cache."""
    return stem.native and logits.device.type == "cpu"


def _gradient_in_forward(stem: Stem, logits: Tensor) -> bool:
    """Whether forward may make the gradient of the logits; half precision would underflow."""
    return on_cpu(stem, logits) and logits.dtype in (torch.float32, torch.float64)


def _class_sums_in_forward(stem: Stem, logits: Tensor) -> bool:
    """Whether forward makes the gradients of scale, bias and confidence on the way.

    Upsampling on a GPU makes them in backward: there they cost the low-resolution logits once more,
    in forward every output position.
    """
    return stem.name != UPSAMPLE.name or on_cpu(stem, logits)


def loss(
    stem: Stem,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    reduction: str,
    normalizer: str | Tensor,
    in_place: bool,
    extension: Extension = WHOLE,
) -> tuple[Tensor, ...]:
    """The loss through a stem's operators, in the accumulation dtype ('none': flat), and details.

    tensors: logits, target, weight, scale, bias, confidence, prior, margin, sample_weight, as the
    operator takes them, vectors flat, contiguous and of the accumulation dtype; but the operator
    takes the extension of scale and bias. (In eager mode that is made below autograd, which costs
    a small batch less than its nodes would.)
    """
    logits, target, _, scale, bias, confidence = tensors[:6]
    assert logits is not None
    assert target is not None
    grad = torch.is_grad_enabled()
    need = [grad and t is not None and t.requires_grad for t in (logits, scale, bias, confidence)]
    compiling = torch.compiler.is_compiling()
    want = [False] * 4  # of need, what forward makes
    if reduction != "none" and True in need:
        in_forward = _gradient_in_forward(stem, logits) and not compiling and not in_place
        want[0] = need[0] and in_forward
        if scale is not None and _class_sums_in_forward(stem, logits):
            want[1:] = need[1:]
    if isinstance(normalizer, Tensor):
        given, code = normalizer, GIVEN_NORMALIZER
    else:
        given, code = None, NORMALIZERS[normalizer]
    arguments = (*tensors, given, *options, REDUCTIONS[reduction], code, *want)
    if compiling:
        outputs = stem.forward(*_extended(arguments, extension))
        return (outputs[0], *(t.detach() for t in outputs[_RESULTS:]))
    try:
        if True not in need:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = stem.forward(*_extended(arguments, extension))
            return (outputs[0], *outputs[_RESULTS:])
        found = _EagerLoss.apply(  # type: ignore[no-untyped-call]
            logits, scale, bias, confidence, stem, arguments, in_place, extension
        )
    except RuntimeError as error:
        raise_for_target(error, target)
        raise
    return found if isinstance(found, tuple) else (found,)


def raise_for_target(error: RuntimeError, target: Tensor) -> None:
    """An operator's error about a target that is no class, as the IndexError of F.cross_entropy:
    the stable ABI throws nothing but RuntimeError.
    """
    message = str(error)
    if message.startswith("IndexError: "):
        message = name_position(message.removeprefix("IndexError: "), target.shape)
        raise IndexError(message) from None


def name_position(message: str, shape: torch.Size) -> str:
    """An error's flat `target[i]` as indices into a target of `shape`: `target[n, y, x]`."""

    def indices(match: re.Match[str]) -> str:
        found = torch.unravel_index(torch.tensor(int(match[1]), device="cpu"), shape)
        return "target[" + ", ".join(str(int(i)) for i in found) + "]"

    return re.sub(r"target\[(\d+)\]", indices, message, count=1) if len(shape) > 1 else message


def _save_calibrate(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _calibrate_backward(ctx: Any, grad_output: Tensor, stem: Stem) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    need = list(ctx.needs_input_grad)
    if torch.is_grad_enabled():
        with torch.enable_grad():
            u = reference.calibrate(*tensors).to(tensors[0].dtype)
        inputs = [t for t, n in zip(tensors, need, strict=True) if n]
        found = iter(torch.autograd.grad(u, inputs, grad_output, create_graph=True))
        return tuple(next(found) if n else None for n in need)
    grads = stem.operator("calibrate_backward")(grad_output.contiguous(), *tensors, *need)
    return tuple(g if n else None for g, n in zip(grads, need, strict=True))


for _stem in STEMS:
    register(_stem, library)


def calibrate(
    stem: Stem, logits: Tensor, scale: Tensor, bias: Tensor, confidence: Tensor
) -> Tensor:
    """(1 + c a) z + c b of (N, C) or (N, C, S) logits, in their dtype; vectors as in `loss`."""
    calibrated: Tensor = stem.operator("calibrate")(logits, scale, bias, confidence)
    return calibrated
