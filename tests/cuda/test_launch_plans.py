"""What the row operators launch on GPUs that are not here: waves, balance, bytes in flight.

The launchers are the project's, the registers those that nvcc gives the kernels, the devices'
limits those of benchmarks/gpus.py.
"""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import model
from benchmarks.gpus import GPUS, REGISTERS, Gpu
from machine_code import planes
from simt import build
from support import compiler_report, launch_plans
from support.launch_plans import Plan

HOME = build.cuda_home()
if build.why_not() or HOME is None or not (HOME / "bin" / "nvcc").exists():
    pytest.skip(build.why_not() or "needs nvcc", allow_module_level=True)

SHAPES = [
    (4096, 1204),  # LVIS with its background column, a detector's boxes
    (4096, 1203),  # rows of every alignment
    (16384, 8142),  # iNaturalist 2018
    (2048, 8142),
    (65536, 1000),  # ImageNet
    (512, 100000),  # few rows, each of many tiles
    (8192, 32000),  # language models' vocabularies
    (8192, 128256),
    (100, 1203),  # fewer rows than multiprocessors
]
DTYPES = list(launch_plans.SIZES)
STEPS = list(launch_plans.STEPS)
LATENCY = 800e-9  # of a read under load
MOST_BALANCE = 1.10

# Bytes in flight of a multiprocessor, of twice its share of the bandwidth times the latency: the
# least of a step's launches over all shapes but the last, for each of STEPS in fp32 and in bf16; of
# rows that warps keep (row_warp_kernel), then of the others. 1 is the aim. The others' threads keep
# 16 elements of a row, with them their exponentials and class sums, so that registers (on T4 shared
# memory, too) bound the warps; and of bf16 they are half as many bytes. Of warps' rows B200 would
# need about three times what their registers and stages hold. `PYTHONPATH=tests:. python -m
# cuda.test_launch_plans` prints this.
IN_FLIGHT = {
    "T4": (
        (1, 0.62, 1, 0.62, 1, 0.62, 1, 0.62),
        (1, 1, 1, 0.5, 1, 0.5, 1, 1),
    ),
    "A100 SXM 80 GB": (
        (1, 1, 1, 1, 1, 1, 1, 1),
        (0.94, 0.47, 0.94, 0.47, 0.94, 0.47, 0.94, 0.47),
    ),
    "L4": (
        (1, 1, 1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1, 1, 1),
    ),
    "RTX 4090": (
        (1, 1, 1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1, 1, 1),
    ),
    "H100 SXM": (
        (1, 0.78, 0.78, 0.67, 0.78, 1, 1, 0.78),
        (1, 1, 0.37, 0.18, 0.37, 0.18, 1, 1),
    ),
    "B200": (
        (0.55, 0.37, 0.37, 0.32, 0.37, 0.55, 0.55, 0.37),
        (1, 1, 0.15, 0.07, 0.15, 0.07, 1, 1),
    ),
    "RTX 5090": (
        (1, 1, 0.95, 1, 0.95, 1, 1, 1),
        (1, 1, 0.83, 0.41, 0.83, 0.41, 1, 1),
    ),
}


@pytest.fixture(scope="module")
def planner() -> ModuleType:
    return build.module("planner")


Plans = dict[tuple[str, tuple[int, int], str, str], Plan]


def _gpus(main: bool) -> dict[str, Gpu]:
    """Those of the architectures that other tests compile for too, or the others."""
    return {n: g for n, g in GPUS.items() if (g.architecture in compiler_report.MAIN) == main}


@functools.cache
def _plans(main: bool) -> Plans:
    gpus, planner = _gpus(main), build.module("planner")
    registers = {
        a: {kernel.symbol: kernel.registers for kernel in compiler_report.every_kernel(a)[1]}
        for a in sorted({gpu.architecture for gpu in gpus.values()})
    }
    return {
        (name, shape, dtype, step): launch_plans.plan(
            planner.row_launches, gpu, registers[gpu.architecture], step, dtype, *shape
        )
        for (name, gpu), shape, dtype, step in itertools.product(
            gpus.items(), SHAPES, DTYPES, STEPS
        )
    }


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["H100", "others"],
)  # fmt: skip
def plans(request: pytest.FixtureRequest) -> Plans:
    return _plans(request.param)


# A plane's 100 x 100 positions are not many for 16 bytes a thread: a tile is 64 bytes of a plane at
# least, of which a multiprocessor has few, and one more than others.
FEW_POSITIONS = 1203


