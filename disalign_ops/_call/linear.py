"""Validates losses of a linear head without its logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._ops import dispatch
from .._ops.shard_reference import IGNORED
from .._sharded import chunk_plan, chunks
from .._sharded.pair import Pair
from .._sharded.sampling import Sample
from ..errors import ArgumentError, ArgumentTypeError
from . import entry, sharded
from .arguments import check_dtype, check_integer, check_number, check_tensor
from .details import LossDetails, ReturnDetails, check_return_details
from .options import Calibration, Options
from .shard import Shard, check_shard, local_calibration, local_classes, local_options, local_rows
from .types import Target


class Head(NamedTuple):
    """What a user gives of it; see `linear_cross_entropy`."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    cosine_scale: Tensor | float | None
    sample_rate: float | None
    generator: torch.Generator | None
    chunk_bytes: int

    def local(self, shard: Shard) -> Head:
        return self._replace(
            features=local_rows("features", self.features),
            weight=local_classes("linear_weight", self.weight, shard, 0),
            bias=local_classes("linear_bias", self.bias, shard, 0),
            cosine_scale=local_rows("cosine_scale", self.cosine_scale),
        )


def loss(
    head: Head,
    target: Target,
    options: Options,
    calibration: Calibration | None,
    shard: Shard | None,
    return_details: ReturnDetails,
) -> Tensor | LossDetails:
    """The loss of a head's logits; with a shard, over all ranks' classes."""
    check_return_details(return_details)
    if shard is not None:
        check_shard(shard, calibration)
        head, target = head.local(shard), sharded.local_target(target, shard)
        options, calibration = local_options(options, shard), local_calibration(calibration, shard)
    like, head = validate_head(head, empty_shard=shard is not None)
    if not isinstance(target, tuple):
        sharded.check_rows(like, len(head.weight), target)
    of_all_classes = isinstance(target, tuple) or target.is_floating_point()
    if head.sample_rate is not None and of_all_classes:
        raise ArgumentError(
            "sample_rate must be None where target is (a, b, lam) or holds class probabilities, "
            f"got {head.sample_rate}"
        )
    if dispatch.needs_logits():
        if head.sample_rate is not None or shard is not None:
            raise RuntimeError(dispatch.NO_TRANSFORMS)
        logits = _logits(head, like)
        if return_details:
            return entry.loss_with_details(
                logits, target, options, calibration, None, return_details
            )
        return entry.loss(logits, target, options, calibration)
    if return_details and head.sample_rate is not None:
        raise ArgumentError(
            "return_details must be False where sample_rate is given, since other classes have no "
            f"logits, got {return_details!r}"
        )

    def one(
        target: Tensor, options: Options, shard: Shard | None, pair: Pair | None
    ) -> tuple[chunks.Call, Tensor]:
        return _in_chunks(head, like, target, options, calibration, shard, return_details, pair)

    return sharded.of_parts(like, len(head.weight), target, options, calibration, shard, one)


def _in_chunks(
    head: Head,
    like: Tensor,
    target: Tensor,
    options: Options,
    calibration: Calibration | None,
    shard: Shard | None,
    return_details: ReturnDetails,
    pair: Pair | None,
) -> tuple[chunks.Call, Tensor]:
    features, weight, bias, cosine_scale, sample_rate, generator, chunk_bytes = head
    call, a, b, c = sharded.validate(
        like, len(weight), target, options, calibration, shard, return_details, pair
    )
    if sample_rate is not None:
        first = 0 if call.ranks is None else call.ranks.first
        sample = Sample.draw(
            call.target, first, len(weight), call.ignore_index, sample_rate, generator
        )
        weight = sample.of(weight)
        bias, a, b = (None if t is None else sample.of(t) for t in (bias, a, b))
        call = replace(
            call,
            target=sample.target(call.target, call.ignore_index),
            ignore_index=IGNORED,
            vectors=call.vectors.each(sample.of),
            ranks=None if call.ranks is None else replace(call.ranks, first=0),
        )
    plan = chunk_plan.plan(len(features), len(weight), like, chunk_bytes, call.backend)
    chunked = chunks.Call(
        **vars(call), plan=plan, cosine=cosine_scale is not None, chunk_bytes=chunk_bytes
    )
    return chunked, chunks.loss(chunked, features, weight, bias, c, a, b)


