"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Before the library is used: its fresh tensors and scratch hold NaN, so that an entry that a kernel
# forgets to write, or reads before it is written, shows.
os.environ["DISALIGN_OPS_POISON"] = "1"

import disalign_ops


def pytest_report_header() -> list[str]:
    """Which libraries the tests have, and why not the others."""
    native = disalign_ops.backend_info()["native"]
    if "why_not" in native:
        cpu = f"not there: {native['why_not']}"
    else:
        sets = ", ".join(native["instruction_sets_compiled"])
        cpu = f"{native['instruction_set']} of {sets}, by {native['compiler']}"
    cuda = f"for {', '.join(native['cuda_architectures'])}, by {native['cuda_compiler']}"
    if native["why_not_cuda"]:
        cuda = f"{cuda}, not used" if native["cuda_architectures"] else "not there"
        cuda += f": {native['why_not_cuda']}"
    return [f"CPU library: {cpu}", f"CUDA library: {cuda}"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
