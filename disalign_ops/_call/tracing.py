"""The losses in the graphs that torch.jit.trace makes, whose users (ONNX) lack our operators.

The checks run, and are no part of the graph: it serves any number of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops import composed, reference
from .._ops.calibration_form import CalibrationForm
from .._ops.codes import REDUCTIONS
from .._ops.problem import Inputs, Problem
from .._ops.schemas import DENSE, ROW
from .arguments import check_normalizer
from .options import Calibration, Options, normalizer_code, output


def vector(value: Any, input: Tensor) -> Tensor | None:
    """A vector of classes or positions that was checked, flat."""
    dtype = reference.accumulate_dtype(input.dtype)
    if value is None or isinstance(value, Tensor):
        return None if value is None else value.reshape(-1).to(dtype)
    return torch.full((1,), float(value), dtype=dtype, device=input.device)


def _given_vectors(input: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and bias of the calibrated classes, and the confidence."""
    foreground = input.shape[min(1, input.dim() - 1)] - int(calibration.background is not None)
    a, b, c = (
        vector(v, input) for v in (calibration.scale, calibration.bias, calibration.confidence)
    )
    assert a is not None
    assert b is not None
    assert c is not None
    return a.expand(foreground).contiguous(), b.expand(foreground).contiguous(), c


def calibration_vectors(input: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor, Tensor]:
    """As options.calibration_vectors."""
    a, b, c = _given_vectors(input, calibration)
    calibration_form = CalibrationForm.of(calibration.form, calibration.background)
    return (*composed.form_vectors(a, b, *calibration_form), c)


def calibrate(input: Tensor, calibration: Calibration) -> Tensor:
    """`functional.calibrate` of what was checked."""
    a, b, c = _given_vectors(input, calibration)
    return composed.calibrate(input, c, a, b, calibration.form, calibration.background)


def loss(
    input: Tensor,
    target: Tensor,
    options: Options,
    calibration: Calibration | None,
    checked: Callable[..., Tensor],
) -> Tensor:
    """`entry.loss`, which is `checked`."""
    with composed.unrecorded():
        checked(input, target, options, calibration)
    flat = input.flatten(2) if input.dim() > 2 else input.reshape(-1, input.shape[-1])
    a = b = c = None
    if calibration is not None:
        a, b, c = calibration_vectors(input, calibration)
    weight, prior, margin, sample_weight = (
        vector(v, input)
        for v in (options.weight, options.prior, options.margin, options.sample_weight)
    )
    normalizer = check_normalizer(options.normalizer, input)
    flat_target = target.reshape(flat.shape) if target.is_floating_point() else target
    if margin is not None:
        margin = margin.expand(flat.shape[1])
    layout = DENSE if flat.dim() == 3 else ROW
    numbers = (options.ignore_index, options.label_smoothing, options.focal_gamma)
    code, denominator = normalizer_code(normalizer)
    found = composed.cross_entropy(
        Inputs(flat, flat_target, weight, a, b, c, prior, margin, sample_weight, denominator),
        Problem(layout, numbers, REDUCTIONS[options.reduction], code),
    )
    promoting = (target, options.weight) if target.is_floating_point() else ()
    found = output(input, found, None, *promoting)
    if options.reduction != "none":
        return found
    if target.is_floating_point():
        return found.reshape(input.select(min(1, input.dim() - 1), 0).shape)
    return found.reshape(target.shape)
