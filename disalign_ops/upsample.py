"""The loss of logits at the resolution of their target, without logits of that resolution."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._call import entry, mixed, tracing
from ._call.arguments import (
    check_bool,
    check_image,
    check_size,
    check_target,
    class_vector,
    row_vector,
    same_device,
    target_hint,
)
from ._call.options import (
    Calibration,
    Options,
    calibration_vectors,
    check_gradient,
    check_probability_options,
    normalizer_code,
    output,
    validate_options,
)
from ._call.shard import refuse_shard
from ._call.types import (
    Background,
    Form,
    GradientPass,
    Normalizer,
    ReductionName,
    Target,
    UpsampleOptions,
)
from ._ops import composed, dispatch, layouts, reference
from ._ops.codes import DETAILS, REDUCTIONS
from ._ops.problem import Inputs, Problem, is_soft
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
    input: Tensor, target: Target, weight: Tensor | None = None, ignore_index: int = 255,
    reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[False] = False, **options: Unpack[UpsampleOptions],
) -> Tensor: ...  # fmt: skip


@overload
def upsample_cross_entropy(
    input: Tensor, target: Target, weight: Tensor | None = None, ignore_index: int = 255,
    reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[True], **options: Unpack[UpsampleOptions],
) -> UpsampleDetails: ...  # fmt: skip


@overload
def upsample_cross_entropy(
    input: Tensor, target: Target, weight: Tensor | None = None, ignore_index: int = 255,
    reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: bool, **options: Unpack[UpsampleOptions],
) -> Tensor | UpsampleDetails: ...  # fmt: skip


def upsample_cross_entropy(
    input: Tensor,
    target: Target,
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
    gradient: GradientPass = "auto",
    return_details: bool = False,
    shard: None = None,
) -> Tensor | UpsampleDetails:
    """Loss of logits at 1/8 or 1/4 of the label's size, or any other, without upsampled logits.

    What calibration at low resolution, `F.interpolate(u, (H, W), mode="bilinear", align_corners)`
    and `cross_entropy` give, with all gradients; nothing of size (N, C, H, W) is made. Beyond the
    input's gradient it takes memory for a few numbers a position of the target and, for each
    thread, eight low-resolution rows of all classes. The same threads give the same bits.

    Args:
        input: logits (N, C, h, w) of any strides; float32, float64, bfloat16 or float16.
        target: class indices (N, H, W), uint8, int16, int32 or int64, of any size: H and W need
            not be multiples of h and w, and may be smaller. Or class probabilities (N, C, H, W),
            or two classes a position, `(a, b, lam)`, at the cost of two losses; both without
            details.
        confidence, scale, bias: DisAlign's calibration, all three or none: confidence (N, 1, h, w)
            or (N, h, w) before the sigmoid, at the resolution of the input; scale, bias, form and
            background as in `disalign_cross_entropy`.
        sample_weight: (N, H, W).
        return_details: also return what OHEM and accuracy need; see `UpsampleDetails`.
        ignore_index: 255 as segmentation masks have it: with more than 255 classes that is a class
            too, and you are warned.
        shard: None; another value raises, see `Shard`.

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
    refuse_shard(shard, "upsample_cross_entropy", "which needs all classes of a position")
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior, margin,
        focal_gamma, inplace_backward, gradient,
    )  # fmt: skip
    calibration = _calibration(confidence, scale, bias, form, background)
    if isinstance(target, tuple):
        return _two_losses(input, target, align_corners, options, calibration, return_details)
    if composed.is_tracing():
        return _recorded_loss(input, target, align_corners, options, calibration, return_details)
    inputs, problem = _validate(input, target, align_corners, options, calibration, return_details)
    loss, *details = dispatch.compute(inputs, problem)
    each = problem.reduction == REDUCTIONS["none"]
    promoting = (target, weight) if is_soft(inputs) else ()
    result = output(input, loss, _positions(target) if each else None, *promoting)
    if not return_details:
        return result
    losses = [] if len(details) == 3 else [loss.detach()]  # 'none' is these losses itself
    position_loss, probability, prediction = (t.reshape(target.shape) for t in (*losses, *details))
    return UpsampleDetails(result, position_loss, probability, prediction)


def _validate(
    input: Tensor,
    target: Tensor,
    align_corners: bool,
    options: Options,
    calibration: Calibration | None,
    details: bool,
) -> tuple[Inputs, Problem]:
    """As entry.validate."""
    classes = check_image(input)
    check_bool("align_corners", align_corners)
    check_bool("return_details", details)
    shape = _target_shape(input, target)
    soft = target.is_floating_point()
    if not soft:
        check_target(input, target, shape)
    given = validate_options(input, classes, options)
    if soft:
        check_probability_options(options, given, default_ignore_index=255)
        if details:
            raise ArgumentError(
                "return_details must be False where target holds class probabilities, got True"
            )
        target = layouts.probabilities(UPSAMPLE, input, target)
    elif given.ignore_index == 255 and classes > 255 and not torch.compiler.is_compiling():
        warnings.warn(
            f"ignore_index is 255, and the logits have {classes} classes: class 255 is ignored; "
            "pass the ignore_index of your masks, or a negative one",
            stacklevel=3,
        )
    dtype = reference.accumulate_dtype(input.dtype)
    v = row_vector("sample_weight", options.sample_weight, input, shape, dtype)
    a, b, c = calibration_vectors(input, classes, calibration)
    check_gradient(given, UPSAMPLE, input, target)
    in_place = given.in_place and layouts.check_in_place(input, input, False)
    code, denominator = normalizer_code(given.normalizer)
    return (
        Inputs(
            input, target if soft else target.contiguous(), given.weight, a, b, c, given.prior,
            given.margin, v, denominator,
        ),
        Problem(
            UPSAMPLE, (*given.numbers, align_corners), REDUCTIONS[given.reduction], code,
            in_place=in_place, details=DETAILS * details, gradient=given.gradient,
        ),
    )  # fmt: skip


