"""The counts of test_machine_code.py for slices of padded heads, short rows, few rows, and what a
step launches besides the kernel that walks over its rows.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks import model
from benchmarks.gpus import GPUS
from disalign_ops._ops.new_gradient import new_gradient
from machine_code import ends, library, rows
from simt import build
from support import launch_plans


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    if library.why_not():
        pytest.skip(str(library.why_not()))


# Instructions for 512 bytes of the logits `padded[:, :1203]` of 1216 classes, for each of
# rows.SLICED: those of nvcc 13.0 and 3 %. `python -m machine_code.rows sliced` prints this.
SLICED = {
    ("80", "float32"): ((77, 147, 70),),
    ("80", "bfloat16"): ((163, 314, 150),),
    ("90", "float32"): ((83, 156, 74),),
    ("90", "bfloat16"): ((177, 344, 159),),
}


@pytest.mark.parametrize(("architecture", "dtype"), SLICED)
def test_the_gradient_of_a_slice_is_stored_by_vectors(architecture: str, dtype: str) -> None:
    classes, padding = rows.SLICED_CLASSES, rows.PADDING
    padded = torch.empty(rows.ROWS, classes + padding, dtype=getattr(torch, dtype), device="meta")
    assert new_gradient(padded[:, :classes]).stride() == (classes + padding, 1)
    budgets = dict(zip(rows.SLICED, SLICED[architecture, dtype][0], strict=True))
    scalar = "STG.E" if dtype == "float32" else "STG.E.U16"
    for step, budget in budgets.items():
        found = rows.count(architecture, dtype, classes, step)
        assert found.vector <= budget
        # All but a row's edges; what is issued for vectors that a row's last has not is counted.
        assert 0.99 < found.opcodes["STG.E.128"] < 1.1
        other = rows.count(architecture, dtype, classes, f"{step}, contiguous").opcodes
        in_vector = 16 // rows.DTYPES[dtype][1]
        assert other["STG.E.128"] < 1.1 / in_vector + 0.01
        assert other[scalar] > found.opcodes[scalar] + 0.9 * (in_vector - 1)


# The same of rows.NARROW_CLASSES, 65536 rows, and of rows.FEW_CLASSES, 100 rows; for each of
# rows.STEPS. `python -m machine_code.rows narrow` prints both.
NARROW = {
    ("80", "float32"): (
        (344, 452, 492, 581, 314),
        (196, 255, 333, 400, 172),
        (87, 132, 309, 379, 130),
    ),
    ("80", "bfloat16"): (
        (1145, 1463, 1944, 2276, 1157),
        (385, 498, 689, 825, 331),
        (246, 365, 633, 789, 362),
    ),
    ("90", "float32"): (
        (385, 508, 507, 599, 327),
        (209, 272, 348, 418, 169),
        (90, 135, 308, 378, 132),
    ),
    ("90", "bfloat16"): (
        (1271, 1627, 2070, 2417, 1168),
        (412, 533, 720, 862, 325),
        (247, 368, 644, 806, 364),
    ),
}
FEW = {
    ("80", "float32"): ((305, 371, 287, 319, 284),),
    ("80", "bfloat16"): ((657, 798, 586, 663, 618),),
    ("90", "float32"): ((310, 380, 291, 323, 286),),
    ("90", "bfloat16"): ((668, 819, 631, 712, 624),),
}


@pytest.mark.parametrize(("architecture", "dtype"), NARROW)
def test_short_and_few_rows_keep_their_budgets(architecture: str, dtype: str) -> None:
    over = {}
    for budgets, classes, steps in (
        (NARROW, rows.NARROW_CLASSES, rows.STEPS), (FEW, rows.FEW_CLASSES, rows.FEW),
    ):  # fmt: skip
        all_budgets = sum(budgets[architecture, dtype], ())
        for case, most in zip(itertools.product(classes, steps), all_budgets, strict=True):
            found = rows.count(architecture, dtype, *case).vector
            if found > most:
                over[case] = found, most
    assert not over


def test_the_stated_counts_of_short_and_few_rows() -> None:
    text = Path(model.__file__).with_name("results").joinpath("README.md").read_text()
    table = re.findall(r"^\| (\d+) \| (fp32|bf16) \| ([\d |]+) \|$", text, re.M)
    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    stated = {
        (int(classes), dtypes[dtype]): [int(n) for n in numbers.split("|")]
        for classes, dtype, numbers in table
    }
    steps = {
        **dict.fromkeys(rows.NARROW_CLASSES, rows.STEPS),
        **dict.fromkeys(rows.FEW_CLASSES, rows.FEW),
    }
    assert set(stated) == set(itertools.product(steps, rows.DTYPES))
    for (classes, dtype), numbers in stated.items():
        found = [rows.count("90", dtype, classes, step).vector for step in steps[classes]]
        assert numbers == pytest.approx(found, rel=rows.MARGIN - 1), (classes, dtype)


def test_groups_keep_short_rows_and_warps_the_longer_ones() -> None:
    """As many lanes as a row's vectors need, and by warps where that takes fewer instructions."""
    lanes = {}
    for dtype, classes, step in itertools.product(
        rows.DTYPES, (10, 100, 200, 365), ("gradient", "all")
    ):
        kernel = rows.launch("90", dtype, classes, step)
        by_warps = "row_warp_kernel" in kernel.declaration
        lanes[dtype, classes, step] = "warp" if by_warps else kernel.lanes
    for step in ("gradient", "all"):
        assert [lanes["float32", c, step] for c in (10, 100, 200, 365)] == [1, 8, 16, "warp"]
        assert [lanes["bfloat16", c, step] for c in (10, 100, 200, 365)] == [2, 8, 16, "warp"]


