"""The CUDA library: built, loaded and registered without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import disalign_ops
from disalign_ops._ops import backends, schemas
from simt import build
from support.places import ROOT

NATIVE = disalign_ops.backend_info()["native"]

needs_library = pytest.mark.skipif(
    not backends.CUDA_LIBRARY.exists(),
    reason=f"the CUDA library is not built: {NATIVE['why_not_cuda']}",
)


@needs_library
@pytest.mark.parametrize("operator", sorted(schemas.fakes()))
def test_the_library_loads_without_a_gpu_and_registers_every_operator(operator: str) -> None:
    name = f"disalign_ops::{operator}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@needs_library
def test_backend_info_names_the_architectures_and_why_cuda_does_not_serve() -> None:
    assert all(re.fullmatch(r"\d+a?(-real)?", a) for a in NATIVE["cuda_architectures"])
    assert NATIVE["cuda_compiler"].startswith("nvcc ")
    if torch.version.cuda is None:
        assert NATIVE["why_not_cuda"] == "this PyTorch is built without CUDA"


@needs_library
def test_the_library_is_small() -> None:
    # 25 MiB with all seven architectures.
    most = 25 * 2**20 * len(NATIVE["cuda_architectures"]) / 7
    assert backends.CUDA_LIBRARY.stat().st_size <= most


STUB = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = 0; return 0; }
"""


@needs_library
def test_torchs_stream_is_found_where_torch_has_loaded_its_cuda_library(tmp_path: Path) -> None:
    # As torch's CUDA builds load theirs: out of sight of other libraries, found by its name alone.
    stub = tmp_path / "libtorch_cuda.so"
    (tmp_path / "stub.cpp").write_text(STUB)
    subprocess.run(
        [build.compiler(), "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so",
         str(tmp_path / "stub.cpp"), "-o", str(stub)], check=True,
    )  # fmt: skip
    program = (
        "import ctypes, sys, torch, disalign_ops;"
        "sys.argv[1:] and ctypes.CDLL(sys.argv[1]);"
        "print(torch.ops.disalign_ops.cuda_why_not(0))"
    )
    if torch.version.cuda is None:
        without = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert without.stdout.strip() == "this PyTorch has no CUDA streams", without.stderr
    found = subprocess.run(
        [sys.executable, "-c", program, str(stub)], capture_output=True, text=True, check=True
    )
    assert "no CUDA streams" not in found.stdout
    if not torch.cuda.is_available():
        assert "the library has code for" in found.stdout  # and why the runtime has no device


# A CUDA runtime of these calls alone, none of which makes a context: with any other, the program
# does not link.
RUNTIME = r"""
#include "cuda/launch/support.h"
#include <cstdio>
static int major_, minor_, integrated_, driver_;
extern "C" {
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 1) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? major_
         : attribute == cudaDevAttrComputeCapabilityMinor ? minor_ : integrated_;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { *version = driver_; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no such device"; }
}
int main() {
  char architectures[99];
  int device;
  while (std::scanf("%98s %d %d %d %d %d", architectures, &device, &major_, &minor_, &integrated_,
                    &driver_) == 6)
    std::printf("%s\n", disalign::cuda::why_not(device, architectures).c_str());
}
"""
OLD, NEW = 12080, 13010  # drivers
# (architectures, device, major, minor, integrated, driver) -> why not
DEVICES = {
    ("80-real,90-real", 1, 8, 0, 0, NEW): "",
    ("80-real,90-real", 1, 8, 6, 0, NEW): "",
    ("80-real,90-real", 1, 8, 7, 1, NEW): "the device's compute capability is 8.7",
    ("87-real", 1, 8, 7, 1, NEW): "",
    ("86-real", 1, 8, 0, 0, NEW): "the device's compute capability is 8.0",
    ("80-real,90-real", 1, 7, 5, 0, NEW): "the device's compute capability is 7.5",
    ("80-real,90-real", 1, 12, 0, 0, NEW): "the device's compute capability is 12.0",
    ("80-real,90", 1, 12, 0, 0, NEW): "",
    ("80-real,90", 1, 12, 0, 0, OLD): "the device's compute capability is 12.0",
    ("80-real,90", 1, 9, 0, 0, OLD): "",
    ("90a", 1, 9, 0, 0, NEW): "",
    ("90a", 1, 10, 0, 0, NEW): "the device's compute capability is 10.0",
    ("100-real,120", 1, 10, 3, 0, NEW): "",
    ("100-real,120", 1, 12, 1, 1, NEW): "",
    ("80-real", 0, 8, 0, 0, NEW): "no such device",
}


