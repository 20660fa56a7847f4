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
    # 22 MiB with all six architectures. Code for 9.0 and newer is the larger half.
    most = 1 + 21 * len(NATIVE["cuda_architectures"]) / 6
    assert backends.CUDA_LIBRARY.stat().st_size <= most * 2**20


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


# What buildtools chooses. Arguments: the driver's library.
CHOICE = """
import sys
from buildtools import machine
machine.DRIVER_LIBRARY, machine.DRIVER_FILES = sys.argv[1], ()
chosen = machine.cuda()
print(chosen.why_not or f"builds for {chosen.architectures or 'all'}")
"""


def _choose(
    folder: Path, *, setting: str, nvcc: bool = True, driver: bool = False, gpus: str = "",
    wanted: str = "",
) -> str:  # fmt: skip
    """What is built, or the reason that backend_info() gives. gpus: what nvidia-smi prints."""
    home, library = folder / "cuda", folder / "libplanted_driver.so.1"
    environment = {**os.environ, "DISALIGN_OPS_CUDA": setting, "TORCH_CUDA_ARCH_LIST": wanted}
    environment["PATH"] = str(folder)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        environment.pop(variable, None)
    if nvcc:
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "nvcc").touch()
        environment["CUDA_HOME"] = str(home)
    if driver:
        subprocess.run(
            [build.compiler(), "-shared", "-x", "c++", os.devnull, "-o", str(library)], check=True
        )
    if gpus:
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
        program.chmod(0o755)
    run = subprocess.run(
        [sys.executable, "-c", CHOICE, str(library)],
        env=environment, cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return run.stdout.strip()


def test_without_nvcc_there_is_no_cuda_library(tmp_path: Path) -> None:
    assert "no nvcc was found" in _choose(tmp_path, setting="auto", nvcc=False, driver=True)


@pytest.mark.parametrize(
    ("setting", "driver", "gpus", "wanted", "expected"),
    [
        # This machine's GPUs, each architecture once.
        ("auto", True, "12.0\\n9.0\\n9.0\\n", "", "builds for 9.0 12.0"),
        ("auto", True, "9.0\\n", "8.0 8.6+PTX", "builds for 8.0 8.6+PTX"),
        ("auto", True, "No devices were found", "", "builds for all"),
        ("auto", True, "", "", "builds for all"),
        ("auto", False, "", "", "no NVIDIA driver was found (DISALIGN_OPS_CUDA=1 compiles it"),
        # A release: for other machines.
        ("1", False, "", "", "builds for all"),
        ("1", True, "9.0\\n", "", "builds for all"),
        ("1", False, "", "8.0", "builds for 8.0"),
        ("0", True, "9.0\\n", "", "DISALIGN_OPS_CUDA was 0"),
    ],
)
def test_the_cuda_library_is_for_the_gpus_that_are_here(
    tmp_path: Path, setting: str, driver: bool, gpus: str, wanted: str, expected: str
) -> None:
    chosen = _choose(tmp_path, setting=setting, driver=driver, gpus=gpus, wanted=wanted)
    assert expected in chosen


def test_the_driver_is_seen_by_its_library_or_its_files(tmp_path: Path) -> None:
    program = (
        "import sys; from buildtools import machine;"
        "machine.DRIVER_LIBRARY, machine.DRIVER_FILES = 'libno_driver.so.1', sys.argv[1:];"
        "print(machine.driver_is_seen())"
    )
    for file, expected in ((tmp_path, "True"), (tmp_path / "none", "False")):
        run = subprocess.run(
            [sys.executable, "-c", program, str(file)],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert run.stdout.splitlines()[-1] == expected
