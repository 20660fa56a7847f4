"""A pytest plugin: the Triton operators on a GPU in place of the native ones.

python -m pytest -p support.triton_cuda_operators tests/_ops/test_row.py
"""

from __future__ import annotations

import pytest

from support import cuda_operators, operator_swap
from support.cuda_operators import pytest_collection_modifyitems, pytest_terminal_summary

__all__ = ["pytest_collection_modifyitems", "pytest_terminal_summary"]


def pytest_configure(config: pytest.Config) -> None:
    from disalign_ops._ops import schemas
    from disalign_ops._ops.triton import registration

    assert registration.layout_of(schemas.ROW).prefix == "triton_"
    operator_swap.swap(
        lambda name: cuda_operators.on_gpu(name, schemas._OPERATORS[f"triton_{name}"]),
        native=False,
    )
