"""A bar chart of the results."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401 - whoever asks for a plot learns here that it is missing

from disalign_ops._bench.results import CaseResult, Result
from disalign_ops._cli.text import number
from disalign_ops._figures import style

_CHARACTERS = 24  # of a case's title, a line


def _errors(result: Result) -> tuple[float, float]:
    """How far the 20th and 80th percentile lie from the median, in copies."""
    timing, copies = result.timing, result.copies
    if timing is None or copies is None:
        return 0.0, 0.0
    per_second = copies / timing.median
    return (timing.median - timing.p20) * per_second, (timing.p80 - timing.median) * per_second


def _bars(
    axes: Any,
    cases: list[CaseResult],
    names: list[str],
    value: Callable[[Result], float | None],
    spread: Callable[[Result], tuple[float, float]] | None,
) -> None:
    """A group of bars a case, a bar a contestant; the first case on top."""
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        found = [(i, r) for i, case in enumerate(cases) for r in case.results if
                 r.contestant == name and value(r) is not None]  # fmt: skip
        places = [i + (k - (len(names) - 1) / 2) * height for i, _ in found]
        values = [value(r) or 0.0 for _, r in found]
        spreads = [spread(r) for _, r in found] if spread else []
        bars = axes.barh(
            places,
            values,
            height,
            label=name,
            color=style.CYCLE[k % len(style.CYCLE)],
            xerr=list(zip(*spreads, strict=True)) or None,
            error_kw={"elinewidth": 0.8},
        )
        labels = [number(v) for v in values]
        axes.bar_label(bars, labels=labels, padding=3, fontsize=7)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def bar_chart(path: Path, cases: list[CaseResult], about: dict[str, Any]) -> Path:
    """Time in copies of the logits and peak extra memory, of every contestant in every case."""
    names = list(dict.fromkeys(r.contestant for case in cases for r in case.results))
    with style.applied():
        return style.save(_figure(cases, names, about), path)


def _figure(cases: list[CaseResult], names: list[str], about: dict[str, Any]) -> Any:
    height = 1.5 + (0.6 + 0.24 * len(names)) * len(cases)
    figure, (left, right) = style.figure(2, 1, height=2 * height)
    _bars(left, cases, names, lambda r: r.copies, _errors)
    left.set_xscale("log")
    left.set_xlabel("time in copies of the logits, 20 % to 80 %")
    left.axvline(1, color="black", linewidth=0.8)
    _bars(
        right,
        cases,
        names,
        lambda r: None if r.memory_share is None else r.memory_share * 100,
        None,
    )
    # Linear up to 1 %, the bound that the library sets itself, so that 0 has a place.
    right.set_xscale("symlog", linthresh=1)
    right.set_xlabel("peak extra memory, % of the logits")
    for axes in (left, right):
        shown = [textwrap.fill(case.case.title, _CHARACTERS) for case in cases]
        axes.set_yticks(range(len(cases)), shown)
        axes.invert_yaxis()
        style.plain_numbers(axes.xaxis)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    style.title(figure, f"Forward and backward on {about['device']}, {about['threads']} threads")
    return figure
