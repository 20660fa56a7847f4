"""The layout of the Hugging Face kernels hub: several builds in one process beside the package."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from buildtools import kernels_hub
from support.places import ROOT

# What kernel-builder adds to a build without compiled code.
OPS = """
import torch
ops = torch.ops.{id}
def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
"""

# As the `kernels` package imports builds: by their folders, under names of its own.
USED = """
import importlib.util, sys
from pathlib import Path
sys.modules["numpy"] = None  # a kernel may use torch and the standard library alone
import warnings
warnings.simplefilter("ignore")
import torch

def loaded(folder):
    name = "kernel_" + Path(folder).name
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

import disalign_ops
torch.manual_seed(0)
builds = [disalign_ops, *map(loaded, sys.argv[1:])]
for kernel in builds:
    for shape, positions in (((5, 9), (5,)), ((2, 9, 3, 4), (2, 3, 4))):
        z = torch.randn(shape, requires_grad=True)
        target = torch.randint(9, positions)
        loss = kernel.cross_entropy(z, target, label_smoothing=0.1)
        expected = torch.nn.functional.cross_entropy(z, target, label_smoothing=0.1)
        torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
        plain = torch.nn.functional.cross_entropy(z, target)
        compiled = torch.compile(kernel.cross_entropy, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z, target), plain)
    layer = kernel.nn.DisAlignLinear(4, 9)
    kernel.nn.CrossEntropyLoss()(layer(torch.randn(5, 4)), torch.arange(5)).backward()
assert len({kernel.nn.DisAlignLinear for kernel in builds}) == 3
for kernel, folder in zip(builds[1:], sys.argv[1:]):
    assert Path(kernel.__file__).is_relative_to(folder)
    assert hasattr(getattr(torch.ops, "_" + Path(folder).name), "row_forward")
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    kernels_hub.write(folder, "someone/disalign-ops", 1)
    return folder


def test_every_operator_is_in_the_builds_namespace(layout: Path) -> None:
    package = layout / "torch-ext" / "disalign_ops"
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "disalign_ops::" not in node.value, path
            if isinstance(node, ast.Attribute):
                assert not re.search(r"ops\.disalign_ops", ast.unparse(node)), path
            # Absolute imports of the package would find what is installed.
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").partition(".")[0] != "disalign_ops", path
    assert not (package / "_ops").exists(), "kernel-builder writes _ops.py there"
    assert not (package / "_ops.py").exists()


def test_the_layout_is_complete(layout: Path) -> None:
    names = {str(path.relative_to(layout)) for path in layout.rglob("*")}
    assert {"build.toml", "flake.nix", "CARD.md", "tests/test_disalign_ops.py"} <= names
    here = {p.relative_to(ROOT / "disalign_ops") for p in (ROOT / "disalign_ops").rglob("*.py")}
    there = {p.relative_to(layout / "torch-ext/disalign_ops") for p in layout.rglob("*.py")
             if "torch-ext" in p.parts}  # fmt: skip
    renamed = {Path("_operators", *p.parts[1:]) if p.parts[0] == "_ops" else p for p in here}
    assert {p for p in renamed - there if p.parts[0] not in ("__main__.py", "_cli")} == set()
    card = (layout / "CARD.md").read_text()
    assert 'get_kernel("someone/disalign-ops"' in card
    assert "OWNER" not in card + (layout / "build.toml").read_text()
    compile((layout / "tests" / "test_disalign_ops.py").read_text(), "test", "exec")


def test_two_builds_compute_in_one_process(layout: Path, tmp_path: Path) -> None:
    folders = []
    for build in ("disalign_ops_cpu_1a2b3c4", "disalign_ops_cpu_5d6e7f8"):
        folder = tmp_path / build
        shutil.copytree(layout / "torch-ext" / "disalign_ops", folder)
        (folder / "_ops.py").write_text(OPS.format(id=f"_{build}"))
        folders.append(folder)
    run = subprocess.run(
        [sys.executable, "-c", USED, *map(str, folders)], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
