"""The CPU library for another processor: compiled by Debian's cross compiler, run by an emulator.

apt-get install g++-aarch64-linux-gnu qemu-user
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from simt.build import _which, compiler
from support.places import ROOT

PROGRAM = ROOT / "tests" / "cpu" / "kernels.cpp"
CROSS = "aarch64-linux-gnu-g++"


def call(*command: str | Path, cwd: Path = ROOT) -> str:
    run = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def build(folder: Path, compiler: str, target: str, *options: str) -> None:
    """A target of CMakeLists.txt by this compiler; a warning is an error."""
    cmake, ninja = _which("cmake"), _which("ninja")
    if cmake is None or ninja is None:
        pytest.skip("cmake or ninja was not found")
    torch_folder = Path(torch.__file__).parent
    call(
        cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CXX_FLAGS=-Werror",
        f"-DDISALIGN_TORCH_INCLUDE={torch_folder / 'include'}",
        f"-DDISALIGN_TORCH_LIB={torch_folder / 'lib'}", *options,
    )  # fmt: skip
    call(cmake, "--build", folder, "--target", target)


def program(folder: Path, compiler: str) -> Path:
    """tests/cpu/kernels.cpp over the baseline's kernels that are built in folder."""
    made = folder / "kernels"
    objects = (folder / "CMakeFiles" / "kernels_baseline.dir").rglob("*.o")
    # -O1: GCC 12 for aarch64 fails on the program, which is no part of the library, at -O3.
    call(compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}",
         PROGRAM, *sorted(objects), "-static", "-o", made)  # fmt: skip
    return made


@pytest.mark.slow  # compiles the baseline's kernels
def test_the_kernels_compute_here_without_torch(tmp_path: Path) -> None:
    build(tmp_path, compiler(), "kernels_baseline")
    assert "all as the formulas have it" in call(program(tmp_path, compiler()))


@pytest.mark.slow  # compiles the CPU library
@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"no {CROSS} was found")
def test_the_cpu_library_for_aarch64(tmp_path: Path) -> None:
    # What the linker sees of torch; its x86-64 library is of no use to it.
    (tmp_path / "torch").mkdir()
    call(CROSS, "-shared", "-x", "c++", "/dev/null", "-o", tmp_path / "torch" / "libtorch_cpu.so")
    build(
        tmp_path / "build", CROSS, "disalign_ops_cpu", "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DDISALIGN_TORCH_LIB={tmp_path / 'torch'}",
    )  # fmt: skip
    library = tmp_path / "build" / "libdisalign_ops_cpu.so"
    assert "AArch64" in call("readelf", "--file-header", library)
    made = program(tmp_path / "build", CROSS)
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("compiled; no qemu-aarch64 was found to run it")
    assert "all as the formulas have it" in call(emulator, made)
