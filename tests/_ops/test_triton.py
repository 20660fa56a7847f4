"""The Triton operators: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import disalign_ops
from disalign_ops._ops import backends, schemas
from disalign_ops._ops.codes import CALIBRATION, DETAILS, LOGITS
from disalign_ops._ops.triton import operators, registration, upsample_operators
from support import sets, triton_compile
from support.places import TESTS, test_files
from support.triton_compile import SHAPES, Launch


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(TESTS), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# The interpreter takes milliseconds a program, so that all of it would take hours: `make
# test-triton` runs it. Here: the rows, without the many of them that try the CPU kernels' own ways,
# and parts of the others, chosen by name; of these, `make test` runs the combinations of options.
@pytest.mark.parametrize(
    "part", ["few", *(pytest.param(part, marks=pytest.mark.slow) for part in ("once", "all"))]
)
@pytest.mark.parametrize(
    ("files", "only"),
    [
        (
            ["row", "shard", "new_gradient"],
            "not exported and not depend_on and not beyond_the_cache and not far_above "
            "and not (denominator_of_0 and (upsample or dense or reference))",
        ),
        (
            ["dense", "calibrate", "in_place"],
            "shapes or contents or calibrate or in_place or integer_type",
        ),
        (["upsample"], "details_are or masked_class or integer_type"),
    ],
    ids=["row", "dense", "upsample"],
)
def test_the_operators_pass_the_tests_of_the_cpu_kernels(
    files: list[str], only: str, part: str
) -> None:
    tests = test_files(*files)
    run = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "support.triton_operators",
        "-W", "ignore", *sets.arguments(part, only), *tests,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    called = dict(re.findall(r"(\w+) called (\d+) times", run.stdout))
    assert {f"{files[0]}_forward", f"{files[0]}_backward"} <= set(called), called


SAME = """
import torch, disalign_ops as d
torch.manual_seed(0)
found = {}
for backend in ("native", "triton", "reference"):
    torch.manual_seed(1)
    z = (torch.randn(9, 37) * 3).requires_grad_()
    a, b, c = (torch.randn(k).requires_grad_() for k in (37, 37, 9))
    with d.set_backend(backend):
        loss = d.disalign_cross_entropy(z, torch.arange(9), c, a, b, label_smoothing=0.1)
        (loss * 3).backward()
    found[backend] = [loss.detach(), z.grad, a.grad, b.grad, c.grad]
for backend in ("triton", "reference"):
    for x, y in zip(found[backend], found["native"]):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
z = torch.randn(2, 3)
try:
    with d.set_backend("triton"):
        d.cross_entropy(z, torch.tensor([0, 3]))
except IndexError as error:
    print(error)
print(d.cross_entropy(z, torch.tensor([0, 1])) is not None)
"""


def test_the_same_gradients_from_every_backend_and_a_wrong_target_raises() -> None:
    run = python("-W", "ignore", "-c", SAME, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Target 3 is out of bounds" in run.stdout
    forced = python(
        "-W", "ignore", "-c",
        "import torch, disalign_ops as d, sys;"
        "d.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]));"
        "print('disalign_ops._ops.triton.registration' in sys.modules)",
        TRITON_INTERPRET="1", DISALIGN_OPS_BACKEND="triton",
    )  # fmt: skip
    assert forced.stdout.strip() == "True", forced.stderr


KNOWN = """
import itertools, torch, disalign_ops as d
for shape, soft, reduction, calibrated in itertools.product(
    ((5, 37), (2, 7, 6), (0, 7)), (False, True), ("mean", "sum", "none"), (False, True)
):
    z = (torch.randn(shape) * 3).requires_grad_()
    positions = (shape[0], *shape[2:])
    y = torch.rand(shape) if soft else torch.randint(0, shape[1], positions)
    vectors = [torch.randn(n, requires_grad=True) for n in (positions, shape[1], shape[1])]
    found = {}
    for backend in ("triton", "native"):
        with d.set_backend(backend):
            if calibrated:
                details = d.disalign_cross_entropy(
                    z, y, *vectors, reduction=reduction, return_details="entropy")
            else:
                details = d.cross_entropy(z, y, reduction=reduction, return_details="entropy")
            gradients = torch.autograd.grad(
                details.loss.sum(), [z, *vectors] if calibrated else [z])
            found[backend] = [*details, *gradients]
    for ours, native in zip(found["triton"], found["native"], strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-5, atol=1e-5, equal_nan=True)
