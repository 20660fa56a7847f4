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
from tests.support import sets


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--once",
        action="store_true",
        help="of each test, the cases that together hold every value of every parameter",
    )


def pytest_collectstart() -> None:
    """Cases may hold random numbers, which are in their names: each process draws the same."""
    torch.manual_seed(0)


@pytest.hookimpl(trylast=True)  # after what -k, -m and plugins leave out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("once"):
        kept = sets.once(items)
        left_out = set(items) - set(kept)
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = kept


class _Marks:
    @pytest.hookimpl(tryfirst=True)  # before -m chooses
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        sets.mark(items)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Marks())


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