# Bytes in flight as IN_FLIGHT has them, of one stage a block: where they are less than 1, the least
# over the shapes. Shared memory bounds them.
LEAST_OF_PLANES = {
    ("T4", "forward"): 0.95,
    ("T4", "gradient"): 0.95,
    ("T4", "stage2"): 0.63,
    ("T4", "backward"): 0.95,
    ("RTX 4090", "stage2"): 0.97,
    ("B200", "forward"): 0.56,
    ("B200", "gradient"): 0.46,
    ("B200", "stage2"): 0.46,
    ("B200", "backward"): 0.56,
    ("RTX 5090", "forward"): 0.89,
    ("RTX 5090", "gradient"): 0.96,
    ("RTX 5090", "stage2"): 0.72,
}


@pytest.mark.parametrize("step", planes.STEPS)
@pytest.mark.parametrize("name", GPUS)
def test_planes_fill_the_device(planner: ModuleType, name: str, step: str) -> None:
    gpu = GPUS[name]
    device = launch_plans.Device(gpu, defaultdict(lambda: 128))
    needed = 2 * gpu.gigabytes_per_second * 1e9 * LATENCY / gpu.multiprocessors
    for (classes, shape), dtype in itertools.product(planes.SHAPES.items(), (1, 2)):
        images, _, positions = shape
        launch, *others = (
            launch
            for launch in planner.dense_launches(
                **planes.STEPS[step], dtype=dtype, images=images, classes=classes,
                positions=positions, weighted=True, device=device,
            )
            if launch["fills"]
        )  # fmt: skip
        assert not others
        grid, tiles = launch["grid_x"], launch["tiles"]
        assert launch["shared_bytes"] <= device.shared_bytes
        resident = launch_plans.blocks_per_multiprocessor(
            gpu, 128, launch["threads"], launch["shared_bytes"]
        )
        assert grid <= resident * gpu.multiprocessors  # all blocks run at once
        of_multiprocessor = Counter[int]()
        for block in range(grid):
            of_multiprocessor[block % gpu.multiprocessors] += len(range(block, tiles, grid))
        balance = max(of_multiprocessor.values()) * gpu.multiprocessors / tiles
        in_flight = min(resident, grid / gpu.multiprocessors) * launch["rounds"] * 4096 / needed
        what = (classes, dtype, launch["grid_x"], launch["rounds"], launch["chunks"])
        assert balance <= (MOST_BALANCE if classes != FEW_POSITIONS else 1.5), what
        assert in_flight >= LEAST_OF_PLANES.get((name, step), 1), what
        if classes != FEW_POSITIONS:
            assert launch["chunks"] == 1, what


@pytest.mark.parametrize(("name", "most"), [("RTX 4090", 448), ("H100 SXM", 1216)])
def test_to_how_many_classes_planes_are_read_once(
    planner: ModuleType, name: str, most: int
) -> None:
    # The numbers of docs/gpus.md, of both dtypes.
    device = launch_plans.Device(GPUS[name], defaultdict(lambda: 128))

    def once(dtype: int, classes: int) -> bool:
        launches = planner.dense_launches(
            **launch_plans.STAGE_2, dtype=dtype, images=2, classes=classes, positions=1 << 16,
            weighted=True, device=device,
        )  # fmt: skip
        return next(launch for launch in launches if launch["fills"])["chunks"] == 1

    assert all(once(dtype, most) for dtype in (1, 2))
    assert not all(once(dtype, most + 8) for dtype in (1, 2))


def test_every_row_is_one_groups(plans: Plans) -> None:
    for plan in plans.values():
        for walk in plan.walks:
            blocks = itertools.product(range(walk.grid_x), range(walk.team))
            assert sum(walk.rows_of(*block) for block in blocks) == walk.rows


def test_all_blocks_run_at_once(plans: Plans) -> None:
    over = {
        key: walk
        for key, plan in plans.items()
        for walk in plan.walks
        if walk.waves > 1 and walk.grid_x * walk.team > walk.period
    }
    assert not over


def test_no_multiprocessor_has_much_more_than_the_mean(plans: Plans) -> None:
    over = {
        key: walk
        for key, plan in plans.items()
        for walk in plan.walks
        # A row of one tile is one block's: with fewer rows than multiprocessors (T4: 40, RTX 5090:
        # 170) some have none, and with few more some have one more than others.
        if walk.balance > MOST_BALANCE and key[1] != (100, 1203)
    }
    assert not over


