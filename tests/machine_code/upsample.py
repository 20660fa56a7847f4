"""Warp instructions of the upsampled loss, counted in the machine code of its kernels.

    PYTHONPATH=tests:. python -m machine_code.upsample                               # the table
    PYTHONPATH=tests:. python -m machine_code.upsample 90 bfloat16 1/8 forward       # opcodes
    PYTHONPATH=tests:. python -m machine_code.upsample budgets   # UPSAMPLE of test_machine_code.py

The number is that of all warps of a step's kernels for 32 times an output position and a class,
which would be one instruction of a warp that has a logit of the output a lane. upsample_axis_kernel
and finish_kernel, which are of other sizes, are not among them. A block walks as rows.py says, one
that has its share of the image's middle.
"""

from __future__ import annotations

import functools
import math
import re
import struct
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from support import launch_plans

from . import disassembly, library
from .kept import kept
from .rows import (
    DEVICES,
    DTYPES,
    MARGIN,
    MOST,
    ORDINARY,
    OUTER,
    decide,
    planner,
    table,
    target_memory,
)  # fmt: skip
from .warp import Launch, Warp


@dataclass(frozen=True)
class Shape:
    images: int
    classes: int
    low: tuple[int, int]
    size: tuple[int, int]

    @property
    def warps(self) -> float:
        """32 times an output position and a class."""
        return self.images * self.classes * math.prod(self.size) / 32


# Logits at 1/8 and at 1/4 of the target's height and width: ADE20K, Cityscapes.
SHAPES = {
    "ade20k": Shape(2, 150, (64, 64), (512, 512)),
    "cityscapes": Shape(4, 19, (128, 256), (1024, 2048)),
}
# Plain: the loss with weights a class, and the gradient of the logits. Calibrated: with the
# gradients of scale, bias and confidence, which backward makes.
CALIBRATED = launch_plans.STAGE_2 | {"class_gradients": False}
STEPS = {
    "forward": launch_plans.FORWARD,
    "backward": launch_plans.BACKWARD,
    "calibrated forward": CALIBRATED,
    "calibrated backward": launch_plans.STAGE_2 | {"forward": False, "grad_logits": True},
}
# What these kernels make of predicates otherwise.
OF_UPSAMPLE = {
    r"FSETP\.NEU\.AND P, PT, R, R, PT": False,  # the target's logit is what is taken off
    r"ISETP\.GE\.U32\.AND P, PT, R, 0x7f800000, PT": False,  # log1p of a positive number
    r"B2R\.RESULT ": False,  # all sums of the block are moderate, all logits finite
    r"ISETP\.GE\.AND P, PT, R, RZ, PT": True,  # the target, from shared memory, is not ignored
    r"ISETP\.GE\.U32\.AND P, PT, R, R, PT": False,  # and among the classes that are staged
    r"FSETP\.NEU\.AND P, PT, RZ, R, PT": True,  # the inverse of the denominator is not 0
    r"FSETP\.EQ\.OR P, PT, (RZ, R|R, RZ), P": False,
    r"LOP3\.LUT P, RZ, R, 0x[12], RZ, 0xc0, !PT": False,  # no label smoothing, no margin
}


@dataclass(frozen=True)
class Kernel:
    """A launch: simt/planner.cpp.

    tiles: of an image; a block has one at a time. source, first: addresses of the axes' arrays
    (csrc/cuda/kernels/arguments.h), of the rows and of the columns.
    """

    symbol: str
    declaration: str
    grid: tuple[int, int]
    threads: int
    arguments: bytes
    tiles: int
    source: tuple[int, int]
    first: tuple[int, int]

    @classmethod
    def of(cls, launch: dict[str, Any], shape: Shape) -> Kernel:
        threads, tiles = launch["threads"], launch["tiles"]
        if "upsample_nodes" in launch["declaration"]:  # a thread has one
            tiles = math.prod(shape.low) // threads
        return cls(
            launch["kernel"], launch["declaration"], (launch["grid_x"], launch["grid_y"]), threads,
            launch["arguments"], tiles, launch["source"], launch["first"],
        )  # fmt: skip

    @property
    def name(self) -> str:
        return re.search(r"(\w+)<", self.declaration)[1]  # type: ignore[index]

    def constants(self, code: disassembly.Kernel, architecture: str, images: int) -> bytes:
        """The constant bank of a launch with a block a tile of an image, for so many images."""
        sizes = DEVICES[architecture][1]
        constants = bytearray(code.constant_bytes)
        struct.pack_into("<3I", constants, sizes[0], self.threads, 1, 1)
        struct.pack_into("<3I", constants, sizes[1], self.tiles, self.grid[1], 1)
        arguments = bytearray(self.arguments)
        struct.pack_into("<q", arguments, OUTER, images)
        constants[len(constants) - len(arguments) :] = arguments
        return bytes(constants)

    def memory(self, shape: Shape) -> dict[int, list[int]]:
        """Arrays of int32 by their address: Axis of arguments.h, without align_corners."""
        arrays = {}
        for low, size, source, first in zip(
            shape.low, shape.size, self.source, self.first, strict=True
        ):
            of = [min(int(max((i + 0.5) * low / size - 0.5, 0)), low - 1) for i in range(size)]
            arrays[source] = of
            arrays[first] = [sum(s < node for s in of) for node in range(low + 1)]
        return arrays