z, t = torch.randn(5, 37), torch.arange(5)
with d.set_backend("triton"):
    both = lambda z: d.cross_entropy(z, t, return_details=True)
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z).position_loss, both(z).position_loss)
"""


def test_details_are_those_of_the_native_kernels() -> None:
    run = python("-W", "ignore", "-c", KNOWN, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr[-3000:]


CHECKS = """
import torch, disalign_ops as d
from disalign_ops._ops import schemas
from disalign_ops._ops.codes import CALIBRATION, DETAILS, LOGITS
from disalign_ops._ops.triton import registration
for name in schemas.fakes(native=False):
    native, ours = schemas._OPERATORS[name]._schema, schemas._OPERATORS["triton_" + name]._schema
    assert [(a.name, str(a.type)) for a in native.arguments] == [
        (a.name, str(a.type)) for a in ours.arguments], name
    assert [str(r.type) for r in native.returns] == [str(r.type) for r in ours.returns], name
z, t, vector = torch.randn(6, 9), torch.arange(6), torch.rand(9)
given = (z, t, vector, vector, vector, torch.rand(6), None, None, None)
numbers = (-100, 0.1, 2.0)
tests = ("test_schema", "test_autograd_registration", "test_faketensor")
check = torch.library.opcheck
forward, backward_ = (schemas._OPERATORS["triton_row_" + part] for part in ("forward", "backward_"))
check(forward, (*given, None, *numbers, 1, 0, CALIBRATION | DETAILS), test_utils=tests)
statistics = (torch.ones(2, 6), torch.ones((), dtype=torch.float64))
every = (torch.ones(()), *given, *statistics, *numbers, LOGITS | CALIBRATION)
check(backward_, every, test_utils=tests)

def loss(z, a, b, c):
    return d.disalign_cross_entropy(z, t, c, a, b, label_smoothing=0.1)

with d.set_backend("triton"):
    x = [v.clone().requires_grad_() for v in (z, vector, vector, torch.rand(6))]
    eager = torch.autograd.grad(loss(*x), x)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for e, g in zip(eager, torch.autograd.grad(compiled(*x), x)):
        assert torch.equal(e, g)
print("checked")
"""


def test_operators_are_well_formed_and_torch_compile_takes_them_whole() -> None:
    run = python("-W", "ignore", "-c", CHECKS, TRITON_INTERPRET="1")
    assert "checked" in run.stdout, run.stderr[-3000:]


def test_tracing_sees_the_kernels() -> None:
    def forward(z: torch.Tensor, t: torch.Tensor, vector: torch.Tensor) -> Any:
        given = (z, t, vector, vector, vector, z[:, 0].contiguous(), None, None, None, None)
        return registration.layout_of(schemas.ROW).operator("forward")(
            *given, -100, 0.1, 0.0, 1, 0, CALIBRATION
        )

    traced = make_fx(dispatch_functionalize(forward), tracing_mode="fake")(
        torch.randn(6, 9), torch.arange(6), torch.rand(9)
    )
    kernels = [n for n in traced.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(kernels) == 5  # forward, the loss, and what sums up scale, bias and confidence
    assert not any("maxnreg" in n.kwargs["kwargs"] for n in kernels)


AUTOTUNE = """
import torch, disalign_ops as d
from unittest import mock
from triton.runtime.autotuner import Autotuner
trials = []
def bench(run, quantiles=None):
    trials.append(run())
    return [1.0, 1.0, 1.0]
z, t, found = torch.randn(5, 40), torch.arange(5), []
with mock.patch.object(Autotuner, "do_bench", property(lambda self: bench), create=True):
    for backend in ("native", "triton"):
        with d.set_backend(backend):
            x = z.clone().requires_grad_()
            # In place: what a trial writes is what the next one reads.
            d.cross_entropy(x * 1, t, focal_gamma=2.0, inplace_backward=True).backward()
            found.append(x.grad)
