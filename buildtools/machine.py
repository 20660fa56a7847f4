"""What this machine has for a build, and what its environment variables ask for."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Name -> the oldest version that serves: CMakeLists.txt; the stable ABI.
TOOLS = {"cmake": (3, 24), "ninja": (1, 8)}
TORCH = (2, 10)


def setting(name: str, values: tuple[str, ...], default: str) -> str:
    given = os.environ.get(name) or default
    if given not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, got {given!r}")
    return given


def why_pure() -> str | None:
    """Why nothing is compiled here; None where the kernels are.

    DISALIGN_OPS_PURE: "1" leaves out all that is compiled, for a wheel of Python alone. "0"
    compiles on other systems than Linux too, where no one has tried it (CONTRIBUTING.md).
    """
    pure = setting("DISALIGN_OPS_PURE", ("0", "1", "auto"), "auto")
    if pure == "1":
        return "not compiled: this is the wheel of Python alone"
    if pure == "auto" and sys.platform != "linux":
        return f"not compiled at installation: only Linux is supported, not {sys.platform}"
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        return f"not compiled at installation: no C++ compiler ({compiler}) was found"
    return None


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0,)


def tool(name: str) -> str | None:
    """cmake or ninja that runs: of the PATH, or beside this Python, where pip puts it."""
    for found in (shutil.which(name), str(Path(sysconfig.get_path("scripts"), name))):
        if found is None or not Path(found).exists():
            continue
        # A script of pip's fails where pip builds in isolation and hides the package behind it.
        run = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
        if run.returncode == 0 and _version(run.stdout) >= TOOLS[name]:
            return found
    return None


def required_tool(name: str) -> str:
    found = tool(name)
    if found is None:
        version = ".".join(map(str, TOOLS[name]))
        raise FileNotFoundError(
            f"{name} must be installed, version {version} or newer (pip install {name}, or without "
            "--no-build-isolation), got none"
        )
    return found


def torch_folder() -> Path | None:
    """The folder of a torch that the libraries can be built with.

    In pip's isolated build the interpreter is that of the environment the package goes into. Its
    torch serves: a build environment needs none of its own, which would be a download of gigabytes.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parents[1]] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) for name in ("platlib", "purelib")]
    places += [Path(site.getusersitepackages())]
    for folder in (place / "torch" for place in places):
        version = folder / "version.py"
        if version.exists() and (folder / "include").exists():
            found = re.search(r"__version__ = '(.+)'", version.read_text())
            if found and _version(found[1]) >= TORCH:
                return folder
    return None


def required_torch() -> Path:
    found = torch_folder()
    if found is None:
        raise FileNotFoundError(
            f"torch must be installed, version {'.'.join(map(str, TORCH))} or newer, to compile "
            "the kernels, got none (DISALIGN_OPS_PURE=1 installs without them)"
        )
    return found


def missing() -> list[str]:
    """What a build needs besides the compiler and is not installed, for pip."""
    needed = [
        f"{name}>={'.'.join(map(str, version))}"
        for name, version in TOOLS.items()
        if tool(name) is None
    ]
    if torch_folder() is None:
        needed.append(f"torch>={'.'.join(map(str, TORCH))}")
    return needed


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH, or the one that an nvcc on the PATH calls itself."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found is None:
        return None
    # What is on the PATH may be a script in another folder: nvcc says where it is.
    run = subprocess.run(
        [found, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    for line in run.stderr.splitlines():
        if line.startswith("#$ _HERE_="):
            return Path(line.removeprefix("#$ _HERE_=")) / "nvcc"
    return Path(found)


DRIVER_LIBRARY = "libcuda.so.1"
# Where the driver's library is not on the loader's path: its device and its version, WSL's copy.
DRIVER_FILES = (
    "/dev/nvidiactl",
    "/proc/driver/nvidia/version",
    "/usr/lib/wsl/lib/libcuda.so.1",
)


def driver_is_seen() -> bool:
    """Whether this machine has an NVIDIA driver. No device is asked: it may be hidden or busy."""
    if any(Path(file).exists() for file in DRIVER_FILES):
        return True
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def compute_capabilities() -> str:
    """Of this machine's GPUs, as TORCH_CUDA_ARCH_LIST writes them; "" where nobody knows."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    run = subprocess.run(
        [program, "--query-gpu=compute_cap", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = set(re.findall(r"^\d+\.\d$", run.stdout, re.MULTILINE))
    return " ".join(sorted(found, key=float)) if run.returncode == 0 else ""


@dataclass
class Cuda:
    """How the CUDA library is built, or why it is not.

    architectures: as in TORCH_CUDA_ARCH_LIST; "" for all that CMakeLists.txt names.
    """

    nvcc: Path | None = None
    why_not: str = ""
    architectures: str = ""
    required: bool = False


def cuda() -> Cuda:
    """By DISALIGN_OPS_CUDA: "auto" (the default) builds for this machine's GPUs, where there are
    some and nvcc is found, and goes on without the library if it fails. "1" insists on it, for
    every architecture; "0" leaves it out. TORCH_CUDA_ARCH_LIST chooses the architectures.
    """
    wanted = setting("DISALIGN_OPS_CUDA", ("0", "1", "auto"), "auto")
    if wanted == "0":
        return Cuda(why_not="not compiled at installation: DISALIGN_OPS_CUDA was 0")
    nvcc = find_nvcc()
    if nvcc is None and wanted == "1":
        raise FileNotFoundError(
            "nvcc must be on the PATH or in CUDA_HOME where DISALIGN_OPS_CUDA is 1, got none"
        )
    if nvcc is None:
        return Cuda(why_not="not compiled at installation: no nvcc was found")
    if wanted == "auto" and not driver_is_seen():
        return Cuda(
            why_not="not compiled at installation: no NVIDIA driver was found (DISALIGN_OPS_CUDA=1 "
            "compiles it all the same)"
        )
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ""
    if wanted == "auto" and not architectures:
        architectures = compute_capabilities()
    return Cuda(nvcc, architectures=architectures, required=wanted == "1")