def launched(architecture: str, dtype: str, shape: str, step: str, registers: int = 128
             ) -> list[Kernel]:  # fmt: skip
    """The step's launches that are counted. registers: of a thread."""
    device = launch_plans.Device(DEVICES[architecture][0], defaultdict(lambda: registers))
    of = SHAPES[shape]
    found = planner().upsample_launches(
        **STEPS[step], dtype=DTYPES[dtype][0], images=of.images, classes=of.classes, low=of.low,
        size=of.size, weighted=True, device=device,
    )  # fmt: skip
    return [
        Kernel.of(launch, of)
        for launch in found
        if not any(name in launch["declaration"] for name in ("upsample_axis", "finish"))
    ]


@kept
def count(architecture: str, dtype: str, shape: str, step: str) -> dict[str, Counter[str]]:
    """Of each kernel by name, of each opcode: instructions for 32 positions and classes."""
    codes, registers = library.kernels(architecture)
    found = {}
    for k, first in enumerate(launched(architecture, dtype, shape, step)):
        most = registers[first.symbol]
        kernel = launched(architecture, dtype, shape, step, most)[k]
        # Blocks of one tile and of two, of as many images: the difference is that of a tile.
        one, two = (
            _block(kernel, images, codes[kernel.symbol], architecture, SHAPES[shape])
            for images in (1, 2)
        )
        total: Counter[str] = Counter()
        for opcode in two:
            tile = two[opcode] - one[opcode]
            setup = one[opcode] - tile
            issued = setup * math.prod(kernel.grid)
            issued += tile * kernel.tiles * kernel.grid[1] * SHAPES[shape].images
            total[opcode] = issued / SHAPES[shape].warps  # type: ignore[assignment]
        found[kernel.name] = total
    return found


def total(architecture: str, dtype: str, shape: str, step: str) -> float:
    return sum(c.total() for c in count(architecture, dtype, shape, step).values())


def _block(kernel: Kernel, images: int, code: disassembly.Kernel, architecture: str,
           shape: Shape) -> Counter[str]:  # fmt: skip
    """Instructions of a block that goes over the same tile of so many images."""
    constants = kernel.constants(code, architecture, images)
    arrays = kernel.memory(shape)

    def memory(address: int, size: int) -> int | None:
        for begin, array in arrays.items():
            if 0 <= address - begin < 4 * len(array):
                return array[(address - begin) // 4]
        return target_memory(5, address, size)

    issued: Counter[str] = Counter()
    middle = kernel.tiles // 2 + round(kernel.tiles**0.5) // 2
    for warp in range(kernel.threads // 32):
        launch = Launch(constants, (middle, 0), 32 * warp, memory)
        walking = Warp(code, launch, functools.partial(decide, OF_UPSAMPLE | ORDINARY))
        walking.run(MOST)
        issued += walking.opcodes()
    return issued


KEYS = [(a, d, shape, step) for a in DEVICES for d in DTYPES for shape in SHAPES for step in STEPS]


def budgets() -> str:
    """UPSAMPLE of test_machine_code.py: the counts and MARGIN."""
    return table("UPSAMPLE", DEVICES, SHAPES, STEPS,
                 lambda *key: math.ceil(10 * MARGIN * total(*key)) / 10)  # fmt: skip


def main() -> None:
    for key in KEYS:
        parts = count(*key)
        names = ", ".join(f"{name} {c.total():.2f}" for name, c in parts.items())
        architecture, *rest = key
        line = f"sm_{architecture:4} {' '.join(f'{r:10}' for r in rest)} {total(*key):6.2f}"
        print(f"{line}: {names}", flush=True)


def main_of(architecture: str, dtype: str, shape: str, step: str) -> None:
    """The opcodes of one of them."""
    for name, opcodes in count(architecture, dtype, shape, step).items():
        print(name)
        for opcode, n in sorted(opcodes.items(), key=lambda item: -item[1]):
            print(f"{n:8.3f}  {opcode}")
    print(f"{total(architecture, dtype, shape, step):8.2f}  for 32 positions and classes")


if __name__ == "__main__":
    if sys.argv[1:] == ["budgets"]:
        print(budgets())
    elif len(sys.argv) > 1:
        main_of(*sys.argv[1:5])
    else:
        main()
