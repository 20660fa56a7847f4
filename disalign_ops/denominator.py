"""The denominator of a loss whose batch is divided over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._call.arguments import (
    TARGET_DTYPES,
    check_choice,
    check_class_indices,
    check_integer,
    check_number,
    check_tensor,
    positions_shape,
)
from ._call.types import Target
from ._ops import reference
from ._ops.dispatch import check_classes
from ._sharded.ranks import Ranks
from .errors import ArgumentError, ArgumentTypeError


@torch.no_grad()
def loss_denominator(
    target: Target | Sequence[Target],
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
        target: of this rank, as given to the loss, or a list of those of each micro-batch: class
            indices, class probabilities (N, C, ...) or `(a, b, lam)`.
        weight, ignore_index: as given to the loss. `upsample_cross_entropy` has the ignore_index
            255 by itself; here it must be passed.
        sample_weight: as given to the loss; a list with one of each target where these are several.
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
    several = isinstance(target, list | tuple) and not _is_two_index(target)
    targets: list[Any] = [*target] if several else [target]
    if not targets:
        raise ArgumentError("target must be a tensor, or at least one of a list, got none")
    parts = [_Part.of(each, ignore_index) for each in targets]
    device = parts[0].device
    weights: list[Any] = [None] * len(parts)
    if sample_weight is not None:
        several = isinstance(sample_weight, list | tuple)
        weights = [*sample_weight] if several else [sample_weight]
        if len(weights) != len(parts):
            raise ArgumentError(
                f"sample_weight must be one tensor of each target ({len(parts)}), got "
                f"{len(weights)}"
            )
    if weight is not None:
        _check_factor("weight", weight, device)
        if weight.dim() != 1:
            raise ArgumentError(f"weight must have shape (C,), got {tuple(weight.shape)}")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part, v in zip(parts, weights, strict=True):
        if part.device != device:
            raise ArgumentError(f"target must be on one device, got {device} and {part.device}")
        total += part.denominator(weight, v, normalizer)
    if ranks == "same" or not dist.is_available() or not dist.is_initialized():
        return total
    size = dist.get_world_size(group)
    if size < 1:
        raise ArgumentError("group must contain this process, got a group of other processes")
    if size > 1:
        Ranks(group, 0).add(total, "denominators")
    return total / size if ranks == "mean" else total


class _Part(NamedTuple):
    """One target: terms of its loss, each with class indices, flat (None: class probabilities), and
    its share of every position, a number or flat.
    """

    terms: list[tuple[Tensor | None, Tensor | float]]
    shape: torch.Size  # of the positions
    device: torch.device
    ignore_index: int

    @staticmethod
    def of(target: Any, ignore_index: int) -> _Part:
        if _is_two_index(target):
            first, second, share = target
            for name, indices in (("target[0]", first), ("target[1]", second)):
                check_class_indices(check_tensor(name, indices))
                _check_dtype(indices)
                if indices.shape != first.shape or indices.device != first.device:
                    raise ArgumentError(
                        "target[1] must have the shape and device of target[0], "
                        f"{tuple(first.shape)} on {first.device}, got {tuple(indices.shape)} on "
                        f"{indices.device}"
                    )
            if isinstance(share, Tensor):
                if share.dim() and share.shape != first.shape:
                    raise ArgumentError(
                        "target[2] must be a number or have the positions' shape "
                        f"{tuple(first.shape)}, got {tuple(share.shape)}"
                    )
                share = share.to(first.device, torch.float64)
                share = share.reshape(-1) if share.dim() else share
            else:
                share = check_number("target[2]", share, 0.0, 1.0)
            terms = [(first.reshape(-1), share), (second.reshape(-1), 1 - share)]
            return _Part(terms, first.shape, first.device, ignore_index)
        check_tensor("target", target)
        if not target.is_floating_point():
            _check_dtype(target)
            return _Part([(target.reshape(-1), 1.0)], target.shape, target.device, ignore_index)
        if target.dim() == 0:
            raise ArgumentError(
                "target must have shape (C,) or (N, C, ...) where it holds class probabilities, "
                "got ()"
            )
        return _Part([(None, 1.0)], positions_shape(target), target.device, ignore_index)

    def denominator(
        self, weight: Tensor | None, sample_weight: Tensor | None, normalizer: str
    ) -> Tensor:
        rows = torch.zeros(self.shape.numel(), dtype=torch.float64, device=self.device)
        valid = rows > 0
        for target, share in self.terms:
            if target is None:  # "weights" counts sample_weight alone
                rows, valid = rows + share, ~valid
                continue
            if weight is not None and normalizer == "weights":
                check_classes(target, len(weight), self.ignore_index, asserted=False)
            target, counts = reference.class_indices(target, self.ignore_index)
            if normalizer == "weights":
                w = share if weight is None else share * _of_classes(weight, target, counts)
                # `rows` has the dtype: torch.where of two numbers would have float32.
                rows = rows + torch.where(counts, rows.new_zeros(()) + w, 0.0)
            valid = valid | counts
        if sample_weight is not None:
            sample_weight = self._flat(sample_weight)
        return reference.denominator_of(normalizer, valid, rows, sample_weight)

    def _flat(self, sample_weight: Tensor) -> Tensor:
        _check_factor("sample_weight", sample_weight, self.device)
        shape = self.shape
        if sample_weight.shape != shape and sample_weight.shape != (*shape[:1], 1, *shape[1:]):
            raise ArgumentError(
                f"sample_weight must have the positions' shape {tuple(shape)}, got "
                f"{tuple(sample_weight.shape)}"
            )
        return sample_weight.reshape(-1)


def _of_classes(weight: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    return weight[torch.where(valid, target, 0)].to(torch.float64)


def _is_two_index(target: object) -> bool:
    """Whether it is (a, b, lam), and not three micro-batches: these are all indices or none."""
    if not isinstance(target, tuple) or len(target) != 3:
        return False
    *indices, share = target
    return all(isinstance(t, Tensor) and not t.is_floating_point() for t in indices) and (
        not isinstance(share, Tensor) or share.is_floating_point()
    )


def _check_dtype(target: Tensor) -> None:
    if target.dtype not in TARGET_DTYPES:
        raise ArgumentTypeError(
            "target must have dtype int64, int32, int16 or uint8 (class indices), or a floating "
            f"dtype (class probabilities), got {target.dtype}"
        )


def _check_factor(name: str, value: Tensor, device: torch.device) -> None:
    if not check_tensor(name, value).is_floating_point():
        raise ArgumentTypeError(f"{name} must have a floating dtype, got {value.dtype}")
    if value.device != device:
        raise ArgumentError(f"{name} must be on the target's device, {device}, got {value.device}")
