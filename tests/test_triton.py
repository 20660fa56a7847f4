"""The Triton operators: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_compile
from triton_compile import Launch

import disalign_ops
from disalign_ops import _backends
from disalign_ops._triton import operators, upsample_operators

HERE = Path(__file__).parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(HERE), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# The interpreter takes milliseconds a program: part of each file's tests, chosen by name.
@pytest.mark.parametrize(
    ("files", "only"),
    [
        (["row"], "shapes or contents or combination or integer_type"),
        (["dense", "calibrate", "in_place"], "shapes or contents or calibrate or in_place"),
        (["upsample"], "details_are or masked_classes_stay or integer_type"),
    ],
    ids=["row", "dense", "upsample"],
)
def test_the_operators_pass_tests_of_the_cpu_kernels(files: list[str], only: str) -> None:
    tests = [str(HERE / f"test_{name}.py") for name in files]
    run = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "triton_operators",
        "-W", "ignore", "-k", only, *tests,
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
        "print('disalign_ops._ops_triton' in sys.modules)",
        TRITON_INTERPRET="1", DISALIGN_OPS_BACKEND="triton",
    )  # fmt: skip
    assert forced.stdout.strip() == "True", forced.stderr


def test_native_before_triton_before_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backends.serving(cpu) == "native"
    monkeypatch.setattr(_backends._state, "why_not_native", "taken away")
    assert _backends.serving(cpu) == "triton"
    monkeypatch.setattr(_backends._state, "triton_missing", "taken away too")
    assert _backends.serving(cpu) == "reference"
    with (
        disalign_ops.set_backend("triton"),
        pytest.raises(disalign_ops.errors.ArgumentError, match="taken away too"),
    ):
        _backends.serving(cpu)


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
    statistics = (vector(n), vector(n), torch.ones((), dtype=torch.float64))
    up, want = torch.ones((), dtype=acc), (calibrated,) * 3
    options = (ignore_index, smoothing, gamma)
    with triton_compile.launches() as found:
        if size[0]:
            upsample_operators.forward(*given, None, *options, False, True, 1, 0, *(False,) * 4)
            upsample_operators.backward(up, *given, *statistics, *options, False, True, True, *want)
        else:
            operators.forward(*given, None, *options, 1, 0, False, *want)
            operators.backward(up, *given, *statistics, *options, True, *want)
            if calibrated:
                operators.calibrate(z, a, b, c)
                operators.calibrate_backward(z, z, a, b, c, True, True, True, True)
    return found


SHAPES: list[tuple[tuple[int, ...], tuple[int, int]]] = [
    ((4096, 19), (0, 0)),
    ((4096, 100), (0, 0)),
    ((4096, 1203), (0, 0)),
    ((4096, 4000), (0, 0)),
    ((64, 8142), (0, 0)),
    ((2, 19, 1000), (0, 0)),
    ((2, 150, 1000), (0, 0)),
    ((2, 1203, 100), (0, 0)),
    ((1, 150, 16, 16), (128, 128)),
]
# A thread's, at most: all that there are where a program is 8 warps or fewer.
MOST_REGISTERS = 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_every_kernel_compiles_and_spills_nothing(
    shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype
) -> None:
    # Every target for two shapes, two of them for the others: a compilation takes seconds.
    wide = shape in ((4096, 1203), (2, 19, 1000))
    for calibrated in (True, False):
        for launch in launches(shape, dtype, calibrated, size, gamma=1.0):
            for architecture in triton_compile.TARGETS if wide else (90,):
                compiled = triton_compile.compile_launch(launch, architecture)
                assert compiled.spilled == 0, (launch.name, architecture, compiled)
                threads = 32 * launch.options["num_warps"]
                assert compiled.registers <= min(MOST_REGISTERS, 65536 // threads)


def test_aligned_rows_are_read_by_16_bytes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for launch in launches((64, 4096), dtype, False):
            if launch.name in ("forward_kernel", "backward_kernel"):
                assert triton_compile.compile_launch(launch, 90).wide_loads > 0


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