def _least_in_flight(plans: Plans, name: str, of_warps: bool) -> tuple[float, ...]:
    gpu = GPUS[name]
    needed = 2 * gpu.gigabytes_per_second * 1e9 * LATENCY / gpu.multiprocessors
    return tuple(
        min(
            (
                walk.bytes_in_flight / needed
                for shape in SHAPES[:-1]
                for walk in plans[name, shape, dtype, step].walks
                if (walk.warp_rows is not None) == of_warps
            ),
            default=1.0,  # no shape is worked on so
        )
        for step, dtype in itertools.product(STEPS, DTYPES)
    )


@pytest.mark.parametrize("of_warps", [True, False], ids=["warps", "others"])
def test_bytes_in_flight(plans: Plans, of_warps: bool) -> None:
    for name in {key[0] for key in plans}:
        least = _least_in_flight(plans, name, of_warps)
        known = IN_FLIGHT[name][0 if of_warps else 1]
        assert all(a >= b for a, b in zip(least, known, strict=True)), (name, least, known)


def _way(plan: Plan) -> str:
    walk, launch = plan.walks[0], next(launch for launch in plan.launches if launch["fills"])
    if len(plan.walks) > 1:  # the first may be that of a cluster, without class sums
        return "tiles"
    if launch["clustered"] and walk.team == 1:
        return "cluster"
    if walk.warp_rows:
        return "warps" if walk.warp_rows.wide else "warp"
    return "block" if walk.tiles == 1 else "tiles"


def test_the_model_counts_these_launches_and_reads(plans: Plans) -> None:
    for (name, (rows, classes), dtype, step), plan in plans.items():
        if step not in model.STEPS:
            continue
        gpu = GPUS[name]
        assert _way(plan) == model.way(gpu, step, dtype, classes), (name, step, dtype, classes)
        assert len(plan.launches) == model.launches(gpu, step, dtype, classes), (name, step)
        assert len(plan.walks) == model.reads(gpu, step, dtype, classes), (name, step)
        blocks = max(launch.get("class_blocks", 0) for launch in plan.launches)
        if (rows, classes) != (100, 1203):  # whose blocks are rounded up to the alignment's period
            sums = 2 * 2 * 4 * blocks * classes
            most = model.class_sum_bytes(gpu, step, dtype, rows, classes)
            assert sums <= 1.02 * most, (name, step, dtype, classes)


# Of the logits' bytes, what is written of class sums, and read again, where there are clusters. But
# rows of 8142 classes are a cluster's on the RTX 5090, and clusters add up no other's.
MOST_OF_CLASS_SUMS = 0.1
OF_CLUSTERS_ROWS = {("RTX 5090", (2048, 8142), "bf16"): 0.167}


def test_class_sums_are_few_bytes_where_there_are_clusters(plans: Plans) -> None:
    found = {}
    for (name, (rows, classes), dtype, step), plan in plans.items():
        # Of 100 rows the least is a block of each alignment.
        if not GPUS[name].capability.has_clusters or rows == 100:
            continue
        blocks = max(launch.get("class_blocks", 0) for launch in plan.launches)
        share = 2 * 4 * blocks * classes / (rows * classes * launch_plans.SIZES[dtype])
        found[name, (rows, classes), dtype, step] = share
        assert share <= OF_CLUSTERS_ROWS.get((name, (rows, classes), dtype), MOST_OF_CLASS_SUMS), (
            name, rows, classes, dtype, step, share,
        )  # fmt: skip
    assert found
    assert found.get(("H100 SXM", (4096, 1204), "bf16", "stage 2"), 0) < 0.07


@pytest.mark.parametrize("step", ["plain", "stage 2"])
@pytest.mark.parametrize("classes", [8142, 32000])
def test_the_model_knows_the_shared_memory_of_a_rows_warps(classes: int, step: str) -> None:
    rows = 2048 if classes == 8142 else 8192
    launches = _plans(True)["H100 SXM", (rows, classes), "fp32", step].launches
    launch = next(n for n in launches if n["fills"])
    of_a_warp = model._PLAIN_WARP_BYTES
    if step == "stage 2":
        of_a_warp = model._WARP_BYTES + 2 * model._WARP_VECTORS * launch_plans.VECTOR_BYTES
    besides = model._CLUSTER_BYTES if launch["row_tiles"] > 1 else model._BLOCK_BYTES
    assert launch["shared_bytes"] == launch["threads"] // 32 * of_a_warp + besides


