"""A pytest plugin: the Triton operators, interpreted on the CPU, in place of the native ones.

python -m pytest -p triton_operators tests/test_row.py
"""

from __future__ import annotations

import os

import operator_swap
import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


def pytest_configure(config: pytest.Config) -> None:
    from disalign_ops import _ops, _ops_triton

    missing = [name for name in _ops.fakes() if name not in _ops_triton._FUNCTIONS]
    operator_swap.swap(lambda name: _ops._OPERATORS[name if name in missing else f"triton_{name}"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    operator_swap.leave_out(config, items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    operator_swap.write_calls(terminalreporter)
