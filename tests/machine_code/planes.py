"""Warp instructions of the dense kernel, counted in its machine code; as rows.py, for class planes.

    PYTHONPATH=tests:. python -m machine_code.planes                          # the table
    PYTHONPATH=tests:. python -m machine_code.planes 90 bfloat16 19 forward   # opcodes of one
    PYTHONPATH=tests:. python -m machine_code.planes budgets  # PLANES of test_machine_code.py
    PYTHONPATH=tests:. python -m machine_code.planes model    # of benchmarks/model_planes.py

A block's warps are walked through one tile and through three: the difference is that of the tiles,
the rest is set-up. Every target is the same class, and no position is ignored.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
from collections import Counter, defaultdict
from typing import Any

from benchmarks import model_planes
from support import launch_plans

from . import disassembly, library
from .kept import kept
from .rows import (
    BYTES,
    DTYPES,
    MARGIN,
    MOST,
    ORDINARY,
    OUTER,
    decide,
    planner,
    table,
    target_memory,
)
from .rows import DEVICES as ALL_DEVICES
from .warp import Launch, Warp

# Newer code packs what is not known with what is into registers, which the walk does not follow.
DEVICES = {architecture: ALL_DEVICES[architecture] for architecture in ("80", "90")}
# Classes -> images, classes, positions of a plane.
SHAPES = {c: (n, c, height * width) for n, c, height, width in model_planes.SHAPES}
STEPS = {
    "forward": launch_plans.FORWARD,
    "gradient": launch_plans.FORWARD | {"grad_logits": True},
    "stage2": launch_plans.STAGE_2,
    "backward": launch_plans.BACKWARD,
}
OF_PLANES = {
    r"ISETP\.NE\.OR\.EX P, PT, (R, RZ|RZ, \S+), !P, P": False,  # the longer way
    r"B2R\.RESULT ": False,  # no position of the tile is read once more, by its maximum
    # That is: the sum of the others is moderate, no logit beyond a million.
    r"F?SETP\.GTU\.OR P, PT, R, 4\.29\d*e\+09, P": False,
    r"FSETP\.(LT|LE)\.AND P, PT, \|?R\|?, \d\S*, P": True,
    r"FSETP\.GEU\.OR P, PT, \|R\|, 1000000, P": False,
    r"FSETP\.NEU\.AND P, PT, R, R, PT": False,  # the target's logit is what is taken off
    r"FSETP\.NEU\.AND P, PT, R, -INF , PT": True,  # and not -inf
    r"FSETP\.NAN\.AND P, PT, R, R, PT": False,  # nor NaN
    r"ISETP\.GE\.U32\.AND P, PT, R, 0x7f800000, PT": False,  # log1p of a positive number
    # The position is not ignored.
    r"ISETP\.GE\.AND\.EX P, PT, R, -0x1, PT, P": True,
    r"ISETP\.GT\.AND P, PT, R, -0x2, PT": True,
    r"ISETP\.GE(\.S64)?\.AND P, PT, R, -0x1, PT": True,
    # The stage has the target.
    r"ISETP\.GT\.AND P, PT, R, -0x1, PT": True,
    r"ISETP\.GE\.AND P, PT, R, RZ, PT": True,
}


def launch(architecture: str, dtype: str, classes: int, step: str,
           registers: int = 128) -> dict[str, Any]:  # fmt: skip
    """The step's dense kernel: simt/planner.cpp. registers: of a thread."""
    device = launch_plans.Device(DEVICES[architecture][0], defaultdict(lambda: registers))
    images, _, positions = SHAPES[classes]
    launches = planner().dense_launches(
        **STEPS[step], dtype=DTYPES[dtype][0], images=images, classes=classes, positions=positions,
        weighted=True, device=device,
    )  # fmt: skip
    found: dict[str, Any] = next(launch for launch in launches if launch["fills"])
    return found


@kept
def count(architecture: str, dtype: str, classes: int, step: str) -> dict[str, float]:
    """Opcode -> how often it is issued for 512 bytes of logits, by all warps."""
    codes, registers = library.kernels(architecture)
    symbol = launch(architecture, dtype, classes, step)["kernel"]
    found = launch(architecture, dtype, classes, step, registers[symbol])
    few, many = (_block(found, n, codes[symbol], architecture) for n in (1, 3))
    tile = {opcode: (many[opcode] - few[opcode]) / 2 for opcode in many}
    images, _, positions = SHAPES[classes]
    vectors = images * classes * positions * DTYPES[dtype][1] / BYTES
    return {
        o: ((few[o] - tile[o]) * found["grid_x"] + tile[o] * found["tiles"]) / vectors for o in many
    }


def _block(found: dict[str, Any], tiles: int, code: disassembly.Kernel,
           architecture: str) -> Counter[str]:  # fmt: skip
    """Instructions of a block with so many whole tiles of one image."""
    sizes = DEVICES[architecture][1]
    arguments = bytearray(found["arguments"])
    struct.pack_into("<q", arguments, OUTER, 1)
    struct.pack_into("<i", arguments, found["image_tiles_at"], tiles)
    constants = bytearray(code.constant_bytes)
    struct.pack_into("<3I", constants, sizes[0], found["threads"], 1, 1)
    struct.pack_into("<3I", constants, sizes[1], 1, 1, 1)
    constants[len(constants) - len(arguments) :] = arguments
    deciding = functools.partial(decide, ORDINARY | OF_PLANES)
    total: Counter[str] = Counter()
    for first_thread in range(0, found["threads"], 32):
        memory = functools.partial(target_memory, 0)
        warp = Warp(code, Launch(bytes(constants), (0, 0), first_thread, memory), deciding)
        warp.run(MOST)
        total.update(warp.opcodes())
    return total


KEYS = [(a, d, c, s) for a in DEVICES for d in DTYPES for c in SHAPES for s in STEPS]


def budgets() -> str:
    """PLANES of test_machine_code.py: the counts and MARGIN."""
    return table("PLANES", DEVICES, SHAPES, STEPS,
                 lambda *key: math.ceil(MARGIN * sum(count(*key).values())))  # fmt: skip


def model() -> str:
    """INSTRUCTIONS of benchmarks/model_planes.py."""
    lines = ["INSTRUCTIONS = {"]
    for c in SHAPES:
        for step in STEPS:
            found = (round(sum(count("90", d, c, step).values())) for d in DTYPES)
            lines.append(f'    ({c}, "{step}"): ({", ".join(map(str, found))}),')
    return "\n".join([*lines, "}"])


def main(keys: list[tuple[str, str, int, str]]) -> None:
    print("architecture  dtype     classes  step       for 512 bytes")
    for architecture, dtype, classes, step in keys:
        vector = sum(count(architecture, dtype, classes, step).values())
        print(f"sm_{architecture:10} {dtype:9} {classes:6}  {step:9} {vector:14.1f}", flush=True)


def main_of(architecture: str, dtype: str, classes: int, step: str) -> None:
    """The opcodes of one of them."""
    for opcode, n in sorted(count(architecture, dtype, classes, step).items(), key=lambda x: -x[1]):
        print(f"{n:8.2f}  {opcode}")


if __name__ == "__main__":
    if sys.argv[1:] in (["budgets"], ["model"]):
        print(budgets() if sys.argv[1] == "budgets" else model())
    elif len(sys.argv) > 2:
        main_of(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main([key for key in KEYS if key[0] in sys.argv[1:] or len(sys.argv) == 1])