@pytest.mark.parametrize(
    ("gpu", "classes", "blocks"),
    [
        # docs/gpus.md: one read in stage 2, by a block to 10,240 classes, a cluster to 81,920.
        ("H100 SXM", 10_240, 1), ("H100 SXM", 10_248, 2), ("H100 SXM", 81_920, 8),
        ("H100 SXM", 81_928, None), ("RTX 4090", 8185, 1), ("RTX 4090", 8196, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [1, 2], ids=["fp32", "bf16"])  # of launch.h
def test_as_far_as_a_row_is_read_once_in_stage_2(
    planner: ModuleType, dtype: int, gpu: str, classes: int, blocks: int | None
) -> None:
    device = launch_plans.Device(GPUS[gpu], defaultdict(lambda: 255))
    launches = planner.row_launches(
        **launch_plans.STAGE_2, dtype=dtype, rows=64, classes=classes,
        weighted=True, device=device,
    )  # fmt: skip
    walks = [launch for launch in launches if launch["fills"]]
    assert len(walks) == (2 if blocks is None else 1)
    if blocks is not None:
        assert walks[0]["row_tiles"] == blocks


# CUDA's own calculator. It knows how many blocks a multiprocessor has at most, and its sizes of
# shared memory.
OCCUPANCY = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  cudaOccDeviceProp device;
  cudaOccFuncAttributes kernel;
  const cudaOccDeviceState state;
  int threads, shared;
  device.warpSize = 32;
  device.maxThreadsPerBlock = 1024;
  device.regsPerBlock = device.regsPerMultiprocessor = 64 << 10;
  device.sharedMemPerBlock = 48 << 10;
  device.numSms = 1;
  kernel.maxThreadsPerBlock = 1024;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  while (std::scanf("%d %d %d %zu %zu %d %d %d", &device.computeMajor, &device.computeMinor,
                    &device.maxThreadsPerMultiprocessor, &device.sharedMemPerMultiprocessor,
                    &device.reservedSharedMemPerBlock, &kernel.numRegs, &threads, &shared) == 8) {
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin =
        device.sharedMemPerMultiprocessor - device.reservedSharedMemPerBlock;
    cudaOccResult result;
    const int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state,
                                                               threads, shared);
    std::printf("%d\\n", status ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_cudas(tmp_path: Path) -> None:
    assert HOME is not None
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(OCCUPANCY)
    subprocess.run(
        [build.compiler(), f"-I{HOME / 'include'}", str(source), "-o", str(program)], check=True
    )
    kib = (0, 1, 16, 20, 31, 33, 48, 49, 63, 64, 99, 163, 227)  # those that a block may have
    cases = [
        (gpu, registers, threads, shared)
        for gpu, registers, threads, shared in itertools.product(
            GPUS.values(), (16, 32, 128, 129, 168, 255),
            (32, 64, 96, 128, 256, 384, 512, 1024), (n * 1024 + b for n in kib for b in (0, 1)),
        )
        if shared <= gpu.capability.shared_bytes_of_a_block and registers * threads <= REGISTERS
    ]  # fmt: skip
    asked = "".join(
        f"{gpu.architecture[:-1]} {gpu.architecture[-1]} {gpu.capability.threads} "
        f"{gpu.capability.shared_bytes} {gpu.capability.reserved_bytes} {registers} {threads} "
        f"{shared}\n"
        for gpu, registers, threads, shared in cases
    )
    run = subprocess.run([program], input=asked, capture_output=True, text=True, check=True)
    found = [launch_plans.blocks_per_multiprocessor(*case) for case in cases]
    assert found == [int(line) for line in run.stdout.split()]
    assert {1, 2, 16, 24, 32} <= set(found)


def main() -> None:
    """Prints IN_FLIGHT."""
    plans = _plans(True) | _plans(False)
    print("IN_FLIGHT = {")
    for name in GPUS:
        print(f'    "{name}": (')
        for of_warps in (True, False):
            least = _least_in_flight(plans, name, of_warps)
            cut = (f"{min(1, math.floor(100 * value) / 100):g}" for value in least)
            print(f"        ({', '.join(cut)}),")
        print("    ),")
    print("}")


if __name__ == "__main__":
    main()
