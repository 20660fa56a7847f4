"""Warp instructions of the row kernels, counted in their machine code.

    PYTHONPATH=tests:. python -m machine_code.rows                            # the table
    PYTHONPATH=tests:. python -m machine_code.rows 90 bfloat16 8192 forward   # opcodes of one
    PYTHONPATH=tests:. python -m machine_code.rows budgets    # BUDGETS of test_machine_code.py
    PYTHONPATH=tests:. python -m machine_code.rows soft       # SOFT_ROWS of it
    PYTHONPATH=tests:. python -m machine_code.rows sliced     # SLICED of test_machine_code_tiers.py
    PYTHONPATH=tests:. python -m machine_code.rows narrow     # NARROW and FEW of it
    PYTHONPATH=tests:. python -m machine_code.rows details    # DETAILS of it
    PYTHONPATH=tests:. python -m machine_code.rows model      # INSTRUCTIONS of benchmarks/model.py

The number is that of all warps of a step's row kernel over N = 4096 rows, for each 512 bytes of
logits, which are one 16-byte load of a warp. finish_kernel is not among them. What row_launch.h
launches comes from simt/planner.cpp; the library's kernels are disassembled (library.py), and some
warps of some blocks walk through them (warp.py): the first and the last of a block, whose vectors
may be ragged, the one that has the target's class, and one for all others.
"""

from __future__ import annotations

import functools
import math
import re
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from benchmarks.gpus import GPUS
from simt import build
from support import launch_plans
from support.launch_plans import WarpRows

from . import disassembly, library
from .kept import kept
from .warp import Launch, Unknown, Warp

ROWS = 4096
BYTES = 512
CLASSES = (1000, 1203, 8142, 8192)
LONG = (32000, 128256)  # by clusters (sm_90 and newer), by tiles
MARGIN = 1.03  # of budgets
DTYPES = {"float32": (1, 4), "bfloat16": (2, 2)}  # number in launch.h, bytes
# The loss, with weights a class; with the gradient of the logits; calibrated, with the gradients of
# scale, bias and confidence; with all gradients. Backward: the gradient of the logits, not
# calibrated, of an upstream gradient that is a scalar.
STEPS = {
    "forward": launch_plans.FORWARD,
    "gradient": launch_plans.FORWARD | {"grad_logits": True},
    "stage2": launch_plans.STAGE_2,
    "all": launch_plans.STAGE_2 | {"grad_logits": True},
    "backward": launch_plans.BACKWARD,
}
# The second kernel of "stage2" and of "all" where a row is several blocks' but no cluster's.
SUMS = {
    "stage2 backward": STEPS["stage2"] | {"forward": False},
    "all backward": STEPS["all"] | {"forward": False},
}
# With class probabilities as targets: of the logits' type without weights, with weights, and of the
# arithmetic; of calibrated logits.
SOFT = {
    "soft forward": STEPS["forward"] | {"probabilities": 1, "weighted": False},
    "soft gradient": STEPS["gradient"] | {"probabilities": 1, "weighted": False},
    "soft weighted": STEPS["gradient"] | {"probabilities": 1},
    "soft float": STEPS["gradient"] | {"probabilities": 2, "weighted": False},
    "soft stage2": STEPS["stage2"] | {"probabilities": 1, "weighted": False},
    "soft all": STEPS["all"] | {"probabilities": 1, "weighted": False},
    "soft backward": STEPS["backward"] | {"probabilities": 1, "weighted": False},
}
# With prediction and entropy of every row.
DETAILS = {
    f"{step} details": STEPS[step] | {"details": True} for step in ("forward", "gradient", "all")
}
SOFT_CLASSES = (*CLASSES, 32000)
CLASSES_WITH_DETAILS = (1203, 8192)
SOFT_DEVICES = ("80", "90")
# Of a slice of a padded head, `padded[:, :1203]` of 1216 classes, whose gradient has its stride.
SLICED_CLASSES, PADDING = 1203, 13
SLICED = {
    f"sliced {step}": STEPS[step] | {"padding": PADDING, "grad_padding": PADDING}
    for step in ("gradient", "all", "backward")
}
# The same where the gradient is contiguous.
CONTIGUOUS = {f"{step}, contiguous": SLICED[step] | {"grad_padding": 0} for step in SLICED}
# Rows that groups of threads keep, many of them; and few rows, where set-up is most of it.
NARROW_CLASSES, NARROW_ROWS = (10, 100, 365), 65536
FEW_CLASSES = (1203,)
FEW = {f"few {step}": STEPS[step] | {"rows": 100} for step in STEPS}
ALL = STEPS | SUMS | SOFT | SLICED | CONTIGUOUS | FEW | DETAILS

