"""Warp instructions of the Triton kernels, counted in their machine code.

    PYTHONPATH=tests:. python -m machine_code.triton_kernels                          # the table
    PYTHONPATH=tests:. python -m machine_code.triton_kernels bfloat16 rows 8192 both  # opcodes

The number is that of all warps of a step's kernels for each 512 bytes of logits, as in rows.py, for
sm_90 and the launches of an H100. Every warp of a program walks through the kernel. A step's small
kernels, which add up what the programs leave, are not among them. `peer` is a fused kernel of the
design that the Triton libraries share: support/fused_peer.py.
"""

from __future__ import annotations

import functools
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from disalign_ops._ops.codes import CALIBRATION, LOGITS
from disalign_ops._ops.triton import launch, operators
from support import fused_peer, triton_compile

from . import disassembly
from .rows import BYTES, DEVICES, ORDINARY, decide
from .warp import Launch as WarpLaunch
from .warp import Warp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# rows: (N, C). planes: (N, C, S).
SHAPES: dict[tuple[str, int], tuple[int, ...]] = {
    **{("rows", c): (4096, c) for c in (1203, 8142, 8192)},
    **{("planes", c): (2, c, 512 * 512) for c in (19, 150)},
}
# Where the constant bank has the arguments; besides them it has two pointers, which Triton adds.
ARGUMENTS = {"80": 0x160, "90": 0x210, "100": 0x380, "120": 0x380}
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
ROUNDS = (1, 3)  # blocks that a program works on
MOST = 400_000
SUMS = ("loss_kernel", "sum_kernel")
TARGET = 7

# As in rows.py: what Triton's kernels make of predicates that data decide.
DECISIONS = {
    r"FSETP\.GT\.AND P, PT, \|R\|, 1\.469\d*e-39, PT": True,  # 1 / a double that is no subnormal
}


