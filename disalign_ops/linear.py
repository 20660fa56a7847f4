"""Losses of a linear classifier without its logits: chunks of them are made and consumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ._call import linear
from ._call.details import LossDetails
from ._call.linear import Head
from ._call.options import Calibration, Options
from ._call.shard import Shard
from ._call.types import (
    Background,
    CalibratedLinearOptions,
    Form,
    LinearOptions,
    Normalizer,
    ReductionName,
    Target,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

CHUNK_BYTES = 64 << 20


@overload
def linear_cross_entropy(
    features: Tensor, linear_weight: Tensor, target: Target,
    linear_bias: Tensor | None = None, weight: Tensor | None = None, ignore_index: int = -100,
    reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[False] = False, **options: Unpack[LinearOptions],
) -> Tensor: ...  # fmt: skip


@overload
def linear_cross_entropy(
    features: Tensor, linear_weight: Tensor, target: Target,
    linear_bias: Tensor | None = None, weight: Tensor | None = None, ignore_index: int = -100,
    reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[True, "entropy"], **options: Unpack[LinearOptions],
) -> LossDetails: ...  # fmt: skip


def linear_cross_entropy(
    features: Tensor,
    linear_weight: Tensor,
    target: Target,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Normalizer = "weights",
    prior: Tensor | None = None,
    margin: Tensor | float | None = None,
    focal_gamma: float = 0.0,
    cosine_scale: Tensor | float | None = None,
    sample_rate: float | None = None,
    generator: torch.Generator | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    shard: Shard | None = None,
    return_details: bool | Literal["entropy"] = False,
) -> Tensor | LossDetails:
    """`cross_entropy(F.linear(features, linear_weight, linear_bias), target, ...)`, without the
    logits.

    Args:
        features: (N, D) or (D,); float32, float64, bfloat16 or float16. Under autocast this and
            the head are cast as F.linear's are.
        linear_weight, linear_bias: (C, D) and (C,), of the dtype of features.
        target: class indices (N,), for (D,) (). Or class probabilities (N, C), with `shard` of this
            process's classes, that require no gradient, or two classes a row, `(a, b, lam)`; both
            not with sample_rate.
        cosine_scale: a number or a tensor of one entry, which may require a gradient: the logits
            are cosine_scale times the cosine of features and weight. Then there is no linear_bias.
        sample_rate: in (0, 1]: of the classes only this share, at least those of the batch's
            targets, the rest drawn uniformly from the others, takes part: Partial FC (An et al.,
            CVPR 2022). Gradients of the other classes are 0. Smoothing is over the share too.
        generator: of the draw, on the device of features; the same state gives the same classes.
        chunk_bytes: what the loss may take beyond its inputs, the gradients asked for and a few
            numbers a row, in bytes; a cosine also takes a copy of features, sample_rate one of the
            sampled classes' weight.
        shard: see `Shard`: linear_weight, linear_bias, weight, prior and margin are one process's
            classes, of which sample_rate draws a share (generators need not agree); the loss is
            that over all processes of the group, and the logits are made in forward and again in
            backward.

    The other arguments are those of `cross_entropy`.

    Gradients go to features, linear_weight, linear_bias and cosine_scale, each only if it requires
    one: a frozen head computes nothing of size N x D or C x D beyond the logits. They are made in
    forward where the reduction is a scalar (but in float16); in half precision their sums over
    chunks are in float32 while these fit in a quarter of chunk_bytes. Twice differentiated it makes
    the logits. Not traced by torch.compile: the graph breaks there. Under torch.export and
    torch.jit.trace it makes the logits.

    Returns and raises what `cross_entropy` does. return_details: not with sample_rate.
    """
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, False,
    )  # fmt: skip
    head = Head(
        features, linear_weight, linear_bias, cosine_scale, sample_rate, generator, chunk_bytes
    )
    return linear.loss(head, target, options, None, shard, return_details)


@overload
def disalign_linear_cross_entropy(
    features: Tensor, linear_weight: Tensor, target: Target, confidence: Tensor, scale: Tensor,
    bias: Tensor,
    linear_bias: Tensor | None = None, weight: Tensor | None = None, ignore_index: int = -100,
    reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[False] = False, **options: Unpack[CalibratedLinearOptions],
) -> Tensor: ...  # fmt: skip


@overload
def disalign_linear_cross_entropy(
    features: Tensor, linear_weight: Tensor, target: Target, confidence: Tensor, scale: Tensor,
    bias: Tensor,
    linear_bias: Tensor | None = None, weight: Tensor | None = None, ignore_index: int = -100,
    reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
    return_details: Literal[True, "entropy"], **options: Unpack[CalibratedLinearOptions],
) -> LossDetails: ...  # fmt: skip


def disalign_linear_cross_entropy(
    features: Tensor,
    linear_weight: Tensor,
    target: Target,
    confidence: Tensor,
    scale: Tensor,
    bias: Tensor,
    linear_bias: Tensor | None = None,
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
    cosine_scale: Tensor | float | None = None,
    sample_rate: float | None = None,
    generator: torch.Generator | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    shard: Shard | None = None,
    return_details: bool | Literal["entropy"] = False,
) -> Tensor | LossDetails:
    """`disalign_cross_entropy` of a linear classifier's logits, without the logits.

    Args:
        confidence, scale, bias, form, background: as in `disalign_cross_entropy`.

    The other arguments are those of `linear_cross_entropy`.

    Gradients go to features, linear_weight, linear_bias, cosine_scale, confidence, scale and bias,
    each only if it requires one. With a frozen head and frozen features (stage 2) each chunk of the
    logits is made once, and read twice.
    """
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, False,
    )  # fmt: skip
    head = Head(
        features, linear_weight, linear_bias, cosine_scale, sample_rate, generator, chunk_bytes
    )
    calibration = Calibration(confidence, scale, bias, form, background)
    return linear.loss(head, target, options, calibration, shard, return_details)
