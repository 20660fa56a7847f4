"""Losses of a linear classifier without its logits: chunks of them are made and consumed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._call import entry
from ._call.arguments import (
    check_class_indices,
    check_dtype,
    check_integer,
    check_number,
    check_target,
    check_tensor,
    positions_shape,
    row_vector,
)
from ._call.options import Calibration, Options, calibration_vectors, output, validate_options
from ._call.types import Background, Form, Normalizer, ReductionName
from ._ops import dispatch
from ._ops.reference import IGNORED, accumulate_dtype
from ._sharded import chunks
from ._sharded.ranks import Ranks
from ._sharded.sampling import Sample
from ._sharded.shards import Reduction, Vectors
from .errors import ArgumentError, ArgumentTypeError

CHUNK_BYTES = 64 << 20


def linear_cross_entropy(
    features: Tensor,
    linear_weight: Tensor,
    target: Tensor,
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
) -> Tensor:
    """`cross_entropy(F.linear(features, linear_weight, linear_bias), target, ...)`, without the
    logits.

    Args:
        features: (N, D) or (D,); float32, float64, bfloat16 or float16. Under autocast this and
            the head are cast as F.linear's are.
        linear_weight, linear_bias: (C, D) and (C,), of the dtype of features.
        target: class indices (N,), for (D,) ().
        cosine_scale: a number or a tensor of one entry, which may require a gradient: the logits
            are cosine_scale times the cosine of features and weight. Then there is no linear_bias.
        sample_rate: in (0, 1]: of the classes only this share, at least those of the batch's
            targets, the rest drawn uniformly from the others, takes part: Partial FC (An et al.,
            CVPR 2022). Gradients of the other classes are 0. Smoothing is over the share too.
        generator: of the draw, on the device of features; the same state gives the same classes.
        chunk_bytes: what the loss may take beyond its inputs, the gradients asked for and a few
            numbers a row, in bytes; a cosine also takes a copy of features, sample_rate one of the
            sampled classes' weight.

    The other arguments are those of `cross_entropy`.

    Gradients go to features, linear_weight, linear_bias and cosine_scale, each only if it requires
    one: a frozen head computes nothing of size N x D or C x D beyond the logits. They are made in
    forward where the reduction is a scalar (but in float16); in half precision their sums over
    chunks are in float32 while these fit in a quarter of chunk_bytes. Twice differentiated it makes
    the logits. Not traced by torch.compile: the graph breaks there. Under torch.export and
    torch.jit.trace it makes the logits.

    Returns and raises what `cross_entropy` does; ArgumentError also for class probabilities.
    """
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, False,
    )  # fmt: skip
    head = Linear(features, linear_weight, linear_bias, cosine_scale, chunk_bytes)
    sample = head.sample(target, ignore_index, sample_rate, generator)
    return linear_loss(head, target, None, options, sample, None)


def disalign_linear_cross_entropy(
    features: Tensor,
    linear_weight: Tensor,
    target: Tensor,
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
) -> Tensor:
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
    head = Linear(features, linear_weight, linear_bias, cosine_scale, chunk_bytes)
    sample = head.sample(target, ignore_index, sample_rate, generator)
    calibration = Calibration(confidence, scale, bias, form, background)
    return linear_loss(head, target, calibration, options, sample, None)


class Linear:
    """The checked arguments of a head, as autocast has them. `logits` stands for the logits (N, C)
    where arguments are checked against them: it has their shape and no memory.
    """

    def __init__(
        self, features: Tensor, weight: Tensor, bias: Tensor | None,
        cosine_scale: Tensor | float | None, chunk_bytes: int, *, no_classes: bool = False,
    ) -> None:  # fmt: skip
        check_dtype("features", check_tensor("features", features))
        check_tensor("linear_weight", weight)
        chunk_bytes = check_integer("chunk_bytes", chunk_bytes)
        if chunk_bytes < 1:
            raise ArgumentError(f"chunk_bytes is {chunk_bytes}, needed is an integer above 0")
        if features.dim() not in (1, 2):
            raise ArgumentError(
                f"features has shape {tuple(features.shape)}, needed is (N, D) or (D,)"
            )
        width = features.shape[-1]
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ArgumentError(
                f"linear_weight has shape {tuple(weight.shape)}, needed is (C, {width}) for "
                f"features of shape {tuple(features.shape)}"
            )
        classes = weight.shape[0]
        if not classes and not no_classes:
            raise ArgumentError(f"linear_weight has shape {tuple(weight.shape)}: it has no classes")
        if bias is not None:
            check_tensor("linear_bias", bias)
            if cosine_scale is not None:
                raise ArgumentError("linear_bias is given, and cosine_scale: needed is one of them")
            if bias.shape != (classes,):
                raise ArgumentError(
                    f"linear_bias has shape {tuple(bias.shape)}, needed is ({classes},)"
                )
        self.alone = features.dim() == 1
        self.chunk_bytes = chunk_bytes
        self.cosine = cosine_scale is not None
        device, kind = features.device, features.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            features, weight = _as_autocast(features, dtype), _as_autocast(weight, dtype)
            bias = None if bias is None else _as_autocast(bias, dtype)
        self.logits = features.new_empty((1,) * (2 - self.alone)).expand(
            *features.shape[:-1], max(classes, 1)
        )
        for name, tensor in {"linear_weight": weight, "linear_bias": bias}.items():
            if tensor is None:
                continue
            if tensor.device != device:
                raise ArgumentError(
                    f"{name} is on {tensor.device}, features on {device}: needed is one device"
                )
            if tensor.dtype != features.dtype:
                raise ArgumentTypeError(
                    f"{name} has dtype {tensor.dtype}, needed is that of features, {features.dtype}"
                )
        rows = features.unsqueeze(0) if self.alone else features
        if cosine_scale is not None:
            eps = chunks.smallest_norm(rows.dtype)
            rows = F.normalize(rows, dim=1, eps=eps) * _checked_scale(cosine_scale, rows)
        self.features, self.weight, self.bias, self.classes = rows, weight, bias, classes

    def sample(
        self, target: Tensor, ignore_index: int, rate: float | None,
        generator: torch.Generator | None, ranks: Ranks | None = None,
    ) -> Sample | None:  # fmt: skip
        """The classes that take part, if that is not all of them."""
        if rate is None:
            if generator is not None:
                raise ArgumentError("generator is given, and no sample_rate: needed are both")
            return None
        rate = check_number("sample_rate", rate, 0.0, 1.0)
        if rate == 0:
            raise ArgumentError("sample_rate is 0, needed is a number above it, to 1")
        ignore_index = check_integer("ignore_index", ignore_index)
        check_target(self.logits, target, positions_shape(self.logits))
        first = ranks.first if ranks else 0
        return Sample.draw(target.reshape(-1), first, self.classes, ignore_index, rate, generator)


def _as_autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _checked_scale(scale: Any, features: Tensor) -> Tensor | float:
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ArgumentError(
                f"cosine_scale has shape {tuple(scale.shape)}, needed is a single number"
            )
        return scale.reshape(()).to(features.dtype)
    return check_number("cosine_scale", scale, 0.0)


def _whole_loss(
    head: Linear, target: Tensor, calibration: Calibration | None, options: Options
) -> Tensor:
    """Through the logits, for torch.func, forward-mode differentiation and exporters."""
    weight = head.weight
    if head.cosine:
        weight = F.normalize(weight, dim=1, eps=chunks.smallest_norm(weight.dtype))
    logits = F.linear(head.features, weight, head.bias)
    logits = logits.squeeze(0) if head.alone else logits
    return entry.loss(logits, target, options, calibration)


def linear_loss(
    head: Linear,
    target: Tensor,
    calibration: Calibration | None,
    options: Options,
    sample: Sample | None,
    ranks: Ranks | None,
) -> Tensor:
    """The loss of a checked head, of this process's classes where there are ranks."""
    logits = head.logits
    shape = positions_shape(logits)
    check_class_indices(target)
    check_target(logits, target, shape)
    if dispatch.needs_logits():
        if sample is not None or ranks is not None:
            raise RuntimeError(dispatch.NO_TRANSFORMS)
        return _whole_loss(head, target, calibration, options)
    given = validate_options(logits, head.classes, options)
    if ranks is None:
        dispatch.check_classes(target, head.classes, given.ignore_index, asserted=False)
    dtype = accumulate_dtype(logits.dtype)
    a, b, c = calibration_vectors(logits, head.classes, calibration)
    sample_weight = row_vector("sample_weight", options.sample_weight, logits, shape, dtype)
    weight, linear_bias = head.weight, head.bias
    vectors = Vectors(
        given.weight, None, None, given.prior, given.margin, given.label_smoothing > 0
    )
    flat = target.reshape(-1)
    ignore_index, smoothing, gamma = given.numbers
    if sample is not None:
        flat, ignore_index = sample.target(flat, ignore_index), IGNORED
        weight = sample.of(weight)
        linear_bias, a, b = (None if t is None else sample.of(t) for t in (linear_bias, a, b))
        vectors = vectors.each(sample.of)
        ranks = None if ranks is None else replace(ranks, first=0)
    backend = dispatch.serving_backend(logits)
    call = chunks.Call(
        backend=backend,
        target=flat,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        focal_gamma=gamma,
        vectors=vectors,
        reduction=Reduction(sample_weight, given.reduction, given.normalizer),
        plan=chunks.plan(len(head.features), len(weight), logits, head.chunk_bytes, backend),
        cosine=head.cosine,
        ranks=ranks,
        chunk_bytes=head.chunk_bytes,
    )
    loss = chunks.loss(call, head.features, weight, linear_bias, c, a, b)
    return output(logits, loss, shape if given.reduction == "none" else None)
