"""The public functions of logits; _call/entry.py validates what they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ._call import entry, tracing
from ._call.arguments import check_input, positions_shape
from ._call.details import LossDetails
from ._call.options import Calibration, Options, calibration_vectors, validate_calibration
from ._call.shard import Shard
from ._call.types import (
    Background,
    CalibratedFunctionOptions,
    Form,
    FunctionOptions,
    GradientPass,
    Normalizer,
    ReductionName,
    Target,
)
from ._ops import autograd, composed, dispatch, layouts, reference

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def cross_entropy(
    input: Tensor, target: Target, weight: Tensor | None = None,
    size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None,
    reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[False] = False, **options: Unpack[FunctionOptions],
) -> Tensor: ...  # fmt: skip


@overload
def cross_entropy(
    input: Tensor, target: Target, weight: Tensor | None = None,
    size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None,
    reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[True, "entropy"], **options: Unpack[FunctionOptions],
) -> LossDetails: ...  # fmt: skip


@torch.fx.wrap  # in a graph of torch.fx it is one call
def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Normalizer = "weights",
    prior: Tensor | None = None,
    margin: Tensor | float | None = None,
    focal_gamma: float = 0.0,
    inplace_backward: bool = False,
    gradient: GradientPass = "auto",
    shard: Shard | None = None,
    return_details: bool | Literal["entropy"] = False,
) -> Tensor | LossDetails:
    """Class-weighted softmax cross-entropy; takes the place of `torch.nn.functional.cross_entropy`.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16.
        target: class indices (), (N,) or (N, d1, ...); int64, and beyond PyTorch int32, int16,
            uint8. Or class probabilities of the input's shape, as mixup and CutMix make them: rows
            need not sum to 1, and "weights" then counts sample_weight alone. (Ones that require a
            gradient go through the reference.) Or two classes a position, `(a, b, lam)`, lam a
            number or one a position: lam CE(a) + (1 - lam) CE(b), from one read of the logits
            (two, if margin, focal_gamma, or weight and label_smoothing are given). Its "weights"
            are lam w_a + (1 - lam) w_b, and ignore_index in a or b leaves the other's term.
        weight: (C,), any floating dtype: w_t multiplies the loss of class t.
        size_average, reduce: PyTorch's deprecated forms of `reduction`.
        ignore_index: positions with this target count nothing, whatever their logits hold.
        reduction: "mean", "sum" or "none".
        label_smoothing: e in [0, 1], as in PyTorch:
            (1 - e) w_t (lse - u_t) + e/C sum_j w_j (lse - u_j).
        sample_weight: one entry a position; multiplies its loss.
        normalizer: what "mean" divides by: "weights" (sum of sample_weight w_t over positions not
            ignored, PyTorch's), "valid" (their number), "count" (all positions), or a number or
            0-d tensor (avg_factor), read without a synchronisation.
        prior: (C,) or what broadcasts to it, added to the logits: log n for balanced softmax
            (Ren et al., NeurIPS 2020), tau log pi for logit adjustment (Menon et al., ICLR 2021).
        margin: (C,) or a number, subtracted from the target's logit: LDAM (Cao et al., NeurIPS
            2019), CosFace.
        focal_gamma: (1 - p_t)^gamma on the target's term, not on the smoothing (Lin et al.,
            ICCV 2017).
        inplace_backward: backward writes the gradient over the logits' memory. The logits must not
            be used afterwards: a second backward, a second loss on them, or a layer that needs its
            own output raises. Not under torch.compile.
        gradient: the pass that makes the gradient of the logits: "forward", from the one read that
            the loss takes; "backward", from a second one; or "auto", forward in eager mode with a
            scalar reduction, for float32 and float64, and on GPUs for bfloat16 (on GPUs not for
            upsampled logits, and not under float16 autocast). Made in forward, it takes its memory
            from then on, a GPU makes it again where the upstream gradient is not 1, and in float16
            what GradScaler's factor would have saved flushes to zero. "forward" raises where
            forward cannot make it: reduction "none", inplace_backward, torch.compile, shard, class
            probabilities that require a gradient, two classes a position at the cost of two losses,
            upsampled logits on a GPU, and the backends "triton" and "reference".
        shard: of `Shard`: input, weight, prior and margin are one process's classes; the loss is
            that over all processes of the group.
        return_details: also return what accuracy, OHEM and calibration curves need of each
            position, see `LossDetails`; "entropy" adds that.

    Numbers, here and in the other functions, may be Python's, numpy's or 0-d tensors on the CPU.

    Returns:
        What `F.cross_entropy` returns, a 0-d tensor or the positions' shape, in the input's dtype
        (float32 under autocast; with class probabilities the widest of theirs, the weight's and the
        input's). With return_details a `LossDetails`.

    Raises:
        ArgumentError: an argument of the wrong value or shape; weight, prior, margin or
            sample_weight that requires a gradient. It is a ValueError and a RuntimeError.
        ArgumentTypeError: one of the wrong type or dtype. It is a TypeError and a RuntimeError.
        IndexError: a target that is no class.

    Formula: docs/math.md; PyTorch's documentation of CrossEntropyLoss for weight and smoothing.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)  # type: ignore[assignment]
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior, margin,
        focal_gamma, inplace_backward, gradient,
    )  # fmt: skip
    if return_details is not False:
        return entry.loss_with_details(input, target, options, None, shard, return_details)
    return entry.loss(input, target, options, None, shard)


