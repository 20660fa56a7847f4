"""What a run says about itself and its results, as plain values for JSON and CSV."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import backend_info
from .case import WORK
from .peers import LeftOut
from .results import CaseResult, Result

_DISTRIBUTIONS = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels",
                  "flash-attn")  # fmt: skip


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gigabytes(size: float) -> float:
    return round(size / 1e9, 1)


def machine(device: torch.device) -> dict[str, Any]:
    """The processor and, where it is measured, the GPU."""
    found: dict[str, Any] = {"cpu": device_name(torch.device("cpu")), "cores": os.cpu_count()}
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" in names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory_gigabytes"] = _gigabytes(memory)
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": about.name,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "memory_gigabytes": _gigabytes(about.total_memory),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


def environment(device: torch.device) -> dict[str, Any]:
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    info = backend_info()
    devices = info["devices"]
    assert isinstance(devices, dict)
    return {
        "device": device_name(device),
        "backend": devices[device.type] if info["backend"] == "auto" else info["backend"],
        "device_type": device.type,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "disalign_ops": info,
    }


def as_record(of: CaseResult, result: Result) -> dict[str, Any]:
    """A result as one flat row. Times in milliseconds."""
    case, timing = result.case, result.timing
    share = result.memory_share
    return {
        "case": case.name,
        "work": WORK[case.mode],
        "rows": case.rows,
        "size": "x".join(str(n) for n in case.size),
        "target_size": "x".join(str(n) for n in case.target_size),
        "classes": case.classes,
        "dtype": case.dtype_name,
        "contestant": result.contestant,
        "problem": result.problem,
        "median_ms": timing and timing.median * 1e3,
        "p20_ms": timing and timing.p20 * 1e3,
        "p80_ms": timing and timing.p80 * 1e3,
        "rounds": timing and timing.rounds,
        "times_ours": result.times_ours,
        "copies": result.copies,
        "copy_median_ms": of.copy.median * 1e3,
        "gigabytes_per_second": result.bytes_per_second and result.bytes_per_second * 1e-9,
        "share_of_copy_bandwidth": result.share_of_copy,
        "peak_extra_bytes": result.peak_extra,
        "peak_extra_percent_of_logits": None if share is None else share * 100,
        "gradient_bytes": result.gradient_bytes,
        "other_cores": of.other_cores,
        "largest_relative_error": max(result.errors.values(), default=None),
    }


def document(
    cases: list[CaseResult], left_out: list[LeftOut], about: dict[str, Any]
) -> dict[str, Any]:
    """Everything of a run, for JSON."""
    pairs = [(case, result) for case in cases for result in case.results]
    return {
        "environment": about,
        "cases": {case.case.name: case.case.reason for case in cases},
        "left_out": [asdict(peer) for peer in left_out],
        "results": [
            {**as_record(case, result), "relative_errors": result.errors} for case, result in pairs
        ],
    }