def test_a_device_is_judged_without_a_context(tmp_path: Path) -> None:
    home = build.cuda_home()
    if home is None:
        pytest.skip("needs CUDA headers")
    (tmp_path / "runtime.cpp").write_text(RUNTIME)
    program = tmp_path / "runtime"
    subprocess.run(
        [build.compiler(), "-std=c++17", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}",
         f"-I{home / 'include'}",
         str(tmp_path / "runtime.cpp"), "-o", str(program)], check=True,
    )  # fmt: skip
    asked = "".join(" ".join(map(str, device)) + "\n" for device in DEVICES)
    run = subprocess.run([program], input=asked, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == list(DEVICES.values())


# setup.py as pip calls it, but for the compilers: instead of calling them it prints what it would
# build. Arguments: the folder for the libraries, the driver's library, whether it is a checkout.
SETUP = """
import runpy, sys
from pathlib import Path
from setuptools import Distribution
lib, driver, checkout = sys.argv[1:]
sys.argv = ["setup.py", "--quiet", "--name"]
command = runpy.run_path("setup.py")["CMakeBuild"](Distribution())
command.inplace = checkout == "True"
command.configure = lambda lib, nvcc: None
command.build = lambda target, lib: print("builds", target)
names = command.build_cuda.__func__.__globals__
names["DRIVER_LIBRARY"], names["DRIVER_FILES"] = driver, ()
command.build_cuda(Path(lib))
"""


def _choose(
    folder: Path, *, setting: str, nvcc: bool = True, driver: bool = False, checkout: bool = False
) -> str:
    """What setup.py builds, or the reason that backend_info() gives."""
    home, lib = folder / "cuda", folder / "lib"
    lib.mkdir()
    environment = {**os.environ, "DISALIGN_OPS_CUDA": setting, "PATH": str(folder)}
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        environment.pop(variable, None)
    if nvcc:
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "nvcc").touch()
        environment["CUDA_HOME"] = str(home)
    library = folder / "libplanted_driver.so.1"
    if driver:
        subprocess.run(
            [build.compiler(), "-shared", "-x", "c++", os.devnull, "-o", str(library)], check=True
        )
    run = subprocess.run(
        [sys.executable, "-c", SETUP, str(lib), str(library), str(checkout)],
        env=environment, cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    if "builds" in run.stdout:
        assert not (lib / "cuda_not_built.txt").exists()
        return run.stdout.splitlines()[-1]
    return backends._why_missing(lib / "libdisalign_ops_cuda.so", "cuda_not_built.txt")


BUILDS = "builds disalign_ops_cuda"


def test_an_installation_has_the_cuda_library_where_nvcc_is(tmp_path: Path) -> None:
    # A wheel is for other machines too: all architectures, driver or not.
    assert _choose(tmp_path, setting="auto") == BUILDS


@pytest.mark.parametrize("checkout", [False, True])
def test_without_nvcc_there_is_no_cuda_library(tmp_path: Path, checkout: bool) -> None:
    reason = _choose(tmp_path, setting="auto", nvcc=False, driver=True, checkout=checkout)
    assert "no nvcc was found" in reason


@pytest.mark.parametrize(
    ("setting", "driver", "expected"),
    [
        ("auto", True, BUILDS),
        ("auto", False, "an NVIDIA driver is, and none was found (DISALIGN_OPS_CUDA=1 compiles it"),
        ("1", False, BUILDS),
        ("0", True, "DISALIGN_OPS_CUDA was 0"),
    ],
)
def test_a_checkout_has_the_cuda_library_where_a_driver_is(
    tmp_path: Path, setting: str, driver: bool, expected: str
) -> None:
    assert expected in _choose(tmp_path, setting=setting, driver=driver, checkout=True)


def test_the_driver_is_seen_by_its_library_or_its_files(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; seen = runpy.run_path('setup.py')['driver_is_seen'];"
        "seen.__globals__.update(DRIVER_LIBRARY='libno_driver.so.1', DRIVER_FILES=sys.argv[3:]);"
        "print(seen())"
    )
    for file, expected in ((tmp_path, "True"), (tmp_path / "none", "False")):
        run = subprocess.run(
            [sys.executable, "-c", program, "--quiet", "--name", str(file)],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert run.stdout.splitlines()[-1] == expected
