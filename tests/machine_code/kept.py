"""Counts that build/reports keeps until a source changes: several tests, in several processes, want
the same.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from disalign_ops._ops import backends
from support import compiler_report
from support.places import ROOT, TESTS

F = TypeVar("F", bound=Callable[..., Any])
_KEPT = ROOT / "build" / "reports" / "counts"


def kept(function: F) -> F:
    """Calls it once for the same arguments, which must be words and numbers."""

    @functools.cache
    def call(*arguments: Any) -> Any:
        # With its file: several modules are __main__, where they are run, and pickle by that name.
        module = f"{function.__module__}.{Path(function.__code__.co_filename).stem}"
        key = f"{module}.{function.__qualname__}{arguments} {_digest()}"
        path = _KEPT / hashlib.sha256(key.encode()).hexdigest()[:24]
        _KEPT.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of tests want the same
            if not path.exists():
                found = function(*arguments)
                unfinished = path.with_suffix(".new")
                unfinished.write_bytes(pickle.dumps(found))
                unfinished.rename(path)
            return pickle.loads(path.read_bytes())

    return call  # type: ignore[return-value]


@functools.cache
def _digest() -> str:
    """Of the kernels, of the library with their code, of what counts instructions, of the GPUs."""
    of_kernels = compiler_report.digest(b"")
    library = [path for path in [backends.CUDA_LIBRARY] if path.exists()]
    counting = (
        *library, *sorted((TESTS / "machine_code").glob("*.py")), ROOT / "benchmarks" / "gpus.py",
        TESTS / "simt" / "planner.cpp", TESTS / "support" / "launch_plans.py",
    )  # fmt: skip
    content = [of_kernels.encode(), *(path.read_bytes() for path in counting)]
    return hashlib.sha256(b"".join(content)).hexdigest()
