"""Losses whose classes are divided over the processes of a torch.distributed group.

Every rank has the same rows and targets, and some of the classes: contiguous shards, rank after
rank, of any sizes, 0 included. Vectors with an entry a class (scale, bias, weight, prior, margin)
are divided like the logits; what has an entry a row (confidence, sample_weight) is the same on
every rank. The loss is the same on every rank. Gradients of a shard are its rank's own; those of
the confidence, and of the features of the linear losses, come back summed over the ranks, the same
on each. Every rank must call with the same options, and backward the same loss.

What is exchanged: _sharded/ranks.py; what it costs: docs/scaling.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._call.arguments import (
    check_class_indices,
    check_dtype,
    check_integer,
    check_target,
    check_tensor,
    is_dtensor,
    positions_shape,
    row_vector,
)
from ._call.options import Calibration, Options, calibration_vectors, output, validate_options
from ._call.types import Form, Normalizer, ReductionName
from ._ops import dispatch, layouts
from ._ops.reference import accumulate_dtype
from ._sharded import parallel
from ._sharded.ranks import Ranks
from ._sharded.shards import Call, Reduction, Vectors
from .errors import ArgumentError
from .linear import CHUNK_BYTES, Linear, linear_loss


def class_parallel_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    group: Any = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    shard_offset: int | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Normalizer = "weights",
    prior: Tensor | None = None,
    margin: Tensor | float | None = None,
    focal_gamma: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    """`cross_entropy` of the ranks' logits side by side.

    Args:
        local_logits: this rank's columns, (N, C_rank) or (C_rank,), C_rank >= 0. Or a DTensor
            sharded on its class dimension and on no other, whose mesh then is the group.
        target: global class ids, the same on every rank.
        group: of torch.distributed; None: the default group. gloo for CPU tensors, NCCL for CUDA.
        weight, prior, margin: this rank's entries, (C_rank,); each given on all ranks or on none.
        shard_offset: this rank's first class. None: found by an exchange of the shards' sizes,
            which waits for the device.

    The other arguments are those of `cross_entropy`.

    A row costs two all-reduces in forward, of 1 and of up to 5 values, and none in backward.

    Returns what `cross_entropy` of the whole logits returns, on every rank.

    Raises:
        ArgumentError: as `cross_entropy`, on the rank with the wrong argument.
        IndexError: on every rank: a target that is no rank's class, or several ranks'.
        RuntimeError: a rank failed, or did not come within the group's timeout; double backward.
    """
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, inplace_backward,
    )  # fmt: skip
    shard = _Shard(local_logits, group, shard_offset)
    return _loss(shard, target, None, options)


def class_parallel_disalign_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    confidence: Tensor,
    scale: Tensor,
    bias: Tensor,
    group: Any = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    form: Form = "interpolated",
    shard_offset: int | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Normalizer = "weights",
    prior: Tensor | None = None,
    margin: Tensor | float | None = None,
    focal_gamma: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    """`disalign_cross_entropy` of the ranks' logits side by side.

    Args:
        confidence: (N,) or (N, 1), the same on every rank; its gradient comes back summed.
        scale, bias: this rank's entries.

    The other arguments are those of `class_parallel_cross_entropy` and `disalign_cross_entropy`.
    There is no `background`: give such a column a scale (1 where interpolated, else 0) and a bias
    of 0 that no optimizer changes.

    A row costs two all-reduces in forward, of 1 and of up to 5 values, and one of 1 in backward.
    """
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, inplace_backward,
    )  # fmt: skip
    shard = _Shard(local_logits, group, shard_offset)
    calibration = Calibration(_local(confidence), _local(scale), _local(bias), form, None)
    return _loss(shard, target, calibration, options)


def class_parallel_linear_cross_entropy(
    features: Tensor,
    local_weight: Tensor,
    target: Tensor,
    local_bias: Tensor | None = None,
    group: Any = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    shard_offset: int | None = None,
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
    """`linear_cross_entropy` of a head whose classes are divided over the ranks.

    Args:
        features: (N, D), the same on every rank; their gradient comes back summed.
        local_weight, local_bias: this rank's (C_rank, D) and (C_rank,).
        sample_rate, generator: of this rank's classes; generators need not agree.

    The other arguments are those of `linear_cross_entropy` and `class_parallel_cross_entropy`.

    A row costs two all-reduces in forward, of 1 and of up to 5 values, and one of D in backward.
    The logits are made twice, in forward and in backward.
    """
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, False,
    )  # fmt: skip
    head = Linear(features, local_weight, local_bias, cosine_scale, chunk_bytes, no_classes=True)
    ranks = Ranks.of(group, _offset(shard_offset), head.classes, features.device)
    sample = head.sample(target, ignore_index, sample_rate, generator, ranks)
    return linear_loss(head, target, None, options, sample, ranks)


def class_parallel_disalign_linear_cross_entropy(
    features: Tensor,
    local_weight: Tensor,
    target: Tensor,
    confidence: Tensor,
    scale: Tensor,
    bias: Tensor,
    local_bias: Tensor | None = None,
    group: Any = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    form: Form = "interpolated",
    shard_offset: int | None = None,
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
    """`disalign_linear_cross_entropy` of a head whose classes are divided over the ranks.

    Arguments as in `class_parallel_linear_cross_entropy` and
    `class_parallel_disalign_cross_entropy`.
    """
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, False,
    )  # fmt: skip
    head = Linear(features, local_weight, local_bias, cosine_scale, chunk_bytes, no_classes=True)
    calibration = Calibration(confidence, scale, bias, form, None)
    ranks = Ranks.of(group, _offset(shard_offset), head.classes, features.device)
    sample = head.sample(target, ignore_index, sample_rate, generator, ranks)
    return linear_loss(head, target, calibration, options, sample, ranks)


def _offset(shard_offset: int | None) -> int | None:
    if shard_offset is not None:
        shard_offset = check_integer("shard_offset", shard_offset)
        if shard_offset < 0:
            raise ArgumentError(f"shard_offset is {shard_offset}, needed is 0 or above")
    return shard_offset


class _Shard:
    """Checked local logits. `checked_against`: what other arguments are checked against, the
    logits, or where there are no classes a stand-in with one.
    """

    def __init__(self, local_logits: Tensor, group: Any, shard_offset: int | None) -> None:
        if is_dtensor(local_logits):
            if group is not None:
                raise ArgumentError("group is given, and a DTensor, which has its own mesh")
            group = _class_group(local_logits)
            local_logits = _local(local_logits)
        check_tensor("local_logits", local_logits)
        if local_logits.dim() not in (1, 2):
            raise ArgumentError(
                f"local_logits has shape {tuple(local_logits.shape)}, needed is (N, C_rank) or "
                "(C_rank,)"
            )
        check_dtype("local_logits", local_logits)
        self.logits = local_logits
        self.classes = local_logits.shape[-1]
        self.checked_against = local_logits
        if not self.classes:
            rows = local_logits.shape[:-1]
            stand_in = local_logits.detach().new_empty((1,) * local_logits.dim())
            self.checked_against = stand_in.expand(*rows, 1)
        self.ranks = Ranks.of(group, _offset(shard_offset), self.classes, local_logits.device)


def _loss(
    shard: _Shard, target: Tensor, calibration: Calibration | None, options: Options
) -> Tensor:
    like, target = shard.checked_against, _local(target)
    shape = positions_shape(like)
    check_class_indices(target)
    check_target(like, target, shape)
    options = Options(*(_local(option) for option in options))
    given = validate_options(like, shard.classes, options)
    dtype = accumulate_dtype(like.dtype)
    sample_weight = row_vector("sample_weight", options.sample_weight, like, shape, dtype)
    rows = shard.logits.unsqueeze(0) if shard.logits.dim() == 1 else shard.logits
    copied = rows.stride(1) != 1 and rows.shape[1] > 1
    flat = rows.contiguous() if copied else rows
    in_place = given.in_place and layouts.check_in_place(shard.logits, flat, copied)
    if dispatch.needs_logits():
        raise RuntimeError(dispatch.NO_TRANSFORMS)
    ignore_index, smoothing, gamma = given.numbers
    call = Call(
        backend=dispatch.serving_backend(like),
        target=target.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        focal_gamma=gamma,
        vectors=Vectors(given.weight, None, None, given.prior, given.margin, smoothing > 0),
        reduction=Reduction(sample_weight, given.reduction, given.normalizer),
        ranks=shard.ranks,
    )
    a, b, c = calibration_vectors(like, shard.classes, calibration)
    loss = parallel.loss(call, flat, c, a, b, in_place=in_place)
    return output(like, loss, shape if given.reduction == "none" else None)


def _local(value: Any) -> Any:
    """A DTensor's local part; anything else as it is."""
    return value.to_local() if is_dtensor(value) else value


def _class_group(logits: Any) -> Any:
    """The group over which a DTensor is sharded on its last dimension."""
    last = logits.dim() - 1
    sharded = [k for k, placed in enumerate(logits.placements) if placed.is_shard(last)]
    others = [p for k, p in enumerate(logits.placements) if k not in sharded]
    if len(sharded) != 1 or not all(placed.is_replicate() for placed in others):
        raise ArgumentError(
            f"local_logits is a DTensor with placements {logits.placements}, needed is Shard("
            f"{last}) once, the others Replicate()"
        )
    return logits.device_mesh.get_group(sharded[0])
