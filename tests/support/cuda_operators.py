"""A pytest plugin: the CUDA operators on a GPU in place of the native ones.

    python -m pytest -p support.cuda_operators tests/_ops/test_row.py

Each call takes its tensors to the GPU, with their strides and offsets, and its results back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support import operator_swap


def _to_gpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().cuda()
    moved = torch.empty(0, dtype=value.dtype, device="cuda")
    return moved.set_(storage, value.storage_offset(), value.size(), value.stride())


def on_gpu(name: str, operator: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Takes a call of the native operator of this name to the GPU; operator: another for it."""
    native: Callable[..., Any] = getattr(torch.ops.disalign_ops, name).default
    if name.endswith("calibrate"):
        return native  # whose autograd is the dispatcher's: test_cuda.py
    operator = operator or native

    def call(*arguments: Any) -> Any:
        moved = [_to_gpu(a.detach() if isinstance(a, Tensor) else a) for a in arguments]
        results = operator(*moved)
        if name.endswith(("_backward_", "_backward_made")):
            arguments[1].data.copy_(moved[1])  # the gradient, over the logits or what forward made
        if isinstance(results, Tensor):
            return results.cpu()
        return [r.cpu() for r in results]

    return call


def pytest_configure(config: pytest.Config) -> None:
    operator_swap.swap(on_gpu)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    operator_swap.leave_out(config, items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    operator_swap.write_calls(terminalreporter)
