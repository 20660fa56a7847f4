"""Class probabilities in the Triton operators: interpreted on the CPU, and compiled for GPUs that
are not here.
"""

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

from disalign_ops._ops import schemas
from disalign_ops._ops.codes import CALIBRATION, LOGITS
from disalign_ops._ops.triton import operators, registration, upsample_operators
from machine_code import triton_kernels
from support import cuda_tools, triton_compile
from support.places import TESTS, test_files
from support.triton_compile import SHAPES, Launch


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


# As in test_triton.py: the interpreter takes milliseconds a program.
SOME = [
    "--once", "-k",
    "contents or strides or half or (upsampled and not 150) or linear_head or operators_of_a_shard",
]  # fmt: skip
INTERPRETED = [
    pytest.param(SOME, marks=pytest.mark.standard, id="some"),
    pytest.param(["--once"], marks=pytest.mark.slow, id="once"),
    pytest.param([], marks=pytest.mark.slow, id="all"),
]


@pytest.mark.parametrize("part", INTERPRETED)
def test_the_operators_pass_the_tests_of_the_cpu_kernels(part: list[str]) -> None:
    run = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "support.triton_operators",
        *part, *test_files("soft", "soft_shards"),
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    called = dict(re.findall(r"(\w+) called (\d+) times", run.stdout))
    expected = {f"{layout.name}_{step}" for layout in schemas.LAYOUTS
                for step in ("forward", "backward")}  # fmt: skip
    expected |= {"row_shard_forward", "row_shard_backward"}
    assert expected <= set(called), called


SHARDS = """
import itertools, torch
from disalign_ops._ops import reference, shard_reference
from disalign_ops._ops.codes import CALIBRATION, LOGITS
from disalign_ops._ops.triton import operators
torch.manual_seed(0)
for (n, classes), calibrated, weighted, masked in itertools.product(
    ((1, 300), (5, 3)), (False, True), (False, True), (False, True)
):
    z = torch.randn(n, classes, dtype=torch.float64) * 3
    y = torch.rand(n, 2 * classes, dtype=torch.float64)[:, classes:]
    if masked:
        z[:, 1], y[:, 1] = -float("inf"), 0.0
    def vector(k, wanted):
        return torch.rand(k, dtype=torch.float64) if wanted else None
    given = (
        vector(classes, weighted), vector(classes, calibrated), vector(classes, calibrated),
        vector(n, calibrated), vector(classes, weighted), None, 0.9, 0.0 if masked else 0.1 / 2000,
    )
    (sums,) = operators.shard_forward(z, y, *given, 0)
    torch.testing.assert_close(sums, shard_reference.shard_sums(z, y, *given))
    factors = torch.rand(5, n, dtype=torch.float64)
    factors[0], factors[3:] = sums[0], 0
    wanted = LOGITS | (CALIBRATION if calibrated else 0)
    expected = shard_reference.shard_gradients(factors, z, y, *given)[: 4 if calibrated else 1]
    found = operators.shard_backward(factors, z, y, *given, wanted)
    torch.testing.assert_close(tuple(found), expected)
    over = z.clone()
    rest = operators.shard_backward_in_place(factors, over, y, *given, wanted)
    torch.testing.assert_close((over, *rest), expected)
print("checked")
"""


def test_shards_have_the_sums_and_gradients_of_the_reference() -> None:
    run = python("-c", SHARDS)
    assert "checked" in run.stdout, run.stderr[-3000:]


IN_PLACE = """
import torch, disalign_ops as d
torch.manual_seed(0)
for shape, up in (((5, 700), None), ((2, 19, 7), None), ((1, 3, 2, 2), (4, 5))):
    z = torch.randn(shape)
    y = torch.rand(shape if up is None else (*shape[:2], *up))
    loss_of = d.cross_entropy if up is None else d.upsample_cross_entropy
    found = []
    for backend, in_place in (("triton", False), ("triton", True), ("reference", False)):
        with d.set_backend(backend):
            x = z.clone().requires_grad_()
            (loss_of(x * 1, y, inplace_backward=in_place) * 3).backward()
            found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], found[2])
for classes in (5, 5000):
    a = torch.ones(classes, requires_grad=True)
    z = torch.zeros(0, classes)
    with d.set_backend("triton"):
        loss = d.disalign_cross_entropy(z, z, torch.zeros(0), a, a, reduction="sum")
    loss.backward()
    assert float(loss) == 0 and float(a.grad.abs().sum()) == 0
print("checked")
"""


def test_over_the_logits_and_of_no_rows_at_all() -> None:
    run = python("-c", IN_PLACE)
    assert "checked" in run.stdout, run.stderr[-3000:]


