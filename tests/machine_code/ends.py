"""Warp instructions of what a step of rows launches besides the kernel that walks over them.

    PYTHONPATH=tests:. python -m machine_code.ends            # the table
    PYTHONPATH=tests:. python -m machine_code.ends budgets    # ENDS of test_machine_code_tiers.py

divisor_kernel before it, finish_kernel and row_combine_kernel after it, and a backward that finds
the gradient made. Some blocks are walked, all their warps, as rows.py does: the first ones, those
around the last of the class sums, and the last; the blocks in between are taken to be alike.
"""

from __future__ import annotations

import functools
import math
import re
import struct
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from support import launch_plans

from . import library, rows
from .kept import kept
from .warp import Launch, Warp

# Rows, classes and the step: its loss alone, with the gradient of the logits, of stage 2, with all
# gradients; and backward where forward has made the gradient.
CASES = {
    f"{n} x {classes} {step}": (n, classes, step)
    for n, classes in ((4096, 1203), (65536, 1203))
    for step in ("forward", "gradient", "stage2", "all", "made")
} | {"4096 x 365 made": (4096, 365, "made"), "4096 x 128256 forward": (4096, 128256, "forward")}
STEPS = rows.STEPS | {"made": rows.STEPS["backward"] | {"made": True}}

# As rows.ORDINARY, which is asked after it.
ORDINARY = {
    # A division of doubles, neither of which is subnormal or next to it.
    r"FSETP\.GT\.AND P, PT, \|R\|, 1\.469\d*e-39, PT": True,
    r"FSETP\.GEU\.AND P, PT, \|R\|, 6\.58\d*e-37, PT": True,
    r"FSETP\.NEU\.AND P, PT, R, 1, PT": False,  # the upstream gradient is 1
    r"ISETP\.NE\.AND P, PT, RZ, R, !P; EXIT": True,  # and nothing is left to be done
}


@dataclass(frozen=True)
class Count:
    """Of a launch: the instructions of all warps, and those of the warp that has the most."""

    total: float
    longest: int


def launches(architecture: str, dtype: str, case: str,
             registers: dict[str, int] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """What the step launches, without the kernel that walks over rows, unless it has nothing to do.
    registers: a thread's, of each kernel; else 128.
    """
    n, classes, step = CASES[case]
    known = defaultdict(lambda: 128, registers or {})
    device = launch_plans.Device(rows.DEVICES[architecture][0], known)
    found: list[dict[str, Any]] = rows.planner().row_launches(
        **({"weighted": True} | STEPS[step]), dtype=rows.DTYPES[dtype][0], rows=n, classes=classes,
        device=device,
    )  # fmt: skip
    return [launch for launch in found if step == "made" or not launch["fills"]]


def name_of(launch: dict[str, Any]) -> str:
    found = re.search(r"(\w+)<", launch["declaration"])
    assert found
    return found[1]


@kept
def counts(architecture: str, dtype: str, case: str) -> dict[str, Count]:
    """Kernel -> its count, in the order of the launches."""
    codes, registers = library.kernels(architecture)
    return {
        name_of(launch): _count(codes[launch["kernel"]], launch, rows.DEVICES[architecture][1])
        for launch in launches(architecture, dtype, case, registers)
    }


def _count(code: Any, launch: dict[str, Any], sizes: tuple[int, int]) -> Count:
    constants = bytearray(code.constant_bytes)
    grid, threads = (launch["grid_x"], launch["grid_y"]), launch["threads"]
    struct.pack_into("<3I", constants, sizes[0], threads, 1, 1)
    struct.pack_into("<3I", constants, sizes[1], *grid, 1)
    constants[len(constants) - len(launch["arguments"]) :] = launch["arguments"]
    deciding = functools.partial(rows.decide, ORDINARY | rows.ORDINARY)
    middle = launch.get("class_grid", 0)
    near = (0, 1, 2, middle - 2, middle - 1, middle, middle + 1, grid[0] - 1)
    walked = sorted({block for block in near if 0 <= block < grid[0]})
    total, longest = 0.0, 0
    for block, following in zip(walked, [*walked[1:], grid[0]], strict=True):
        for first in range(0, threads, 32):
            memory = functools.partial(rows.target_memory, 1)
            warp = Warp(code, Launch(bytes(constants), (block, 0), first, memory), deciding)
            issued = warp.run(rows.MOST)
            total += issued * (following - block) * grid[1]
            longest = max(longest, issued)
    return Count(total, longest)


def budgets() -> str:
    """ENDS of test_machine_code_tiers.py: the counts and a margin."""
    lines = ["ENDS = {"]
    for a in rows.SOFT_DEVICES:
        for d in rows.DTYPES:
            lines.append(f'    ("{a}", "{d}"): {{')
            for case in CASES:
                numbers = ", ".join(
                    f'"{name}": ({math.ceil(rows.MARGIN * n.total)}, '
                    f"{math.ceil(rows.MARGIN * n.longest)})"
                    for name, n in counts(a, d, case).items()
                )
                lines.append(f'        "{case}": {{{numbers}}},')
            lines.append("    },")
    return "\n".join([*lines, "}"])


def main() -> None:
    for a in rows.SOFT_DEVICES:
        for d in rows.DTYPES:
            for case in CASES:
                for name, n in counts(a, d, case).items():
                    print(f"sm_{a} {d:9} {case:24} {name:20} {n.total:10.0f} {n.longest:6}",
                          flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["budgets"]:
        print(budgets())
    else:
        main()
