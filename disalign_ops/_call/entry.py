"""The one way in: a call of a loss is validated, which makes it a problem, and computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import composed, dispatch, layouts, reference
from .._ops.calibration_form import UNCHANGED, CalibrationForm
from .._ops.codes import NORMALIZERS, REDUCTIONS
from .._ops.problem import Inputs, Problem, is_soft
from .._ops.schemas import ROW
from ..errors import ArgumentError
from . import details, mixed, sharded, tracing
from .arguments import check_input, check_target, is_probability, positions_shape, row_vector
from .details import LossDetails, ReturnDetails, check_return_details
from .options import (
    Calibration,
    Options,
    check_gradient,
    check_probability_options,
    normalizer_code,
    output,
    validate_calibration,
    validate_options,
)
from .shard import Shard
from .types import BACKGROUNDS, FORMS, Target

_AUTO = Options().gradient
_MEAN, _NONE, _WEIGHTS = REDUCTIONS["mean"], REDUCTIONS["none"], NORMALIZERS["weights"]
_PLAIN = Problem(ROW, (-100, 0.0, 0.0), _MEAN, _WEIGHTS)
# `type(x) in`, not isinstance: a subclass may mean anything by its attributes.
_TENSORS = (Tensor, torch.nn.Parameter)
_CALIBRATION_FORMS = {
    (form, where): CalibrationForm.of(form, where) for form in FORMS for where in BACKGROUNDS
}


def loss(
    input: Tensor,
    target: Target,
    options: Options,
    calibration: Calibration | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """The loss of logits, as `cross_entropy` gives it."""
    if shard is not None:
        found = sharded.loss(input, target, options, calibration, shard)
        assert isinstance(found, Tensor)
        return found
    if isinstance(target, tuple):
        of_two = mixed.loss(input, target, options, calibration, validate)
        assert isinstance(of_two, Tensor)
        return of_two
    call = validate(input, target, options, calibration)
    if call is None:
        return tracing.loss(input, target, options, calibration, loss)
    inputs, problem = call
    found = dispatch.compute(inputs, problem)[0]
    # (is_soft, without the call)
    soft, each = inputs.target.is_floating_point(), problem.reduction == _NONE
    if found.dtype is input.dtype and not soft and not each:
        return found
    # Class probabilities and their weight may have the wider dtype.
    promoting = (target, options.weight) if soft else ()
    return output(input, found, positions_shape(input) if each else None, *promoting)


def loss_with_details(
    input: Tensor,
    target: Target,
    options: Options,
    calibration: Calibration | None,
    shard: Shard | None,
    return_details: ReturnDetails,
) -> LossDetails:
    """The same with what is known of each position."""
    check_return_details(return_details)
    if composed.is_tracing():
        raise ArgumentError(
            f"return_details must be False where torch.jit.trace records, got {return_details!r}"
        )
    if shard is not None:
        known = sharded.loss(input, target, options, calibration, shard, return_details)
    elif isinstance(target, tuple):
        known = mixed.loss(input, target, options, calibration, validate, return_details)
    else:
        call = validate(input, target, options, calibration)
        assert call is not None
        promoting = (target, options.weight) if is_soft(call[0]) else ()
        known = details.of(input, *call, return_details, *promoting)
    assert isinstance(known, LossDetails)
    return known


def validate(
    input: Tensor, target: Tensor, options: Options, calibration: Calibration | None
) -> tuple[Inputs, Problem] | None:
    """Checks the arguments and returns what `dispatch.compute` takes.

    Returns None where torch.jit traces the call, which has a way of its own. Raises ArgumentError
    or ArgumentTypeError for a wrong argument.
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
        and target.is_contiguous()
        and len(shape := input.shape) == 2
        and len(positions := target.shape) == 1
        and (dtype := _ARITHMETIC.get(input.dtype)) is not None
    ):
        rows, classes = shape
        if (
            type(classes) is int  # under torch.jit.trace a tensor
            and classes > 0
            and positions[0] == rows
            and (input.is_contiguous() or input.stride(1) == 1)
            and ((input.is_cpu and target.is_cpu) or target.device == input.device)
            and (
                weight is None
                or (_is_vector(weight, dtype, classes, input) and not weight.requires_grad)
            )
        ):
            numbers = (ignore_index, smoothing, 0.0)
            if calibration is None:
                same = numbers == _PLAIN.numbers
                problem = _PLAIN if same else _PLAIN._replace(numbers=numbers)
                return Inputs(input, target, weight), problem
            c, a, b, form, background = calibration
            calibration_form = None
            if type(form) is str and (background is None or type(background) is str):
                calibration_form = _CALIBRATION_FORMS.get((form, background))
            calibrated = classes - (background is not None)
            if type(c) is Tensor and c.dim() == 2 and c.shape[1] == 1:
                c = c.reshape(-1)
            if (
                calibration_form is not None
                and _is_vector(a, dtype, calibrated, input)
                and _is_vector(b, dtype, calibrated, input)
                and _is_vector(c, dtype, rows, input)
                and not is_probability(c)
            ):
                inputs = Inputs(input, target, weight, a, b, c)
                return inputs, Problem(ROW, numbers, _MEAN, _WEIGHTS, calibration_form)

    if composed.is_tracing():
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
    if target.is_floating_point():
        check_probability_options(options, given)
        target = layouts.probabilities(layout, flat, target)
    else:
        target = target.contiguous()
    check_gradient(given, layout, flat, target)
    in_place = given.in_place and layouts.check_in_place(input, flat, copied)
    code, denominator = normalizer_code(given.normalizer)
    return (
        Inputs(
            flat, target, given.weight, a, b, c, given.prior, given.margin, v, denominator,
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


def _is_vector(vector: Any, dtype: torch.dtype, entries: int, input: Tensor) -> bool:
    """Whether this is a contiguous vector of that dtype and length on the input's device."""
    return (
        type(vector) in _TENSORS
        and vector.dtype is dtype
        and vector.dim() == 1
        and vector.size(0) == entries
        and ((input.is_cpu and vector.is_cpu) or vector.device == input.device)
        and vector.is_contiguous()
    )
