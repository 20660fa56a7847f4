"""Prediction and entropy from the CUDA kernels' read of the logits, executed on the CPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from disalign_ops._ops.shard_reference import ELSEWHERE, IGNORED
from simt import build
from simt.calls import DTYPES, Problem, check
from simt.soft_calls import SMALL, probabilities, soft

if build.why_not():
    pytest.skip(str(build.why_not()), allow_module_level=True)

CLUSTERS = {"has_clusters": True, "shared_bytes": 227 << 10}
TILES = {"shared_bytes": 40 << 10}  # too little for a wide row: tiles, which are added up
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return build.module("kernels")


def row(
    n: int, classes: int, dtype: torch.dtype = torch.float32, offset: int = 0,
    calibrated: bool = True, all_options: bool = False,
) -> Problem:  # fmt: skip
    """offset: elements between an aligned address and the logits."""
    options: dict[str, Any] = {}
    if all_options:
        options = {
            "weight": torch.rand(classes) + 0.1, "prior": torch.randn(classes),
            "margin": torch.rand(classes) * 4 - 2, "sample_weight": torch.rand(n) + 0.1,
            "label_smoothing": 0.1, "focal_gamma": 1.5,
        }  # fmt: skip
    logits = torch.empty(offset + n * classes, dtype=dtype)[offset:].view(n, classes)
    target = torch.randint(0, classes, (n,))
    target[1] = -100
    problem = Problem(
        logits.copy_(torch.randn(n, classes) * 3), target, calibrated, options=options, details=True
    )
    if calibrated:
        problem.vectors["confidence"][1] = 3.0  # an ignored row's: of its prediction
    return problem


# Each way that a row is kept: by some lanes, a warp (in half precision with half of the vectors and
# all), the warps of a block, a block.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 9, 33, 513, 1203, 1280, 2501, 5003, 8193])
def test_rows_of_every_tier(kernels: ModuleType, classes: int, dtype: torch.dtype) -> None:
    torch.manual_seed(classes)
    for offset, calibrated in itertools.product((0, 1), (False, True)):
        kernels.set_options(shuffle=offset > 0, seed=classes)
        problem = row(6, classes, dtype, offset, calibrated, all_options=offset > 0)
        check(kernels, problem.calls()[0])
        for call in problem.gradient_calls(class_gradients=offset == 0):
            check(kernels, call)


@pytest.mark.parametrize("limits", [CLUSTERS, TILES], ids=["clusters", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows(kernels: ModuleType, dtype: torch.dtype, limits: dict[str, int]) -> None:
    torch.manual_seed(5)
    kernels.set_options(shuffle=True, seed=5)
    for classes, all_options in ((9001, False), (40001, True)):
        problem = row(4, classes, dtype, 1, all_options, all_options)
        check(kernels, problem.calls(**limits)[0])
        for call in problem.gradient_calls(**limits):
            check(kernels, call)


# Planes that are whole vectors and others; a tile of one stage and of several; a class far above a
# target, where the loss reads the tile again.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        ((2, 5, 64), {}),
        ((2, 19, 33), {}),
        ((1, 150, 40), {}),
        ((2, 400, 16), {"shared_bytes": 64 << 10}),
    ],
    ids=str,
)
def test_planes(
    kernels: ModuleType, shape: tuple[int, int, int], limits: dict[str, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(shape[1])
    n, classes, inner = shape
    for calibrated, all_options in itertools.product((False, True), (False, True)):
        kernels.set_options(shuffle=all_options, seed=classes)
        problem = row(n * inner, classes, dtype, 0, calibrated, all_options)
        problem.logits = (torch.randn(shape) * 3).to(dtype)
        problem.target = problem.target.view(n, inner)
        problem.logits[-1, 2, 5] = 40.0
        problem.target[-1, 5] = 3
        check(kernels, problem.calls(**limits)[0])
        for call in problem.gradient_calls(**limits):
            check(kernels, call)


# Tiles that would be narrower if details took room of their own; more positions than threads.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 171, 128), (1, 150, 2048), (2, 3, 3000), (1, 800, 32)], ids=str
)
def test_planes_have_the_same_bits_without_details(
    kernels: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    kernels.set_options()
    torch.manual_seed(shape[1])
    n, classes, inner = shape
    for calibrated in (False, True):
        problem = row(n * inner, classes, dtype, 0, calibrated, False)
        problem.logits = (torch.randn(shape) * 3).to(dtype)
        problem.target = problem.target.view(n, inner)
        for call in (problem.calls()[0], problem.gradient_calls()[0]):
            check(kernels, call)
            known = ("row_sum", *(k for k in call.expected if k not in ("prediction", "entropy")))
            found = {k: call.fields[k].tobytes() for k in known}
            for k in ("prediction", "entropy"):
                del call.fields[k], call.expected[k]
            check(kernels, call)
            assert {k: call.fields[k].tobytes() for k in known} == found


# Some lanes, a block, tiles: what works on gradients beside details in one loop.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "limits"), [(20, {}), (5003, {"shared_bytes": 56 << 10})])
def test_an_ignored_row_has_no_gradient_whatever_its_confidence(
    kernels: ModuleType, classes: int, limits: dict[str, int], dtype: torch.dtype
) -> None:
    kernels.set_options()
    torch.manual_seed(classes)
    problem = row(6, classes, dtype)
    call = problem.gradient_calls(**limits)[0]
    call.fields["confidence"][1] = NAN
    call.expected = {"grad_logits": call.expected["grad_logits"]}
    check(kernels, call)


def test_more_rows_than_lanes(kernels: ModuleType) -> None:
    kernels.set_options()
    problem = row(80, 1203)
    problem.target[30:80:7] = -100
    for call in problem.gradient_calls(shared_bytes=32 << 10, multiprocessors=1):
        check(kernels, call)


HARD = 10


def hard(problem: Problem, generator: torch.Generator) -> None:
    """Rows with several largest logits, masked classes, infinity and NaN, where they may be: at the
    row's ends, which are no whole vectors, next to each other, far apart.
    """
    z, classes = problem.logits, problem.logits.shape[1]
    places = torch.randperm(classes, generator=generator)[:4]
    z[0, places] = 50.0
    z[1, [0, classes - 1]] = 50.0  # ignored
    z[2] = 0.5
    z[3] = -INFINITY
    z[4], z[4, places[0]] = -INFINITY, 2.0
    z[5, places] = INFINITY
    z[6, places[:2]] = NAN
    z[7, [0, 1]], z[7, places] = NAN, INFINITY
    z[8, -1] = NAN
    z[9] = NAN


def check_hard(
    kernels: ModuleType, problem: Problem, classes: int, margin: float | None,
    limits: dict[str, int],
) -> None:  # fmt: skip
    """What `hard` made of the rows, or of a plane's positions; the margin changes none of it."""
    if margin is not None:
        problem.options["margin"] = torch.full((classes,), margin)
    call = problem.calls(**limits)[0]
    call.expected = {"prediction": call.expected["prediction"]}
    check(kernels, call)
    entropy = torch.from_numpy(call.fields["entropy"])
    entropy[1] -= float(np.log(2.0)) if problem.soft else 0.0
    assert entropy[[1, 3, 4]].abs().max() < 1e-6
    assert entropy[5:].isnan().all()
    assert abs(float(entropy[2].exp()) - classes) < 1e-3 * classes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("classes", "limits"),
    [(11, {}), (131, {}), (1203, {}), (2563, {}), (5003, {}), (9001, TILES), (9001, CLUSTERS)],
    ids=str,
)
def test_the_first_of_several_largest_classes(
    kernels: ModuleType, classes: int, limits: dict[str, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(classes)
    kernels.set_options()
    for offset, margin in itertools.product((0, 3), (None, 40.0, -40.0)):
        problem = row(HARD, classes, dtype, offset, calibrated=False)
        hard(problem, generator)
        problem.target[0] = int(problem.logits[0].argmax())
        check_hard(kernels, problem, classes, margin, limits)


@pytest.mark.parametrize("classes", [131, 1203])
def test_entropy_of_margins_beyond_the_range_of_exp(kernels: ModuleType, classes: int) -> None:
    kernels.set_options()
    for margin in (200.0, -200.0):
        problem = row(5, classes)
        problem.options["margin"] = torch.full((classes,), margin)
        call = problem.calls()[0]
        call.expected = {k: call.expected[k] for k in ("prediction", "entropy")}
        check(kernels, call)


@pytest.mark.parametrize(("classes", "limits"), [(1203, {}), (9001, CLUSTERS), (9001, TILES)])
def test_the_logits_are_read_once(
    kernels: ModuleType, classes: int, limits: dict[str, int]
) -> None:
    kernels.set_options()
    problem = row(6, classes, calibrated=False)
    problem.target[1] = 3
    loads = []
    for details in (False, True):
        check(kernels, replace(problem, details=details).calls(**limits)[0])
        loads.append(kernels.traffic("logits")["load_bytes"])
    assert loads[0] == loads[1] >= problem.logits.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("classes", "limits"), [(11, {}), (67, {}), (400, {"shared_bytes": 64 << 10})], ids=str
)
def test_the_first_of_several_largest_classes_of_planes(
    kernels: ModuleType, classes: int, limits: dict[str, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(classes)
    kernels.set_options()
    for margin in (None, 40.0, -40.0):
        problem = row(HARD, classes, dtype, calibrated=False)
        hard(problem, generator)
        problem.logits = problem.logits.t().contiguous()[None]
        problem.target = problem.target[None]
        check_hard(kernels, problem, classes, margin, limits)


# Class probabilities. Rows by lanes, by a warp, by several of a block, by a cluster's, by tiles.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("classes", "limits"),
    [
        *((n, {}) for n in (1, 2, 9, 33, 512, 513, 1203, 1288, 5003)),
        (9001, CLUSTERS), (20003, CLUSTERS), (9001, {"shared_bytes": SMALL}),
    ],
    ids=str,
)  # fmt: skip
def test_rows_of_class_probabilities(
    kernels: ModuleType, classes: int, limits: dict[str, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(classes)
    for offset, calibrated in itertools.product((0, 1), (False, True)):
        kernels.set_options(shuffle=offset > 0, seed=classes)
        problem = soft(
            5, classes, dtype=dtype, offset=offset, wide=offset > 0, alike=True,
            calibrated=calibrated, all_options=offset > 0, details=True,
        )  # fmt: skip
        check(kernels, problem.calls(**limits)[0])
        for call in problem.gradient_calls(class_gradients=offset == 0, **limits):
            check(kernels, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        ((2, 1, 64), {}),
        ((2, 5, 64), {}),
        ((2, 19, 33), {}),
        ((1, 150, 40), {}),
        ((1, 900, 16), {"shared_bytes": 64 << 10, "multiprocessors": 1}),  # in chunks
    ],
    ids=str,
)
def test_planes_of_class_probabilities(
    kernels: ModuleType, shape: tuple[int, int, int], limits: dict[str, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(shape[1])
    for calibrated, all_options in itertools.product((False, True), (False, True)):
        kernels.set_options(shuffle=all_options, seed=shape[1])
        problem = soft(
            *shape, dtype=dtype, wide=all_options, calibrated=calibrated, all_options=all_options,
            details=True,
        )  # fmt: skip
        check(kernels, problem.calls(**limits)[0])
        for call in problem.gradient_calls(**limits):
            check(kernels, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("classes", "limits"),
    [
        (11, {}), (131, {}), (1203, {}), (2563, {}), (5003, {}), (9001, CLUSTERS),
        (9001, {"shared_bytes": SMALL}),
    ],
    ids=str,
)  # fmt: skip
def test_the_first_of_several_largest_classes_with_class_probabilities(
    kernels: ModuleType, classes: int, limits: dict[str, int], calibrated: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(classes)
    kernels.set_options()
    for offset, planes in ((0, False), (3, False), (0, True)):
        if planes and classes > 2000:
            continue
        problem = soft(
            HARD, classes, dtype=dtype, offset=offset, alike=True, calibrated=calibrated,
            details=True,
        )  # fmt: skip
        hard(problem, generator)
        if calibrated:  # equal ones stay so
            problem.vectors["scale"].fill_(0.5)
            problem.vectors["bias"].fill_(0.25)
        if planes:
            problem.logits = problem.logits.t().contiguous()[None]
            problem.target = problem.target.t().contiguous()[None]
        check_hard(kernels, problem, classes, None, limits)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        ((6, 100), {}), ((6, 1203), {}), ((3, 9001), CLUSTERS),
        ((3, 9001), {"shared_bytes": SMALL}), ((2, 150, 40), {}),
    ],
    ids=str,
)  # fmt: skip
def test_the_logits_of_class_probabilities_are_read_once(
    kernels: ModuleType, shape: tuple[int, ...], limits: dict[str, int], calibrated: bool
) -> None:
    kernels.set_options()
    problem = soft(*shape, calibrated=calibrated)
    loads = []
    for details in (False, True):
        check(kernels, replace(problem, details=details).calls(class_gradients=False, **limits)[0])
        loads.append(kernels.traffic("logits")["load_bytes"])
    again = 2 if calibrated and "shared_bytes" in limits and limits is not CLUSTERS else 1
    assert loads == [again * problem.logits.nbytes] * 2


# A shard's: of the rows' own classes, whether their target is there or elsewhere.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_probabilities", [False, True])
@pytest.mark.parametrize(
    ("classes", "limits"),
    [(1, {}), (33, {}), (1203, {}), (9001, {}), (9001, CLUSTERS), (9001, TILES)], ids=str
)  # fmt: skip
def test_shards(
    kernels: ModuleType, classes: int, limits: dict[str, int], of_probabilities: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(classes)
    kernels.set_options(shuffle=True, seed=classes)
    for calibrated in (False, True):
        problem = row(6, classes, dtype, 1, calibrated)
        if of_probabilities:
            problem.target = probabilities(6, classes).to(dtype)
        else:
            problem.target[1] = 0
        call = problem.calls(**limits)[0]
        dropped = ("reduced_loss", "loss", "row_shift", "row_sum", "row_total", "denominator")
        fields = {k: v for k, v in call.fields.items() if not k.startswith("grad_c")}
        fields = {k: v for k, v in fields.items() if k not in dropped}
        fields = {k: v for k, v in fields.items() if k not in ("grad_scale", "grad_bias")}
        known = {k: call.expected[k] for k in ("prediction", "entropy")}
        fields |= {"class_gradients": False, "reduction": 0}
        fields["shard_sums"] = np.full((5, 6), np.nan, dtype=call.fields["entropy"].dtype)
        if not of_probabilities:
            target = fields["target"] = fields["target"].copy()
            target[2], target[3] = ELSEWHERE, IGNORED
            fields["ignore_index"] = IGNORED
            known["entropy"] = known["entropy"].copy()
            known["entropy"][3] = 0
        call.fields, call.expected = fields, known
        check(kernels, call)
        with_details = fields["shard_sums"].copy()
        assert np.isfinite(with_details).all()
        for name in known:
            del fields[name]
        call.expected = {}
        check(kernels, call)
        assert (fields["shard_sums"] == with_details).all()


@pytest.mark.parametrize("of_probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_of_planes_masked_by_the_lowest_number(
    kernels: ModuleType, dtype: torch.dtype, of_probabilities: bool
) -> None:
    kernels.set_options()
    n, classes, inner = 1, 400, 256
    problem = row(n * inner, classes, dtype, calibrated=False)
    problem.logits = (torch.randn(n, classes, inner) * 3).to(dtype)
    problem.logits[:, :100] = torch.finfo(dtype).min
    if of_probabilities:
        problem.target = probabilities(n, classes, inner).to(dtype)
    else:
        problem.target = problem.target.view(n, inner)
    call = problem.calls()[0]
    call.expected = {k: call.expected[k] for k in ("prediction", "entropy")}
    check(kernels, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_planes_whose_factor_is_below_0(kernels: ModuleType, dtype: torch.dtype) -> None:
    kernels.set_options()
    problem = row(64, 9, dtype)
    problem.logits = (torch.randn(1, 9, 64) * 3).to(dtype)
    problem.target = problem.target.view(1, 64)
    problem.vectors["scale"].fill_(-3.0)
    problem.vectors["confidence"].fill_(2.0)
    call = problem.calls()[0]
    call.expected = {k: call.expected[k] for k in ("prediction", "entropy", "loss")}
    check(kernels, call)
