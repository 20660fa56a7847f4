"""`python -m benchmarks.gpu_machine`: this machine and its CUDA device as JSON, or why it has none.

Imports the standard library alone until it asks torch, which may be missing.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

Json = dict[str, Any]

OLDEST = {"torch": (2, 10), "triton": (3, 5)}
PACKAGES = (
    "torch", "triton", "numpy", "setuptools", "pytest", "pytest-xdist", "hypothesis", "rich",
    "matplotlib", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn",
)  # fmt: skip
MODULES = {"pytest-xdist": "xdist"}  # where a package and its module differ
DRIVER = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def version(text: str) -> tuple[int, ...]:
    """The numbers of "2.10.0+cu130" as far as the first that is none."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def path() -> str:
    """PATH, after the folder of the interpreter: a virtual environment's programs are there."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit that is named, beside the interpreter or on the PATH."""
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders = [str(Path(home) / "bin") for home in homes]
    return shutil.which(name, path=os.pathsep.join([*folders, path()]))


def why_missing(need: str) -> str:
    """Why a package or a program cannot be used; empty if it can."""
    if need not in PACKAGES:
        return "" if tool(need) else f"{need} was not found"
    if importlib.util.find_spec(MODULES.get(need, need)) is None:
        return f"{need} is not installed"
    oldest, found = OLDEST.get(need, ()), versions().get(need, "")
    if version(found) < oldest:
        wanted = ".".join(str(number) for number in oldest)
        return f"{need} must be {wanted} or newer, got {found or 'no version'}"
    return ""


def value(text: str) -> str | float | None:
    """A cell of a CSV as a number where it is one; None for an empty one."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text  # JSON has no NaN
    return text or None


def parse_driver(text: str, name: str) -> Json:
    """What nvidia-smi says of the first device of this name, by DRIVER."""
    for cells in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(cells) == len(DRIVER) and cells[0] == name:
            numbers = zip(("max_mhz", "max_memory_mhz", "power_limit_w"), cells[2:], strict=True)
            return {"driver": cells[1]} | {key: value(cell) for key, cell in numbers}
    return {}


def _driver(name: str) -> Json:
    smi = tool("nvidia-smi")
    if smi is None:
        return {}
    query = [smi, f"--query-gpu={','.join(DRIVER)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return parse_driver(done.stdout, name)


def describe() -> Json:
    """The machine, with `device`, its first CUDA device, or `why_no_device`. Makes a context."""
    about: Json = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count() or 1,
    }
    if why := why_missing("torch"):
        return about | {"why_no_device": why}
    import torch

    about["cuda_of_torch"] = torch.version.cuda
    mine = f"this torch ({torch.__version__})"
    if torch.version.cuda is None:
        kind = "for ROCm" if torch.version.hip else "without CUDA"
        return about | {"why_no_device": f"{mine} is built {kind}"}
    try:
        torch.cuda.init()
        torch.ones(1, device="cuda").add_(1).cpu()  # whether this torch has code for it
        found = torch.cuda.get_device_properties(0)
    except Exception as error:  # the driver's and torch's own words
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return about | {"why_no_device": f"{mine} cannot use a device: {reason}"}
    about["device"] = {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        **_driver(found.name),
    }
    return about


def ask() -> Json:
    """describe() in a process of its own, so that this one holds no device."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_machine"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        found: Json = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.splitlines() or ["no output"])[-1]
        found = {"why_no_device": f"torch cannot be used: {last}"}
    return found


if __name__ == "__main__":
    print(json.dumps(describe()))
