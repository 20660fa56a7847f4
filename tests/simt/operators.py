"""A pytest plugin: the CUDA operators, executed by simt, in place of the native ones.

    python -m pytest -p simt.operators tests/test_row.py

The .cu files of csrc/cuda, launchers included, are compiled as C++ and registered as
`disalign_simt::row_forward` and so on, for tensors on the CPU. Everything above them (checks,
autograd, reductions) is the library's own. SIMT_SEED shuffles the threads.
"""

from __future__ import annotations

import collections
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import build

# Tests of what is not these kernels: (part of a test's name, why it is left out).
LEFT_OUT = (
    ("is_no_class", "a wrong target stops the kernel, as on CUDA: test_cuda_simt.py"),
    ("out_of_range", "a wrong target stops the kernel, as on CUDA: test_cuda_simt.py"),
    ("compile", "torch.compile knows the operators by the library's own name"),
    ("checkpoint_keeps_no_gradient", "the CPU alone makes the gradient of the logits in forward"),
    ("in_forward", "the CPU alone makes the gradient of the logits in forward"),
    ("memory", "counts what the CPU kernels allocate"),
)


calls: collections.Counter[str] = collections.Counter()


def _counted(name: str, operator: Any) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls[name] += 1
        return operator(*arguments)

    return call


def _load(library: Path) -> None:
    from disalign_ops import _autograd, _ops

    definitions = torch.library.Library("disalign_simt", "DEF")
    pytest.simt_definitions = definitions  # type: ignore[attr-defined]  # they end with the object
    for stem in _ops.STEMS:
        for schema in _ops.schemas(stem):
            definitions.define(schema)
    definitions.define(_ops.PREDICT_SCHEMA)
    torch.ops.load_library(str(library))
    for name in _ops._OPERATORS:
        _ops._OPERATORS[name] = _counted(name, getattr(torch.ops.disalign_simt, name).default)

    def on_a_gpu(*_: Any) -> bool:
        return False

    def class_sums_in_forward(stem: _ops.Stem, logits: Tensor) -> bool:
        return stem is not _ops.UPSAMPLE

    _autograd._gradient_in_forward = on_a_gpu
    _autograd._class_sums_in_forward = class_sums_in_forward
    seed = os.environ.get("SIMT_SEED")
    if seed:
        ctypes.CDLL(str(library)).simt_shuffle(ctypes.c_uint64(int(seed)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _load(build.build("operators"))
    left_out = [i for i in items if any(part in i.name for part, _ in LEFT_OUT)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [i for i in items if i not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, times in sorted(calls.items()):
        terminalreporter.write_line(f"simt: {name} called {times} times")
