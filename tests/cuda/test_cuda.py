"""On a GPU: the operators' tests, and what only a device has (streams, graphs, synchronisation)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops._bench.measure import captured
from support.cases import Rows, rows
from support.dense_cases import dense
from support.places import TESTS, test_files
from support.tolerances import assert_close

FILES = ["row", "soft", "dense", "upsample", "in_place", "autograd", "stage2", "gradient_pass"]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with disalign_ops.set_backend("native"):  # raises where the CUDA library does not serve
        yield


def _run_files(*before: str) -> subprocess.CompletedProcess[str]:
    tests = test_files(*FILES)
    return subprocess.run(
        [*before, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "-p", "support.cuda_operators", *tests],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_operators_pass_the_tests_of_the_cpu_kernels() -> None:
    run = _run_files()
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    run = _run_files("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    assert run.returncode == 0, run.stdout[-3000:]


def on_gpu(r: Rows, dtype: torch.dtype) -> Rows:
    tensors = [t.detach().to("cuda", dtype).requires_grad_() for t in r.learned]
    return Rows(tensors[0], r.target.cuda(), *tensors[1:], r.options)


def step(r: Rows) -> list[Tensor]:
    loss = disalign_ops.disalign_cross_entropy(
        r.logits, r.target, r.confidence, r.scale, r.bias, **r.options
    )
    return [loss.detach(), *torch.autograd.grad(loss, r.learned)]


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.cpu(), e.cpu(), torch.float32, what)


def test_nothing_waits_for_the_device() -> None:
    r = on_gpu(rows(64, 1203), torch.float32)
    step(r)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(r)
        loss = disalign_ops.cross_entropy(
            r.logits, r.target, reduction="none", normalizer=torch.ones((), device="cuda")
        )
        torch.autograd.grad(loss, r.logits, torch.ones_like(loss))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream() -> None:
    r = on_gpu(rows(64, 1203), torch.float32)
    expected = step(r)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = step(r)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(actual, expected, "another stream")


def test_cuda_graph() -> None:
    r = on_gpu(rows(64, 1203), torch.float32)
    graph, results = captured(lambda: step(r))
    with torch.no_grad():
        r.logits.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(results, step(r), "graph")


UPSTREAM = (1.0, 1 / 3, 65536.0)


def training_step(r: Rows, upstream: Tensor, gradient: Any) -> list[Tensor]:
    """Forward, and backward with an upstream gradient that lies on the device."""
    loss = disalign_ops.disalign_cross_entropy(
        r.logits, r.target, r.confidence, r.scale, r.bias, gradient=gradient, **r.options
    )
    return [loss.detach(), *torch.autograd.grad(loss, r.learned, upstream.to(loss.dtype))]


@pytest.mark.parametrize("gradient", ["auto", "forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [133, 1203, 8192, 60_000])
def test_a_captured_step_takes_any_upstream_gradient(
    classes: int, dtype: torch.dtype, gradient: str
) -> None:
    r = on_gpu(rows(64, classes, torch.float32), dtype)
    upstream = torch.ones((), device="cuda")
    graph, results = captured(lambda: training_step(r, upstream, gradient))
    for factor in UPSTREAM:  # of one graph: whether it is 1 is found out on the device
        upstream.fill_(factor)
        graph.replay()
        torch.cuda.synchronize()
        expected = training_step(r, upstream, gradient)
        for replayed, eager in zip(results, expected, strict=True):
            assert torch.equal(replayed.nan_to_num(), eager.nan_to_num())


@pytest.mark.parametrize("gradient", ["auto", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [133, 1203, 8192, 60_000])
def test_every_run_gives_the_same_bits(classes: int, dtype: torch.dtype, gradient: str) -> None:
    r = on_gpu(rows(300, classes, torch.float32), dtype)
    for factor in UPSTREAM:
        upstream = torch.tensor(factor, device="cuda", dtype=torch.float64)
        first = training_step(r, upstream, gradient)
        for _ in range(5):
            for a, b in zip(training_step(r, upstream, gradient), first, strict=True):
                assert torch.equal(a, b)


def test_forward_makes_the_gradient_and_backward_takes_no_memory() -> None:
    # Beyond the one gradient there are a few values a row.
    z = torch.randn(512, 8142, device="cuda", requires_grad=True)
    t = torch.randint(0, 8142, (512,), device="cuda")
    held = {}
    for gradient in ("auto", "backward"):
        before = torch.cuda.memory_allocated()
        loss = disalign_ops.cross_entropy(z, t, gradient=gradient)  # type: ignore[arg-type]
        held[gradient] = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        (grad,) = torch.autograd.grad(loss, z)
        assert torch.cuda.max_memory_allocated() - before < 1.1 * z.numel() * z.itemsize
        del loss, grad
    assert held["auto"] - held["backward"] >= z.numel() * z.itemsize


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device() -> None:
    r = on_gpu(rows(9, 133), torch.float32)
    moved = [t.detach().to("cuda:1").requires_grad_() for t in r.learned]
    second = Rows(moved[0], r.target.to("cuda:1"), *moved[1:])
    assert torch.cuda.current_device() == 0
    assert_same(step(second), step(r), "another device")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_makes_no_float32_copy(dtype: torch.dtype) -> None:
    z = torch.randn(512, 8142, device="cuda", dtype=dtype, requires_grad=True)
    t = torch.randint(0, 8142, (512,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=dtype):
        loss = disalign_ops.cross_entropy(z, t)
    assert loss.dtype == torch.float32
    assert torch.cuda.max_memory_allocated() - before < z.numel() * z.itemsize / 4


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
BACKENDS = ["native", pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_equal_the_reference(backend: Any) -> None:
    r = on_gpu(rows(64, 1203), torch.float32)
    with disalign_ops.set_backend(backend):
        found = step(r)
    with disalign_ops.set_backend("reference"):
        expected = step(r)
    assert_same(found, expected, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_and_upsampling_equal_the_reference(backend: Any) -> None:
    d = dense((2, 21, 16, 16), (64, 64))
    z = d.logits.detach().to("cuda", torch.float32).requires_grad_()
    t = d.target.cuda()
    found, expected = [], []
    for results, name in ((found, backend), (expected, "reference")):
        with disalign_ops.set_backend(name):
            loss = disalign_ops.upsample_cross_entropy(z, t)
            results += [loss.detach(), *torch.autograd.grad(loss, z)]
            loss = disalign_ops.cross_entropy(z, t[:, :16, :16], ignore_index=255)
            results += [loss.detach(), *torch.autograd.grad(loss, z)]
    assert_same(found, expected, "on the device")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(9, 1203), (2, 21, 8, 9)], ids=str)
def test_calibrate_equals_the_reference(shape: tuple[int, ...], backend: Any) -> None:
    z = torch.randn(shape, device="cuda", requires_grad=True)
    c = torch.randn(shape[0], *shape[2:], device="cuda", requires_grad=True)
    a, b = (torch.randn(shape[1], device="cuda", requires_grad=True) for _ in range(2))
    upstream = torch.randn_like(z)
    found, expected = [], []
    for results, name in ((found, backend), (expected, "reference")):
        with disalign_ops.set_backend(name):
            u = disalign_ops.calibrate(z, c, a, b)
            results += [u.detach(), *torch.autograd.grad(u, (z, c, a, b), upstream)]
    assert_same(found, expected, "calibrate")


def test_a_target_that_is_no_class_stops_the_kernel() -> None:
    # The device is lost to the process that did it.
    program = (
        "import torch, disalign_ops as d;"
        "d.cross_entropy(torch.zeros(4, 7, device='cuda'), torch.full((4,), 7, device='cuda'));"
        "torch.cuda.synchronize()"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "device-side assert" in run.stderr or "illegal instruction" in run.stderr
