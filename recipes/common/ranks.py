"""The processes of torchrun, or this one alone."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """value of every rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, module: nn.Module) -> None:
        """The first rank's state to all: BatchNorm's statistics are each rank's own."""
        if self.world > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, 0)


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """NCCL and a GPU for each process where there are GPUs, else gloo.

    With gloo the process ends with the block: ending gloo's threads now and then aborts a process
    that is done ("terminate called without an active exception"). A group that is there already
    is used and left alone.
    """
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    if "RANK" not in os.environ:
        yield Ranks(0, 1, device)
        return
    # Others wait while the first rank computes LVIS's AP.
    hours = datetime.timedelta(hours=3)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=hours)
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    dist.barrier()
    if not cuda:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    dist.destroy_process_group()
