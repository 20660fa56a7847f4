"""The machine code of the library's CUDA kernels."""

from __future__ import annotations

import functools

from support import compiler_report

from .disassembly import Kernels


@functools.cache
def kernels(architecture: str) -> tuple[Kernels, dict[str, int]]:
    """All kernels, and their registers, by symbol."""
    cubin, report = compiler_report.every_kernel(architecture)
    return Kernels(cubin), {kernel.symbol: kernel.registers for kernel in report}
