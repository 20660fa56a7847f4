"""Losses over a share of the classes, drawn anew each time: Partial FC.

An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs
by Partial FC", CVPR 2022: every class of the batch's targets is kept, others are drawn uniformly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .shards import local_target


@dataclass(frozen=True)
class Sample:
    """Which of a shard's classes take part, (k,) ascending, and where each of them is (C + 1,), -1
    where it is not.
    """

    chosen: Tensor
    place: Tensor
    first: int

    @staticmethod
    def draw(
        target: Tensor, first: int, classes: int, ignore_index: int, rate: float,
        generator: torch.Generator | None,
    ) -> Sample:  # fmt: skip
        """Draws max(ceil(rate C), N) of the shard's C classes, at most all, targets included.

        target: (N,), global class ids. N classes, so that every target fits: counting the distinct
        ones would wait for the device.
        """
        device = target.device
        count = min(classes, max(math.ceil(rate * classes), target.numel()))
        local = local_target(target, first, classes, ignore_index)
        wanted = torch.zeros(classes + 1, dtype=torch.bool, device=device)
        wanted[torch.where(local >= 0, local, classes)] = True  # the last: not this shard's
        lot = torch.rand(classes, generator=generator, device=device)
        lot.masked_fill_(wanted[:classes], 2.0)
        chosen = lot.topk(count, sorted=False).indices.sort().values
        place = torch.full((classes + 1,), -1, dtype=torch.int64, device=device)
        place[chosen] = torch.arange(count, device=device)
        return Sample(chosen, place, first)

    def target(self, target: Tensor, ignore_index: int) -> Tensor:
        """Targets as places among the chosen classes; see shards.local_target."""
        local = local_target(target, self.first, len(self.place) - 1, ignore_index)
        return torch.where(local >= 0, self.place[local.clamp(min=0)], local)

    def of(self, tensor: Tensor) -> Tensor:
        """The chosen classes' entries. Its gradient is 0 at the others."""
        return tensor.index_select(0, self.chosen)
