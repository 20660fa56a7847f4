"""Smoke tests of the installed wheel, in an environment and under a torch it was not built in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops import nn as dnn

pytestmark = pytest.mark.skipif(
    "DISALIGN_OPS_TEST_WHEEL" not in os.environ,
    reason="`make test-integrations` and `make test-dist` install the wheel",
)


def test_it_is_the_wheel_that_runs() -> None:
    assert Path(disalign_ops.__file__).is_relative_to(sysconfig.get_paths()["purelib"])
    files = {str(file) for file in metadata.files("disalign_ops") or ()}
    assert {"disalign_ops/py.typed", "disalign_ops/lib/libdisalign_ops_cpu.so"} <= files
    wheel = metadata.distribution("disalign_ops").read_text("WHEEL") or ""
    assert re.search(r"^Tag: py3-none-\w*linux\w*$", wheel, re.MULTILINE)
    info: Any = disalign_ops.backend_info()
    assert info["native"]["available"]
    assert info["devices"]["cpu"] == "native"


def compared(function: Any, *tensors: Tensor) -> None:
    """Value and gradients, native and by the reference."""
    found = []
    for backend in ("native", "reference"):
        with disalign_ops.set_backend(backend):
            leaves = [t.clone().requires_grad_() for t in tensors]
            loss = function(*leaves)
            found.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(actual.dtype, 2e-2)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_planes_and_upsampling(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, planes = torch.randn(9, 1203, dtype=dtype), torch.randn(2, 19, 5, 7, dtype=dtype)
    t_rows, t_planes = torch.randint(0, 1203, (9,)), torch.randint(0, 19, (2, 5, 7))
    large = torch.randint(0, 19, (2, 40, 56), dtype=torch.uint8)
    confidence, vectors = torch.randn(9, dtype=dtype), torch.randn(2, 1203, dtype=dtype)

    def calibrated(z: Tensor, c: Tensor, v: Tensor) -> Tensor:
        return disalign_ops.disalign_cross_entropy(z, t_rows, c, v[0], v[1], form="residual")

    compared(lambda z: disalign_ops.cross_entropy(z, t_rows, label_smoothing=0.1), rows)
    compared(calibrated, rows, confidence, vectors)
    compared(lambda z: disalign_ops.cross_entropy(z, t_planes, ignore_index=3), planes)
    compared(lambda z: disalign_ops.upsample_cross_entropy(z, large), planes)
    compared(lambda z, c, v: disalign_ops.calibrate(z, c, v[0], v[1]), rows, confidence, vectors)


def test_a_head_and_a_step_of_stage_2() -> None:
    x, weight = torch.randn(40, 8), torch.randn(301, 8)
    target = torch.randint(0, 301, (40,))

    def head(x: Tensor, w: Tensor) -> Tensor:
        return disalign_ops.linear_cross_entropy(x, w, target, chunk_bytes=1 << 14)

    compared(head, x, weight)
    model = dnn.convert_to_disalign(torch.nn.Sequential(torch.nn.Linear(8, 301)))
    parameters = dnn.freeze_for_stage2(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    criterion = dnn.GRWCrossEntropyLoss(torch.arange(1, 302), rho=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = criterion(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]


def test_the_command_line_measures_a_shape(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-m", "disalign_ops", "bench", "--shape", "32x67",
               "--rounds", "2", "--threads", "1", "--peer", "torch eager"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "disalign_ops" in done.stdout
    assert "no numbers" not in done.stdout


def test_it_compiles() -> None:
    z, target = torch.randn(9, 1203, requires_grad=True), torch.randint(0, 1203, (9,))
    compiled = torch.compile(disalign_ops.cross_entropy, fullgraph=True, backend="aot_eager")
    for function in (compiled, disalign_ops.cross_entropy):
        (grad,) = torch.autograd.grad(function(z, target), z)
        torch.testing.assert_close(grad.sum(1), torch.zeros(9), rtol=0, atol=1e-6)
    torch.testing.assert_close(compiled(z, target), disalign_ops.cross_entropy(z, target))
