"""What the public losses share: their options checked, and the way to a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ops import autograd, composed, layouts, reference
from .._ops.dispatch import composes, operators_of, serving_backend
from ..errors import ArgumentError
from .arguments import (
    check_bool,
    check_choice,
    check_input,
    check_integer,
    check_number,
    check_target,
    class_vector,
    given_denominator,
    given_reduction,
    is_probability,
    positions_shape,
    row_vector,
)
from .types import BACKGROUNDS, FORMS, Normalizer


@dataclass(slots=True)
class Options:
    """Keywords that both losses share; see `cross_entropy`."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    sample_weight: Tensor | None
    normalizer: Normalizer
    prior: Tensor | None
    margin: Tensor | float | None
    focal_gamma: float
    inplace_backward: bool


def calibration_vectors(
    input: Tensor,
    confidence: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    form: str,
    background: str | None,
    classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b (C,) and the confidence (rows,) of u = (1 + c a) z + c b, c = sigmoid(confidence).

    classes: their number, if it is not the input's.
    """
    a, b, c = given_calibration(input, confidence, scale, bias, form, background, classes)
    return (*layouts.Extension.of(form, background).vectors(a, b), c)


def given_calibration(
    input: Tensor,
    confidence: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    form: str,
    background: str | None,
    classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scale and bias of the calibrated classes and the confidence (rows,), checked, flat."""
    if composed.is_tracing():
        with composed.unrecorded():
            given_calibration(input, confidence, scale, bias, form, background, None)
        dtype = reference.accumulate_dtype(input.dtype)
        foreground = input.shape[min(1, input.dim() - 1)] - int(background is not None)
        a, b, c = (_recorded(v, input, dtype) for v in (scale, bias, confidence))
        assert a is not None
        assert b is not None
        assert c is not None
        return a.expand(foreground).contiguous(), b.expand(foreground).contiguous(), c
    check_choice("form", form, FORMS)
    check_choice("background", background, BACKGROUNDS)
    classes = check_input(input) if classes is None else classes
    dtype = reference.accumulate_dtype(input.dtype)
    foreground = classes - (background is not None)
    a, b = (
        class_vector(name, value, foreground, input, dtype, learned=True, background=background)
        for name, value in (("scale", scale), ("bias", bias))
    )
    c = row_vector("confidence", confidence, input, positions_shape(input), dtype, learned=True)
    for name, vector in (("scale", a), ("bias", b), ("confidence", c)):
        if vector is None:
            raise ArgumentError(f"{name} is None, needed is a tensor")
    assert a is not None
    assert b is not None
    assert c is not None
    if is_probability(c):
        raise ArgumentError(
            "confidence must be what goes into the sigmoid, got the output of a sigmoid: it is "
            "applied here, to what a layer gives; of a probability p pass torch.logit(p)"
        )
    return a, b, c


@dataclass(slots=True)
class Checked:
    """Options after their checks: class vectors (C,) of the accumulation dtype, and numbers."""

    weight: Tensor | None
    prior: Tensor | None
    margin: Tensor | None
    normalizer: str | Tensor
    numbers: tuple[int, float, float]  # ignore_index, label_smoothing, focal_gamma


def checked(input: Tensor, classes: int, options: Options) -> Checked:
    """Everything of `options` that does not depend on the positions."""
    options.reduction = given_reduction(options.reduction)
    check_bool("inplace_backward", options.inplace_backward)
    ignore_index = check_integer("ignore_index", options.ignore_index)
    smoothing = check_number("label_smoothing", options.label_smoothing, 0.0, 1.0)
    gamma = check_number("focal_gamma", options.focal_gamma, 0.0)
    dtype = reference.accumulate_dtype(input.dtype)
    return Checked(
        class_vector("weight", options.weight, classes, input, dtype, exact=True),
        class_vector("prior", options.prior, classes, input, dtype),
        class_vector("margin", options.margin, classes, input, dtype),
        given_denominator(options.normalizer, input),
        (ignore_index, smoothing, gamma),
    )


def output(input: Tensor, loss: Tensor, shape: torch.Size | None) -> Tensor:
    """The loss in the dtype that F.cross_entropy has, of the positions' shape unless None."""
    wanted = input.dtype
    if loss.dtype != wanted:  # half logits, whose loss is float32; or a float64 denominator
        if wanted in (torch.bfloat16, torch.float16):
            # Under autocast F.cross_entropy yields float32; the half logits are not copied.
            device = input.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                wanted = torch.float32
        loss = loss.to(wanted)
    return loss if shape is None else loss.reshape(shape)


def loss(
    input: Tensor,
    target: Tensor,
    calibration: tuple[Tensor, ...] | None,
    options: Options,
    extension: layouts.Extension = layouts.WHOLE,
) -> Tensor:
    """Of logits; calibration: as from `calibration_vectors`, or, with their extension, as from
    `given_calibration`.
    """
    if composed.is_tracing():
        return _recorded_loss(input, target, calibration, options, extension)
    classes = check_input(input)
    shape = positions_shape(input)
    check_target(input, target, shape)
    given = checked(input, classes, options)
    dtype = reference.accumulate_dtype(input.dtype)
    sample_weight = row_vector("sample_weight", options.sample_weight, input, shape, dtype)
    a, b, c = calibration or (None, None, None)
    probabilities = target.is_floating_point()
    backend = "reference" if probabilities else serving_backend(input)
    if backend == "reference" and a is not None and b is not None:
        a, b = extension.vectors(a, b)
    stem, flat_logits, copied = layouts.flatten(input)
    in_place = options.inplace_backward and layouts.check_in_place(input, flat_logits, copied)
    if backend != "reference":
        if backend == "triton":
            check_classes(target, classes, given.numbers[0])
        loss = autograd.loss(
            operators_of(stem, backend),
            (
                flat_logits, target.contiguous(), given.weight, a, b, c, given.prior, given.margin,
                sample_weight,
            ),
            given.numbers,
            options.reduction,
            given.normalizer,
            in_place,
            extension,
        )[0]  # fmt: skip
    else:
        vectors: dict[str, Any] = {
            "weight": given.weight, "scale": a, "bias": b, "confidence": c, "prior": given.prior,
        }  # fmt: skip
        if probabilities:
            loss = _soft_loss(layouts.rows(input), target, vectors, given, options)
        else:
            check_classes(target, classes, given.numbers[0])
            vectors |= {"sample_weight": sample_weight, **reference_options(given, options)}
            if composes(backend):
                loss = composed.cross_entropy(flat_logits, target, **vectors)
            else:
                loss = reference.cross_entropy(layouts.rows(input), target, **vectors)
    return output(input, loss, shape if options.reduction == "none" else None)


def _recorded(value: Any, input: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A vector of classes or positions that was checked, flat, in the graph of torch.jit.trace."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else value.reshape(-1).to(dtype)
    return torch.full((1,), float(value), dtype=dtype, device=input.device)


def _recorded_loss(
    input: Tensor,
    target: Tensor,
    calibration: tuple[Tensor, ...] | None,
    options: Options,
    extension: layouts.Extension,
) -> Tensor:
    """`loss` for torch.jit.trace: for any number of positions; the checks are not recorded."""
    with composed.unrecorded():
        loss(input, target, calibration, options, extension)
    dtype = reference.accumulate_dtype(input.dtype)
    flat = input.flatten(2) if input.dim() > 2 else input.reshape(-1, input.shape[-1])
    a, b, c = calibration or (None, None, None)
    if a is not None and b is not None:
        a, b = composed.extended(a, b, *extension)
    weight, prior, margin, sample_weight = (
        _recorded(v, input, dtype)
        for v in (options.weight, options.prior, options.margin, options.sample_weight)
    )
    normalizer = given_denominator(options.normalizer, input)
    divided = options.reduction == "mean" and isinstance(normalizer, Tensor)
    if target.is_floating_point():
        u = flat.to(dtype)
        if a is not None and b is not None and c is not None:
            u = reference.calibrate(flat, a, b, c)
        if prior is not None:
            u = u + (prior[:, None] if u.dim() == 3 else prior)
        found = composed.torch_cross_entropy(
            u, target.reshape(u.shape).to(dtype), weight, label_smoothing=options.label_smoothing,
            reduction="sum" if divided else options.reduction,
        )  # fmt: skip
        if isinstance(normalizer, Tensor) and divided:
            found = (found / normalizer).to(dtype)
    else:
        if margin is not None:
            margin = margin.expand(flat.shape[1])
        found = composed.cross_entropy(
            flat, target, weight=weight, scale=a, bias=b, confidence=c, prior=prior, margin=margin,
            sample_weight=sample_weight, ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing, focal_gamma=options.focal_gamma,
            reduction=options.reduction, normalizer=normalizer,
        )  # fmt: skip
    found = output(input, found, None)
    if options.reduction != "none":
        return found
    if target.is_floating_point():
        return found.reshape(input.select(min(1, input.dim() - 1), 0).shape)
    return found.reshape(target.shape)


def reference_options(given: Checked, options: Options) -> dict[str, Any]:
    """What every loss of _ops/reference.py takes beside vectors of classes and positions."""
    ignore_index, smoothing, gamma = given.numbers
    return {
        "margin": given.margin,
        "ignore_index": ignore_index,
        "label_smoothing": smoothing,
        "focal_gamma": gamma,
        "reduction": options.reduction,
        "normalizer": given.normalizer,
    }


def _soft_loss(
    rows: Tensor,
    target: Tensor,
    vectors: dict[str, Any],
    given: Checked,
    options: Options,
) -> Tensor:
    """Class probabilities: what has no meaning with them is refused; the reference computes."""
    for name in ("sample_weight", "margin"):
        if getattr(options, name) is not None:
            raise ArgumentError(f"{name} is given, and target holds class probabilities: needed "
                                "are class indices")  # fmt: skip
    ignore_index, smoothing, gamma = given.numbers
    if gamma:
        raise ArgumentError("focal_gamma is given, and target holds class probabilities: needed "
                            "are class indices")  # fmt: skip
    if ignore_index >= 0:
        raise ArgumentError(
            f"ignore_index is {ignore_index}, and target holds class probabilities: no "
            "position can be ignored"
        )
    return reference.soft_cross_entropy(
        rows,
        layouts.rows(target),
        **vectors,
        reduction=options.reduction,
        normalizer=given.normalizer,
        label_smoothing=smoothing,
    )


def check_classes(
    target: Tensor, classes: int, ignore_index: int, *, asserted: bool = True
) -> None:
    """IndexError for a target that is no class, on the CPU. Other devices assert: in the kernel if
    it is `asserted` there, or else here.
    """
    on_cpu = target.device.type == "cpu"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if not on_cpu and asserted:
        return
    flat = target.reshape(-1)
    bad = reference.no_class(flat, classes, ignore_index)
    if not on_cpu:
        torch._assert_async(~bad.any(), f"target is no class of {classes}")
        return
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        message = (
            f"Target {int(flat[at])} is out of bounds: target[{at}], the logits have {classes} "
            f"classes and ignore_index is {ignore_index}"
        )
        raise IndexError(autograd.name_position(message, target.shape))
