"""The one way in: a call of a loss is validated, which makes it a problem, and computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import composed, dispatch, layouts, reference
from .._ops.calibration_form import UNCHANGED, CalibrationForm
from .._ops.codes import NORMALIZERS, REDUCTIONS
from .._ops.problem import Inputs, Problem
from .._ops.schemas import ROW
from ..errors import ArgumentError
from . import sharded, tracing
from .arguments import check_input, check_target, is_probability, positions_shape, row_vector
from .options import (
    Calibration,
    Options,
    Validated,
    calibration_vectors,
    check_gradient,
    normalizer_code,
    output,
    refuse_in_forward,
    validate_calibration,
    validate_options,
)
from .shard import Shard
from .types import BACKGROUNDS, FORMS

_AUTO = Options().gradient
_MEAN, _NONE, _WEIGHTS = REDUCTIONS["mean"], REDUCTIONS["none"], NORMALIZERS["weights"]
# `type(x) in`, not isinstance: a subclass may mean anything by its attributes.
_TENSORS = (Tensor, torch.nn.Parameter)
_CALIBRATION_FORMS = {
    (form, where): CalibrationForm.of(form, where) for form in FORMS for where in BACKGROUNDS
}


def loss(
    input: Tensor,
    target: Tensor,
    options: Options,
    calibration: Calibration | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """The loss of logits, as `cross_entropy` gives it."""
    if shard is not None:
        return sharded.loss(input, target, options, calibration, shard)
    call = validate(input, target, options, calibration)
    if call is None:
        if composed.is_tracing():
            return tracing.loss(input, target, options, calibration, loss)
        return _probability_loss(input, target, options, calibration)
    found = dispatch.compute(*call)[0]
    if call[1].reduction == _NONE:
        return output(input, found, positions_shape(input))
    return found if found.dtype is input.dtype else output(input, found, None)


def validate(
    input: Tensor, target: Tensor, options: Options, calibration: Calibration | None
) -> tuple[Inputs, Problem] | None:
    """Checks the arguments and returns what `dispatch.compute` takes.

    Returns None where the target holds class probabilities and where torch.jit traces the call:
    these have ways of their own. Raises ArgumentError or ArgumentTypeError for a wrong argument.
    """
    # First the calls that most training loops make: rows that the operators take as they are, and
    # no options beyond F.cross_entropy's. The checks below would cost a batch of 64 x 1000 logits
    # a tenth of its step.
    (
        weight, ignore_index, reduction, smoothing, sample_weight, normalizer, prior, margin, gamma,
        inplace_backward, gradient,
    ) = options  # fmt: skip
    if (
        type(input) is type(target) is Tensor
        and reduction == "mean"
        and sample_weight is prior is margin is None
        and type(normalizer) is str
        and normalizer == "weights"
        and inplace_backward is False
        and gradient is _AUTO
        and type(gamma) is type(smoothing) is float
        and not gamma
        and 0.0 <= smoothing <= 1.0
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and target.dtype is torch.int64
        and input.dim() == 2
        and target.dim() == 1
        and (dtype := _ARITHMETIC.get(input.dtype)) is not None
    ):
        rows, classes, device = input.size(0), input.size(1), input.device
        if (
            type(classes) is int  # under torch.jit.trace a tensor
            and classes > 0
            and input.stride(1) == 1
            and target.size(0) == rows
            and ((input.is_cpu and target.is_cpu) or target.device == device)
            and target.is_contiguous()
            and (
                weight is None
                or (_is_vector(weight, dtype, classes, device) and not weight.requires_grad)
            )
        ):
            numbers = (ignore_index, smoothing, 0.0)
            if calibration is None:
                return Inputs(input, target, weight), Problem(ROW, numbers, _MEAN, _WEIGHTS)
            c, a, b, form, background = calibration
            calibration_form = None
            if type(form) is str and (background is None or type(background) is str):
                calibration_form = _CALIBRATION_FORMS.get((form, background))
            calibrated = classes - (background is not None)
            if type(c) is Tensor and c.dim() == 2 and c.shape[1] == 1:
                c = c.reshape(-1)
            if (
                calibration_form is not None
                and _is_vector(a, dtype, calibrated, device)
                and _is_vector(b, dtype, calibrated, device)
                and _is_vector(c, dtype, rows, device)
                and not is_probability(c)
            ):
                inputs = Inputs(input, target, weight, a, b, c)
                return inputs, Problem(ROW, numbers, _MEAN, _WEIGHTS, calibration_form)

    if composed.is_tracing() or (isinstance(target, Tensor) and target.is_floating_point()):
        return None
    classes = check_input(input)
    positions = positions_shape(input)
    check_target(input, target, positions)
    given = validate_options(input, classes, options)
    dtype = reference.accumulate_dtype(input.dtype)
    v = row_vector("sample_weight", options.sample_weight, input, positions, dtype)
    a = b = c = None
    calibration_form = UNCHANGED
    if calibration is not None:
        a, b, c, calibration_form = validate_calibration(input, classes, calibration)
    layout, flat, copied = layouts.flatten(input)
    check_gradient(given, layout, flat)
    in_place = given.in_place and layouts.check_in_place(input, flat, copied)
    code, denominator = normalizer_code(given.normalizer)
    return (
        Inputs(
            flat, target.contiguous(), given.weight, a, b, c, given.prior, given.margin, v,
            denominator,
        ),
        Problem(
            layout, given.numbers, REDUCTIONS[given.reduction], code, calibration_form, in_place,
            gradient=given.gradient,
        ),
    )  # fmt: skip


_ARITHMETIC = {
    dtype: reference.accumulate_dtype(dtype)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


def _is_vector(vector: Any, dtype: torch.dtype, entries: int, device: torch.device) -> bool:
    """Whether this is a contiguous vector of that dtype and length on that device."""
    return (
        type(vector) in _TENSORS
        and vector.dtype is dtype
        and vector.dim() == 1
        and vector.size(0) == entries
        and vector.device == device
        and vector.is_contiguous()
    )


def _probability_loss(
    input: Tensor, target: Tensor, options: Options, calibration: Calibration | None
) -> Tensor:
    """Class probabilities: what has no meaning with them is refused; the reference computes."""
    classes = check_input(input)
    positions = positions_shape(input)
    check_target(input, target, positions)
    given = validate_options(input, classes, options)
    _check_probability_options(options, given)
    if given.gradient == "forward":
        refuse_in_forward("where target holds class probabilities")
    a, b, c = calibration_vectors(input, classes, calibration)
    rows = layouts.rows(input)
    if given.in_place:
        layouts.check_in_place(input, *layouts.flatten(input)[1:])
    found = reference.soft_cross_entropy(
        rows, layouts.rows(target), weight=given.weight, scale=a, bias=b, confidence=c,
        prior=given.prior, reduction=given.reduction, normalizer=given.normalizer,
        label_smoothing=given.label_smoothing,
    )  # fmt: skip
    shape = positions if given.reduction == "none" else None
    return output(input, found, shape, target, options.weight)


def _check_probability_options(options: Options, given: Validated) -> None:
    for name in ("sample_weight", "margin"):
        if getattr(options, name) is not None:
            raise ArgumentError(
                f"{name} must be None where target holds class probabilities, got a "
                f"{type(getattr(options, name)).__name__}"
            )
    if given.focal_gamma:
        raise ArgumentError(
            f"focal_gamma must be 0 where target holds class probabilities, got {given.focal_gamma}"
        )
    if given.ignore_index >= 0:
        raise ArgumentError(
            "ignore_index must be negative where target holds class probabilities, since no "
            f"position can be ignored, got {given.ignore_index}"
        )
