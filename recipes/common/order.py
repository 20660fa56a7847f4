"""The order of training samples, which a resumed run goes on with in the middle of an epoch."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .ranks import Ranks

Key = tuple[int, int]  # epoch and index: what a training data set is asked for


class TrainingOrder(Sampler[list[Key]]):
    """A batch sampler: this rank's part of every batch of an epoch, from `step` on.

    A batch has the same samples on any number of ranks. The last one of an epoch is filled up with
    the epoch's first samples.
    """

    def __init__(self, samples: int, batch: int, ranks: Ranks, seed: int) -> None:
        if batch % ranks.world or not 0 < batch <= samples:
            raise ValueError(
                f"batch must be a multiple of the {ranks.world} processes and at most the "
                f"{samples} samples, got {batch}"
            )
        self.samples, self.batch, self.ranks, self.seed = samples, batch, ranks, seed
        self.epoch = self.step = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-self.samples // self.batch)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, own = self.epoch, self.batch // self.ranks.world
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(self.samples, generator=generator).tolist()
        order += order[: len(self) * self.batch - self.samples]
        for step in range(self.step, len(self)):
            first = step * self.batch + self.ranks.rank * own
            yield [(epoch, index) for index in order[first : first + own]]


def seed_of(*numbers: int) -> int:
    """One seed of several numbers."""
    # The CPU's generator reads 32 bits of a seed, which crc32 makes of all numbers.
    return zlib.crc32(repr(numbers).encode())


@contextlib.contextmanager
def seeded(seed: int, key: Key) -> Iterator[None]:
    """torch's random numbers in the block depend on seed and key alone.

    So a sample is augmented alike on any rank, in any worker, and after a run was resumed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, *key))
        yield