CHECKS = """
import torch, disalign_ops as d
from disalign_ops._ops import schemas
from disalign_ops._ops.codes import CALIBRATION, LOGITS
from disalign_ops._ops.triton import registration
z, y, vector = torch.randn(6, 9), torch.rand(6, 9), torch.rand(9)
given = (z, y, vector, vector, vector, torch.rand(6), None, None, None)
numbers = (-100, 0.1, 0.0)
forward, backward = (registration.layout_of(schemas.ROW).operator(part)
                     for part in ("forward", "backward"))
tests = ("test_schema", "test_autograd_registration", "test_faketensor")
torch.library.opcheck(forward, (*given, None, *numbers, 1, 0, CALIBRATION), test_utils=tests)
statistics = (torch.ones(3, 6), torch.ones((), dtype=torch.float64))
every = (torch.ones(()), *given, *statistics, *numbers, LOGITS | CALIBRATION)
torch.library.opcheck(backward, every, test_utils=tests)

def loss(z, y, a, b, c):
    return d.disalign_cross_entropy(z, y, c, a, b, label_smoothing=0.1)

with d.set_backend("triton"):
    compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=True)
    for n in (6, 4):
        x = [v.clone().requires_grad_() for v in (z[:n], vector, vector, torch.rand(n))]
        found, expected = (
            torch.autograd.grad(f(x[0], y[:n], *x[1:]), x) for f in (compiled, loss)
        )
        torch.testing.assert_close(found, expected)
print("checked")
"""


def test_operators_are_well_formed_and_torch_compile_takes_them_whole() -> None:
    run = python("-c", CHECKS)
    assert "checked" in run.stdout, run.stderr[-3000:]


@pytest.mark.parametrize("mode", ["fake", "symbolic"])  # symbolic: dynamic shapes
def test_tracing_sees_the_kernels(mode: str) -> None:
    def forward(z: torch.Tensor, y: torch.Tensor, vector: torch.Tensor) -> Any:
        given = (z, y, vector, vector, vector, z[:, 0].contiguous(), None, None, None, None)
        return registration.layout_of(schemas.ROW).operator("forward")(
            *given, -100, 0.1, 0.0, 1, 0, CALIBRATION
        )

    traced = make_fx(dispatch_functionalize(forward), tracing_mode=mode)(
        torch.randn(6, 9), torch.rand(6, 9), torch.rand(9)
    )
    kernels = [n for n in traced.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(kernels) == 5  # forward, the loss, and what sums up scale, bias and confidence


# ---- Compiled without a GPU ----


def launches(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, calibrated: bool = True,
    size: tuple[int, int] = (0, 0), *, like: torch.dtype | None = None, smoothing: float = 0.1,
    reduction: int = 1, options: bool = True,
) -> list[Launch]:  # fmt: skip
    """What forward and backward launch. like: the dtype of the probabilities, if not that of the
    logits. options: weights a class and a position, and a prior.
    """
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    classes = shape[1]

    def vector(entries: int, wanted: bool = True) -> Any:
        return torch.zeros(entries, dtype=acc) if wanted else None

    z = torch.zeros(shape, dtype=dtype)
    y = torch.zeros((*shape[:2], *size) if size[0] else shape, dtype=like or dtype)
    low, n = z.numel() // classes, y.numel() // classes
    calibration = [vector(k, calibrated) for k in (classes, classes, low)]
    vectors = (vector(classes, options), *calibration, vector(classes, options), None)
    given = (z, y, *vectors, vector(n, options))
    statistics = (vector(3 * n).view(3, n), torch.ones((), dtype=torch.float64))
    want = CALIBRATION if calibrated else 0
    up = torch.ones(() if reduction else n, dtype=acc)
    numbers: tuple[Any, ...] = (-100, smoothing, 0.0, *([False] if size[0] else []))
    module: Any = upsample_operators if size[0] else operators
    with triton_compile.launches() as found:
        module.forward(*given, None, *numbers, reduction, 0, want if reduction else 0)
        module.backward(up, *given, *statistics, *numbers, LOGITS | want)
        if z.dim() == 2:
            shard = (z, y, *vectors, 1 - smoothing, smoothing / classes)
            operators.shard_forward(*shard, 0)
            operators.shard_backward(vector(5 * n).view(5, n), *shard, LOGITS | want)
    return [launch for launch in found if launch.name not in ("loss_kernel", "sum_kernel")]


# As in test_triton.py: (kernel, layout, warps) -> (float32 and bfloat16, float64).
REGISTERS = {
    ("backward_kernel", "upsample", 4): (255, 224),
    ("soft_backward_kernel", "planes", 1): (224, 232),
    ("soft_backward_kernel", "planes", 2): (192, 0),
    ("soft_backward_kernel", "rows", 1): (232, 192),
    ("soft_backward_kernel", "rows", 2): (168, 176),
    ("soft_backward_kernel", "rows", 4): (152, 160),
    ("soft_backward_kernel", "rows", 8): (184, 255),
    ("soft_backward_kernel", "rows", 16): (128, 0),
    ("soft_factors_kernel", "upsample", 4): (32, 40),
    ("soft_forward_kernel", "planes", 1): (224, 232),
    ("soft_forward_kernel", "planes", 2): (232, 0),
    ("soft_forward_kernel", "rows", 1): (255, 216),
    ("soft_forward_kernel", "rows", 2): (240, 224),
    ("soft_forward_kernel", "rows", 4): (168, 192),
    ("soft_forward_kernel", "rows", 8): (168, 240),
    ("soft_forward_kernel", "rows", 16): (120, 0),
    ("soft_upsample_kernel", "upsample", 4): (176, 168),
}


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, marks=pytest.mark.standard if a == 90 else pytest.mark.slow)
        for a in triton_compile.TARGETS
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_every_kernel_compiles_spills_nothing_and_keeps_its_budget(
    shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype, architecture: int
) -> None:
    layout = "upsample" if size[0] else "planes" if len(shape) == 3 else "rows"
    for calibrated in (True, False):
        for launch in launches(shape, dtype, calibrated, size):
            if launch.name == "axis_kernel":
                continue
            most = REGISTERS[launch.name, layout, launch.options["num_warps"]]
            found = triton_compile.compile_launch(launch, architecture)
            assert found.spilled == 0, (launch.name, found)
            assert found.registers <= most[dtype == torch.float64], (launch.name, found)


