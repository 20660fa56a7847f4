"""The denominator of a loss whose batch is divided over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ._call.arguments import (
    TARGET_DTYPES,
    check_choice,
    check_integer,
    check_tensor,
    positions_shape,
)
from ._ops import reference
from ._ops.dispatch import check_classes
from ._sharded.ranks import Ranks
from .errors import ArgumentError, ArgumentTypeError


@torch.no_grad()
def loss_denominator(
    target: Tensor | Sequence[Tensor],
    weight: Tensor | None = None,
    *,
    sample_weight: Tensor | Sequence[Tensor] | None = None,
    ignore_index: int = -100,
    normalizer: Literal["weights", "valid", "count"] = "weights",
    group: dist.ProcessGroup | None = None,
    ranks: Literal["mean", "sum", "same"] = "mean",
) -> Tensor:
    """What `normalizer=` of the losses takes where gradient accumulation or several ranks divide a
    batch: its parts then add up to the gradient of the whole batch.

    The mean of each part has a denominator of its own, and the mean of these means is another loss
    than the mean of the batch, unless all parts have the same sum of weights.

    Args:
        target: of this rank: a tensor, or one of each micro-batch. Class indices, or class
            probabilities (N, C, ...).
        weight, ignore_index: as given to the loss. `upsample_cross_entropy` has the ignore_index
            255 by itself; here it must be passed.
        sample_weight: as given to the loss; one tensor of each target where these are several.
        normalizer: "weights", "valid" or "count", as in `cross_entropy`. Class probabilities count
            by sample_weight alone, as there.
        group: of torch.distributed, the ranks that divide the batch; None: the default group if
            there is one. Every rank of it must call.
        ranks: what becomes of the gradients of several ranks. "mean": they are averaged, as by
            DistributedDataParallel and fully_shard; the denominator comes divided by the number
            of ranks, which undoes it. "sum": they are added up. "same": every rank has the same
            targets, as with `shard=`, and nothing is exchanged.

    Returns:
        A float64 0-d tensor on the targets' device: one all-reduce, without a synchronisation with
        the host. 0 if nothing counts; loss and gradients are then 0, as they are of a micro-batch
        without a valid target.

    A framework that divides each loss by the number of micro-batches (Accelerate's and Lightning's
    backward) needs the denominator divided by that number.

    Raises ArgumentError, ArgumentTypeError, or IndexError for a target that is no class of weight.
    """
    check_choice("normalizer", normalizer, ("weights", "valid", "count"))
    check_choice("ranks", ranks, ("mean", "sum", "same"))
    ignore_index = check_integer("ignore_index", ignore_index)
    targets = _tensors("target", target)
    if not targets:
        raise ArgumentError("target must be a tensor, or at least one of a sequence, got none")
    device = targets[0].device
    weights: list[Tensor | None] = [None] * len(targets)
    if sample_weight is not None:
        weights = [*_tensors("sample_weight", sample_weight)]
        if len(weights) != len(targets):
            raise ArgumentError(
                f"sample_weight must be one tensor of each target ({len(targets)}), got "
                f"{len(weights)}"
            )
    if weight is not None:
        _check_factor("weight", weight, device)
        if weight.dim() != 1:
            raise ArgumentError(f"weight must have shape (C,), got {tuple(weight.shape)}")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for t, v in zip(targets, weights, strict=True):
        if t.device != device:
            raise ArgumentError(f"target must be on one device, got {device} and {t.device}")
        total += _of_one(t, weight, v, ignore_index, normalizer)
    if ranks == "same" or not dist.is_available() or not dist.is_initialized():
        return total
    size = dist.get_world_size(group)
    if size < 1:
        raise ArgumentError("group must contain this process, got a group of other processes")
    if size > 1:
        Ranks(group, 0).add(total, "denominators")
    return total / size if ranks == "mean" else total


def _of_one(
    target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, ignore_index: int,
    normalizer: str,
) -> Tensor:  # fmt: skip
    soft = target.is_floating_point()
    if not soft and target.dtype not in TARGET_DTYPES:
        raise ArgumentTypeError(
            "target must have dtype int64, int32, int16 or uint8 (class indices), or a floating "
            f"dtype (class probabilities), got {target.dtype}"
        )
    if soft and target.dim() == 0:
        raise ArgumentError("target must have shape (C,) or (N, C, ...), got () of probabilities")
    shape = positions_shape(target) if soft else target.shape
    if sample_weight is not None:
        _check_factor("sample_weight", sample_weight, target.device)
        if sample_weight.shape != shape and sample_weight.shape != (*shape[:1], 1, *shape[1:]):
            raise ArgumentError(
                f"sample_weight must have shape {tuple(shape)} for this target of shape "
                f"{tuple(target.shape)}, got {tuple(sample_weight.shape)}"
            )
        sample_weight = sample_weight.reshape(-1)
    if soft:
        weight, rows = None, target.new_empty((shape.numel(), 0))
    else:
        rows = target.reshape(-1)
        if weight is not None and normalizer == "weights":
            check_classes(rows, len(weight), ignore_index, asserted=False)
    return reference.denominator(
        rows, normalizer, weight=weight, sample_weight=sample_weight, ignore_index=ignore_index
    )


def _tensors(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [check_tensor(name, each) for each in value]
    return [check_tensor(name, value)]  # type: ignore[arg-type]


def _check_factor(name: str, value: Tensor, device: torch.device) -> None:
    if not check_tensor(name, value).is_floating_point():
        raise ArgumentTypeError(f"{name} must have a floating dtype, got {value.dtype}")
    if value.device != device:
        raise ArgumentError(f"{name} must be on the target's device, {device}, got {value.device}")
