"""The machine code of the library's CUDA kernels."""

from __future__ import annotations

import functools

from simt import build
from support import compiler_report, cuda_tools

from .disassembly import Kernels


def why_not() -> str | None:
    """Why there is no machine code to be counted here, if there is none."""
    home = build.cuda_home()
    if build.why_not() or home is None or not (home / "bin" / "nvcc").exists():
        return build.why_not() or "needs nvcc"
    return cuda_tools.why_not()


@functools.cache
def kernels(architecture: str) -> tuple[Kernels, dict[str, int]]:
    """All kernels, and their registers, by symbol."""
    cubins, report = compiler_report.every_kernel(architecture)
    return Kernels(*cubins), {kernel.symbol: kernel.registers for kernel in report}
