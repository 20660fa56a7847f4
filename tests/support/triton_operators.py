"""A pytest plugin: the Triton operators, interpreted on the CPU, in place of the native ones.

python -m pytest -p support.triton_operators tests/_ops/test_row.py
"""

from __future__ import annotations

import os

import pytest

from support import operator_swap

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


def pytest_configure(config: pytest.Config) -> None:
    from disalign_ops._ops import schemas
    from disalign_ops._ops.triton import registration

    assert registration.layout_of(schemas.ROW).prefix == "triton_"
    operator_swap.swap(lambda name: schemas._OPERATORS[f"triton_{name}"], native=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    operator_swap.leave_out(config, items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    operator_swap.write_calls(terminalreporter)
