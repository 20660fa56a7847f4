"""The options that the losses share, and the checks that do not depend on the positions."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .._ops import dispatch, reference
from .._ops.calibration_form import CalibrationForm
from .._ops.codes import NORMALIZERS
from .._ops.schemas import Layout
from ..errors import ArgumentError
from .arguments import (
    check_bool,
    check_choice,
    check_integer,
    check_normalizer,
    check_number,
    check_reduction,
    class_vector,
    is_probability,
    positions_shape,
    row_vector,
)
from .types import BACKGROUNDS, FORMS, GRADIENT_PASSES, Normalizer


class Options(NamedTuple):
    """What a user gives; see `cross_entropy`."""

    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    sample_weight: Tensor | None = None
    normalizer: Normalizer = "weights"
    prior: Tensor | None = None
    margin: Tensor | float | None = None
    focal_gamma: float = 0.0
    inplace_backward: bool = False
    gradient: str = "auto"


class Calibration(NamedTuple):
    """What a user gives of it; see `disalign_cross_entropy`."""

    confidence: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    form: str
    background: str | None


class Validated(NamedTuple):
    """Options after their checks: class vectors (C,) of the accumulation dtype, and numbers."""

    weight: Tensor | None
    prior: Tensor | None
    margin: Tensor | None
    reduction: str
    normalizer: str | Tensor
    ignore_index: int
    label_smoothing: float
    focal_gamma: float
    in_place: bool
    gradient: str

    @property
    def numbers(self) -> tuple[int, float, float]:
        return self.ignore_index, self.label_smoothing, self.focal_gamma


def normalizer_code(normalizer: str | Tensor) -> tuple[int, Tensor | None]:
    """The operators' code for a normalizer, and its value where it is a number."""
    if isinstance(normalizer, Tensor):
        return NORMALIZERS["given"], normalizer
    return NORMALIZERS[normalizer], None


def validate_options(input: Tensor, classes: int, options: Options) -> Validated:
    """Everything of `options` but sample_weight."""
    reduction = check_reduction(options.reduction)
    check_bool("inplace_backward", options.inplace_backward)
    check_choice("gradient", options.gradient, GRADIENT_PASSES)
    ignore_index = check_integer("ignore_index", options.ignore_index)
    smoothing = check_number("label_smoothing", options.label_smoothing, 0.0, 1.0)
    gamma = check_number("focal_gamma", options.focal_gamma, 0.0)
    dtype = reference.accumulate_dtype(input.dtype)
    return Validated(
        class_vector("weight", options.weight, classes, input, dtype, exact=True),
        class_vector("prior", options.prior, classes, input, dtype),
        class_vector("margin", options.margin, classes, input, dtype),
        reduction,
        check_normalizer(options.normalizer, input),
        ignore_index,
        smoothing,
        gamma,
        options.inplace_backward,
        options.gradient,
    )


def check_gradient(given: Validated, layout: Layout, logits: Tensor, target: Tensor) -> None:
    """Refuses gradient="forward" where forward cannot make the gradient of these logits."""
    if given.gradient != "forward":
        return
    if torch.compiler.is_compiling():
        refuse_in_forward("under torch.compile")
    if given.reduction == "none":
        refuse_in_forward("where reduction is 'none'")
    if given.in_place:
        refuse_in_forward("where inplace_backward is True")
    if target.requires_grad:
        refuse_in_forward("where target requires a gradient")
    if not dispatch.makes_in_forward(layout, logits):
        refuse_in_forward(
            f"for {layout.name} logits on {logits.device.type} by the "
            f"{dispatch.serving_backend(logits)} backend"
        )


def refuse_in_forward(where: str) -> NoReturn:
    raise ArgumentError(f"gradient must be 'auto' or 'backward' {where}, got 'forward'")


def check_probability_options(
    options: Options, given: Validated, default_ignore_index: int = -100
) -> None:
    """Refuses what has no meaning where target holds class probabilities."""
    if options.margin is not None:
        raise ArgumentError(
            "margin must be None where target holds class probabilities, which have no one class "
            f"to take it from, got a {type(options.margin).__name__}"
        )
    if given.focal_gamma:
        raise ArgumentError(
            f"focal_gamma must be 0 where target holds class probabilities, got {given.focal_gamma}"
        )
    if given.ignore_index >= 0 and given.ignore_index != default_ignore_index:
        raise ArgumentError(
            "ignore_index must be negative where target holds class probabilities, since no "
            f"position can be ignored, got {given.ignore_index}"
        )


def validate_calibration(
    input: Tensor, classes: int, calibration: Calibration
) -> tuple[Tensor, Tensor, Tensor, CalibrationForm]:
    """Scale and bias of the calibrated classes and the confidence (positions,), flat and of the
    accumulation dtype; and how scale and bias become those of all classes.
    """
    confidence, scale, bias, form, background = calibration
    check_choice("form", form, FORMS)
    check_choice("background", background, BACKGROUNDS)
    dtype = reference.accumulate_dtype(input.dtype)
    foreground = classes - (background is not None)
    a, b = (
        class_vector(name, value, foreground, input, dtype, learned=True, background=background)
        for name, value in (("scale", scale), ("bias", bias))
    )
    c = row_vector("confidence", confidence, input, positions_shape(input), dtype, learned=True)
    for name, vector in (("scale", a), ("bias", b), ("confidence", c)):
        if vector is None:
            raise ArgumentError(f"{name} must be a tensor, got None")
    assert a is not None
    assert b is not None
    assert c is not None
    if is_probability(c):
        raise ArgumentError(
            "confidence must be what goes into the sigmoid, got the output of a sigmoid: it is "
            "applied here, to what a layer gives; of a probability p pass torch.logit(p)"
        )
    return a, b, c, CalibrationForm.of(form, background)


def calibration_vectors(
    input: Tensor, classes: int, calibration: Calibration | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """a, b (C,) and the confidence (positions,) of u = (1 + c a) z + c b, c = sigmoid(confidence).

    classes: their number, where it is not the input's.
    """
    if calibration is None:
        return None, None, None
    a, b, c, calibration_form = validate_calibration(input, classes, calibration)
    return (*calibration_form.vectors(a, b), c)


def output(
    input: Tensor, loss: Tensor, shape: torch.Size | None, *promoting: Tensor | None
) -> Tensor:
    """The loss in the dtype that F.cross_entropy has, of the positions' shape unless None.

    promoting: class probabilities and their weight, whose dtype may be the wider one.
    """
    wanted = input.dtype
    for other in promoting:
        if other is not None:
            wanted = torch.promote_types(wanted, other.dtype)
    if loss.dtype is not wanted:  # half logits, whose loss is float32; or a float64 denominator
        if wanted in (torch.bfloat16, torch.float16):
            # Under autocast F.cross_entropy yields float32; the half logits are not copied.
            device = input.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                wanted = torch.float32
        loss = loss.to(wanted)
    return loss if shape is None else loss.reshape(shape)