torch.testing.assert_close(*found)
print("trials", len(trials))
"""


def test_autotuning_tries_each_kernel_and_leaves_the_logits_for_the_last_run() -> None:
    environment = {"TRITON_INTERPRET": "1", "DISALIGN_OPS_TRITON_AUTOTUNE": "1"}
    run = python("-W", "ignore", "-c", AUTOTUNE, **environment)
    assert run.stdout == "trials 6\n", run.stderr[-3000:]  # forward and backward, 3 each


def test_no_rows_at_all() -> None:
    script = (
        "import torch, disalign_ops as d\n"
        "for classes in (5, 5000):\n"
        "    a = torch.ones(classes, requires_grad=True)\n"
        "    z, t, c = torch.zeros(0, classes), torch.zeros(0).long(), torch.zeros(0)\n"
        "    loss = d.disalign_cross_entropy(z, t, c, a, a, reduction='sum')\n"
        "    loss.backward()\n"
        "    print(float(loss), float(a.grad.abs().sum()))\n"
    )
    environment = {"TRITON_INTERPRET": "1", "DISALIGN_OPS_BACKEND": "triton"}
    run = python("-W", "ignore", "-c", script, **environment)
    assert run.stdout == "0.0 0.0\n" * 2, run.stderr[-3000:]


def test_native_before_triton_before_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.serving(cpu) == "native"
    monkeypatch.setattr(backends._state, "why_not_native", "taken away")
    assert backends.serving(cpu) == "triton"
    monkeypatch.setattr(backends._state, "triton_missing", "taken away too")
    assert backends.serving(cpu) == "reference"
    with (
        disalign_ops.set_backend("triton"),
        pytest.raises(disalign_ops.errors.ArgumentError, match="taken away too"),
    ):
        backends.serving(cpu)


def test_importing_the_library_does_not_import_triton() -> None:
    run = python("-c", "import disalign_ops, sys; print('triton' in sys.modules)")
    assert run.stdout.strip() == "False", run.stderr


# ---- Compiled without a GPU ----


def launches(
    shape: tuple[int, ...], dtype: torch.dtype, calibrated: bool, size: tuple[int, int] = (0, 0),
    smoothing: float = 0.1, ignore_index: int = -100, gamma: float = 0.0,
) -> list[Launch]:  # fmt: skip
    """What forward and backward of a loss launch, by every branch of the kernels."""
    z = torch.zeros(shape, dtype=dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    classes, low = shape[1], z.numel() // shape[1]
    n = shape[0] * size[0] * size[1] if size[0] else low

    def vector(entries: int) -> Any:
        return torch.zeros(entries, dtype=acc)

    a, b, c = (vector(classes), vector(classes), vector(low)) if calibrated else (None, None, None)
    target = torch.zeros(shape[0], *size) if size[0] else torch.zeros(n)
    given = (z, target.long(), vector(classes), a, b, c, vector(classes), vector(classes),
             vector(n))  # fmt: skip
    statistics = (vector(2 * n).view(2, n), torch.ones((), dtype=torch.float64))
    up, want = torch.ones((), dtype=acc), CALIBRATION if calibrated else 0
    options = (ignore_index, smoothing, gamma)
    with triton_compile.launches() as found:
        if size[0]:
            upsample_operators.forward(*given, None, *options, False, 1, 0, DETAILS)
            upsample_operators.backward(up, *given, *statistics, *options, False, LOGITS | want)
        else:
            operators.forward(*given, None, *options, 1, 0, want)
            operators.backward(up, *given, *statistics, *options, LOGITS | want)
            if calibrated:
                operators.calibrate(z, a, b, c)
                operators.calibrate_backward(z, z, a, b, c, LOGITS | CALIBRATION)
            if z.dim() == 2:
                shard = (z, target.long(), vector(classes), a, b, c, vector(classes),
                         vector(classes), 1 - smoothing, smoothing / classes)  # fmt: skip
                operators.shard_forward(*shard, 0)
                factors = vector(5 * n).view(5, n)
                operators.shard_backward(factors, *shard, LOGITS | want)
    return found


# Registers a thread, at most, over all targets, with all options: (kernel, layout, warps) ->
# (float32 and bfloat16, float64). 255 is all that a thread can have, 128 of 16 warps.
REGISTERS = {
    ("axis_kernel", "upsample", 4): (48, 48),
    ("backward_kernel", "planes", 1): (255, 232),
    ("backward_kernel", "planes", 2): (255, 0),
    ("backward_kernel", "rows", 1): (168, 160),
    ("backward_kernel", "rows", 2): (255, 192),
    ("backward_kernel", "rows", 4): (216, 192),
    ("backward_kernel", "rows", 8): (224, 250),
    ("backward_kernel", "rows", 16): (128, 0),
    ("backward_kernel", "upsample", 4): (255, 216),
    ("calibrate_backward_kernel", "planes", 1): (184, 160),
    ("calibrate_backward_kernel", "rows", 4): (120, 88),
    ("calibrate_backward_kernel", "rows", 8): (152, 176),
    ("calibrate_backward_kernel", "rows", 16): (112, 0),
    ("calibrate_kernel", "planes", 1): (88, 96),
    ("calibrate_kernel", "rows", 4): (56, 56),
    ("calibrate_kernel", "rows", 8): (88, 112),
    ("calibrate_kernel", "rows", 16): (64, 0),
    ("factors_kernel", "upsample", 4): (48, 80),
    ("forward_kernel", "planes", 1): (255, 240),
    ("forward_kernel", "planes", 2): (255, 0),
    ("forward_kernel", "rows", 1): (208, 200),
    ("forward_kernel", "rows", 2): (216, 184),
    ("forward_kernel", "rows", 4): (208, 216),
    ("forward_kernel", "rows", 8): (176, 255),
    ("forward_kernel", "rows", 16): (128, 0),
    ("forward_kernel", "upsample", 4): (248, 200),
    ("loss_kernel", "any", 4): (40, 40),
    ("sum_kernel", "any", 4): (40, 40),
}
_SUMS = ("loss_kernel", "sum_kernel")  # the same for every layout
_compiled: dict[tuple[str, int], triton_compile.Compiled] = {}


def compiled(launch: Launch, architecture: int) -> triton_compile.Compiled:
    key = (triton_compile.specialised(launch, architecture)[1], architecture)
    if key not in _compiled:
        _compiled[key] = triton_compile.compile_launch(launch, architecture)
    return _compiled[key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_every_kernel_compiles_spills_nothing_and_keeps_its_budget(
    shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype
) -> None:
    layout = "upsample" if size[0] else "planes" if len(shape) == 3 else "rows"
    for calibrated in (True, False):
        for launch in launches(shape, dtype, calibrated, size, gamma=1.0):
            kind = "any" if launch.name in _SUMS else layout
            budgets = REGISTERS[launch.name, kind, launch.options["num_warps"]]
            for architecture in triton_compile.TARGETS:
                found = compiled(launch, architecture)
                assert found.spilled == 0, (launch.name, architecture, found)
                most = budgets[dtype == torch.float64]
                assert found.registers <= most, (launch.name, architecture, found)
                if launch.name == "forward_kernel":
                    assert found.asserts, "a wrong target must stop the kernel"


def test_aligned_rows_are_read_by_16_bytes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for launch in launches((64, 4096), dtype, False):
            if launch.name in ("forward_kernel", "backward_kernel"):
                assert compiled(launch, 90).wide_loads > 0


def compilations(cases: list[dict[str, Any]]) -> set[str]:
    return {
        triton_compile.specialised(launch, 90)[1]
        for case in cases
        for launch in launches(**{"dtype": torch.float32, "calibrated": True, **case})
    }


def test_new_sizes_and_options_compile_nothing() -> None:
    once = compilations([{"shape": (64, 1203)}])
    assert once == compilations([
        {"shape": (n, 1203), "smoothing": smoothing, "ignore_index": ignored, "gamma": gamma}
        for n in (2, 17, 64, 4096)
        for smoothing, ignored, gamma in ((0.0, -100, 0.0), (0.1, 255, 2.0), (0.5, 0, 0.0))
    ])  # fmt: skip
    # A new C: one of nine powers of two or the tiles beyond, each with or without aligned rows.
    kernels = len(once)
    sizes = compilations([{"shape": (64, c)} for c in range(2, 6000, 97)])
    assert len(sizes) <= 2 * 10 * kernels