# Architecture -> the GPU that the launches are made for, and where its constant bank has the sizes
# of the block and of the grid.
DEVICES = {
    "80": (GPUS["A100 SXM 80 GB"], (0, 12)),
    "90": (GPUS["H100 SXM"], (0, 12)),
    "100": (GPUS["B200"], (0x360, 0x370)),
    "120": (GPUS["RTX 5090"], (0x360, 0x370)),
}

# For the model also a GPU without clusters, and with too little shared memory for several warps.
WITH_MODEL = DEVICES | {"89": (GPUS["RTX 4090"], (0, 12))}

# What the ordinary case makes of predicates that data decide: a pattern of the instruction that
# makes the predicate, registers without numbers (and uniform ones as others), and of the branch ->
# the predicate. The first that matches.
ORDINARY = {
    r"FCHK ": False,  # a division whose operands need the long way
    r"FSETP\.NEU\.AND P, PT, R, R, PT": True,  # the target's logit is not the largest: no log1p
    r"FSETP\.EQ\.AND P, PT, R, R, PT": False,
    r"FSETP\.NEU\.AND P, PT, R, RZ, PT": True,  # the inverse of the denominator is not 0
    r"DSETP\.NEU\.AND P, PT, R, RZ, PT": True,  # the denominator is not 0
    r"FSETP\.GEU\.AND P, PT, \|R\|, 5\.87\d*e-39, PT": True,  # 1 / a double that is no subnormal
    r"ISETP\.GT\.U32\.AND P, PT, R, 0x1ffffff, PT": True,  # 1 / a float that is no subnormal
    r"FSETP\.GE\.AND P, PT, R, RZ, PT": True,  # the sigmoid of a positive number
    r"ISETP\.NE\.AND P, PT, R, RZ, PT; EXIT": False,  # this is the last block, which ends the loss
    r"FSETP\.GEU\.(AND|OR) P, PT, \|R\|, 1000000, !?P": False,  # no logit beyond a million
    r"FSETP\.EQ\.OR P, PT, R, RZ, !?P": False,  # the inverse of the denominator is not 0
    r"FSETP\.LE\.AND P, PT, \|R\|, 3\.40\d*e\+38, !?P": True,  # finite sums: no masked class
    r"FSETP\.LEU\.OR P, PT, R, RZ, P": False,  # a softmax has a sum, and no NaN: an entropy
}
# What row_warp_kernel makes of them otherwise.
OF_WARP_ROWS = {
    r"VOTE\.ANY P, ": False,  # the sum of slopes is NaN
    r"FSETP\.NEU\.AND P, PT, R, R, PT": False,  # the target's logit is what is taken off
    r"FSETP\.EQ\.AND P, PT, R, R, PT": True,
    r"ISETP\.NE\.OR P, PT, R, RZ, !P": True,  # the sum of the others is moderate
    r"FSETP\.LE\.(OR|AND) P, PT, R, 4\.29\d*e\+09, !?P": True,
    r"FSETP\.GTU\.AND P, PT, R, 4\.29\d*e\+09, PT": False,
    r"ISETP\.GE\.U32\.AND P, PT, R, 0x7f800000, PT": False,  # log1p of a positive number
}


class NewBranchError(AssertionError):
    """A branch that data decide, of which ORDINARY says nothing."""


