"""Compiles what the Triton operators launch, for GPUs that are not here.

`launches` collects what an operator would launch, with its arguments; `compile_launch` does what
Triton's launcher does up to the driver: specialises the arguments, and compiles for a target.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from disalign_ops._ops.triton import launch

from . import cuda_tools

TARGETS = (80, 90, 100, 120)
ROCM = ("gfx942", "gfx1100")


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """What is launched meanwhile, instead of launching it."""
    found: list[Launch] = []

    def note(
        kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        found.append(Launch(kernel, grid, arguments, options))

    with mock.patch.object(launch, "_call", note):
        yield found


def _target(architecture: int | str) -> GPUTarget:
    """Of a compute capability times ten, or of an AMD GPU: those of data centres have 64 lanes."""
    if isinstance(architecture, int):
        return GPUTarget("cuda", architecture, 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


def specialised(found: Launch, architecture: int | str) -> tuple[Any, str]:
    """The launch's source for the compiler with its options, and the key of Triton's cache."""
    backend = make_backend(_target(architecture))
    kernel = found.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**found.options, "debug": kernel.debug}
    bound, specialization, options = binder(*found.arguments, **given)
    key = f"{found.name} {specialization} {options}"
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, specialization, options
    )
    return (ASTSource(kernel, signature, constants, attributes), parsed), key


@dataclass(frozen=True)
class Compiled:
    registers: int
    spilled: int  # bytes of local memory
    shared: int
    wide_loads: int  # of 16 bytes, from global memory
    asserts: bool  # whether it has a device_assert


def translate(found: Launch, architecture: int | str) -> Any:
    """The launch's compiled kernel, as Triton's launcher would hand it to the driver."""
    (source, options), _ = specialised(found, architecture)
    return triton_compile(source, target=_target(architecture), options=options.__dict__)


def front_end(found: Launch, architecture: int) -> Any:
    """The launch in Triton's own language, before any machine: what a wrong kernel fails in."""
    (source, options), _ = specialised(found, architecture)
    target = _target(architecture)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    return source.make_ir(target, options, functions, backend.get_module_map(), context)


def compile_launch(found: Launch, architecture: int) -> Compiled:
    compiled = translate(found, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = cuda_tools.run("cuobjdump", "-res-usage", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert used, usage
    ptx = compiled.asm["ptx"]
    return Compiled(
        registers=int(used[1]),
        spilled=int(used[2]) + int(used[4]),
        shared=int(compiled.metadata.shared),
        wide_loads=len(re.findall(r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", ptx)),
        asserts="__assertfail" in ptx,
    )


# (logits, size of an upsampled loss or (0, 0)): kernels of every layout and number of warps.
SHAPES: list[tuple[tuple[int, ...], tuple[int, int]]] = [
    ((4096, 19), (0, 0)),
    ((4096, 100), (0, 0)),
    ((4096, 1203), (0, 0)),
    ((4096, 4000), (0, 0)),
    ((64, 8142), (0, 0)),
    ((2, 19, 1000), (0, 0)),
    ((2, 19, 1024), (0, 0)),  # aligned
    ((2, 150, 1000), (0, 0)),
    ((2, 1203, 100), (0, 0)),
    ((1, 150, 16, 16), (128, 128)),
]
