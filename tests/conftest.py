"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import disalign_ops


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN: an entry that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test through each backend that serves the CPU."""
    with disalign_ops.set_backend(request.param):
        yield request.param