# Instructions of a launch, of all its warps and of the warp that has the most: those of nvcc 13.0
# and 3 %. `python -m machine_code.ends budgets` prints this.
ENDS = {
    ("80", "float32"): {
        "4096 x 1203 forward": {"finish_kernel": (1897, 271)},
        "4096 x 1203 gradient": {"divisor_kernel": (21231, 170)},
        "4096 x 1203 stage2": {"finish_kernel": (216504, 460)},
        "4096 x 1203 all": {"divisor_kernel": (21227, 166), "finish_kernel": (192151, 421)},
        "4096 x 1203 made": {"row_warp_kernel": (272979, 216)},
        "65536 x 1203 forward": {"finish_kernel": (1897, 271)},
        "65536 x 1203 gradient": {"divisor_kernel": (339624, 170)},
        "65536 x 1203 stage2": {"finish_kernel": (548988, 460)},
        "65536 x 1203 all": {"divisor_kernel": (339620, 166), "finish_kernel": (529497, 446)},
        "65536 x 1203 made": {"row_warp_kernel": (272979, 216)},
        "4096 x 365 made": {"row_warp_kernel": (272979, 216)},
        "4096 x 128256 forward": {
            "row_combine_kernel": (2542930, 661),
            "finish_kernel": (2284, 308),
        },
    },
    ("80", "bfloat16"): {
        "4096 x 1203 forward": {"finish_kernel": (1876, 271)},
        "4096 x 1203 gradient": {"divisor_kernel": (21231, 170)},
        "4096 x 1203 stage2": {"finish_kernel": (212121, 460)},
        "4096 x 1203 all": {"divisor_kernel": (21227, 166), "finish_kernel": (187767, 421)},
        "4096 x 1203 made": {"row_warp_kernel": (269609, 216)},
        "65536 x 1203 forward": {"finish_kernel": (1876, 271)},
        "65536 x 1203 gradient": {"divisor_kernel": (339624, 170)},
        "65536 x 1203 stage2": {"finish_kernel": (544605, 460)},
        "65536 x 1203 all": {"divisor_kernel": (339620, 166), "finish_kernel": (525113, 446)},
        "65536 x 1203 made": {"row_warp_kernel": (269609, 216)},
        "4096 x 365 made": {"row_warp_kernel": (269609, 216)},
        "4096 x 128256 forward": {
            "row_combine_kernel": (2542930, 661),
            "finish_kernel": (2284, 308),
        },
    },
    ("90", "float32"): {
        "4096 x 1203 forward": {"finish_kernel": (2139, 296)},
        "4096 x 1203 gradient": {"divisor_kernel": (23471, 187)},
        "4096 x 1203 stage2": {"finish_kernel": (232482, 484)},
        "4096 x 1203 all": {"divisor_kernel": (23468, 184), "finish_kernel": (200453, 435)},
        "4096 x 1203 made": {"row_warp_kernel": (360154, 233)},
        "65536 x 1203 forward": {"finish_kernel": (2139, 296)},
        "65536 x 1203 gradient": {"divisor_kernel": (375484, 187)},
        "65536 x 1203 stage2": {"finish_kernel": (598832, 484)},
        "65536 x 1203 all": {"divisor_kernel": (375481, 184), "finish_kernel": (548906, 460)},
        "65536 x 1203 made": {"row_warp_kernel": (360154, 233)},
        "4096 x 365 made": {"row_warp_kernel": (480207, 233)},
        "4096 x 128256 forward": {"finish_kernel": (1859, 280)},
    },
    ("90", "bfloat16"): {
        "4096 x 1203 forward": {"finish_kernel": (2139, 296)},
        "4096 x 1203 gradient": {"divisor_kernel": (23471, 187)},
        "4096 x 1203 stage2": {"finish_kernel": (190122, 432)},
        "4096 x 1203 all": {"divisor_kernel": (23468, 184), "finish_kernel": (159420, 384)},
        "4096 x 1203 made": {"row_warp_kernel": (356516, 233)},
        "65536 x 1203 forward": {"finish_kernel": (2139, 296)},
        "65536 x 1203 gradient": {"divisor_kernel": (375484, 187)},
        "65536 x 1203 stage2": {"finish_kernel": (584324, 484)},
        "65536 x 1203 all": {"divisor_kernel": (375481, 184), "finish_kernel": (539185, 460)},
        "65536 x 1203 made": {"row_warp_kernel": (356516, 233)},
        "4096 x 365 made": {"row_warp_kernel": (356516, 233)},
        "4096 x 128256 forward": {"finish_kernel": (1859, 280)},
    },
}