def test_each_option_compiles() -> None:
    """Through Triton's front end, where a kernel that is wrong for its arguments fails."""
    cases: list[dict[str, Any]] = [
        {}, {"calibrated": False}, {"options": False}, {"calibrated": False, "options": False},
        {"reduction": 0}, {"dtype": torch.bfloat16}, {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "like": torch.float32}, {"dtype": torch.float64},
    ]  # fmt: skip
    names = set()
    for (shape, size), case in ((s, case) for s in SHAPES[2:6] + SHAPES[-1:] for case in cases):
        for launch in launches(shape, size=size, **case):
            names.add(launch.name)
            triton_compile.front_end(launch, 90)
    assert names == {"soft_forward_kernel", "soft_backward_kernel", "axis_kernel",
                     "soft_upsample_kernel", "soft_factors_kernel", "backward_kernel"}  # fmt: skip


@pytest.mark.parametrize("architecture", triton_compile.ROCM)
def test_kernels_compile_for_rocm(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for shape in ((4, 5), (2, 5001), (2, 5, 3)):
        for launch in launches(shape):
            assert "maxnreg" not in launch.options
            assert triton_compile.translate(launch, architecture).asm["hsaco"]


def test_new_sizes_and_options_compile_nothing() -> None:
    def compilations(n: int, smoothing: float) -> set[str]:
        images = min(n, 40)  # whose probabilities have 152 n entries each
        found = [
            launches((n, 1203), smoothing=smoothing), launches((images, 19, 7, 9), size=(8, n))
        ]  # fmt: skip
        return {triton_compile.specialised(x, 90)[1] for part in found for x in part}

    once = compilations(64, 0.1)
    for n, smoothing in ((2, 0.0), (17, 0.5), (4096, 0.1)):
        assert compilations(n, smoothing) == once


# Instructions for 512 bytes of logits, forward and backward: those of triton 3.9 and 3 %.
# `python -m machine_code.triton_kernels` prints them.
INSTRUCTIONS = {"float32": (77, 42), "bfloat16": (181, 117)}


@pytest.mark.parametrize("dtype", triton_kernels.DTYPES)
def test_logits_and_probabilities_are_read_once(dtype: str) -> None:
    if why := cuda_tools.why_not():
        pytest.skip(why)
    forward, backward = (
        triton_kernels.count("rows", 8192, dtype, step) for step in triton_kernels.SOFT_STEPS
    )
    # In vectors of the logits' size: both inputs, and the weights a class, which are float32.
    reads = 2 + 4 / triton_kernels.DTYPES[dtype].itemsize
    for found, writes, most in zip((forward, backward), (0, 1), INSTRUCTIONS[dtype], strict=True):
        assert sum(found.values()) <= most, sum(found.values())
        assert found["LDG.E.128"] == pytest.approx(reads, abs=0.01)
        assert found.get("STG.E.128", 0) == pytest.approx(writes, abs=0.01)
