"""`python -m benchmarks.figures`: benchmark.svg and memory.svg of docs/figures.

They show recorded rows of benchmarks/results: a number in a picture has a source there.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from disalign_ops._figures import style

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "epyc-2-cores" / "rows.csv"
FOLDER = ROOT / "docs" / "figures"
MACHINE = "two cores of an AMD EPYC, torch 2.13, float32"

# Case -> what a reader calls it. Of one kind of work the case that is nearest to a use.
SHOWN = {
    "lvis-full": "DisAlign loss,\n4,096 boxes x 1,204 classes",
    "inat-stage2": "DisAlign stage 2,\n2,048 images x 8,142 classes",
    "lvis-plain": "weighted cross-entropy,\n4,096 x 1,204",
    "ade-dense-plain": "the same for segmentation,\n150 classes, 256 x 256",
    "ade-upsample-large": "DisAlign loss upsampled,\n150 classes to 512 x 512",
    "inat-head-stage2": "stage 2 from features,\n4,096 x 8,142 classes",
}


def recorded() -> dict[str, dict[str, str]]:
    """The recorded rows by the name of their case."""
    with RECORDED.open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def _bars(axes: Any, series: dict[str, tuple[str, list[float]]], unit: str) -> None:
    """A group a case from the top, a bar a contestant, each with its number."""
    height = 0.8 / len(series)
    for k, (name, (colour, values)) in enumerate(series.items()):
        places = [i + (k - (len(series) - 1) / 2) * height for i in range(len(values))]
        bars = axes.barh(places, values, height, color=colour, label=name)
        axes.bar_label(bars, [f"{style.plain(v)}{unit}" for v in values], padding=3, fontsize=10)
    axes.set_yticks(range(len(SHOWN)), SHOWN.values())
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color=style.LINE, linewidth=0.6)
    axes.margins(x=0.18)


def time_figure(rows: dict[str, dict[str, str]]) -> Any:
    """Times as long as disalign_ops, of eager PyTorch and torch.compile."""
    with style.applied():
        figure, axes = style.figure(height=4.6)
        series = {
            "PyTorch": (style.GREY, [float(rows[case]["eager"]) for case in SHOWN]),
            "torch.compile": (style.AMBER, [float(rows[case]["compile"]) for case in SHOWN]),
        }
        axes.set_xscale("log")
        _bars(axes, series, " x")
        axes.set_xlim(0.8, 200)
        axes.axvline(1, color=style.BLUE, linewidth=2, label="disalign_ops = 1")
        style.plain_numbers(axes.xaxis)
        axes.set_xlabel("time, forward and backward, in times of ours")
        figure.legend(loc="outside lower left", ncols=3, handlelength=1.2, columnspacing=1.2)
        style.title(figure, f"A step takes PyTorch this many times as long ({MACHINE})")
    return figure


def memory_figure(rows: dict[str, dict[str, str]]) -> Any:
    """Peak memory beyond inputs and gradients, in % of the logits' bytes."""
    with style.applied():
        figure, axes = style.figure(height=4.6)
        series = {
            "PyTorch": (style.GREY, [float(rows[c]["eager_memory_percent"]) for c in SHOWN]),
            "disalign_ops": (style.BLUE, [float(rows[c]["memory_percent"]) for c in SHOWN]),
        }
        axes.set_xscale("log")
        _bars(axes, series, " %")
        axes.set_xlim(0.1, 6000)
        style.plain_numbers(axes.xaxis)
        axes.set_xlabel("extra memory, % of the logits' bytes")
        figure.legend(loc="outside lower left", ncols=2, handlelength=1.2, columnspacing=1.2)
        style.title(figure, "Memory a step needs beyond its inputs and gradients")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the files")
    options = parser.parse_args(arguments)
    rows = recorded()
    for name, made in (("benchmark", time_figure(rows)), ("memory", memory_figure(rows))):
        print(style.save(made, options.out / f"{name}.svg"))


if __name__ == "__main__":
    main()
