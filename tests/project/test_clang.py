"""The CPU library by another compiler than the one that built it here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simt.build import _which
from support.places import ROOT

PROGRAM = """
import torch, disalign_ops
assert "lang" in disalign_ops.backend_info()["native"]["compiler"]
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for shape, target in (((7, 1203), (7,)), ((2, 37, 19), (2, 19))):
        logits = torch.randn(shape).to(dtype).requires_grad_()
        classes = torch.randint(shape[1], target)
        with disalign_ops.set_backend("native"):
            loss = disalign_ops.cross_entropy(logits, classes, label_smoothing=0.1)
        grad, = torch.autograd.grad(loss, logits)
        wide = logits.detach().double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(wide, classes, label_smoothing=0.1)
        expected_grad, = torch.autograd.grad(expected, wide)
        torch.testing.assert_close(loss, expected.to(dtype))
        torch.testing.assert_close(grad, expected_grad.to(dtype))
"""


@pytest.mark.slow  # two minutes
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ was found")
@pytest.mark.skipif(
    _which("cmake") is None or _which("ninja") is None, reason="cmake or ninja was not found"
)
def test_clang_compiles_the_cpu_library_without_a_warning(tmp_path: Path) -> None:
    package = tmp_path / "disalign_ops"
    shutil.copytree(
        ROOT / "disalign_ops", package, ignore=shutil.ignore_patterns("lib", "__pycache__")
    )
    torch_folder = Path(torch.__file__).parent
    folder = str(tmp_path / "build")
    cmake = _which("cmake") or "cmake"
    configure = [
        cmake, "-S", str(ROOT), "-B", folder, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={_which('ninja')}", "-DCMAKE_CXX_COMPILER=clang++",
        "-DCMAKE_CXX_FLAGS=-Werror", f"-DCMAKE_INSTALL_PREFIX={package / 'lib'}",
        f"-DDISALIGN_TORCH_INCLUDE={torch_folder / 'include'}",
        f"-DDISALIGN_TORCH_LIB={torch_folder / 'lib'}",
    ]  # fmt: skip
    target = "disalign_ops_cpu"
    for command in (
        configure,
        [cmake, "--build", folder, "--target", target],
        [cmake, "--install", folder, "--component", target],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
