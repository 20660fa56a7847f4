"""Installation where there is no compiler: a wheel all the same, with the reason inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from support.places import ROOT


def built(tmp_path: Path, *leave_out: str, **environment: str) -> Path:
    """A wheel of a copy of the tree."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", *leave_out)
    shutil.copytree(ROOT / "disalign_ops", source / "disalign_ops", ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    subprocess.run(
        [*command, "-w", str(tmp_path), str(source)], env={**os.environ, **environment}, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


def test_without_a_compiler_the_wheel_says_why_it_has_no_library(tmp_path: Path) -> None:
    wheel = built(tmp_path, "lib", CXX="no-such-compiler")
    # No Python ABI: one wheel a platform.
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        reason = archive.read("disalign_ops/lib/not_built.txt").decode()
    assert "no C++ compiler (no-such-compiler) was found" in reason
    assert "disalign_ops/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]


def test_the_source_distribution_builds_the_library(tmp_path: Path) -> None:
    """It has every source that CMake names, and nothing compiled."""
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "disalign_ops", "recipes", "CMakeLists.txt", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "out", "lib", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=source, check=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert set(tracked) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


USED = """
import json, torch, disalign_ops
info = disalign_ops.backend_info()
z = torch.randn(5, 9, requires_grad=True)
loss = disalign_ops.cross_entropy(z, torch.arange(5), label_smoothing=0.1)
expected = torch.nn.functional.cross_entropy(z, torch.arange(5), label_smoothing=0.1)
torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
print(json.dumps([disalign_ops.__file__, info["devices"]["cpu"], info["native"]]))
"""


def test_the_wheel_of_python_alone(tmp_path: Path) -> None:
    """Built where a compiled library lies in the tree; it computes, and says why without one."""
    assert list((ROOT / "disalign_ops" / "lib").glob("*.so"))
    wheel = built(tmp_path, DISALIGN_OPS_PURE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert not [name for name in names if name.endswith(".so")]
    assert "disalign_ops/py.typed" in names
    assert "disalign_ops/_ops/triton/loss.py" in names
    run = subprocess.run(
        [sys.executable, "-c", USED], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    file, serves, native = json.loads(run.stdout)
    assert Path(file).is_relative_to(installed)
    assert serves == "reference"
    assert not native["available"]
    assert "the wheel of Python alone" in str(native)


def test_a_wrong_setting_is_an_error(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "DISALIGN_OPS_PURE": "yes"}, check=False,
    )  # fmt: skip
    assert run.returncode != 0
    assert "DISALIGN_OPS_PURE must be one of 0, 1, got 'yes'" in run.stderr
