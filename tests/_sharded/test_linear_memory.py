"""What losses of a linear head allocate, and how they divide the logits into chunks."""

from __future__ import annotations

import itertools

import pytest
import torch

import disalign_ops
from disalign_ops._sharded import chunk_plan
from support.comparison import memory_allocated, memory_held
from support.linear_cases import CALIBRATION, LINEAR, Problem


def _problem_of_size(n: int, d: int, c: int, **requires: bool) -> Problem:
    p = Problem.of(torch.float32, n, d, c)
    for name, t in p.tensors.items():
        t.requires_grad_(requires.get(name, True))
    return p


@pytest.mark.parametrize(
    ("rows", "classes"),
    [(3000, 2000), (64, 100_000), (600, 30_000)],
    ids=["many rows", "many classes", "both"],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "count"), [("native", 2), ("native", 16), ("reference", 2)])
def test_peak_memory_is_chunk_bytes(
    rows: int, classes: int, reduction: str, backend: str, count: int, threads: None
) -> None:
    """Beyond the gradients and some numbers a row, whatever the logits would take."""
    torch.set_num_threads(count)
    chunk_bytes = 4 << 20
    assert rows * classes * 4 > 4 * chunk_bytes
    p = _problem_of_size(rows, 16, classes)

    def step() -> object:
        loss = p.loss(True, chunk_bytes=chunk_bytes, reduction=reduction)
        return torch.autograd.grad(loss, p.learned(True), torch.ones_like(loss))

    with disalign_ops.set_backend(backend):
        step()
        held = memory_held(step)
    gradients = sum(t.numel() * 4 for t in p.tensors.values())
    numbers = 64 * 4 * rows + 8 * 4 * classes  # of each row, and class vectors beside the logits
    assert held <= chunk_bytes + gradients + numbers


def test_a_cosine_head_takes_no_copy_of_its_weight() -> None:
    chunk_bytes = 1 << 20
    p = _problem_of_size(8, 512, 20_000)
    x, w = p.tensors["features"], p.tensors["linear_weight"]

    def step() -> object:
        loss = disalign_ops.linear_cross_entropy(
            x, w, p.target, cosine_scale=8.0, chunk_bytes=chunk_bytes
        )
        return torch.autograd.grad(loss, (x, w))

    step()
    features, weight = x.numel() * 4, w.numel() * 4
    assert memory_held(step) <= chunk_bytes + weight + 8 * features + 8 * 4 * len(w)
    assert chunk_bytes < weight // 8


def test_a_frozen_head_makes_nothing_of_its_size() -> None:
    frozen = {"features": False, "linear_weight": False, "linear_bias": False}
    p = _problem_of_size(40, 20_000, 30, **frozen)
    learned = [p.tensors[name] for name in CALIBRATION]
    p.loss(True)
    assert memory_allocated(lambda: torch.autograd.grad(p.loss(True), learned)) < 30 * 20_000 * 4


def test_frozen_features_or_head_alone_skip_the_others_gradient() -> None:
    for wanted in ("features", "linear_weight"):
        frozen = {name: name == wanted for name in (*LINEAR, *CALIBRATION)}
        p = _problem_of_size(40, 20_000, 40, **frozen)
        t = p.tensors[wanted]
        p.loss(False)
        allocated = memory_allocated(lambda p=p, t=t: torch.autograd.grad(p.loss(False), t))
        assert t.numel() * 4 <= allocated < 1.5 * t.numel() * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("device", "fewest"), [("cpu", 64), ("meta", 256)])
@pytest.mark.parametrize("count", [1, 48])
def test_the_plan_keeps_to_the_memory_and_to_large_matmuls(
    dtype: torch.dtype, device: str, fewest: int, count: int, threads: None
) -> None:
    torch.set_num_threads(count)
    like = torch.empty(0, dtype=dtype, device=device)
    sizes = (1, 7, 300, 4096, 10**6), (1, 10, 1203, 8142, 60_000, 10**6, 10**8), (1 << 16, 64 << 20)
    wholes = set()
    for rows, classes, chunk_bytes in itertools.product(*sizes):
        plan = chunk_plan.plan(rows, classes, like, chunk_bytes, "native")
        assert 1 <= plan.rows <= rows
        assert 1 <= plan.classes <= classes
        bytes_of_a_class = plan.rows * dtype.itemsize
        # As the kernels' launchers allocate: four rows and two sums in double a thread, or two
        # float32 sums of every fourth row.
        bytes_of_a_class += 48 * count if device == "cpu" else 2 * plan.rows
        assert plan.classes * bytes_of_a_class <= chunk_bytes * 2 // 3 or plan.classes == 1
        whole = plan.classes == classes
        wholes.add(whole)
        # All classes of a few rows, only if these are all rows.
        assert not whole or plan.rows >= min(rows, fewest)
        assert whole or plan.rows == min(rows, 1024)
    assert wholes == {False, True}
