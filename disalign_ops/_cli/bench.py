"""`python -m disalign_ops bench`: a shape of your own on this machine, beside what is installed."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from .._bench import peers
from .._bench.case import DTYPE_NAMES, Case, Mode
from .._bench.record import document, environment
from .._bench.results import CaseResult, Result, run_case
from ..errors import ArgumentError
from .compare import comparison
from .text import number, table

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_FP16_UPSTREAM = 1024.0  # as GradScaler: gradients of a mean over thousands of rows are denormal
_QUIET_CORES = 0.1
_NOT_INSTALLED = "ModuleNotFoundError: No module named"


def sizes(text: str) -> tuple[int, ...]:
    """The numbers of "4096x1204"."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"must be numbers joined by x, got {text!r}")
    return tuple(int(part) for part in text.split("x"))


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return int(text)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time and memory of a loss of your shape, beside what is installed",
        description="Forward and backward of a loss, beside eager PyTorch, torch.compile and the "
        "fused losses that are installed. What computes a wrong loss or gradient gets no numbers.",
    )
    parser.add_argument(
        "--shape",
        type=sizes,
        help="of the logits: 4096x1204 (NxC) or 2x150x64x64 (NxCxHxW)",
    )
    parser.add_argument("--mask", type=sizes, help="size of the masks, 512x512, if another")
    parser.add_argument("--features", type=_positive, default=0, help="of a linear head, from "
                        "which the loss is computed without its logits")  # fmt: skip
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--mode", choices=[mode.value for mode in Mode], default=Mode.FULL.value,
        help="full: DisAlign's loss, all gradients; stage2: frozen logits; plain: weighted "
        "cross_entropy; in-place: the gradient over the logits",
    )  # fmt: skip
    parser.add_argument("--peer", action="append", choices=peers.NAMES,
                        help="only beside this one; repeatable")  # fmt: skip
    parser.add_argument("--threads", type=_positive, help="of PyTorch; default: PyTorch's own")
    parser.add_argument("--rounds", type=_positive, help="timed; default: ten seconds' worth")
    parser.add_argument("--save", type=Path, metavar="FILE", help="results and machine as JSON")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"),
                        help="two saved files; measures nothing")  # fmt: skip
    parser.set_defaults(run=run)


def case_of(options: argparse.Namespace) -> Case:
    """The case that the options describe; ArgumentError where they do not fit together."""
    shape, mode = options.shape, Mode(options.mode)
    if shape is None:
        raise ArgumentError("bench must have --shape (4096x1204) or --compare A B, got none")
    if len(shape) not in (2, 4):
        raise ArgumentError(f"--shape must have 2 or 4 numbers, got {len(shape)}")
    mask = options.mask or ()
    if mask and (len(shape) != 4 or len(mask) != 2):
        raise ArgumentError("--mask must be HxW beside a --shape of 4 numbers, got another")
    if options.features and (len(shape) != 2 or mode.in_place):
        raise ArgumentError("--features must go with rows, NxC, and a mode that is not in place")
    if mask and mask != shape[2:] and mode.in_place and not mode.calibrated:
        raise ArgumentError("--mask must be the logits' size in place, got another")
    name = "-".join([
        "x".join(map(str, shape)), *(["mask", "x".join(map(str, mask))] if mask else []),
        *([f"{options.features}-features"] if options.features else []),
        options.dtype, mode.value,
    ])  # fmt: skip
    upstream = _FP16_UPSTREAM if options.dtype == "fp16" else 1.0
    return Case(
        name, shape[0], shape[1], _DTYPES[options.dtype], mode, "from the command line",
        size=shape[2:], target_size=mask, features=options.features, upstream=upstream,
    )  # fmt: skip


def _milliseconds(seconds: float) -> str:
    return number(seconds * 1e3)


def _row(result: Result) -> list[str]:
    timing, share = result.timing, result.memory_share
    assert timing is not None
    return [
        result.contestant,
        _milliseconds(timing.median),
        f"{_milliseconds(timing.p20)} to {_milliseconds(timing.p80)}",
        "-" if result.times_ours is None else f"{result.times_ours:.2f}",
        "-" if result.peak_extra is None else f"{result.peak_extra / 2**20:,.1f}",
        "-" if share is None else f"{100 * share:.1f} %",
    ]


def report(
    found: CaseResult, left_out: list[peers.LeftOut], about: dict[str, Any], device: torch.device
) -> str:
    """The text that is printed of a measured case."""
    case = found.case
    threads = f"{about['threads']} thread" + "s" * (about["threads"] != 1)
    lines = [
        case.title,
        f"{about['device']}, {threads}, torch {about['versions']['torch']}; "
        f"disalign_ops {about['disalign_ops']['version']} by its {about['backend']} backend",
        "",
    ]
    headings = ["forward and backward", "ms", "20 % to 80 %", "/ ours", "extra MiB", "of logits"]
    lines.append(table(headings, [_row(r) for r in found.results if r.timing]))
    timing = found.copy
    lines += ["", f"A copy of the logits takes {_milliseconds(timing.median)} ms; "
              f"{timing.rounds} paired rounds. Extra memory is beyond the inputs and the "
              "gradients asked for."]  # fmt: skip
    lines += [f"{r.contestant}: no numbers: {r.problem}" for r in found.results if r.problem]
    absent = [peer.name for peer in left_out if _NOT_INSTALLED in peer.reason]
    if absent:
        lines.append(f"Not installed: {'; '.join(absent)}.")
    lines += [
        f"{peer.name}: left out, {peer.reason}" for peer in left_out if peer.name not in absent
    ]
    if (found.other_cores or 0) >= _QUIET_CORES:
        lines.append(f"Other programs used {found.other_cores:.1f} cores meanwhile: run it again.")
    return "\n".join(lines)


def _progress(what: str) -> None:
    if sys.stderr.isatty() and not what.startswith("round"):
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> int:
    if options.compare:
        print(comparison(*options.compare))
        return 0
    case = case_of(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device must be cpu, this PyTorch sees no GPU, got cuda")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    about = environment(device)
    names = tuple(options.peer) if options.peer else peers.names_for(case)
    contestants, left_out = peers.contestants(case, device, names)
    found = run_case(case, contestants, device, options.rounds, _progress)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(report(found, left_out, about, device))
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        saved = document([found], left_out, about)
        options.save.write_text(json.dumps(saved, indent=2) + "\n")
        print(f"saved: {options.save}")
    return int(found.ours_failed)
