"""Tables for the terminal; CSV and JSON for everything else."""

from __future__ import annotations

import csv
import json
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import disalign_ops

from .cases import WORK
from .peers import COMPILED, EAGER, OURS, LeftOut
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


def environment(device: torch.device) -> dict[str, Any]:
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "disalign_ops": disalign_ops.backend_info(),
    }


def record(result: Result, copy_seconds: float) -> dict[str, Any]:
    """A result as one flat row. Times in milliseconds."""
    case, timing = result.case, result.timing
    share = result.memory_share
    return {
        "case": case.name,
        "work": WORK[case.mode],
        "rows": case.rows,
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
        "copy_median_ms": copy_seconds * 1e3,
        "gigabytes_per_second": result.bytes_per_second and result.bytes_per_second * 1e-9,
        "share_of_copy_bandwidth": result.share_of_copy,
        "peak_extra_bytes": result.peak_extra,
        "peak_extra_percent_of_logits": None if share is None else share * 100,
        "gradient_bytes": result.gradient_bytes,
        "largest_relative_error": max(result.errors.values(), default=None),
    }


def write(
    folder: Path, cases: list[CaseResult], left_out: list[LeftOut], about: dict[str, Any]
) -> list[Path]:
    """bench.csv and bench.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [record(r, case.copy.median) for case in cases for r in case.results]
    table, everything = folder / "bench.csv", folder / "bench.json"
    shared = {
        "device": about["device"],
        "threads": about["threads"],
        "torch": torch.__version__,
        "disalign_ops": disalign_ops.__version__,
    }
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *shared])
        writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)
    reasons = {case.case.name: case.case.reason for case in cases}
    for row, result in zip(rows, (r for case in cases for r in case.results), strict=True):
        row["relative_errors"] = result.errors
    document = {
        "environment": about,
        "cases": reasons,
        "left_out": [asdict(peer) for peer in left_out],
        "results": rows,
    }
    everything.write_text(json.dumps(document, indent=2) + "\n")
    return [table, everything]


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _memory(value: float | None) -> str:
    return _number(None if value is None else value * 100, "{:.2f} %")


def case_table(result: CaseResult) -> Table:
    """Every contestant of one case."""
    copy = result.copy
    table = Table(
        title=f"{result.case.name}: {result.case.title}",
        caption=f"{result.case.reason}\nout.copy_(logits): {copy.median * 1e3:.3g} ms "
        f"({copy.p20 * 1e3:.3g} to {copy.p80 * 1e3:.3g}), {copy.rounds} paired rounds",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for heading in ("median ms", "20 % .. 80 %", "times ours", "copies", "GB/s", "of copy",
                    "peak extra", "error"):  # fmt: skip
        table.add_column(heading, justify="right")
    for r in result.results:
        if r.timing is None:
            table.add_row(r.contestant, f"[red]no speed: {r.problem}", *[""] * 7)
            continue
        t = r.timing
        gigabytes = r.bytes_per_second and r.bytes_per_second * 1e-9
        table.add_row(
            r.contestant,
            f"{t.median * 1e3:.3g}",
            f"{t.p20 * 1e3:.3g} .. {t.p80 * 1e3:.3g}",
            _number(r.times_ours, "{:.2f}"),
            _number(r.copies, "{:.2f}"),
            _number(gigabytes, "{:.3g}"),
            _number(r.share_of_copy and r.share_of_copy * 100, "{:.0f} %"),
            _memory(r.memory_share),
            f"{max(r.errors.values()):.1e}",
        )
    return table


def summary_table(cases: list[CaseResult], about: dict[str, Any]) -> Table:
    """Ours in each case, beside eager and compiled PyTorch."""
    table = Table(
        title="Forward and backward: medians of paired rounds",
        caption=f"{about['device']}, {about['threads']} threads, torch {torch.__version__}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("work")
    for heading in ("ms", "times faster than\neager / torch.compile", "copies of\nthe logits",
                    "peak extra memory,\n% of the logits"):  # fmt: skip
        table.add_column(heading, justify="right")
    for result in cases:
        ours = result.of(OURS)
        if ours is None or ours.timing is None:
            table.add_row(result.case.title, "[red]failed", "-", "-", "-")
            continue
        faster = []
        for name in (EAGER, COMPILED):
            peer = result.of(name)
            faster.append(_number(peer.times_ours if peer else None, "{:.1f}"))
        table.add_row(
            result.case.title,
            f"{ours.timing.median * 1e3:.3g}",
            " / ".join(faster),
            _number(ours.copies, "{:.2f}"),
            _memory(ours.memory_share),
        )
    return table


def left_out_table(left_out: list[LeftOut]) -> Table:
    table = Table(title="Peers left out", title_justify="left", show_header=False)
    for peer in left_out:
        table.add_row(peer.name, peer.reason)
    return table
