"""`python -m disalign_ops counts FILE`: whether class counts were read right, before training."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from ..class_stats import grw_weights, read_counts
from ..metrics import split_classes
from .text import number, table

_EACH_END = 3  # classes that are printed of the most frequent, and of the rarest
_NAMED = 10  # classes without samples that are named


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "counts",
        help="classes, counts, head / medium / tail and class weights of a file",
        description="Reads class counts as disalign_ops.class_stats.read_counts does.",
    )
    parser.add_argument("file", help="JSON, .npy, CSV or text; see read_counts")
    parser.add_argument("--num-classes", type=int, help="the number of classes expected")
    parser.add_argument("--count", choices=("image", "instance", "pixel"), default="image")
    parser.add_argument("--format", choices=("counts", "samples"), help="of a two-column text")
    parser.add_argument("--rho", type=float, default=1.0, help="of grw_weights; default 1")
    parser.add_argument("--many", type=float, default=100, help="head: more samples; default 100")
    parser.add_argument("--few", type=float, default=20, help="tail: fewer samples; default 20")
    parser.add_argument("--json", action="store_true", help="counts and weights as JSON")
    parser.set_defaults(run=run)


def groups(counts: Tensor, many: float, few: float) -> dict[str, Tensor]:
    """Masks of head, medium and tail. Fractions, such as shares of pixels, have no thresholds in
    samples: there each is a third of the classes.
    """
    if not counts.is_floating_point():
        head, medium, tail = split_classes(counts, many, few)
        return {f"head, > {number(many)}": head, "medium": medium, f"tail, < {number(few)}": tail}
    masks = {}
    parts = counts.argsort(descending=True, stable=True).tensor_split(3)
    for name, part in zip(("head, a third", "medium", "tail, a third"), parts, strict=True):
        masks[name] = counts.new_zeros(len(counts), dtype=torch.bool).index_fill_(0, part, True)
    return masks


def _range(values: Tensor) -> str:
    if not len(values):
        return "-"
    low, high = number(float(values.min())), number(float(values.max()))
    return low if low == high else f"{low} to {high}"


def report(name: str, counts: Tensor, options: argparse.Namespace) -> str:
    """The text that is printed."""
    empty = (counts == 0).nonzero().flatten().tolist()
    weights = grw_weights(counts, options.rho, empty="zero" if empty else "error")
    total = float(counts.sum())
    sums = f"a sum of {number(total)}" if counts.is_floating_point() else f"{number(total)} samples"
    lines = [f"{name}: {len(counts):,} classes, {sums}"]
    some = counts[counts > 0]
    ratio = number(float(some.max()) / float(some.min()))
    lines.append(f"largest {number(float(some.max()))}, smallest {number(float(some.min()))}, "
                 f"ratio {ratio}")  # fmt: skip
    if empty:
        named = ", ".join(map(str, empty[:_NAMED])) + (", ..." if len(empty) > _NAMED else "")
        lines.append(
            f"classes without samples, {len(empty):,}: {named}; grw_weights raises, unless "
            "empty='max' or empty='zero' (weights below)"
        )
    weighed = f"weight, rho {options.rho:g}"
    rows = []
    for group, mask in groups(counts, options.many, options.few).items():
        share = 100 * float(counts[mask].sum()) / total
        rows.append([group, f"{int(mask.sum()):,}", _range(counts[mask]), f"{share:.1f} %",
                     _range(weights[mask])])  # fmt: skip
    lines += ["", table(["group", "classes", "counts", "of all", weighed], rows), ""]
    ranked = counts.argsort(descending=True, stable=True).tolist()
    ends = ranked if len(ranked) <= 2 * _EACH_END else ranked[:_EACH_END] + ranked[-_EACH_END:]
    rows = [[f"class {k}", number(float(counts[k])), number(float(weights[k]))] for k in ends]
    if len(ends) < len(ranked):
        rows.insert(_EACH_END, ["...", "", ""])
    lines.append(table(["most and least frequent", "count", weighed], rows))
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    counts = read_counts(
        options.file, num_classes=options.num_classes, count=options.count, format=options.format
    )
    if options.json:
        empty = "zero" if bool((counts == 0).any()) else "error"
        weights = grw_weights(counts, options.rho, empty=empty)  # type: ignore[arg-type]
        found = {"counts": counts.tolist(), "rho": options.rho, "grw_weights": weights.tolist()}
        print(json.dumps(found))
    else:
        print(report(options.file, counts, options))
    return 0