@pytest.mark.parametrize(("architecture", "dtype"), ENDS)
def test_what_is_launched_besides_the_rows_keeps_its_budgets(architecture: str, dtype: str) -> None:
    budgets = ENDS[architecture, dtype]
    assert list(budgets) == list(ends.CASES)
    for case, kernels in budgets.items():
        found = ends.counts(architecture, dtype, case)
        assert list(found) == list(kernels), case
        for name, (total, longest) in kernels.items():
            assert found[name].total <= total, (case, name)
            assert found[name].longest <= longest, (case, name)


@pytest.mark.parametrize("architecture", rows.SOFT_DEVICES)
def test_they_take_less_than_their_launches(architecture: str) -> None:
    """By the model's constants: of 4096 rows, their instructions less than a launch's 3 us."""
    issue = model.SHARE_OF_ISSUE * rows.DEVICES[architecture][0].instructions_per_second
    for dtype, case in itertools.product(rows.DTYPES, ends.CASES):
        if ends.CASES[case][0] == 4096:
            for name, n in ends.counts(architecture, dtype, case).items():
                if name != "row_combine_kernel":  # which adds up the tiles of every row
                    assert n.total / issue < 3e-6, (dtype, case, name)


def test_every_launch_of_a_step_is_counted() -> None:
    """Whatever a step of rows launches, on any of the GPUs of test_launch_plans.py, is a kernel of
    which a test has a count."""
    counted = {"row_warp_kernel", "row_forward_kernel", "row_backward_kernel"}  # rows.py
    for dtype, case in itertools.product(rows.DTYPES, ends.CASES):
        for architecture in rows.SOFT_DEVICES:
            counted |= {ends.name_of(launch) for launch in ends.launches(architecture, dtype, case)}
    record = build.module("planner").row_launches
    shapes = ((4096, 1203), (65536, 10), (65536, 365), (2048, 8142), (512, 100000), (100, 1203))
    launched = set()
    for gpu, (n, classes), dtype, step in itertools.product(
        GPUS.values(), shapes, launch_plans.SIZES, launch_plans.STEPS
    ):
        registers: defaultdict[str, int] = defaultdict(lambda: 128)
        plan = launch_plans.plan(record, gpu, registers, step, dtype, n, classes)
        launched |= {ends.name_of(launch) for launch in plan.launches}
    assert launched <= counted
    assert {"divisor_kernel", "finish_kernel", "row_combine_kernel"} <= launched
