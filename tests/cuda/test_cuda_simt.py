"""The CUDA kernels, executed on the CPU: results, memory traffic, sanitizers."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from simt import build
from simt.calls import DTYPES, Call, Problem, check, save
from simt.soft_calls import soft_calls
from support import launch_plans, sets
from support.places import TESTS, test_files

if build.why_not():
    pytest.skip(str(build.why_not()), allow_module_level=True)

ALL_FILES = [
    "row",
    "soft",
    "shard",
    "soft_shards",
    "linear",
    "dense",
    "upsample",
    "calibrate",
    "in_place",
    "autograd",
    "stage2",
    "forward_backward",
    "gradient_pass",
    "new_gradient",
    "details",
    "shard_details",
]


@pytest.mark.parametrize("part", sets.PARTS)
@pytest.mark.parametrize(
    ("seed", "files", "only"),
    [
        (None, ALL_FILES, ""),
        (1, ["row", "soft", "dense", "upsample", "calibrate"], "shapes or contents or calibrate"),
        (2, ["row", "soft", "dense", "upsample", "calibrate"], "shapes or contents or calibrate"),
    ],
    ids=["in order", "seed 1", "seed 2"],
)
def test_the_operators_pass_the_tests_of_the_cpu_kernels(
    seed: int | None, files: list[str], only: str, part: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    if seed is not None:
        environment["SIMT_SEED"] = str(seed)
    tests = test_files(*files)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "-p", "simt.operators", *sets.arguments(part, only), *tests],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    # Each was called, and in its forward and both of its backwards.
    called = dict(re.findall(r"(\w+) called (\d+) times", run.stdout))
    layouts = ("row", "dense", "upsample")
    wanted = {f"{layout}_{end}" for layout in layouts for end in ("forward", "backward")}
    if part != "few":
        wanted |= {f"{s}_calibrate{end}" for s in ("row", "dense") for end in ("", "_backward")}
    if part != "few" and seed is None:
        wanted |= {f"{layout}_backward_" for layout in layouts}
        wanted |= {"row_backward_made", "dense_backward_made", "upsample_predict"}
    assert wanted <= set(called), called


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return build.module("kernels")


def row(
    n: int, c: int, dtype: torch.dtype = torch.float32, offset: int = 0, **more: Any
) -> Problem:
    """offset: elements between an aligned address and the logits."""
    logits = torch.empty(offset + n * c, dtype=dtype)[offset:].view(n, c)
    return Problem(logits.copy_(torch.randn(n, c) * 3), torch.randint(0, c, (n,)), **more)


def dense(n: int, c: int, s: int, dtype: torch.dtype = torch.float32, **more: Any) -> Problem:
    return Problem((torch.randn(n, c, s) * 3).to(dtype), torch.randint(0, c, (n, s)), **more)


def upsample(
    shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype = torch.float32, **more: Any
) -> Problem:
    target = torch.randint(0, shape[1], (shape[0], *size))
    return Problem((torch.randn(shape) * 3).to(dtype), target, size=size, **more)


def everything(classes: int, positions: int) -> dict[str, Any]:
    """Options that take every branch of a kernel."""
    return {
        "weight": torch.rand(classes) + 0.1,
        "prior": torch.randn(classes),
        "margin": torch.rand(classes),
        "sample_weight": torch.rand(positions) + 0.1,
        "label_smoothing": 0.1,
        "focal_gamma": 1.5,
    }


def small_problems() -> list[Problem]:
    """Every kernel and tier, small enough for the sanitizers."""
    torch.manual_seed(3)
    problems = [
        row(7, 19),
        row(6, 3, torch.float16, calibrated=False),
        row(19, 133, torch.bfloat16, options=everything(133, 19)),
        row(9, 1203, torch.bfloat16),
        row(5, 1203, options=everything(1203, 5)),
        row(3, 1203, calibrated=False),
        row(3, 301, torch.float64, options=everything(301, 3)),
        dense(2, 5, 70),
        dense(1, 150, 40, torch.bfloat16, options=everything(150, 40)),
        dense(1, 19, 33, torch.float64, calibrated=False),
        upsample((1, 5, 4, 5), (13, 17)),
        upsample((1, 37, 3, 4), (9, 8), torch.float16, options=everything(37, 72)),
        upsample((1, 3, 6, 5), (2, 3), torch.float64),
        # Eight outputs of a band a thread, two and four of four; bands of several warps.
        upsample((1, 19, 9, 5), (72, 40), options=everything(19, 2880)),
        upsample((2, 6, 3, 4), (12, 9), torch.bfloat16),
        upsample((1, 7, 3, 2), (77, 35), calibrated=False),
    ]
    problems[0].target[2] = -100
    problems[7].target[0, 3:40] = -100
    problems[10].target[0, :3] = -100
    return problems


def gradient_calls() -> list[Call]:
    """Forward that makes the gradient of the logits too, in every tier, and backward after it."""
    torch.manual_seed(4)
    half, everywhere = torch.bfloat16, {"has_clusters": True}
    cases: list[tuple[Problem, dict[str, Any]]] = [
        # Several rows a block.
        (row(7, 19), {}),
        (row(6, 3, torch.float16, calibrated=False), {"offset": 1}),
        (row(19, 133, half, options=everything(133, 19)), {}),
        # A warp a row, at each number of vectors and with and without class sums.
        (row(9, 1203, options=everything(1203, 9)), {}),
        (row(5, 1203, offset=1), {"class_gradients": False, "offset": 2}),
        (row(5, 515, calibrated=False), {}),
        (row(9, 1203, half, options=everything(1203, 9)), {}),
        (row(4, 1203, torch.float16, calibrated=False), {"offset": 1}),
        (row(9, 2501, half, options=everything(2501, 9)), {"class_gradients": False}),
        (row(4, 2407, torch.float16, calibrated=False), {}),
        # The same of less shared memory: a block of one warp, and none.
        (row(9, 1203, options=everything(1203, 9)), {"shared_bytes": 40 << 10}),
        (row(4, 1203), {"shared_bytes": 20 << 10}),
        # More rows of a warp than it has lanes, which read what is of a row alone.
        (row(80, 516), {"shared_bytes": 24 << 10, "multiprocessors": 1}),
        # A row a block.
        (row(4, 1301, options=everything(1301, 4)), {"offset": 1}),
        (row(3, 301, torch.float64, options=everything(301, 3)), {}),
        (row(3, 2601, half, calibrated=False), {}),
        # A cluster a row.
        (row(3, 8200), everywhere),
        (row(3, 9001, half, options=everything(9001, 3)), everywhere),
        (row(3, 8300, calibrated=False), everywhere | {"offset": 1}),
        # Tiles of a row, that are read again.
        (row(3, 9001), {"shared_bytes": 40 << 10}),
        (row(2, 9000, calibrated=False), {"shared_bytes": 40 << 10}),
        # Class planes: tiles of one stage; of several, that are read again; not whole vectors.
        (dense(2, 19, 64, half, options=everything(19, 128)), {}),
        (dense(2, 400, 16, half, options=everything(400, 32)), {"shared_bytes": 64 << 10}),
        (dense(2, 300, 9), {"shared_bytes": 48 << 10, "multiprocessors": 1}),
        (dense(2, 40, 32, calibrated=False), {"offset": 1}),
    ]
    calls = []
    for problem, more in cases:
        problem.target[1] = -100
        calls += problem.gradient_calls(**more)
    return calls


def small_calls() -> list[Call]:
    calls = [call for problem in small_problems() for call in problem.calls()]
    # With less shared memory: tiles of a row, logits that are read again.
    for problem, shared in (
        (row(3, 9001), 40 << 10), (row(2, 9000, calibrated=False), 40 << 10),
        (dense(1, 90, 50), 30 << 10), (upsample((1, 500, 6, 8), (9, 13)), 64 << 10),
    ):  # fmt: skip
        calls += problem.calls(shared_bytes=shared)
    # Rows by clusters of two blocks.
    for problem in (row(5, 8200), row(3, 9001, torch.bfloat16, options=everything(9001, 3))):
        calls.append(problem.calls(has_clusters=True)[0])
    for problem in (
        row(7, 19), row(3, 1203, torch.bfloat16), row(2, 5001, torch.float64),
        dense(2, 5, 70), dense(1, 60, 40, torch.float16),
    ):  # fmt: skip
        calls += problem.calibrate_calls()
    return calls + gradient_calls()


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_every_kernel_and_tier(kernels: ModuleType, seed: int | None) -> None:
    kernels.set_options(shuffle=seed is not None, seed=seed or 0)
    for call in small_calls():
        check(kernels, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 8, 9, 33, 512, 513, 1203, 8142, 8192, 8193])
def test_row_tiers_at_every_alignment(
    kernels: ModuleType, classes: int, dtype: torch.dtype
) -> None:
    kernels.set_options()
    for call in row(11, classes, dtype).calls():
        check(kernels, call)


# Ends of the tiers: of narrow rows, of a warp's in float32 and in half precision with and without
# class sums, of those of a block.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "classes", [1, 8, 9, 33, 512, 513, 640, 1203, 1280, 1284, 2501, 2560, 2564, 8142, 8193]
)
def test_gradients_in_forward_at_every_alignment(
    kernels: ModuleType, classes: int, dtype: torch.dtype
) -> None:
    kernels.set_options()
    n = 9  # more than there are alignments
    for offset in (0, 1, 3):
        problems = [
            (row(n, classes, dtype, offset, calibrated=False), True),
            (row(n, classes, dtype, offset), True),
            (row(n, classes, dtype, offset, options=everything(classes, n)), offset != 1),
        ]
        for problem, class_gradients in problems:
            problem.target[offset] = -100
            for call in problem.gradient_calls(class_gradients, offset=offset // 2):
                check(kernels, call)


@pytest.mark.parametrize(
    "of",
    [
        {"reduction": "sum"}, {"normalizer": "weights"}, {"normalizer": "valid"},
        {"normalizer": "count"}, {"normalizer": torch.tensor(2.5)},
    ],
    ids=str,
)  # fmt: skip
def test_what_gradients_in_forward_are_divided_by(kernels: ModuleType, of: dict[str, Any]) -> None:
    kernels.set_options()
    # More rows than the denominator's blocks have threads; two tiers more.
    for n, classes in ((20000, 3), (11, 1203), (4, 1301)):
        problem = row(n, classes, options=everything(classes, n), **of)
        problem.target[::3] = -100
        for call in problem.gradient_calls():
            check(kernels, call)


@pytest.mark.parametrize("classes", [19, 1203, 1301, 9001])
@pytest.mark.parametrize("clusters", [False, True])
def test_gradients_in_forward_are_0_where_nothing_is_left(
    kernels: ModuleType, classes: int, clusters: bool
) -> None:
    kernels.set_options()
    problem = row(3, classes)
    problem.target[:] = -100
    forward, kept, made = problem.gradient_calls(has_clusters=clusters)
    assert np.isnan(forward.expected.pop("reduced_loss"))
    for call in (forward, kept, made):
        check(kernels, call)


def test_a_warp_goes_through_more_rows_than_lanes(kernels: ModuleType) -> None:
    # What is of a row alone is read for 32 rows at a time. One block of one or two warps.
    kernels.set_options()
    for dtype, calibrated in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        problem = row(150, 1200, dtype, calibrated=calibrated)
        problem.target[31:150:17] = -100
        for call in problem.gradient_calls(shared_bytes=32 << 10, multiprocessors=1):
            check(kernels, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [8193, 12289, 40001, 49145])
def test_rows_by_clusters(kernels: ModuleType, classes: int, dtype: torch.dtype) -> None:
    problem = row(5, classes, dtype, options=everything(classes, 5))
    problem.target[1] = -100
    kernels.set_options()
    check(kernels, problem.calls(**HOPPER)[0])
    kernels.set_options(shuffle=True, seed=1)
    for call in problem.gradient_calls(**HOPPER):
        check(kernels, call)


@pytest.mark.parametrize("classes", [2564, 12288])  # of a block's warps, of a cluster's
def test_masked_classes_change_no_other_row(kernels: ModuleType, classes: int) -> None:
    # After the first one a warp sums slopes in the way that masked classes need.
    kernels.set_options()
    problem = row(9, classes, reduction="sum")
    masked = [2, 5]
    kept = problem.logits[masked, problem.target[masked]]
    problem.logits[masked] = problem.logits[masked].masked_fill(
        torch.rand(2, classes) < 0.1, -float("inf")
    )
    problem.logits[masked, problem.target[masked]] = kept
    found = []
    for ignored in (False, True):
        if ignored:
            problem.target[masked] = -100
        call = problem.calls(**HOPPER | {"multiprocessors": 1})[0]
        check(kernels, call)
        found.append(np.delete(call.fields["grad_confidence"], masked))
    assert found[0].tobytes() == found[1].tobytes()


# Multiprocessors, rows and classes -> blocks of a cluster that add up their class sums, in fp32 and
# in bf16: of rows of a warp, then of rows of a block.
TEAMS = {
    (2, 60, 1200): (2, 2), (16, 120, 1203): (4, 2), (64, 60, 1280): (4, 8),
    (2, 20, 5120): (2, 2), (32, 24, 1608): (8, 8),
}  # fmt: skip


class LikeKernels:
    """The device of kernels.cpp, for the planner."""

    shared_bytes, has_clusters = 227 << 10, True

    def __init__(self, multiprocessors: int) -> None:
        self.multiprocessors = multiprocessors

    def blocks_per_multiprocessor(self, kernel: str, threads: int, shared_bytes: int) -> int:
        return 2

    def clusters(self, kernel: str, threads: int, shared_bytes: int, size: int) -> int:
        return max(2, 2 * self.multiprocessors // size)


def test_how_many_blocks_add_up_their_class_sums() -> None:
    planner = build.module("planner")
    for (multiprocessors, rows, classes), teams in TEAMS.items():
        for dtype, team in zip((1, 2), teams, strict=True):
            launch = planner.row_launches(
                **launch_plans.STAGE_2, dtype=dtype, rows=rows, classes=classes, weighted=True,
                device=LikeKernels(multiprocessors),
            )[0]  # fmt: skip
            assert (launch["grid_y"], launch["row_tiles"]) == (team, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("multiprocessors", "rows", "classes"), TEAMS, ids=str)
def test_class_sums_of_a_clusters_blocks(
    kernels: ModuleType, multiprocessors: int, rows: int, classes: int, dtype: torch.dtype
) -> None:
    problem = row(rows, classes, dtype, options=everything(classes, rows))
    problem.target[1] = -100
    limits = HOPPER | {"multiprocessors": multiprocessors}
    for seed in (0, 1):
        kernels.set_options(shuffle=seed > 0, seed=seed)
        for call in problem.calls(**limits) + problem.gradient_calls(**limits)[:1]:
            check(kernels, call)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(40001, torch.float32), (49145, torch.bfloat16)], ids=str
)
def test_clusters_read_a_wide_row_once(
    kernels: ModuleType, classes: int, dtype: torch.dtype
) -> None:
    problem = row(3, classes, dtype)
    logits = problem.logits.numel() * problem.logits.element_size()
    targets = problem.logits[:, 0].nbytes
    for clusters, reads in ((True, 1), (False, 2)):
        run_call(kernels, problem.calls(**(HOPPER if clusters else {}))[0])
        traffic = kernels.traffic("logits")
        again = by_warps(problem, clusters) * targets
        assert traffic["load_bytes"] == reads * logits + again
        assert 16 * traffic["wide_loads"] >= 0.98 * reads * logits


SCRIPT = """
import pickle, sys, kernels
sys.path.insert(0, {simt!r})
calls = pickle.load(open({path!r}, "rb"))
import numpy as np
for seed in (0, 5):
    kernels.set_options(shuffle=True, seed=seed)
    for call in calls:
        getattr(kernels, call["operation"])(call["fields"])
        for name, expected in call["expected"].items():
            found = call["fields"][name]
            if found.dtype == np.int16:
                found = (found.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            error = np.abs(found.astype(np.float64).reshape(expected.shape) - expected).max()
            assert error <= 0.02 * max(np.abs(expected).max(), 1), (call["name"], name, error)
    print("checked", len(calls), flush=True)
"""


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_sanitizer_finds_anything(tmp_path: Path, sanitizer: str) -> None:
    calls = small_calls() + soft_calls()
    path = tmp_path / "calls.pickle"
    save(calls, path)
    script = SCRIPT.format(path=str(path), simt=str(TESTS))
    run = build.run_sanitized(script, sanitizer, "kernels", timeout=900)
    assert run.returncode == 0, run.stdout[-3000:]
    assert run.stdout.count(f"checked {len(calls)}") == 2


def run_call(kernels: ModuleType, call: Call) -> None:
    kernels.set_options()
    getattr(kernels, call.operation)(call.fields)


SHAPES = [(40, 1203), (24, 8142), (200, 100), (3, 40001)]


# Of each of a cluster's rows: blocks and warps of a block, as many as shared memory holds.
OF_CLUSTERS = {
    (40001, torch.float32, False): 2 * 16,
    (40001, torch.float32, True): 4 * 8,
    (40001, torch.bfloat16, False): 2 * 8,
    (40001, torch.bfloat16, True): 4 * 8,
    (49145, torch.bfloat16, True): 5 * 8,
}
HOPPER = {"has_clusters": True, "shared_bytes": 227 << 10}


def by_warps(problem: Problem, clusters: bool = False) -> int:
    """How many warps keep a row. Each reads its target's logit once more, for many rows at a time.
    0: row_forward_kernel, row_backward_kernel.
    """
    classes = problem.logits.shape[1]
    if clusters:
        return OF_CLUSTERS[classes, problem.logits.dtype, problem.calibrated]
    if classes == 1203:
        return 1
    if classes == 8142 and not problem.calibrated:  # else more shared memory than there is
        return 7 if problem.logits.dtype == torch.float32 else 4
    return 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_read_once_and_its_gradient_written_once(
    kernels: ModuleType, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    problem = row(*shape, dtype, calibrated=False)
    logits, targets = problem.logits.nbytes, problem.logits[:, 0].nbytes
    warps = by_warps(problem)
    forward, backward = problem.calls()
    run_call(kernels, forward)
    read = kernels.traffic("logits")
    assert read["load_bytes"] == logits + warps * targets
    # All but the ends of the rows by 16 bytes, at these odd numbers of classes too.
    assert 16 * read["wide_loads"] >= (0.98 if shape[1] > 1000 else 0.8) * logits
    run_call(kernels, backward)
    assert kernels.traffic("logits")["load_bytes"] == logits + warps * targets
    written = kernels.traffic("grad_logits")
    assert written["store_bytes"] == logits
    assert 16 * written["wide_stores"] >= (0.98 if shape[1] > 1000 else 0.8) * logits


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "clusters"), [*((shape, False) for shape in SHAPES), ((3, 40001), True)], ids=str
)
def test_with_the_gradient_in_forward_a_row_on_the_chip_is_read_once_in_all(
    kernels: ModuleType,
    shape: tuple[int, int],
    clusters: bool,
    dtype: torch.dtype,
    calibrated: bool,
) -> None:
    problem = row(*shape, dtype, calibrated=calibrated)
    warps = by_warps(problem, clusters)
    logits, targets = problem.logits.nbytes, problem.logits[:, 0].nbytes
    forward, kept, made = problem.gradient_calls(**(HOPPER if clusters else {}))
    run_call(kernels, forward)
    read, written = kernels.traffic("logits"), kernels.traffic("grad_logits")
    least = 0.98 if shape[1] > 1000 else 0.8
    assert 16 * read["wide_loads"] >= least * logits
    assert 16 * written["wide_stores"] >= least * logits
    if shape[1] == 40001 and not clusters:  # forward, then backward
        # For the confidence's gradient, of 10 tiles' 8 warps each reads the target's logit.
        again = 10 * 8 * targets if calibrated else 0
        assert read["load_bytes"] == 2 * logits + again
        assert written["store_bytes"] == logits
    else:
        assert read["load_bytes"] == logits + warps * targets
        # row_forward_kernel stores the target's gradient over what its vector had there.
        assert written["store_bytes"] == logits + (0 if warps else targets)
    run_call(kernels, kept)  # the upstream gradient is 1
    assert kernels.traffic("logits")["load_bytes"] == 0
    assert kernels.traffic("grad_logits")["store_bytes"] == 0
    assert (kept.fields["grad_logits"] == kept.fields["grad_logits"].flat[0]).all()
    run_call(kernels, made)
    if clusters and calibrated:  # without class sums
        warps = 3 * 6 if dtype == torch.bfloat16 else 4 * 8
    assert kernels.traffic("logits")["load_bytes"] == logits + warps * targets
    assert kernels.traffic("grad_logits")["store_bytes"] == logits


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_frozen_logits_are_read_once_in_all(kernels: ModuleType, shape: tuple[int, int]) -> None:
    problem = row(*shape, torch.bfloat16)
    forward = problem.calls()[0]
    run_call(kernels, forward)
    traffic = kernels.traffic("logits")
    targets = problem.logits[:, 0].nbytes
    assert traffic["load_bytes"] == problem.logits.nbytes + by_warps(problem) * targets
    assert traffic["store_bytes"] == 0
    written = [v for k, v in forward.fields.items() if k.startswith("grad_")]
    numbers = [v.size for v in written if hasattr(v, "size")]
    assert sum(numbers) == 2 * shape[1] + shape[0]  # C each for scale and bias, N: the confidence


@pytest.mark.parametrize("calibrated", [False, True])
def test_dense_planes_are_read_once_and_written_once(kernels: ModuleType, calibrated: bool) -> None:
    problem = dense(2, 150, 300, calibrated=calibrated)
    problem.logits /= 4  # no class is far above a target
    logits = problem.logits.numel() * 4
    forward, backward = problem.calls()
    run_call(kernels, forward)
    # A tile of several stages is not all there when its targets' logits are wanted.
    targets = kernels.traffic("logits")["load_bytes"] - logits
    assert targets == 0 if calibrated else 0 <= targets <= problem.target.numel() * 4
    run_call(kernels, backward)
    assert 0 <= kernels.traffic("logits")["load_bytes"] - logits <= problem.target.numel() * 4
    assert kernels.traffic("grad_logits")["store_bytes"] == logits
    in_forward, kept, made = problem.gradient_calls(class_gradients=calibrated)
    check(kernels, in_forward)
    assert kernels.traffic("logits")["load_bytes"] == logits
    assert kernels.traffic("grad_logits")["store_bytes"] == logits
    check(kernels, kept)  # the upstream gradient is 1
    assert kernels.traffic("logits")["load_bytes"] == 0
    check(kernels, made)
    assert kernels.traffic("grad_logits")["store_bytes"] == logits


@pytest.mark.parametrize("shape", [(1, 19, 1600), (1, 19, 1603), (2, 700, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_planes_with_a_class_far_above_the_target_are_read_once_more(
    kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    n, classes, positions = shape
    problem = dense(*shape, dtype, options=everything(classes, n * positions))
    problem.logits /= 4
    once = problem.calls()[0]
    run_call(kernels, once)
    before = kernels.traffic("logits")["load_bytes"]
    problem.logits = problem.logits.detach().clone()
    problem.logits[-1, 7, 5] += 60
    problem.logits[-1, 8, 6] = 3e6 if dtype == torch.float32 else 3e4
    problem.target[-1, 5:7] = 3
    forward, backward = problem.calls()
    check(kernels, forward)
    again = kernels.traffic("logits")["load_bytes"] - before
    assert 0 < again <= problem.logits[-1:].nbytes
    check(kernels, backward)


def test_upsampling_reads_the_low_resolution_and_nothing_of_the_outputs_size(
    kernels: ModuleType,
) -> None:
    problem = upsample((1, 21, 16, 16), (128, 128), calibrated=False)
    low = problem.logits.numel() * 4
    forward, backward = problem.calls()
    # Tiles of 8 logits by 32 outputs: 9 logits by 5 at the left edge and by 6 elsewhere. Forward
    # reads the upper ones again, whose first band has more outputs than a thread takes at once.
    around = 9 * (5 + 6 + 6 + 6)
    run_call(kernels, forward)
    assert kernels.traffic("logits")["load_bytes"] == low / 256 * 3 * around
    run_call(kernels, backward)
    assert kernels.traffic("logits")["load_bytes"] == low / 256 * 2 * around
    assert kernels.traffic("grad_logits")["store_bytes"] == low


@pytest.mark.parametrize("layout", ["row", "dense", "upsample"])
def test_a_target_that_is_no_class_stops_the_kernel(kernels: ModuleType, layout: str) -> None:
    problem = {
        "row": row(5, 19), "dense": dense(1, 19, 40), "upsample": upsample((1, 19, 3, 3), (6, 6)),
    }[layout]  # fmt: skip
    for call in problem.calls():
        for wrong in (19, -1, 2**40):
            call.fields["target"] = call.fields["target"].copy()
            call.fields["target"].flat[-1] = wrong
            with pytest.raises(RuntimeError, match="target is no class"):
                getattr(kernels, call.operation)(call.fields)


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("classes", [100, 1203, 2100, 8200])
def test_the_same_launch_gives_the_same_bits(
    kernels: ModuleType, classes: int, clusters: bool
) -> None:
    problem = row(37, classes, options=everything(classes, 37))
    found = []
    for seed in (0, 1):
        kernels.set_options(shuffle=True, seed=seed)
        bits = []
        for call in problem.gradient_calls(has_clusters=clusters):
            getattr(kernels, call.operation)(call.fields)
            bits += [call.fields[k].tobytes() for k in sorted(call.expected)]
        found.append(bits)
    assert found[0] == found[1]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_warp_makes_the_same_gradient_in_forward_and_in_backward(
    kernels: ModuleType, dtype: torch.dtype, calibrated: bool
) -> None:
    options = everything(1203, 19) if calibrated else {}
    problem = row(19, 1203, dtype, calibrated=calibrated, options=options)
    problem.target[3] = -100
    in_forward, backward = problem.gradient_calls()[0], problem.calls()[1]
    run_call(kernels, in_forward)
    statistics = ("row_shift", "row_sum", "denominator")
    backward.fields |= {name: in_forward.fields[name] for name in statistics}
    run_call(kernels, backward)
    made, again = (call.fields["grad_logits"] for call in (in_forward, backward))
    assert made.tobytes() == again.tobytes()


@pytest.mark.parametrize("shared", [64, 99, 227])
@pytest.mark.parametrize("classes", [4000, 4093, 8142, 8192, 9000])
def test_launches_fit_every_device(kernels: ModuleType, classes: int, shared: int) -> None:
    # KiB of shared memory of a block: compute capability 7.5; 8.6, 8.9 and 12.0; 9.0 and 10.0.
    # With every class vector there is: the launcher raises where a launch takes more.
    kernels.set_options()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        problem = row(2, classes, dtype, options=everything(classes, 2))
        for call in problem.calls(shared_bytes=shared << 10):
            check(kernels, call)


@pytest.mark.parametrize("shared", [64, 99])
@pytest.mark.parametrize(
    ("classes", "positions"),
    [
        (2, 3000),  # the widest tiles, of one round of a stage
        (16, 3000),  # and of several
        (500, 40),  # class sums and class vectors both fit alone
        (2048, 6),  # the most class vectors
    ],
)
def test_launches_over_class_planes_fit_every_device(
    kernels: ModuleType, classes: int, positions: int, shared: int
) -> None:
    kernels.set_options()
    for dtype, calibrated in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), (False, True)
    ):
        options = everything(classes, positions)
        problem = dense(1, classes, positions, dtype, calibrated=calibrated, options=options)
        problem.logits /= 4
        limits = {"shared_bytes": shared << 10, "multiprocessors": 1}
        for call in problem.calls(**limits) + problem.gradient_calls(**limits):
            check(kernels, call)


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_class_planes_without_a_class(kernels: ModuleType, operation: str) -> None:
    # As a direct call of the operator may have them.
    call = dense(2, 1, 5, calibrated=False).calls()[operation == "backward"]
    call.fields |= {"classes": 0, "target": np.full((2, 5), -100)}
    run_call(kernels, call)
    if operation == "forward":
        assert (call.fields["row_sum"] == 1).all()
    else:
        assert np.isnan(call.fields["grad_logits"]).all()  # not written


def test_an_infinite_target_logit_is_no_loss_of_0(kernels: ModuleType) -> None:
    problem = row(3, 40)
    problem.logits[1, problem.target[1]] = float("inf")
    call = problem.calls()[0]
    run_call(kernels, call)
    assert call.fields["reduced_loss"] != call.fields["reduced_loss"]  # NaN, as PyTorch's