def decide(ordinary: dict[str, bool], unknown: Unknown) -> bool:
    text = unknown.source.text if unknown.source else "?"
    plain = re.sub(r"\bU?([RP])(\d+|(?=[ZT]))", r"\1", re.sub(r"^U", "", text))
    for pattern, value in ordinary.items():
        if re.match(pattern, f"{plain}; {unknown.branch.name}"):
            return value
    raise NewBranchError(f"{unknown.branch.text} at {unknown.branch.address:#x} after {plain}")


# ---- Launches and kernels ----


@dataclass(frozen=True)
class Kernel:
    """A launch: simt/planner.cpp."""

    symbol: str
    declaration: str
    grid: tuple[int, int]
    threads: int
    shared: int
    arguments: bytes
    team: int  # blocks of a cluster, with rows of their own
    lanes: int  # of a row; 0: all of a block's threads, or of a cluster's

    @property
    def wide(self) -> bool:
        """Whether a row is that of several warps."""
        return self.lanes == 0

    @property
    def rows(self) -> int:
        """That its blocks of one blockIdx.x work on at a time."""
        return self.team * (1 if self.wide else self.threads // self.lanes)

    def vectors_of_a_warp(self, size: int) -> int:
        """Of elements of so many bytes."""
        of_warps = WarpRows.of(self.declaration)
        return 32 * (of_warps.vectors if of_warps else size)  # kKept of row_tile.cuh


@functools.cache
def planner() -> ModuleType:
    return build.module("planner")


def rows_of(classes: int, step: str) -> int:
    return int(ALL[step].get("rows", NARROW_ROWS if classes in NARROW_CLASSES else ROWS))


def launch(architecture: str, dtype: str, classes: int, step: str, registers: int = 128) -> Kernel:
    """The step's first launch that walks over the rows. registers: of a thread."""
    device = launch_plans.Device(WITH_MODEL[architecture][0], defaultdict(lambda: registers))
    given = {"weighted": True, "rows": rows_of(classes, step)} | ALL[step]
    launches = planner().row_launches(
        **given, dtype=DTYPES[dtype][0], classes=classes, device=device
    )
    found = next(launch for launch in launches if launch["fills"])
    return Kernel(
        found["kernel"], found["declaration"], (found["grid_x"], found["grid_y"]),
        found["threads"], found["shared_bytes"], found["arguments"],
        found["grid_y"] // found["row_tiles"], found["lanes"],
    )  # fmt: skip


# ---- Counts ----


@dataclass(frozen=True)
class Count:
    """Of a step's row kernel. setup: of a warp, besides its rows; row: of a warp a row (means).

    vector: of all warps, for each 512 bytes of logits. opcodes: the same of each opcode.
    """

    setup: float
    row: float
    vector: float
    opcodes: dict[str, float]


def _constants(kernel: Kernel, code: disassembly.Kernel, sizes: tuple[int, int],
               rounds: int) -> bytes:  # fmt: skip
    """The constant bank of the launch, for so many rows a block."""
    constants = bytearray(code.constant_bytes)
    struct.pack_into("<3I", constants, sizes[0], kernel.threads, 1, 1)
    struct.pack_into("<3I", constants, sizes[1], *kernel.grid, 1)
    arguments = bytearray(kernel.arguments)
    struct.pack_into("<q", arguments, OUTER, rounds * kernel.grid[0] * kernel.rows)
    constants[len(constants) - len(arguments) :] = arguments
    return bytes(constants)


MOST = 60_000  # instructions of a warp: more and the walk has gone astray
OUTER = 8  # where RowArgs has the number of rows


def target_memory(target: int, address: int, size: int) -> int | None:
    """All targets are the same class; nothing else is known. Little-endian int64."""
    if not 0 <= address - planner().TARGETS < 1 << 32:
        return None
    return target >> 8 * (address % 8) & ((1 << 8 * size) - 1)


@kept
def count(architecture: str, dtype: str, classes: int, step: str) -> Count:
    codes, registers = library.kernels(architecture)
    symbol = launch(architecture, dtype, classes, step).symbol
    kernel = launch(architecture, dtype, classes, step, registers[symbol])
    code = codes[kernel.symbol]
    # With so many rows a block: the difference is that of the rows, the rest is set-up.
    few, many = (block(kernel, n, code, architecture, dtype, classes, step) for n in (1, 3))
    row = {opcode: (many[opcode] - few[opcode]) / 2 / kernel.rows for opcode in many}
    setup = {opcode: few[opcode] - kernel.rows * row[opcode] for opcode in many}
    warps = kernel.threads // 32 * kernel.grid[1] / kernel.rows
    rows = rows_of(classes, step)
    vectors = rows * classes * DTYPES[dtype][1] / BYTES
    opcodes = {o: (setup[o] * kernel.grid[0] + row[o] * rows) / vectors for o in many}
    return Count(
        sum(setup.values()) / warps / kernel.rows,
        sum(row.values()) / warps,
        sum(opcodes.values()),
        opcodes,
    )


def block(kernel: Kernel, rounds: int, code: disassembly.Kernel, architecture: str, dtype: str,
           classes: int, step: str) -> Counter[str]:  # fmt: skip
    """Instructions of the blocks of one blockIdx.x: the sum over them, the mean over alignments."""
    warps, tiles = kernel.threads // 32, kernel.grid[1]
    size = DTYPES[dtype][1]
    stride, grad_stride = (classes + ALL[step].get(p, 0) for p in ("padding", "grad_padding"))
    alignments, gradients = (
        next(n for n in (1, 2, 4, 8) if n * s * size % 16 == 0) for s in (stride, grad_stride)
    )
    # Rows that do not begin at an aligned address are taken to be alike.
    blocks = {0: 1 / alignments} | ({1: 1 - 1 / alignments} if alignments > 1 else {})
    if (stride - grad_stride) * size % 16:  # nor do their gradients lie like them
        blocks = dict.fromkeys(range(gradients), 1 / gradients)
    constants = _constants(kernel, code, WITH_MODEL[architecture][1], rounds)
    total: Counter[str] = Counter()
    of_warps = OF_WARP_ROWS if WarpRows.of(kernel.declaration) else {}
    deciding = functools.partial(decide, ORDINARY | of_warps)

    def walk(times: float, block: int, tile: int, warp: int, holder: int) -> None:
        """Adds a warp's to the total. holder: the first tile's warp with the target's class."""
        first = kernel.vectors_of_a_warp(size) * (holder if kernel.wide else 0)
        target = (first + 5) * (16 // size) + 1
        if target >= classes:
            target = classes // 2
        memory = functools.partial(target_memory, target)
        walking = Warp(code, Launch(constants, (block, tile), 32 * warp, memory), deciding)
        walking.run(MOST)
        for opcode, issued in walking.opcodes().items():
            total[opcode] += times * issued  # type: ignore[assignment]

    middle = warps // 2
    for tile in range(tiles):
        for warp in range(warps) if warps <= 4 else (0, middle, warps - 1):
            holder = 0 if warp else warps - 1
            if warps > 4 and warp == middle:
                for block, times in (blocks if stride != grad_stride else {0: 1.0}).items():
                    walk((warps - 2) * times, block, tile, warp, holder)
                continue
            for block, times in blocks.items():
                walk(times, block, tile, warp, holder)
    for member in range(kernel.team):  # a warp with the target's class
        walk(1, 0, member, middle, middle)
        walk(-1, 0, member, middle, 0 if middle else warps - 1)
    return total


KEYS = [(a, d, c, s) for a in DEVICES for d in DTYPES for c in CLASSES for s in STEPS]


def table(name: str, architectures: Iterable[str], rows: Iterable[Any], steps: Iterable[str],
          most: Callable[..., float]) -> str:  # fmt: skip
    """A table of test_machine_code.py: most(architecture, dtype, row, step)."""
    rows, steps = list(rows), list(steps)
    lines = [f"{name} = {{"]
    for a in architectures:
        for d in DTYPES:
            lines.append(f'    ("{a}", "{d}"): (')
            for row in rows:
                numbers = ", ".join(str(most(a, d, row, step)) for step in steps)
                lines.append(f"        ({numbers}),")
            lines.append("    ),")
    return "\n".join([*lines, "}"])


def budgets() -> str:
    """BUDGETS of test_machine_code.py: the counts and MARGIN."""
    return table("BUDGETS", DEVICES, CLASSES, STEPS,
                 lambda *key: math.ceil(MARGIN * count(*key).vector))  # fmt: skip


def sliced_budgets() -> str:
    """SLICED of test_machine_code_tiers.py."""
    return table("SLICED", SOFT_DEVICES, [SLICED_CLASSES], SLICED,
                 lambda *key: math.ceil(MARGIN * count(*key).vector))  # fmt: skip


def narrow_budgets() -> str:
    """NARROW and FEW of test_machine_code_tiers.py."""
    tables = ("NARROW", NARROW_CLASSES, STEPS), ("FEW", FEW_CLASSES, FEW)
    return "\n".join(
        table(name, SOFT_DEVICES, classes, steps,
              lambda *key: math.ceil(MARGIN * count(*key).vector))
        for name, classes, steps in tables
    )  # fmt: skip


def soft_budgets() -> str:
    """SOFT_ROWS of test_machine_code.py."""
    return table("SOFT_ROWS", SOFT_DEVICES, SOFT_CLASSES, SOFT,
                 lambda *key: math.ceil(MARGIN * count(*key).vector))  # fmt: skip


# The way that rows are worked on in benchmarks/model.py, its code -> architecture, classes and step
# that are counted.
MODEL = {
    **{("warp", s): ("90", 1203, s) for s in ("gradient", "stage2", "all")},
    **{("warps", s): ("90", 8192, s) for s in ("gradient", "stage2", "all")},
    **{("block", s): ("89", 8192, s) for s in ("stage2", "all")},
    **{("cluster", s): ("90", 32000, s) for s in ("gradient", "stage2", "all")},
    ("tiles", "forward"): ("80", 128256, "forward"),
    ("tiles", "calibrated forward"): ("90", 128256, "all"),
    ("tiles", "stage2 forward"): ("90", 128256, "stage2"),
    ("tiles", "backward"): ("80", 128256, "backward"),
    **{("tiles", s): ("90", 128256, s) for s in SUMS},
}


def details_budgets() -> str:
    """DETAILS of test_machine_code.py."""
    return table("DETAILS", SOFT_DEVICES, CLASSES_WITH_DETAILS, DETAILS,
                 lambda *key: math.ceil(MARGIN * count(*key).vector))  # fmt: skip


def model() -> str:
    """INSTRUCTIONS of benchmarks/model.py."""
    lines = ["INSTRUCTIONS = {"]
    for key, (architecture, classes, step) in MODEL.items():
        found = (round(count(architecture, d, classes, step).vector) for d in DTYPES)
        lines.append(f'    ("{key[0]}", "{key[1]}"): ({", ".join(map(str, found))}),')
    return "\n".join([*lines, "}"])


def main() -> None:
    print("architecture  dtype     classes  step      setup    row  for 512 bytes")
    for key in KEYS:
        found = count(*key)
        architecture, dtype, classes, step = key
        print(f"sm_{architecture:10} {dtype:9} {classes:6}  {step:9} {found.setup:6.0f} "
              f"{found.row:6.0f} {found.vector:14.1f}", flush=True)  # fmt: skip


def main_of(architecture: str, dtype: str, classes: int, step: str) -> None:
    """The opcodes of one of them."""
    found = count(architecture, dtype, classes, step)
    for opcode, n in sorted(found.opcodes.items(), key=lambda item: -item[1]):
        print(f"{n:8.2f}  {opcode}")
    print(f"{found.vector:8.2f}  for 512 bytes; a warp: {found.setup:.0f}, a row {found.row:.0f}")


if __name__ == "__main__":
    tables = {
        "budgets": budgets, "soft": soft_budgets, "sliced": sliced_budgets,
        "narrow": narrow_budgets, "details": details_budgets, "model": model,
    }  # fmt: skip
    if len(sys.argv) == 2:
        print(tables[sys.argv[1]]())
    elif len(sys.argv) > 1:
        main_of(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
