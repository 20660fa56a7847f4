"""`python -m benchmarks.bandwidth`: forward and backward alone, in GB/s beside the device's copy.

Each kernel moves the logits that docs/design.md counts (a read; a read and a write), so that its
bandwidth says how far it is from what the device can do. Writes bandwidth.csv. What they should
take on GPUs that are not here: benchmarks.model.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import disalign_ops
from disalign_ops._bench import measure
from disalign_ops._bench.record import device_name

CLASSES = (1203, 1204, 4096, 8142, 8192, 16384, 65536)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPY = "copy"
# Passes over the logits: reads and writes.
PASSES = {"forward": 1, "forward, stage 2": 1, "forward with the gradient": 2, "backward": 2}


@dataclass(frozen=True)
class Row:
    classes: int
    dtype: str
    work: str
    milliseconds: float
    gigabytes_per_second: float
    share_of_copy: float


def _steps(
    rows: int, classes: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    z = (torch.randn(rows, classes, device=device) * 3).to(dtype)
    target = torch.randint(0, classes, (rows,), device=device)
    leaf = z.clone().requires_grad_()
    loss = disalign_ops.cross_entropy(leaf, target, gradient="backward")
    confidence, scale, bias = (
        torch.randn(n, device=device).requires_grad_() for n in (rows, classes, classes)
    )
    out = torch.empty_like(z)

    def stage2() -> Tensor:
        return disalign_ops.disalign_cross_entropy(z, target, confidence, scale, bias)

    return {
        COPY: partial(out.copy_, z),
        "forward": partial(disalign_ops.cross_entropy, z, target),
        "forward, stage 2": stage2,
        "forward with the gradient": partial(
            disalign_ops.cross_entropy, leaf, target, gradient="forward"
        ),
        "backward": partial(torch.autograd.grad, loss, leaf, retain_graph=True),
    }


def measured(
    classes: int, name: str, megabytes: float, device: torch.device, rounds: int | None
) -> list[Row]:
    """Every kernel at this number of classes; paired with a copy of the logits."""
    dtype = DTYPES[name]
    rows = max(1, int(megabytes * 1e6 / (classes * dtype.itemsize)))
    steps = _steps(rows, classes, dtype, device)
    clock = measure.make_clock(device, overhead=False)
    prepared = {what: partial(_itself, step) for what, step in steps.items()}
    paired = measure.paired_seconds(prepared, clock, rounds, lambda _: None)
    one_pass = rows * classes * dtype.itemsize
    found = []
    for work, passes in PASSES.items():
        seconds = measure.percentile(paired.seconds[work], 50)
        copies = measure.paired_ratio(paired.seconds[work], paired.seconds[COPY])
        found.append(
            Row(classes, name, work, seconds * 1e3, passes * one_pass / seconds * 1e-9,
                passes / 2 / copies)
        )  # fmt: skip
    return found


def _itself(step: Callable[[], object]) -> Callable[[], object]:
    return step


def _table(found: list[Row], device: torch.device) -> Table:
    table = Table(title=f"disalign_ops on {device_name(device)}: medians of paired rounds")
    for heading in ("C", "dtype", "work", "ms", "GB/s", "of copy"):
        table.add_column(heading, justify="right")
    for row in found:
        table.add_row(
            str(row.classes), row.dtype, row.work, f"{row.milliseconds:.3g}",
            f"{row.gigabytes_per_second:.4g}", f"{row.share_of_copy * 100:.0f} %",
        )  # fmt: skip
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bandwidth", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--megabytes", type=float, default=400.0, help="of logits, default 400")
    parser.add_argument("--classes", type=int, action="append", help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, help="timed rounds; default: some seconds' worth")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    device = torch.device(options.device)
    found = [
        row
        for classes in options.classes or CLASSES
        for name in DTYPES
        for row in measured(classes, name, options.megabytes, device, options.rounds)
    ]
    Console().print(_table(found, device))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "bandwidth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["device", *asdict(found[0])])
        writer.writeheader()
        writer.writerows({"device": device_name(device), **asdict(row)} for row in found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