def validate_head(head: Head, *, empty_shard: bool) -> tuple[Tensor, Head]:
    """A stand-in for the logits (see `sharded.logits_like`) and the head as autocast has it:
    features (N, D), of a cosine head normalised and scaled.

    empty_shard: whether it may have no classes.
    """
    features, weight, bias, cosine_scale, sample_rate, generator, chunk_bytes = head
    check_dtype("features", check_tensor("features", features))
    check_tensor("linear_weight", weight)
    chunk_bytes = check_integer("chunk_bytes", chunk_bytes)
    if chunk_bytes < 1:
        raise ArgumentError(f"chunk_bytes must be an integer above 0, got {chunk_bytes}")
    if features.dim() not in (1, 2):
        raise ArgumentError(f"features must have shape (N, D) or (D,), got {tuple(features.shape)}")
    width = features.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ArgumentError(
            f"linear_weight must have shape (C, {width}) for features of shape "
            f"{tuple(features.shape)}, got {tuple(weight.shape)}"
        )
    classes = weight.shape[0]
    if not classes and not empty_shard:
        raise ArgumentError(
            f"linear_weight must have at least one class, got shape {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor("linear_bias", bias)
        if cosine_scale is not None:
            raise ArgumentError("linear_bias must be None where cosine_scale is given, got a bias")
        if bias.shape != (classes,):
            raise ArgumentError(
                f"linear_bias must have shape ({classes},), got {tuple(bias.shape)}"
            )
    sample_rate = _check_sample_rate(sample_rate, generator)
    device, kind = features.device, features.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        features, weight = _as_autocast(features, dtype), _as_autocast(weight, dtype)
        bias = None if bias is None else _as_autocast(bias, dtype)
    for name, tensor in {"linear_weight": weight, "linear_bias": bias}.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ArgumentError(
                f"{name} must be on the device of features, {device}, got a tensor on "
                f"{tensor.device}"
            )
        if tensor.dtype != features.dtype:
            raise ArgumentTypeError(
                f"{name} must have the dtype of features, {features.dtype}, got {tensor.dtype}"
            )
    like = sharded.logits_like(features, classes)
    rows = features.unsqueeze(0) if features.dim() == 1 else features
    if cosine_scale is not None:
        eps = chunks.smallest_norm(rows.dtype)
        rows = F.normalize(rows, dim=1, eps=eps) * _check_cosine_scale(cosine_scale, rows)
    return like, Head(rows, weight, bias, cosine_scale, sample_rate, generator, chunk_bytes)


def _check_sample_rate(rate: Any, generator: torch.Generator | None) -> float | None:
    if rate is None:
        if generator is not None:
            raise ArgumentError(
                f"generator must be None without a sample_rate, got a {type(generator).__name__}"
            )
        return None
    checked = check_number("sample_rate", rate, 0.0, 1.0)
    if checked == 0:
        raise ArgumentError("sample_rate must be a number above 0, up to 1, got 0")
    return checked


def _check_cosine_scale(scale: Any, features: Tensor) -> Tensor | float:
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ArgumentError(
                "cosine_scale must be a number or a tensor of one entry, got shape "
                f"{tuple(scale.shape)}"
            )
        return scale.reshape(()).to(features.dtype)
    return check_number("cosine_scale", scale, 0.0)


def _as_autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _logits(head: Head, like: Tensor) -> Tensor:
    """For torch.func, forward-mode differentiation and exporters."""
    weight = head.weight
    if head.cosine_scale is not None:
        weight = F.normalize(weight, dim=1, eps=chunks.smallest_norm(weight.dtype))
    logits = F.linear(head.features, weight, head.bias)
    return logits.squeeze(0) if like.dim() == 1 else logits
