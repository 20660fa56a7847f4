"""Warp instructions of the Triton kernels, counted in their machine code.

    PYTHONPATH=tests:. python -m machine_code.triton_kernels                            # the table
    PYTHONPATH=tests:. python -m machine_code.triton_kernels bfloat16 rows 8192 forward  # opcodes
    PYTHONPATH=tests:. python -m machine_code.triton_kernels peers    # every block of the peer

The number is that of all warps of a step for each 512 bytes of logits, as in rows.py, compiled for
sm_90 and launched as on an H100. Every warp of a program walks through the kernel. The kernels that
add up what programs leave are not among them. `peer` is a fused kernel of the design that other
Triton libraries share (support/fused_peer.py), its forward and backward together.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
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

ARCHITECTURE = 90
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# rows: (N, C). planes: (N, C, S).
SHAPES: dict[tuple[str, int], tuple[int, ...]] = {
    **{("rows", c): (4096, c) for c in (1203, 8142, 8192)},
    **{("planes", c): (2, c, 512 * 512) for c in (19, 150)},
}
# The loss, with weights a class, and its gradient of the logits; both again calibrated, with the
# gradients of scale, bias and confidence.
STEPS = ("forward", "backward", "stage2", "all")
SOFT_STEPS = ("soft forward", "soft backward")  # the first two, of class probabilities
SUMS = ("loss_kernel", "sum_kernel")
PEERS = (fused_peer.fused_kernel, fused_peer.fused_planes_kernel)

ARGUMENTS = 0x210  # where the constant bank has them; it ends with two pointers that Triton adds
FORMATS = {"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
ROUNDS = (1, 3)  # blocks that a program works on: the difference is that of two, the rest set-up
MOST = 400_000  # instructions of a warp: more and the walk has gone astray
TARGET = 7  # the class of all targets

# As rows.ORDINARY.
DECISIONS = {
    r"FSETP\.GT\.AND P, PT, \|R\|, 1\.469\d*e-39, PT": True,  # 1 / a double that is no subnormal
}


def _vector(entries: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(entries, dtype=dtype, device="meta")


def launches(layout: str, classes: int, dtype: str, step: str) -> list[triton_compile.Launch]:
    """What a step launches on an H100."""
    z = torch.empty(SHAPES[layout, classes], dtype=DTYPES[dtype], device="meta")
    n = z.numel() // classes
    calibrated = step in ("stage2", "all")
    vectors = (_vector(classes), _vector(classes), _vector(n)) if calibrated else (None,) * 3
    target = _vector(n, torch.int64).view(z.shape[0], *z.shape[2:])
    soft = step in SOFT_STEPS
    if soft:
        target = torch.empty_like(z)
    given = (z, target, _vector(classes), *vectors, None, None, None)
    rows = 3 if soft else 2
    statistics = (_vector(rows * n).view(rows, n), _vector(1, torch.float64)[0])
    options = (-100, 0.0, 0.0)
    device = DEVICES[str(ARCHITECTURE)][0]
    with (
        mock.patch.object(launch, "multiprocessors", return_value=device.multiprocessors),
        triton_compile.launches() as found,
    ):
        if not step.endswith("backward"):
            operators.forward(*given, None, *options, 1, 0, CALIBRATION if calibrated else 0)
        if step.endswith(("backward", "all")):
            operators.backward(_vector(1)[0], *given, *statistics, *options, LOGITS)
    return [launch for launch in found if launch.name not in SUMS]


def peer(
    layout: str, classes: int, dtype: str, config: fused_peer.Config | None = None
) -> triton_compile.Launch:
    shape = SHAPES[layout, classes]
    z = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    n = z.numel() // classes
    positions, block, warps = config or fused_peer.BEST[layout, classes, dtype]
    arguments = (z, _vector(n, torch.int64), _vector(classes), _vector(n), _vector(1))
    options = {"num_warps": warps, "BLOCK": block}
    if layout == "rows":
        rest = (classes, classes, -100)
        return triton_compile.Launch(PEERS[0], (n,), (*arguments, *rest), options)
    rest = (classes * shape[2], shape[2], classes, -100)
    grid = (shape[2] // positions, shape[0])
    options["POSITIONS"] = positions
    return triton_compile.Launch(PEERS[1], grid, (*arguments, *rest), options)


@dataclass(frozen=True)
class Compiled:
    code: disassembly.Kernel
    parameters: dict[str, str]  # name -> type, of those that the kernel takes


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def compile_launch(found: triton_compile.Launch) -> Compiled:
    (source, _), _ = triton_compile.specialised(found, ARCHITECTURE)
    cubin = Path(_folder().name, "kernel.cubin")
    cubin.write_bytes(triton_compile.translate(found, ARCHITECTURE).asm["cubin"])
    (code,) = disassembly.Kernels(cubin).values()
    parameters = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
    return Compiled(code, parameters)


def _constants(
    found: triton_compile.Launch, compiled: Compiled, **changed: int
) -> tuple[bytes, dict[str, int]]:
    """The constant bank of a launch, and the addresses of its buffers."""
    bank = bytearray(compiled.code.constant_bytes)
    threads, grid = DEVICES[str(ARCHITECTURE)][1]
    struct.pack_into("<3I", bank, threads, 32 * found.options["num_warps"], 1, 1)
    struct.pack_into("<3I", bank, grid, *(*found.grid, 1, 1)[:3])
    values = dict(zip(found.kernel.arg_names, found.arguments, strict=False)) | changed
    at, addresses = ARGUMENTS, {}
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


def _walk(found: triton_compile.Launch, compiled: Compiled, **changed: int) -> Counter[str]:
    """Opcodes of all warps of the first program."""
    bank, addresses = _constants(found, compiled, **changed)

    def memory(address: int, size: int) -> int | None:
        """The targets; nothing else is known."""
        if not 0 <= address - addresses.get("target", 1 << 60) < 1 << 40:
            return None
        return TARGET >> 8 * (address % 8) & ((1 << 8 * size) - 1)

    total: Counter[str] = Counter()
    for warp in range(found.options["num_warps"]):
        here = WarpLaunch(bank, (0, 0), 32 * warp, memory)
        walking = Warp(compiled.code, here, functools.partial(decide, ORDINARY | DECISIONS))
        walking.run(MOST)
        total.update(walking.opcodes())
    return total


def opcodes_of(found: triton_compile.Launch) -> dict[str, float]:
    """Issued by all programs of a launch."""
    compiled = compile_launch(found)
    if found.kernel in PEERS:
        programs = math.prod(found.grid)
        return {o: programs * n for o, n in _walk(found, compiled).items()}
    values = dict(zip(found.kernel.arg_names, found.arguments, strict=False))
    positions = found.options["POSITIONS"]
    unit = found.options["UNIT"] if found.options["PLANES"] else 1
    few, many = (
        _walk(found, compiled, outer=1, inner=rounds * found.grid[0] * positions // unit)
        for rounds in ROUNDS
    )
    blocks = values["outer"] * math.ceil(values["inner"] * unit / positions)
    opcodes = {}
    for opcode in many:
        block = (many[opcode] - few[opcode]) / (ROUNDS[1] - ROUNDS[0])
        setup = few[opcode] - ROUNDS[0] * block
        opcodes[opcode] = math.prod(found.grid[1:]) * (setup * found.grid[0] + block * blocks)
    return opcodes


@functools.cache
def count(layout: str, classes: int, dtype: str, step: str) -> dict[str, float]:
    """Warp instructions for 512 bytes of logits, by opcode. step: of STEPS, SOFT_STEPS, or
    'peer'.
    """
    found = launches(layout, classes, dtype, step) if step in STEPS + SOFT_STEPS else []
    total: Counter[str] = Counter()
    for launched in found or [peer(layout, classes, dtype)]:
        total.update(opcodes_of(launched))  # type: ignore[arg-type]
    return {opcode: n / _vectors(layout, classes, dtype) for opcode, n in total.items()}


def _vectors(layout: str, classes: int, dtype: str) -> float:
    return math.prod(SHAPES[layout, classes]) * DTYPES[dtype].itemsize / BYTES


CASES = [(layout, classes, dtype) for layout, classes in SHAPES for dtype in DTYPES]


def main() -> None:
    steps = (*STEPS, *SOFT_STEPS, "peer")
    print("layout  classes  dtype   " + "".join(f"{step:>14}" for step in steps))
    for case in CASES:
        found = [sum(count(*case, step).values()) for step in steps]
        print("{:7} {:7}  {:9}".format(*case) + "".join(f"{n:14.1f}" for n in found), flush=True)


def main_of(dtype: str, layout: str, classes: int, step: str) -> None:
    found = count(layout, classes, dtype, step)
    for opcode, n in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{n:8.2f}  {opcode}")
    print(f"{sum(found.values()):8.2f}  for 512 bytes")


def main_of_peers() -> None:
    """fused_peer.BEST: of 8 to 64 logits a thread."""
    for layout, classes, dtype in CASES:
        blocks = (256, 512, 1024, 2048, 4096, 8192) if layout == "rows" else (1, 4, 8, 16, 32)
        positions = (1,) if layout == "rows" else (128, 256, 512)
        found = {}
        for config in itertools.product(positions, blocks, (1, 2, 4, 8, 16)):
            if 8 <= config[0] * config[1] / (32 * config[2]) <= 64:
                opcodes = opcodes_of(peer(layout, classes, dtype, config))
                found[config] = sum(opcodes.values()) / _vectors(layout, classes, dtype)
        best = min(found, key=lambda config: found[config])
        print(f'    ("{layout}", {classes}, "{dtype}"): {best},  # {found[best]:.1f}', flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["peers"]:
        main_of_peers()
    elif len(sys.argv) > 1:
        main_of(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
