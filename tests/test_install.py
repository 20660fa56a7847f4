"""Installation where there is no compiler: a wheel all the same, with the reason inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_without_a_compiler_the_wheel_says_why_it_has_no_library(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "disalign_ops", source / "disalign_ops", ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    subprocess.run(
        [*command, "-w", str(tmp_path), str(source)],
        env={**os.environ, "CXX": "no-such-compiler"},
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
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
        ["git", "ls-files", "csrc", "disalign_ops", "CMakeLists.txt", "LICENSE"],
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
