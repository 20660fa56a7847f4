"""What serves here, in five lines, or backend_info() as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from .. import backend_info

_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "the baseline instruction set"}


def _of_cpu(info: dict[str, Any]) -> str:
    native = info["native"]
    if info["devices"]["cpu"] == "native":
        return (
            f"CPU: compiled kernels for {_SETS[native['instruction_set']]} ({native['compiler']})"
        )
    served = "Triton's interpreter" if info["devices"]["cpu"] == "triton" else "plain PyTorch"
    return f"CPU: {served}; no compiled kernels: {native['why_not']}"


def _why_not_triton(info: dict[str, Any], kind: str) -> str:
    triton = info["triton"]
    return str(triton.get("why_not") or triton[f"why_not_{kind}"])


def _of_cuda(info: dict[str, Any]) -> str:
    native, serves = info["native"], info["devices"]["cuda"]
    if serves == "native":
        name = torch.cuda.get_device_name()
        built = ", ".join(native["cuda_architectures"])
        return f"CUDA: compiled kernels on {name}; built for {built} ({native['cuda_compiler']})"
    why = f"no compiled kernels: {native['why_not_cuda']}"
    if serves == "triton":
        return f"CUDA: Triton {info['triton']['version']}; {why}"
    return f"CUDA: plain PyTorch; {why}; no Triton: {_why_not_triton(info, 'cuda')}"


def _of_others(info: dict[str, Any]) -> str:
    if info["devices"]["xpu"] == "triton":
        return f"XPU: Triton {info['triton']['version']}; other devices: plain PyTorch"
    why = _why_not_triton(info, "xpu")
    return f"XPU and other devices: plain PyTorch; no Triton on XPU: {why}"


def five_lines(info: dict[str, Any]) -> list[str]:
    """The machine, what serves CPU, CUDA and other devices, and what else there is to ask."""
    forced = "" if info["backend"] == "auto" else f"backend set to {info['backend']}; "
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    return [
        f"disalign_ops {info['version']}, torch {info['torch']}, "
        f"Python {platform.python_version()}, {machine}",
        _of_cpu(info),
        _of_cuda(info),
        _of_others(info),
        f"{forced}more: --json; measure your shape: bench --shape 4096x1204; "
        "check class counts: counts FILE",
    ]


def run(options: argparse.Namespace) -> int:
    info = backend_info()
    print(json.dumps(info, indent=2) if options.json else "\n".join(five_lines(info)))
    return 0