def _two_losses(
    input: Tensor,
    target: tuple[Tensor, Tensor, Tensor | float],
    align_corners: bool,
    options: Options,
    calibration: Calibration | None,
    details: bool,
) -> Tensor:
    """For (a, b, lam): each term is a loss of its own."""
    check_bool("return_details", details)
    if details or composed.is_tracing():
        raise ArgumentError(
            "target must be one tensor where return_details is True, or torch.jit.trace records, "
            "got a tuple"
        )
    classes = check_image(input)
    mixed.check_parts(target)
    shape = _target_shape(input, target[0])

    def losses(indices: Tensor, each: Options) -> mixed.Part:
        inputs, problem = _validate(
            input, indices.reshape(shape), align_corners, each, calibration, False
        )
        return mixed.Part(dispatch.compute(inputs, problem)[0])

    loss = mixed.loss_of(input, classes, shape, target, options, losses)
    assert isinstance(loss, Tensor)
    return loss


def _recorded_loss(
    input: Tensor,
    target: Tensor,
    align_corners: bool,
    options: Options,
    calibration: Calibration | None,
    details: bool,
) -> Tensor:
    """`upsample_cross_entropy` for torch.jit.trace: through the upsampled logits."""
    if details:
        raise ArgumentError(
            "return_details must be False under torch.jit.trace, got True: take the details from "
            "upsample_predict, or torch.export the model"
        )
    with composed.unrecorded():
        _validate(input, target, align_corners, options, calibration, False)
    a = b = c = None
    if calibration is not None:
        a, b, c = tracing.calibration_vectors(input, calibration)
    size = (target.shape[-2], target.shape[-1])
    u = reference.upsample(input, size, align_corners, scale=a, bias=b, confidence=c)
    return output(input, entry.loss(u, target, options._replace(inplace_backward=False)), None)


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
    calibration = _calibration(confidence, scale, bias, form, background)
    with composed.unrecorded() if composed.is_tracing() else nullcontext():
        classes = check_image(input)
        height, width = check_size(size)
        check_bool("align_corners", align_corners)
        a, b, c = calibration_vectors(input, classes, calibration)
    dtype = reference.accumulate_dtype(input.dtype)
    with torch.no_grad():
        if composed.is_tracing() and calibration is not None:
            a, b, c = tracing.calibration_vectors(input, calibration)
        o = class_vector("prior", prior, classes, input, dtype)
        if (backend := dispatch.serving_backend(input)) != "reference":
            operator = dispatch.operators_of(UPSAMPLE, backend).operator("predict")
            found: Tensor = operator(input, a, b, c, o, height, width, align_corners)
            return found
        if dispatch.transformed():  # which takes the images together, and writes over nothing
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


def _positions(target: Tensor) -> torch.Size:
    return torch.Size((target.shape[0], *target.shape[-2:]))


def _target_shape(input: Tensor, target: Tensor) -> torch.Size:
    """(N, H, W), if target has that form, or is (N, C, H, W) class probabilities."""
    if isinstance(target, Tensor) and target.is_floating_point():
        if target.dim() != 4 or target.shape[:2] != input.shape[:2]:
            raise ArgumentError(
                f"target must have shape (N, C, H, W) with N, C = {tuple(input.shape[:2])} where "
                f"it holds class probabilities ({target.dtype}), got {tuple(target.shape)}; class "
                "indices have an integer dtype, as target.long() has"
            )
        same_device("target", target, input)
        return _positions(target)
    if not isinstance(target, Tensor) or target.dim() != 3 or target.shape[0] != input.shape[0]:
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        hint = target_hint(input, target) if isinstance(target, Tensor) else ""
        raise ArgumentError(
            f"target must have shape (N, H, W) with N = {input.shape[0]} for an input of shape "
            f"{tuple(input.shape)}, got {given}{hint}"
        )
    if 0 in target.shape[1:]:
        raise ArgumentError(
            f"target must have at least one position, got shape {tuple(target.shape)}"
        )
    return target.shape


def _calibration(
    confidence: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    form: str,
    background: str | None,
) -> Calibration | None:
    """None where none of it is given."""
    if confidence is None and scale is None and bias is None:
        if background is not None:
            raise ArgumentError(
                f"background must be None without confidence, scale and bias, got {background!r}"
            )
        return None
    return Calibration(confidence, scale, bias, form, background)
