"""Builds the modules of CMakeLists.txt, and runs scripts with them under a sanitizer."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}


@functools.cache
def cuda_home() -> Path | None:
    """The CUDA toolkit whose headers there are; no GPU and no driver are needed."""
    candidates = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(Path(nvcc).resolve().parents[1])
    candidates.append(Path("/usr/local/cuda"))
    candidates += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    for candidate in candidates:
        if (candidate / "include" / "cuda_runtime.h").is_file():
            return candidate
    return None


def why_not() -> str | None:
    """Why modules cannot be built here, if they cannot."""
    if cuda_home() is None:
        return "no CUDA headers (cuda_runtime.h): set CUDA_HOME"
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "simt runs on x86-64 Linux alone"
    for tool in ("cmake", "ninja", compiler()):
        if _which(tool) is None:
            return f"no {tool} was found"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def _which(tool: str) -> str | None:
    """Next to the Python that runs, too: that of a virtual environment need not be on the path."""
    return shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def torch_folder() -> str:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent)


def folder(sanitizer: str = "") -> Path:
    return ROOT / "build" / ("simt-" + sanitizer if sanitizer else "simt")


def build(name: str, sanitizer: str = "") -> Path:
    """The built module's file. Incremental: costs little where nothing has changed."""
    home = cuda_home()
    if home is None:
        raise RuntimeError(why_not())
    import pybind11

    settings = {
        "CMAKE_MAKE_PROGRAM": _which("ninja") or "ninja",
        "CMAKE_CXX_COMPILER": compiler(),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "SIMT_CUDA_INCLUDE": str(home / "include"),
        "SIMT_SANITIZER": sanitizer,
        "SIMT_TORCH": torch_folder(),
    }
    cmake = _which("cmake") or "cmake"
    target = folder(sanitizer)
    target.mkdir(parents=True, exist_ok=True)
    with open(target / ".lock", "w") as lock:  # of test processes that run at once, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        configured = target / "configured.json"
        if not configured.is_file() or json.loads(configured.read_text()) != settings:
            defined = [f"-D{key}={value}" for key, value in settings.items()]
            _run([cmake, "--fresh", "-S", str(HERE), "-B", str(target), "-G", "Ninja", *defined])
            configured.write_text(json.dumps(settings))
        _run([cmake, "--build", str(target), "--target", name])
    if name == "operators":
        return target / "liboperators.so"
    return target / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def module(name: str) -> ModuleType:
    """The module, built without a sanitizer and loaded into this process."""
    spec = importlib.util.spec_from_file_location(name, build(name))
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def run_sanitized(
    script: str, sanitizer: str, name: str = "planted", timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs Python source that imports the module of this name, built with the sanitizer.

    NumPy may be used, torch not. The output has the sanitizer's reports among what the script
    prints: both are one stream, so flush. The exit code is nonzero where there was a report.
    """
    build(name, sanitizer)
    # libstdc++ is loaded early, too: the runtimes look for its functions when they start.
    wanted = (RUNTIMES[sanitizer], "libstdc++.so")
    preload = [_run([compiler(), f"-print-file-name={library}"]).strip() for library in wanted]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder(sanitizer)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Kernels find the same addresses as the kernels before them, whose races are no excuse.
        "TSAN_OPTIONS": "suppress_equal_addresses=0 ignore_noninstrumented_modules=1 exitcode=66",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    # Set by env, as the runtime is for Python and not for the commands that start it.
    command = ["env", "LD_PRELOAD=" + " ".join(preload), sys.executable, "-c", script]
    if sanitizer == "thread":
        # The runtime's shadow memory has fixed addresses, which a random layout may collide with.
        command = ["setarch", "-R", *command]
    return subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
