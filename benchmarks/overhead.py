"""`python -m benchmarks.overhead`: what a call costs beside its arithmetic.

Forward and backward of a batch so small that nothing else is measured, 2 x 4, and of one as small
as batches are, 64 x 1000: ours divided by PyTorch's composition, in pairs that alternate. Compare
two commits by running this in both, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import disalign_ops

SHAPES = ((2, 4), (64, 1000))
_CALLS = {(2, 4): 200, (64, 1000): 40}  # of each side in a pair
Step = Callable[[], Tensor]


def _learned(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def cases(rows: int, classes: int) -> dict[str, tuple[Step, Step]]:
    """Ours and PyTorch's, by what is called."""
    z, t = _learned(rows, classes), torch.randint(0, classes, (rows,))
    weight, v = torch.rand(classes) + 0.5, torch.rand(rows)
    confidence, scale, bias = _learned(rows), _learned(classes), _learned(classes)

    def weighted() -> Tensor:
        losses = F.cross_entropy(z, t, weight, reduction="none", label_smoothing=0.1)
        return (losses * v).sum() / (weight[t] * v).sum()

    def calibrated() -> Tensor:
        c = torch.sigmoid(confidence)[:, None]
        return F.cross_entropy(c * (scale * z + bias) + (1 - c) * z, t, weight)

    options: dict[str, Any] = {"label_smoothing": 0.1, "sample_weight": v}
    return {
        "plain": (lambda: disalign_ops.cross_entropy(z, t), lambda: F.cross_entropy(z, t)),
        "weighted, smoothing, sample weights": (
            lambda: disalign_ops.cross_entropy(z, t, weight, **options), weighted,
        ),
        "calibrated": (
            lambda: disalign_ops.disalign_cross_entropy(z, t, confidence, scale, bias, weight),
            calibrated,
        ),
    }  # fmt: skip


def _seconds(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step().backward()  # type: ignore[no-untyped-call]
    return (time.perf_counter() - start) / calls


def measure(ours: Step, theirs: Step, calls: int, pairs: int) -> tuple[float, float, float]:
    """Median seconds of a call of ours and of theirs, and the median of the pairs' ratios."""
    torch.testing.assert_close(ours(), theirs())
    for step in (ours, theirs):
        _seconds(step, calls)
    found = [(_seconds(ours, calls), _seconds(theirs, calls)) for _ in range(pairs)]
    mine, others = zip(*found, strict=True)
    ratio = statistics.median(a / b for a, b in found)
    return statistics.median(mine), statistics.median(others), ratio


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1")
    parser.add_argument("--pairs", type=int, default=25, help="timed pairs a case; default 25")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table(title=f"A step, {options.threads} threads, torch {torch.__version__}")
    for name, justify in (("call", "left"), ("logits", "left"), ("disalign_ops", "right"),
                          ("PyTorch", "right"), ("ratio", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for shape in SHAPES:
        for name, (ours, theirs) in cases(*shape).items():
            mine, others, ratio = measure(ours, theirs, _CALLS[shape], options.pairs)
            table.add_row(
                name, f"{shape[0]} x {shape[1]}", f"{mine * 1e6:.1f} us", f"{others * 1e6:.1f} us",
                f"{ratio:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
