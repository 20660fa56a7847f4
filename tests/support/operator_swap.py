"""For pytest plugins that run the tests of the native operators with others in their place.

The checks, autograd and reductions above the operators stay the library's own, the tensors lie on
the CPU.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest

from disalign_ops._ops import in_forward, schemas

# Tests of what is not these operators: (part of a test's name, why it is left out).
LEFT_OUT = (
    ("is_no_class", "a wrong target stops the kernel there: test_cuda_simt.py, test_cuda.py"),
    ("out_of_range", "a wrong target stops the kernel there: test_cuda_simt.py, test_cuda.py"),
    ("compile", "torch.compile knows the operators by the library's own name"),
    ("fake tensors", "torch knows fakes of the library's own operators"),
    ("opcheck", "checks the library's own operators"),
    ("exported", "torch.export takes the library's own operators"),
    ("auto_means", "asks what the library's own operators make in forward"),
    ("memory", "counts what the CPU kernels allocate"),
)

calls: collections.Counter[str] = collections.Counter()


def _counted(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls[name] += 1
        return operator(*arguments)

    return call


def swap(operator_of: Callable[[str], Callable[..., Any]], native: bool = True) -> None:
    """Every operator becomes operator_of(name), and what forward makes is what it makes on CUDA, or
    in Triton (native=False).
    """
    for name in schemas.fakes(native):
        schemas._OPERATORS[name] = schemas.BOXED[name] = _counted(name, operator_of(name))
    kernels = in_forward.NATIVE
    kernels["cpu"] = kernels["cuda"] if native else in_forward.TRITON


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [i for i in items if any(part in i.name for part, _ in LEFT_OUT)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [i for i in items if i not in left_out]


def write_calls(reporter: pytest.TerminalReporter) -> None:
    for name, times in sorted(calls.items()):
        reporter.write_line(f"{name} called {times} times")
