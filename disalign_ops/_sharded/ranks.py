"""The processes that share a loss's classes: what they exchange.

A row costs two all-reduces in forward: its maximum, then up to five values relative to it, in the
arithmetic of the logits; in backward one value for the confidence, and those of the features where
they are wanted. Two classes a row cost one more of one value, and one of their weights; details
two more of three values, one of the entropy, and with a margin three. Nothing has the number of
classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import shards


class GlobalSums(NamedTuple):
    """Sums (5, N) and weights of the rows' targets (N,) over all ranks; sum_j w_j and the number of
    classes, 0-d.
    """

    sums: Tensor
    target_weight: Tensor
    weight_sum: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Ranks:
    """group: None is the default one. first: this rank's first class."""

    group: Any
    first: int

    @staticmethod
    def exchange(group: Any, classes: int, device: torch.device) -> Ranks:
        """Finds this rank's first class by an exchange of the shards' sizes."""
        sizes = Ranks(group, 0).sizes(classes, device)
        return Ranks(group, int(sizes[: dist.get_rank(group)].sum()))

    def sizes(self, classes: int, device: torch.device) -> Tensor:
        """The number of every rank's classes."""
        sizes = torch.zeros(dist.get_world_size(self.group), dtype=torch.int64, device=device)
        sizes[dist.get_rank(self.group)] = classes
        self.add(sizes, "sizes of the shards")
        return sizes

    def all_reduce_sums(
        self, sums: Tensor, target_weight: Tensor, weight_sum: Tensor, classes: int,
        target: Tensor, valid: Tensor, *, du_dc: bool, weighted: bool, smoothing: bool,
    ) -> GlobalSums:  # fmt: skip
        """Of this rank's sums. target: as of this rank's shard; see shards.local_target.

        Raises IndexError where a row has no rank, or several, whose class its target is.
        """
        maximum = sums[0].clone()
        self.maximum(maximum, "maxima of the rows")
        relative = shards.rescale_sums(sums, weight_sum, maximum)
        # What is not sent is 0 on every rank, and a weight of 1.
        sent = [1, 2, *([3] if du_dc else []), *([4] if smoothing else [])]
        values = [relative[k] for k in sent] + ([target_weight] if weighted else [])
        # Besides: three numbers for all rows.
        named = (target >= 0).sum()
        numbers = torch.stack([weight_sum, weight_sum.new_tensor(classes), named.to(sums.dtype)])
        message = torch.cat([*values, numbers])
        self.add(message, "sums of the rows")
        *values, numbers = message.split([*(len(maximum) for _ in values), 3])
        weight_sum, everyone, owners = numbers
        check_owners(owners, valid)
        for k, value in zip(sent, values, strict=False):
            relative[k] = value
        target_weight = values[-1] if weighted else valid.to(sums.dtype)
        return GlobalSums(relative, target_weight, weight_sum, everyone)

    def all_reduce_soft_sums(self, sums: Tensor) -> GlobalSums:
        """Of class probabilities, which every rank has of its own classes."""
        maximum = sums[0].clone()
        self.maximum(maximum, "maxima of the rows")
        relative = shards.rescale_sums(sums, sums[2], maximum)
        self.add(relative[1:], "sums of the rows")
        one = torch.ones_like(maximum)
        return GlobalSums(relative, one, one, one)

    def add(self, tensor: Tensor, what: str) -> None:
        """Makes a tensor the sum of every rank's."""
        self._all_reduce(tensor, dist.ReduceOp.SUM, what)

    def maximum(self, tensor: Tensor, what: str) -> None:
        """Makes a tensor the largest of every rank's."""
        self._all_reduce(tensor, dist.ReduceOp.MAX, what)

    def log_sum_exp(self, tensor: Tensor) -> Tensor:
        """log sum exp over every rank's."""
        largest = tensor.clone()
        self.maximum(largest, "log-sum-exps of the rows")
        # All of them masked: -inf, not NaN.
        shift = torch.where(largest == float("-inf"), 0.0, largest)
        total = (tensor - shift).exp()
        self.add(total, "log-sum-exps of the rows")
        found: Tensor = shift + total.log()
        return found

    def minimum(self, tensor: Tensor, what: str) -> Tensor:
        """The smallest of every rank's."""
        self._all_reduce(tensor, dist.ReduceOp.MIN, what)
        return tensor

    def _all_reduce(self, tensor: Tensor, op: Any, what: str) -> None:
        try:
            dist.all_reduce(tensor, op=op, group=self.group)
        except RuntimeError as error:
            rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
            raise RuntimeError(
                f"the all-reduce of the {what} (shape {tuple(tensor.shape)}, {tensor.dtype}) "
                f"failed on rank {rank} of {size}: another rank has raised, ended or does not "
                f"take part, or has another number of rows or other options. {error}"
            ) from error


def check_owners(owners: Tensor, valid: Tensor) -> None:
    """Every target that counts must be exactly one rank's class."""
    message = (
        "target must be global class ids, each the class of exactly one rank (shards follow each "
        "other), got targets out of bounds, which no rank, or more than one, has among its classes"
    )
    right = owners == valid.sum()
    if right.device.type != "cpu":
        torch._assert_async(right, message)
    elif not bool(right):
        raise IndexError(message)
