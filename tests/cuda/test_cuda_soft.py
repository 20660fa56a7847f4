"""The CUDA kernels of class probabilities, executed on the CPU: results and memory traffic.

What the rows launch on GPUs that are not here.
"""

from __future__ import annotations

import functools
import itertools
from types import ModuleType

import numpy as np
import pytest
import torch

from benchmarks.gpus import GPUS
from simt import build
from simt.calls import DTYPES, check
from simt.soft_calls import soft, soft_calls
from support import launch_plans

if build.why_not():
    pytest.skip(str(build.why_not()), allow_module_level=True)

LOGITS, PROBABILITIES, GRADIENT = "logits", "probabilities", "grad_logits"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return build.module("kernels")


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_every_kernel_and_tier(kernels: ModuleType, seed: int | None) -> None:
    kernels.set_options(shuffle=seed is not None, seed=seed or 0)
    for call in soft_calls():
        check(kernels, call)


# Ends of the tiers: of groups of lanes, of several rows a block, of a row a block.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 8, 9, 33, 512, 513, 1203, 8142, 8192, 8193])
def test_rows_at_every_alignment(kernels: ModuleType, classes: int, dtype: torch.dtype) -> None:
    kernels.set_options()
    for offset, calibrated in itertools.product((0, 1, 3), (False, True)):
        problem = soft(9, classes, dtype=dtype, offset=offset, wide=offset > 0,
                       calibrated=calibrated)  # fmt: skip
        for call in (*problem.calls(), *problem.gradient_calls(offset=offset // 2)):
            check(kernels, call)


# Where the probabilities lie like the logits: by a warp a row, from 513 classes to what its
# registers hold; by several of a block; by a cluster's of two, three and eight blocks. Calibrated
# rows have fewer warps a block.
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize(
    ("classes", "calibrated"),
    [
        *((n, False) for n in (513, 1280, 1287, 1288, 5000, 8193, 20000, 70001)),
        *((n, True) for n in (513, 1280, 1287, 1288, 4096, 4104, 8193, 20000, 33001, 65536)),
    ],
)  # fmt: skip
def test_rows_by_warps(
    kernels: ModuleType, classes: int, calibrated: bool, dtype: torch.dtype
) -> None:
    kernels.set_options(shuffle=True, seed=classes)
    for offset, wide, all_options in ((0, True, False), (1, False, True), (3, True, True)):
        problem = soft(5, classes, dtype=dtype, offset=offset, alike=True, wide=wide,
                       calibrated=calibrated, all_options=all_options)  # fmt: skip
        limits = {"has_clusters": True, "shared_bytes": 227 << 10}
        forward, kept, made = problem.gradient_calls(offset=offset, **limits)
        for call in (*problem.calls(**limits), forward, kept, made):
            check(kernels, call)
        check(kernels, forward)
        for name in (LOGITS, PROBABILITIES):
            size = (problem.logits if name == LOGITS else problem.target).nbytes
            assert kernels.traffic(name)["load_bytes"] == size
            # Rows aligned alike are read in vectors, but for fewer than two of them.
            assert 16 * kernels.traffic(name)["wide_loads"] >= (1 - 16 / classes) * size
        assert kernels.traffic(GRADIENT)["store_bytes"] == problem.logits.nbytes


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("classes", [1203, 5000, 9001])
def test_masked_classes(kernels: ModuleType, classes: int, calibrated: bool) -> None:
    # Of probability 0 they add 0; else the loss is infinite.
    kernels.set_options()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = soft(4, classes, dtype=dtype, calibrated=calibrated)
        problem.logits[problem.target == 0] = -torch.inf
        problem.target[:, -1] = 0
        for call in (*problem.gradient_calls(has_clusters=True), *problem.calls()):
            check(kernels, call)
        problem.target[2, classes // 2] = 0.5
        problem.logits[2, classes // 2] = -torch.inf
        forward = problem.calls(has_clusters=True)[0]
        kernels.soft_row_forward(forward.fields)
        assert forward.fields["reduced_loss"] == np.inf
        for name in ("grad_scale", "grad_bias", "grad_confidence") if calibrated else ():
            assert np.isfinite(forward.fields[name]).all(), name


# Calibrated rows take the maximum of a few elements a lane for the row's: one logit far above
# these, logits beyond what fused exponents are exact for, and those next to float16's lowest
# number, which stands for what is not the row's own.
@pytest.mark.parametrize("classes", [1003, 5000, 9001])
@pytest.mark.parametrize(
    ("dtype", "shift", "peak"),
    [
        (torch.float32, 0.0, 60.0), (torch.bfloat16, 0.0, 60.0), (torch.float32, 2.0**21, 0.0),
        (torch.float32, -(2.0**21), 30.0), (torch.float16, -65000.0, 0.0),
        (torch.float16, -65504.0, 128.0),
    ],
    ids=str,
)  # fmt: skip
def test_logits_far_away(
    kernels: ModuleType, dtype: torch.dtype, shift: float, peak: float, classes: int
) -> None:
    kernels.set_options()
    problem = soft(3, classes, dtype=dtype)
    step = 32 if dtype == torch.float16 else 1
    problem.logits.copy_(shift + step * torch.randint(0, 4, problem.logits.shape))
    problem.logits[:, -200] += peak
    problem.vectors["scale"].zero_()  # of numbers as large as these u is rounded otherwise
    problem.vectors["bias"].zero_()
    for call in (*problem.gradient_calls(has_clusters=True), *problem.calls()):
        for name in ("grad_scale", "grad_confidence"):
            call.expected.pop(name, None)  # of large numbers that cancel
        check(kernels, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [1, 7, 16, 64, 136, 1000])
@pytest.mark.parametrize("classes", [1, 4, 19, 150])
def test_planes_of_every_width(
    kernels: ModuleType, classes: int, positions: int, dtype: torch.dtype
) -> None:
    kernels.set_options()
    for wide in (False, True):
        problem = soft(2, classes, positions, dtype=dtype, wide=wide)
        for call in problem.gradient_calls():
            check(kernels, call)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 1203), (9, 8142), (64, 100), (2, 19, 256), (2, 150, 64)])
def test_both_inputs_are_read_once_and_the_gradient_is_written_once(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, wide: bool, calibrated: bool
) -> None:
    problem = soft(*shape, dtype=dtype, wide=wide, calibrated=calibrated)
    logits, target = problem.logits.nbytes, problem.target.nbytes
    forward, kept, made = problem.gradient_calls()
    check(kernels, forward)
    read = {name: kernels.traffic(name) for name in (LOGITS, PROBABILITIES, GRADIENT)}
    assert read[LOGITS]["load_bytes"] == logits
    assert read[PROBABILITIES]["load_bytes"] == target
    assert read[GRADIENT]["store_bytes"] == logits
    # All but the ends of the rows by 16 bytes, at these odd numbers of classes too.
    least = 0.98 if shape[1] > 1000 or len(shape) == 3 else 0.8
    assert 16 * read[LOGITS]["wide_loads"] >= least * logits
    assert 16 * read[PROBABILITIES]["wide_loads"] >= least * target
    assert 16 * read[GRADIENT]["wide_stores"] >= least * logits
    check(kernels, kept)  # the upstream gradient is 1
    for name in (LOGITS, PROBABILITIES, GRADIENT):
        assert kernels.traffic(name)["load_bytes"] + kernels.traffic(name)["store_bytes"] == 0
    check(kernels, made)
    assert kernels.traffic(PROBABILITIES)["load_bytes"] == target


# More classes than a block keeps, and one more than a cluster does; planes' classes.
@pytest.mark.parametrize(
    ("shape", "calibrated"),
    [((2, 16389), False), ((1, 131078), False), ((1, 1500, 64), False), ((2, 8197), True),
     ((1, 65542), True)],
)  # fmt: skip
def test_what_does_not_fit_is_read_again_for_its_gradient(
    kernels: ModuleType, shape: tuple[int, ...], calibrated: bool
) -> None:
    problem = soft(*shape, calibrated=calibrated)
    clusters = shape[1] > (1 << 16 if calibrated else 1 << 17)
    check(kernels, problem.gradient_calls(has_clusters=clusters)[0])
    assert kernels.traffic(LOGITS)["load_bytes"] == 2 * problem.logits.nbytes
    assert kernels.traffic(PROBABILITIES)["load_bytes"] == 2 * problem.target.nbytes
    assert kernels.traffic(GRADIENT)["store_bytes"] == problem.logits.nbytes


@pytest.mark.parametrize("wide", [False, True])
def test_upsampled_probabilities_are_read_once_in_either_direction(
    kernels: ModuleType, wide: bool
) -> None:
    problem = soft(1, 19, 8, 8, dtype=torch.bfloat16, wide=wide, size=(64, 50))
    for call in problem.calls():
        check(kernels, call)
        assert kernels.traffic(PROBABILITIES)["load_bytes"] == problem.target.nbytes


class Registers(dict[str, int]):
    """At most what the launch bounds leave: of soft_row_sums_kernel all, of soft_row_warp_kernel
    those of a row a warp's (its last argument is 0), or several warps'."""

    def __missing__(self, symbol: str) -> int:
        if "sums" in symbol:
            return 255
        return 168 if "Li0E" in symbol else 128


@pytest.mark.parametrize("dtype", launch_plans.SIZES)
@pytest.mark.parametrize("name", GPUS)
def test_rows_fill_the_device(name: str, dtype: str) -> None:
    gpu = GPUS[name]
    launches = functools.partial(build.module("planner").row_launches, probabilities=1)
    needed = 2 * gpu.gigabytes_per_second * 1e9 * 800e-9 / gpu.multiprocessors
    for rows, classes in (
        (4096, 1203), (16384, 8142), (2048, 8142), (65536, 1000), (512, 100000), (8192, 128256)
    ):  # fmt: skip
        plan = launch_plans.plan(launches, gpu, Registers(), "plain", dtype, rows, classes)
        # The denominator, and one read by a kernel that ends the loss; or tiles, their sums and a
        # second read.
        once = classes <= 16384 or gpu.capability.has_clusters
        assert len(plan.walks) == (1 if once else 2)
        assert len(plan.launches) == (2 if once else 4)
        for walk in plan.walks:
            assert walk.waves <= 1
            assert walk.balance <= 1.12, (rows, classes)
            # Of both inputs. B200 needs more of bfloat16 than 12 to 16 warps' registers hold.
            least = 0.5 if (name, dtype) == ("B200", "bf16") else 1
            assert 2 * walk.bytes_in_flight / needed >= least, (rows, classes)


# Bytes of both inputs in flight, as above, at least; where less than 1: eight warps a
# multiprocessor keep the class sums, and of bfloat16 half as many bytes.
LEAST_CALIBRATED = {
    ("T4", "bf16"): 0.78,
    ("A100 SXM 80 GB", "bf16"): 0.98,
    ("H100 SXM", "bf16"): 0.74,
    ("B200", "fp32"): 0.68,
    ("B200", "bf16"): 0.34,
}


@pytest.mark.parametrize("step", ["all gradients", "stage 2"])
@pytest.mark.parametrize("dtype", launch_plans.SIZES)
@pytest.mark.parametrize("name", GPUS)
def test_calibrated_rows_fill_the_device(name: str, dtype: str, step: str) -> None:
    gpu = GPUS[name]
    launches = functools.partial(build.module("planner").row_launches, probabilities=1)
    needed = 2 * gpu.gigabytes_per_second * 1e9 * 800e-9 / gpu.multiprocessors
    for rows, classes in (
        (4096, 1203), (4096, 1204), (16384, 8142), (2048, 8142), (65536, 1000), (8192, 32000),
        (512, 100000),
    ):  # fmt: skip
        plan = launch_plans.plan(launches, gpu, Registers(), step, dtype, rows, classes)
        clusters = gpu.capability.has_clusters
        once = classes <= (1 << 16 if clusters else 1204 if name == "T4" else 8192)
        assert len(plan.walks) == (1 if once else 2)
        for walk in plan.walks:
            assert walk.waves <= 1
            # 25 tiles a row are few for the 40 and 58 multiprocessors of T4 and L4.
            assert walk.balance <= 1.12 or (classes == 100000 and name in ("T4", "L4"))
            least = LEAST_CALIBRATED.get((name, dtype), 1)
            assert 2 * walk.bytes_in_flight / needed >= least, (rows, classes)
        # The class sums that blocks write are few bytes beside the logits.
        blocks = max(launch.get("class_blocks", 0) for launch in plan.launches)
        if once and clusters:
            assert 2 * 4 * blocks <= 0.1 * rows * launch_plans.SIZES[dtype], (rows, classes)
