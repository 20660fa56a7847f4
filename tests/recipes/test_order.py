"""The order of training samples and their random numbers."""

from __future__ import annotations

import pytest
import torch

from recipes.common.order import TrainingOrder, seeded
from recipes.common.ranks import Ranks


def order(rank: int = 0, world: int = 1, epoch: int = 0, step: int = 0) -> list[list[int]]:
    one = TrainingOrder(11, 4, Ranks(rank, world, torch.device("cpu")), seed=0)
    one.epoch, one.step = epoch, step
    batches = list(one)
    assert all(key[0] == epoch for batch in batches for key in batch)
    return [[index for _, index in batch] for batch in batches]


def test_an_epoch_has_every_sample_and_ends_with_its_first() -> None:
    batches = order()
    assert [len(batch) for batch in batches] == [4, 4, 4]
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:11]) == list(range(11))
    assert flat[11] == flat[0]
    assert order(epoch=1) != batches


def test_ranks_divide_the_batches_of_one_process() -> None:
    parts = zip(order(0, 2), order(1, 2), strict=True)
    assert [a + b for a, b in parts] == order()


def test_it_goes_on_in_the_middle_of_an_epoch() -> None:
    assert order(epoch=2, step=1) == order(epoch=2)[1:]


@pytest.mark.parametrize(("batch", "world"), [(5, 2), (12, 1), (0, 1)])
def test_batches_that_cannot_be_divided(batch: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"batch must be a multiple of the {world} .*got {batch}"):
        TrainingOrder(11, batch, Ranks(0, world, torch.device("cpu")), seed=0)


def test_random_numbers_depend_on_seed_and_key_alone() -> None:
    def drawn(seed: int, *key: int) -> float:
        with seeded(seed, (key[0], key[1])):
            return torch.rand(()).item()

    before = torch.get_rng_state()
    keys = [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1, 3)]
    found = [drawn(*key) for key in keys]
    torch.rand(5)
    assert [drawn(*key) for key in keys] == found
    assert len(set(found)) == len(keys)
    torch.set_rng_state(before)
    first = torch.rand(())
    torch.set_rng_state(before)
    drawn(0, 0, 0)
    assert torch.rand(()) == first  # the others go on as they were