@overload
def disalign_cross_entropy(
    input: Tensor, target: Target, confidence: Tensor, scale: Tensor, bias: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100, reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[False] = False, **options: Unpack[CalibratedFunctionOptions],
) -> Tensor: ...  # fmt: skip


@overload
def disalign_cross_entropy(
    input: Tensor, target: Target, confidence: Tensor, scale: Tensor, bias: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100, reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[True, "entropy"], **options: Unpack[CalibratedFunctionOptions],
) -> LossDetails: ...  # fmt: skip


@torch.fx.wrap
def disalign_cross_entropy(
    input: Tensor,
    target: Target,
    confidence: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    form: Form = "interpolated",
    background: Background | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Normalizer = "weights",
    prior: Tensor | None = None,
    margin: Tensor | float | None = None,
    focal_gamma: float = 0.0,
    inplace_backward: bool = False,
    gradient: GradientPass = "auto",
    shard: Shard | None = None,
    return_details: bool | Literal["entropy"] = False,
) -> Tensor | LossDetails:
    """The loss of DisAlign's calibrated logits, without building them.

    Args:
        input, target, weight, ...: as in `cross_entropy`.
        confidence: (N,) or (N, 1), for (N, C, d1, ...) input (N, d1, ...) or (N, 1, d1, ...):
            before the sigmoid; c = sigmoid(confidence). Of a probability p it is torch.logit(p).
            A probability passed as it is stays unnoticed unless autograd's graph shows the sigmoid.
        scale, bias: (C,) or what broadcasts to it ((1, C), (1, C, 1, 1), one number a tensor).
        form: "interpolated", c (scale z + bias) + (1 - c) z: the paper's definition and the
            released detection and segmentation heads. "residual", (1 + c scale) z + c bias: the
            released classification layer.
        background: None, "first" or "last": that column is not calibrated; scale and bias then
            have C - 1 entries.
        shard: as in `cross_entropy`; scale and bias are divided like the input.

    Gradients go to input, confidence, scale and bias, each only if it requires one. With frozen
    logits and a scalar reduction, backward reads nothing of size N x C.

    Source: Zhang et al., "Distribution Alignment", CVPR 2021, sections 3.2 and 3.3.
    """
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior, margin,
        focal_gamma, inplace_backward, gradient,
    )  # fmt: skip
    calibration = Calibration(confidence, scale, bias, form, background)
    if return_details is not False:
        return entry.loss_with_details(input, target, options, calibration, shard, return_details)
    return entry.loss(input, target, options, calibration, shard)


@torch.fx.wrap
def calibrate(
    input: Tensor,
    confidence: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    form: Form = "interpolated",
    background: Background | None = None,
) -> Tensor:
    """DisAlign's calibrated logits, of the input's shape and dtype; differentiable.

    Arguments, forms, errors and source as in `disalign_cross_entropy`.
    """
    calibration = Calibration(confidence, scale, bias, form, background)
    if composed.is_tracing():
        with composed.unrecorded():
            validate_calibration(input, check_input(input), calibration)
        return tracing.calibrate(input, calibration)
    classes = check_input(input)
    a, b, c = calibration_vectors(input, classes, calibration)
    assert a is not None
    assert b is not None
    assert c is not None
    layout, flat, _ = layouts.flatten(input)
    backend = dispatch.serving_backend(input)
    if backend != "reference":
        out = autograd.calibrate(dispatch.operators_of(layout, backend), flat, a, b, c)
    else:
        out = reference.calibrate(flat, a, b, c).to(input.dtype)
    if input.dim() == 1:
        return out.reshape(classes)
    if out.dim() == 3:
        return out.reshape(input.shape)
    return out.reshape(*positions_shape(input), classes).movedim(-1, 1)
