"""What is published: one version everywhere, and libraries that older systems load."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import disalign_ops
from buildtools import old_libraries
from simt import build
from support.places import ROOT

SOURCE = """
#include <cmath>
#include <pthread.h>
#include <sstream>
#include <stdexcept>
#include <vector>

static void* work(void* x) {
  *static_cast<double*>(x) = std::pow(*static_cast<double*>(x), 1.5);
  return x;
}

extern "C" __attribute__((visibility("default"))) double raised(double x, int n) {
  try {
    std::ostringstream text;
    text << std::vector<double>(n, x)[0];
    if (x < 0) throw std::runtime_error(text.str());
  } catch (const std::exception& error) {
    return error.what()[0] == '-' ? -1 : -2;
  }
  pthread_t thread;
  pthread_create(&thread, nullptr, work, &x);
  pthread_join(thread, nullptr);
  return x;
}
"""

CALLS = """
import ctypes, sys
raised = ctypes.CDLL(sys.argv[1]).raised
raised.restype, raised.argtypes = ctypes.c_double, [ctypes.c_double, ctypes.c_int]
print(raised(4.0, 3), raised(-4.0, 3))
import array, decimal, sqlite3  # further libraries are loaded beside it
"""


def test_the_version_is_the_same_everywhere() -> None:
    version = disalign_ops.__version__
    assert (
        re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
        == version
    )
    (heading, *_) = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading == version
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split()[-1] == version


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's versions")
def test_what_is_linked_against_old_libraries_asks_for_no_newer_ones(tmp_path: Path) -> None:
    (tmp_path / "raised.cpp").write_text(SOURCE)
    compiler = build.compiler()
    old = tmp_path / "old"
    old_libraries.write(old, [compiler])
    asked = {}
    for name, flags in (("new", []), ("old", [f"-L{old}", "-Wl,--exclude-libs,ALL"])):
        library = tmp_path / f"lib{name}.so"
        subprocess.run(
            [compiler, "-O2", "-fPIC", "-shared", *flags, str(tmp_path / "raised.cpp"), "-pthread",
             "-o", str(library)], check=True,
        )  # fmt: skip
        asked[name] = old_libraries.too_new(library)
        run = subprocess.run(
            [sys.executable, "-c", CALLS, str(library)], capture_output=True, text=True, check=True
        )
        assert run.stdout == "8.0 -1.0\n"
    assert asked["new"], "this machine's own libraries are that old: the test shows nothing"
    assert not asked["old"]


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        ("GLIBC_2.2.5", False), ("GLIBC_2.28", False), ("GLIBC_2.29", True), ("GLIBC_2.3.4", False),
        ("GLIBCXX_3.4", False), ("GLIBCXX_3.4.24", False), ("GLIBCXX_3.4.25", True),
        ("CXXABI_1.3.11", False), ("CXXABI_1.3.13", True), ("GLIBC_PRIVATE", True),
    ],
)  # fmt: skip
def test_versions_are_compared_by_their_numbers(version: str, newer: bool) -> None:
    assert old_libraries.newer(version) is newer


@pytest.mark.slow  # compiles the CPU library
def test_make_dist(tmp_path: Path) -> None:
    """The files are built and checked, and the wheel computes where no compiler is."""
    tools = ROOT / ".venv-release" / "bin"
    if not tools.exists():
        pytest.skip("`make .venv-release/.installed` installs the checks")
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    subprocess.run(
        [sys.executable, "-m", "buildtools.dist", str(tmp_path / "dist")], cwd=ROOT, check=True,
        env={**os.environ, "PATH": path, "DISALIGN_OPS_CUDA": "0", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert len(list((tmp_path / "dist").iterdir())) == 3
    (wheel,) = (tmp_path / "dist").glob("*manylinux_2_28*.whl")
    folder = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder),
         str(wheel)], check=True,
    )  # fmt: skip
    shutil.copy(ROOT / "tests" / "integrations" / "test_wheel.py", tmp_path)
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest",
         "-k", "not wheel_that_runs", "test_wheel.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(folder), "PATH": "", "DISALIGN_OPS_TEST_WHEEL": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert "1 deselected" in run.stdout
