"""Tables for the terminal; CSV and JSON for everything else."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

import disalign_ops
from disalign_ops._bench.peers import COMPILED, EAGER, OURS, LeftOut
from disalign_ops._bench.record import as_record, document
from disalign_ops._bench.results import CaseResult

_QUIET_CORES = 0.1


def write(
    folder: Path, cases: list[CaseResult], left_out: list[LeftOut], about: dict[str, Any]
) -> list[Path]:
    """bench.csv and bench.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(case, result) for case in cases for result in case.results]
    rows = [as_record(case, result) for case, result in pairs]
    shared = {
        "device": about["device"],
        "threads": about["threads"],
        "torch": torch.__version__,
        "disalign_ops": disalign_ops.__version__,
        "backend": about["backend"],
    }
    table = folder / "bench.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *shared])
        writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)
    everything = folder / "bench.json"
    everything.write_text(json.dumps(document(cases, left_out, about), indent=2) + "\n")
    return [table, everything]


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _memory(value: float | None) -> str:
    return _number(None if value is None else value * 100, "{:.2f} %")


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )


def case_table(result: CaseResult) -> Table:
    """Every contestant of one case."""
    copy = result.copy
    table = _table(
        f"{result.case.name}: {result.case.title}",
        f"{result.case.reason}\nout.copy_(logits): {copy.median * 1e3:.3g} ms "
        f"({copy.p20 * 1e3:.3g} .. {copy.p80 * 1e3:.3g}); {copy.rounds} paired rounds",
    )
    table.add_column("")
    for heading in ("median ms", "20 % .. 80 %", "/ ours", "copies", "GB/s, of copy", "peak extra"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in result.results:
        if r.timing is None:
            continue
        t = r.timing
        gigabytes = _number(r.bytes_per_second and r.bytes_per_second * 1e-9, "{:.3g}")
        share = _number(r.share_of_copy and r.share_of_copy * 100, "{:.0f} %")
        table.add_row(
            r.contestant,
            f"{t.median * 1e3:.3g}",
            f"{t.p20 * 1e3:.3g} .. {t.p80 * 1e3:.3g}",
            _number(r.times_ours, "{:.2f}"),
            _number(r.copies, "{:.2f}"),
            f"{gigabytes}, {share}",
            _memory(r.memory_share),
        )
    return table


def case_problems(result: CaseResult) -> list[str]:
    """A line for every contestant that gets no numbers."""
    return [f"{r.contestant}: no speed reported: {r.problem}" for r in result.results if r.problem]


def summary_table(cases: list[CaseResult], about: dict[str, Any]) -> Table:
    """Ours in each case, beside eager and compiled PyTorch."""
    table = _table(
        "disalign_ops, forward and backward: medians of paired rounds",
        f"{about['device']}, {about['threads']} threads, torch {torch.__version__}. Peak extra "
        "memory: beyond the inputs and the gradients asked for, in % of the logits' "
        "bytes, upsampled ones where the target is larger.",
    )
    table.add_column("work")
    for heading in ("ms", "times faster than\neager / torch.compile", "copies of\nthe logits",
                    "peak extra\nmemory"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for result in cases:
        ours = result.of(OURS)
        if ours is None or ours.timing is None:
            table.add_row(result.case.title, "failed", "-", "-", "-", style="red")
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


def disturbance(cases: list[CaseResult]) -> str:
    """A warning if other programs ran beside what was timed; else empty."""
    others = max((case.other_cores or 0.0 for case in cases), default=0.0)
    if others < _QUIET_CORES:
        return ""
    return (
        f"Other programs used up to {others:.1f} cores while this was timed: the times and ratios "
        "are not to be relied on. Memory is not affected."
    )


def left_out_table(left_out: list[LeftOut]) -> Table:
    table = _table("Peers left out", "")
    table.add_column("peer", no_wrap=True)
    table.add_column("why")
    for peer in left_out:
        table.add_row(peer.name, peer.reason)
    return table