def launches(layout: str, classes: int, dtype: str, step: str) -> list[triton_compile.Launch]:
    """What a step launches: the loss with weights a class; its backward for the logits' gradient;
    stage2 and all: calibrated, as in rows.py.
    """
    z = torch.empty(SHAPES[layout, classes], dtype=DTYPES[dtype], device="meta")
    n = z.numel() // classes

    def vector(entries: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(entries, dtype=dtype, device="meta")

    calibrated = step.startswith(("stage2", "all"))
    abc = (vector(classes), vector(classes), vector(n)) if calibrated else (None, None, None)
    target = vector(n, torch.int64).view(z.shape[0], *z.shape[2:])
    given = (z, target, vector(classes), *abc, None, None, None)
    statistics = (vector(2 * n).view(2, n), vector(1, torch.float64)[0])
    options = (-100, 0.0, 0.0)
    calibration = CALIBRATION if calibrated else 0
    with (
        mock.patch.object(launch, "multiprocessors", lambda device: DEVICES["90"][0].multiprocessors),
        triton_compile.launches() as found,
    ):
        if step in ("forward", "both", "stage2", "all"):
            operators.forward(*given, None, *options, 1, 0, calibration)
        if step in ("backward", "both", "all"):
            operators.backward(vector(1)[0], *given, *statistics, *options, LOGITS)
    return [launch for launch in found if launch.name not in SUMS]


def peer(layout: str, classes: int, dtype: str, config: tuple[int, ...] = ()) -> triton_compile.Launch:
    shape = SHAPES[layout, classes]
    z = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    n = z.numel() // classes

    def vector(entries: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(entries, dtype=dtype, device="meta")

    arguments: tuple[Any, ...] = (z, vector(n, torch.int64), vector(classes), vector(n), vector(1))
    if layout == "rows":
        block, warps = config or fused_peer.block_and_warps(classes)
        return triton_compile.Launch(
            fused_peer.fused_kernel, (n,), (*arguments, classes, classes, -100),
            {"num_warps": warps, "BLOCK": block},
        )
    positions, block, warps = config or fused_peer.PLANES
    return triton_compile.Launch(
        fused_peer.fused_planes_kernel, (shape[2] // positions, shape[0]),
        (*arguments, classes * shape[2], shape[2], classes, -100),
        {"num_warps": warps, "POSITIONS": positions, "BLOCK": block},
    )


@dataclass(frozen=True)
class Compiled:
    code: disassembly.Kernel
    parameters: dict[str, str]  # name -> type, of those that the kernel takes
    registers: int


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


_compiled: dict[tuple[str, str], Compiled] = {}


def compile_launch(found: triton_compile.Launch, architecture: str) -> Compiled:
    (source, _), key = triton_compile.specialised(found, int(architecture))
    if (key, architecture) not in _compiled:
        made = triton_compile.translate(found, int(architecture))
        cubin = Path(_folder().name, f"{len(_compiled)}.cubin")
        cubin.write_bytes(made.asm["cubin"])
        (code,) = disassembly.kernels(cubin).values()
        parameters = {
            name: kind for name, kind in source.signature.items() if kind != "constexpr"
        }
        usage = triton_compile.compile_launch(found, int(architecture))
        _compiled[key, architecture] = Compiled(code, parameters, usage.registers)
    return _compiled[key, architecture]


def constants(
    found: triton_compile.Launch, compiled: Compiled, architecture: str, **changed: int
) -> tuple[bytes, dict[str, int]]:
    """The constant bank of a launch, and the addresses of its buffers."""
    bank = bytearray(compiled.code.constant_bytes)
    threads, grid = DEVICES[architecture][1]
    struct.pack_into("<3I", bank, threads, 32 * found.options["num_warps"], 1, 1)
    struct.pack_into("<3I", bank, grid, *(*found.grid, 1, 1)[:3])
    values = dict(zip(found.kernel.arg_names, found.arguments, strict=False)) | changed
    at, addresses = ARGUMENTS[architecture], {}
    for k, (name, kind) in enumerate(compiled.parameters.items()):
        value: Any = values[name]
        if kind.startswith("*"):
            value = addresses[name] = (k + 1) << 40
            kind = "i64"
        size = struct.calcsize(FORMATS[kind])
        at += -at % size
        struct.pack_into("<" + FORMATS[kind], bank, at, value)
        at += size
    assert at + -at % 8 + 16 == len(bank), "the arguments end where the constant bank does"
    return bytes(bank), addresses


def walk(found: triton_compile.Launch, compiled: Compiled, architecture: str,
         **changed: int) -> Counter[str]:  # fmt: skip
    """Of all warps of the first program."""
    bank, addresses = constants(found, compiled, architecture, **changed)

    def memory(address: int, size: int) -> int | None:
        """All targets are the same class; nothing else is known."""
        if not 0 <= address - addresses.get("target", -1 << 50) < 1 << 40:
            return None
        return TARGET >> 8 * (address % 8) & ((1 << 8 * size) - 1)

    total: Counter[str] = Counter()
    for warp in range(found.options["num_warps"]):
        here = WarpLaunch(bank, (0, 0), 32 * warp, memory)
        walking = Warp(compiled.code, here, functools.partial(decide, ORDINARY | DECISIONS))
        walking.run(MOST)
        total.update(walking.opcodes())
    return total


@dataclass(frozen=True)
class Count:
    """registers: of each kernel. vector: warp instructions for 512 bytes of logits; opcodes alike."""

    registers: list[int]
    vector: float
    opcodes: dict[str, float]


def of_launch(found: triton_compile.Launch, architecture: str, vectors: float) -> Count:
    compiled = compile_launch(found, architecture)
    parts = 1
    for size in found.grid[1:]:
        parts *= size
    opcodes: dict[str, float] = {}
    if found.kernel in (fused_peer.fused_kernel, fused_peer.fused_planes_kernel):
        counted = walk(found, compiled, architecture)
        opcodes = {o: n * found.grid[0] * parts / vectors for o, n in counted.items()}
    else:
        values = dict(zip(found.kernel.arg_names, found.arguments, strict=False))
        positions, unit = found.options["POSITIONS"], found.options["UNIT"]
        planes = found.options["PLANES"]
        few, many = (
            walk(found, compiled, architecture, outer=1,
                 inner=rounds * found.grid[0] * positions // (unit if planes else 1))
            for rounds in ROUNDS
        )  # fmt: skip
        n = values["outer"] * values["inner"] * (unit if planes else 1)
        for o in many:
            block = (many[o] - few[o]) / (ROUNDS[1] - ROUNDS[0])
            setup = few[o] - ROUNDS[0] * block
            opcodes[o] = parts * (setup * found.grid[0] + block * n / positions) / vectors
    return Count([compiled.registers], sum(opcodes.values()), opcodes)


@functools.cache
def count(layout: str, classes: int, dtype: str, step: str, architecture: str = "90") -> Count:
    shape = SHAPES[layout, classes]
    vectors = torch.Size(shape).numel() * DTYPES[dtype].itemsize / BYTES
    if step == "peer":
        found = [peer(layout, classes, dtype)]
    else:
        found = launches(layout, classes, dtype, step)
    counts = [of_launch(launch, architecture, vectors) for launch in found]
    opcodes: Counter[str] = Counter()
    for c in counts:
        opcodes.update(c.opcodes)  # type: ignore[arg-type]
    return Count([c.registers[0] for c in counts], sum(opcodes.values()), dict(opcodes))


STEPS = ("forward", "backward", "both", "stage2", "all", "peer")


def main() -> None:
    print("layout  classes  dtype    " + "".join(f"{step:>18}" for step in STEPS))
    for layout, classes in SHAPES:
        for dtype in DTYPES:
            row = []
            for step in STEPS:
                found = count(layout, classes, dtype, step)
                row.append(f"{found.vector:8.1f} {'+'.join(map(str, found.registers)):>9}")
            print(f"{layout:7} {classes:7}  {dtype:9}" + "".join(row), flush=True)


def main_of(dtype: str, layout: str, classes: int, step: str) -> None:
    found = count(layout, classes, dtype, step)
    for opcode, n in sorted(found.opcodes.items(), key=lambda item: -item[1]):
        print(f"{n:8.2f}  {opcode}")
    print(f"{found.vector:8.2f}  for 512 bytes; registers {found.registers}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main_of(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
