"""The loss of logits at the resolution of their target, without logits of that resolution."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._call.arguments import (
    check_bool,
    check_class_indices,
    check_image,
    check_size,
    check_target,
    class_vector,
    row_vector,
    target_hint,
)
from ._call.entry import (
    Options,
    calibration_vectors,
    check_classes,
    checked,
    loss,
    output,
    reference_options,
)
from ._call.types import Background, Form, Normalizer, ReductionName, UpsampleOptions
from ._ops import autograd, composed, layouts, reference
from ._ops.dispatch import composes, operators_of, serving_backend, transformed
from ._ops.schemas import UPSAMPLE
from .errors import ArgumentError

if TYPE_CHECKING:
    from typing_extensions import Unpack


class UpsampleDetails(NamedTuple):
    """A loss, and of every position (N, H, W), without gradients: loss and softmax of the target
    (0 where ignored, sample_weight included in the loss), and most probable class (int64).
    """

    loss: Tensor
    position_loss: Tensor
    probability: Tensor
    prediction: Tensor


@overload
def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    return_details: Literal[False] = False,
    **options: Unpack[UpsampleOptions],
) -> Tensor: ...


@overload
def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    return_details: Literal[True],
    **options: Unpack[UpsampleOptions],
) -> UpsampleDetails: ...


@overload
def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    return_details: bool,
    **options: Unpack[UpsampleOptions],
) -> Tensor | UpsampleDetails: ...


def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    align_corners: bool = False,
    confidence: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    form: Form = "interpolated",
    background: Background | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Normalizer = "weights",
    prior: Tensor | None = None,
    margin: Tensor | float | None = None,
    focal_gamma: float = 0.0,
    inplace_backward: bool = False,
    return_details: bool = False,
) -> Tensor | UpsampleDetails:
    """Loss of logits at 1/8 or 1/4 of the label's size, or any other, without upsampled logits.

    What calibration at low resolution, `F.interpolate(u, (H, W), mode="bilinear", align_corners)`
    and `cross_entropy` give, with all gradients; nothing of size (N, C, H, W) is made. Beyond the
    input's gradient it takes memory for a few numbers a position of the target and, for each
    thread, eight low-resolution rows of all classes. The same threads give the same bits.

    Args:
        input: logits (N, C, h, w) of any strides; float32, float64, bfloat16 or float16.
        target: class indices (N, H, W), uint8, int16, int32 or int64, of any size: H and W need
            not be multiples of h and w, and may be smaller.
        confidence, scale, bias: DisAlign's calibration, all three or none: confidence (N, 1, h, w)
            or (N, h, w) before the sigmoid, at the resolution of the input; scale, bias, form and
            background as in `disalign_cross_entropy`.
        sample_weight: (N, H, W).
        return_details: also return what OHEM and accuracy need; see `UpsampleDetails`.
        ignore_index: 255 as segmentation masks have it: with more than 255 classes that is a class
            too, and you are warned.

    The other arguments are those of `cross_entropy`.

    Returns:
        As F.cross_entropy, a 0-d tensor, or (N, H, W), in the input's dtype (float32 under
        autocast); with return_details an `UpsampleDetails`.

    Raises:
        IndexError: a value of target that is no class, with its place. The others as
            `cross_entropy`.

    Masked classes (-inf) stay masked where F.interpolate would make NaN of them. Under
    inplace_backward the gradient is written over the low-resolution logits (on a GPU by way of a
    buffer of their size: blocks read what lies around theirs).
    """
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, inplace_backward,
    )  # fmt: skip
    if composed.is_tracing():
        calibration = (confidence, scale, bias, form, background)
        return _recorded_loss(input, target, align_corners, calibration, options, return_details)
    classes = check_image(input)
    check_bool("align_corners", align_corners)
    check_bool("return_details", return_details)
    shape = _target_shape(input, target)
    check_target(input, target, shape)
    given = checked(input, classes, options)
    ignore_index = given.numbers[0]
    if ignore_index == 255 and classes > 255 and not torch.compiler.is_compiling():
        warnings.warn(
            f"ignore_index is 255, and the logits have {classes} classes: class 255 is ignored; "
            "pass the ignore_index of your masks, or a negative one",
            stacklevel=2,
        )
    dtype = reference.accumulate_dtype(input.dtype)
    v = row_vector("sample_weight", sample_weight, input, shape, dtype)
    a, b, c = _calibration(input, confidence, scale, bias, form, background)
    in_place = inplace_backward and layouts.check_in_place(input, input, False)

    if (backend := serving_backend(input)) != "reference":
        if backend == "triton":
            check_classes(target, classes, ignore_index)
        found = autograd.loss(
            operators_of(UPSAMPLE, backend),
            (input, target.contiguous(), given.weight, a, b, c, given.prior, given.margin, v),
            (*given.numbers, align_corners, return_details),
            options.reduction,
            given.normalizer,
            in_place,
        )
        loss, details = found[0], found[1:]
    else:
        check_classes(target, classes, ignore_index)
        u = reference.upsample(
            input, (shape[1], shape[2]), align_corners,
            scale=a, bias=b, confidence=c, prior=given.prior,
        ).flatten(2)  # fmt: skip
        rest = reference_options(given, options)
        dense = composed.cross_entropy if composes(backend) else reference.dense_cross_entropy
        loss = dense(u, target, weight=given.weight, sample_weight=v, **rest)
        if return_details:
            rest["reduction"] = "none"
            each = dense(u, target, weight=given.weight, sample_weight=v, **rest)
            details = (each.detach(), *reference.details(u.detach(), target, ignore_index))
    result = output(input, loss, shape if options.reduction == "none" else None)
    if not return_details:
        return result
    position_loss, probability, prediction = (t.reshape(shape) if t.numel() else t for t in details)
    if options.reduction == "none":
        position_loss = result.detach()
    return UpsampleDetails(result, position_loss, probability, prediction)


def _recorded_loss(
    input: Tensor,
    target: Tensor,
    align_corners: bool,
    calibration: tuple[Any, ...],
    options: Options,
    return_details: bool,
) -> Tensor | UpsampleDetails:
    """`upsample_cross_entropy` for torch.jit.trace: through the upsampled logits."""
    if return_details:
        raise ArgumentError(
            "return_details must be False under torch.jit.trace, got True: take the details from "
            "upsample_predict, or torch.export the model"
        )
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    names = ("confidence", "scale", "bias", "form", "background")
    with composed.unrecorded():
        upsample_cross_entropy(
            input, target, align_corners=align_corners,
            **dict(zip(names, calibration, strict=True)), **given,
        )  # fmt: skip
    a, b, c = _calibration(input, *calibration)
    size = (target.shape[1], target.shape[2])
    u = reference.upsample(input, size, align_corners, scale=a, bias=b, confidence=c)
    return output(input, loss(u, target, None, replace(options, inplace_backward=False)), None)


def upsample_predict(
    input: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    confidence: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    form: Form = "interpolated",
    background: Background | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """The most probable class at every position of `size` (H, W): (N, H, W), int64.

    What argmax over the classes of the upsampled, calibrated logits gives, without them: they are
    made a few positions at a time, or an image at a time where no kernel serves the device.
    Arguments as in `upsample_cross_entropy`. No gradient.
    """
    with composed.unrecorded() if composed.is_tracing() else nullcontext():
        classes = check_image(input)
        height, width = check_size(size)
        check_bool("align_corners", align_corners)
    dtype = reference.accumulate_dtype(input.dtype)
    with torch.no_grad():
        a, b, c = _calibration(input, confidence, scale, bias, form, background)
        o = class_vector("prior", prior, classes, input, dtype)
        if (backend := serving_backend(input)) != "reference":
            operator = operators_of(UPSAMPLE, backend).operator("predict")
            found: Tensor = operator(input, a, b, c, o, height, width, align_corners)
            return found
        if transformed():  # which takes the images together, and writes over nothing
            size = (height, width)
            return reference.upsample(
                input, size, align_corners, scale=a, bias=b, confidence=c, prior=o
            ).argmax(1)
        prediction = torch.empty(
            (input.shape[0], height, width), dtype=torch.int64, device=input.device
        )
        shares = [None] * len(input) if c is None else c.reshape(len(input), -1)
        for i, share in enumerate(shares):
            u = reference.upsample(
                input[i : i + 1], (height, width), align_corners,
                scale=a, bias=b, confidence=share, prior=o,
            )  # fmt: skip
            prediction[i] = u[0].argmax(0)
        return prediction


def _target_shape(input: Tensor, target: Tensor) -> torch.Size:
    """(N, H, W), if target has that form."""
    if isinstance(target, Tensor):
        check_class_indices(target)
    if not isinstance(target, Tensor) or target.dim() != 3 or target.shape[0] != input.shape[0]:
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        hint = target_hint(input, target) if isinstance(target, Tensor) else ""
        raise ArgumentError(
            f"target is {given}, needed is (N, H, W) with N = {input.shape[0]} for an input of "
            f"shape {tuple(input.shape)}{hint}"
        )
    if 0 in target.shape[1:]:
        raise ArgumentError(f"target has shape {tuple(target.shape)}: it has no positions")
    return target.shape


def _calibration(
    input: Tensor,
    confidence: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    form: str,
    background: str | None,
) -> tuple[Tensor | None, ...]:
    if confidence is None and scale is None and bias is None:
        if background is not None:
            raise ArgumentError(
                f"background is {background!r}, and no calibration is given: needed are "
                "confidence, scale and bias"
            )
        return None, None, None
    return calibration_vectors(input, confidence, scale, bias, form, background)
