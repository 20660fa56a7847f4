"""Installation: what is asked for, what is compiled, and a wheel all the same where nothing is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.places import ROOT


def copied(tmp_path: Path, *leave_out: str) -> Path:
    """What a wheel is built of."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", *leave_out)
    for name in ("disalign_ops", "buildtools"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    return source


def built(tmp_path: Path, *leave_out: str, **environment: str) -> Path:
    """A wheel of a copy of the tree."""
    source = copied(tmp_path, *leave_out)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    subprocess.run(
        [*command, "-w", str(tmp_path), str(source)], env={**os.environ, **environment}, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


def test_without_a_compiler_the_wheel_says_why_it_has_no_library(tmp_path: Path) -> None:
    wheel = built(tmp_path, "lib", CXX="no-such-compiler")
    # Nothing of this platform is in it, and so its name has none.
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        reason = archive.read("disalign_ops/lib/not_built.txt").decode()
    assert "no C++ compiler (no-such-compiler) was found" in reason
    assert "disalign_ops/py.typed" in names
    assert not [name for name in names if name.endswith(".so") or "buildtools" in name]


def test_the_source_distribution_has_every_file(tmp_path: Path) -> None:
    """What builds, tests and documents the package, and nothing compiled."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "out", "dist", "lib", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=source, check=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    # Files of the hosting and of editors stay in the repository.
    assert {name for name in tracked if not name.startswith(".")} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A Python environment without a package, and the folder of its packages."""
    folder = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    return packages


def say(packages: Path, expression: str) -> str:
    """An expression of buildtools.machine in that environment, without a tool on the PATH."""
    run = subprocess.run(
        [str(packages.parents[2] / "bin" / "python"), "-c",
         f"from buildtools import machine; print({expression})"],
        cwd=ROOT, env={"PATH": "", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or run.stderr.strip().splitlines()[-1]


def plant_torch(packages: Path, version: str) -> None:
    (packages / "torch" / "include").mkdir(parents=True, exist_ok=True)
    (packages / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")


def test_a_build_asks_for_what_is_missing(bare: Path) -> None:
    assert say(bare, "machine.missing()") == "['cmake>=3.24', 'ninja>=1.8', 'torch>=2.10']"
    # The environment's own torch serves: another would be gigabytes in the build's environment.
    plant_torch(bare, "2.10.0+cpu")
    cmake = bare.parents[2] / "bin" / "cmake"
    cmake.write_text("#!/bin/sh\necho cmake version 3.24.1\n")
    cmake.chmod(0o755)
    assert say(bare, "machine.missing()") == "['ninja>=1.8']"
    assert say(bare, "machine.torch_folder()") == str(bare / "torch")
    # Too old for the stable ABI; and a cmake of pip's whose package the isolated build hides.
    plant_torch(bare, "2.9.1")
    cmake.write_text("#!/bin/sh\necho ModuleNotFoundError >&2; exit 1\n")
    assert say(bare, "machine.missing()") == "['cmake>=3.24', 'ninja>=1.8', 'torch>=2.10']"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("machine.required_tool('cmake')", "cmake must be installed, version 3.24 or newer"),
        ("machine.required_torch()", "torch must be installed, version 2.10 or newer"),
    ],
)
def test_without_isolation_what_is_missing_is_named(bare: Path, call: str, message: str) -> None:
    assert message in say(bare, call)


@pytest.mark.parametrize(
    ("environment", "asked"),
    [({}, "['torch']"), ({"DISALIGN_OPS_PURE": "1"}, "[]"), ({"CXX": "no-such-compiler"}, "[]")],
)
def test_only_a_compiled_wheel_asks_for_torch(environment: dict[str, str], asked: str) -> None:
    program = (
        "from buildtools import backend; backend.machine.missing = lambda: ['torch'];"
        "print(backend.get_requires_for_build_wheel(), backend.get_requires_for_build_sdist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip().splitlines()[-1] == f"{asked} []"


def test_an_old_setuptools_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert "setuptools must be 77 or newer, got 65.5.0" in run.stderr
    assert "Traceback" not in run.stderr


def test_max_jobs_is_how_many_compilers_run_at_once(tmp_path: Path) -> None:
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    for name in ("cmake", "ninja", "c++"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} version 4.0"; echo "$*" >> {log}\n')
        (tools / name).chmod(0o755)
    environment = {**os.environ, "MAX_JOBS": "3", "DISALIGN_OPS_CUDA": "0", "PATH": str(tools)}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copied(tmp_path), env=environment, check=True, capture_output=True,
    )  # fmt: skip
    assert "--target disalign_ops_cpu --parallel 3\n" in log.read_text()


def test_an_editable_installation_is_seen_by_a_type_checker(bare: Path, tmp_path: Path) -> None:
    source = copied(tmp_path, "lib")
    program = "from buildtools import backend; print(backend.build_editable('.'))"
    subprocess.run(
        [sys.executable, "-c", program], cwd=source, check=True, capture_output=True,
        env={**os.environ, "CXX": "no-such-compiler"},
    )  # fmt: skip
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(bare)
    # A path, which type checkers read; they run no finder.
    (path,) = bare.glob("__editable__*.pth")
    assert path.read_text().strip() == str(source)
    assert not list(bare.glob("*finder*"))
    reason = source / "disalign_ops" / "lib" / "not_built.txt"
    assert "no C++ compiler" in reason.read_text()
    pytest.importorskip("mypy")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", bare.parents[2] / "bin" / "python",
         "--follow-imports", "silent", "--cache-dir", os.devnull, "-c",
         "from disalign_ops.errors import ArgumentError, NoSuchName"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'has no attribute "NoSuchName"' in run.stdout, run.stdout + run.stderr
    assert "found 1 error" in run.stdout.lower(), run.stdout


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
    assert "DISALIGN_OPS_PURE must be one of 0, 1, auto, got 'yes'" in run.stderr


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None  # an import of it raises
import warnings
warnings.simplefilter("ignore")  # torch's, that it is missing
import torch, disalign_ops
z = torch.randn(5, 9, requires_grad=True)
loss = disalign_ops.cross_entropy(z, torch.arange(5), label_smoothing=torch.tensor(0.1))
expected = torch.nn.functional.cross_entropy(z, torch.arange(5), label_smoothing=0.1)
torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
layer = disalign_ops.nn.DisAlignLinear(4, 9)
disalign_ops.nn.CrossEntropyLoss()(layer(torch.randn(5, 4)), torch.arange(5)).backward()
"""


def test_importing_needs_no_numpy() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMPY], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
