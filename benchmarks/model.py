"""`python -m benchmarks.model`: what rows of logits should take on GPUs. Nothing is measured.

A pass over the logits takes the larger of two times: its bytes at 90 % of the memory bandwidth of
the maker's data sheet, as a copy reaches, and its warp instructions at half of what the schedulers
issue at most. A step is the sum of its passes, and of 3 us a launch unless a CUDA graph has
captured them. None of the constants is tuned.

What the model leaves out: caches (everything is read from memory), the start and the end of a
launch, and too few bytes in flight (tests/cuda/test_launch_plans.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.gpus import GPUS, Gpu

SHARE_OF_BANDWIDTH = 0.9
SHARE_OF_ISSUE = 0.5
SECONDS_OF_A_LAUNCH = 3e-6
BYTES_OF_A_READ = 512  # a warp's, 16 bytes a thread

SIZES = {"fp32": 4, "bf16": 2}
SHAPES = (
    (4096, 1204), (4096, 1203), (16384, 8142), (2048, 8142), (65536, 1000),
    (512, 100000), (8192, 32000), (8192, 128256), (100, 1203),
)  # fmt: skip
STEPS = ("plain", "all gradients", "stage 2")
SHOWN = ("H100 SXM", "A100 SXM 80 GB", "RTX 4090", "B200")

# Warp instructions for 512 bytes of logits, in the machine code for sm_90: of rows of 1203 classes,
# taken below LONG classes, and of 8192, taken from there on. "stage 2" is the forward that has the
# gradients of scale, bias and confidence, too. tests/cuda/test_machine_code.py counts them.
INSTRUCTIONS = {
    ("forward", "fp32"): (138, 70),
    ("forward", "bf16"): (285, 150),
    ("stage 2", "fp32"): (309, 154),
    ("stage 2", "bf16"): (623, 336),
    ("backward", "fp32"): (142, 72),
    ("backward", "bf16"): (285, 145),
}
LONG = 4096


def instructions(code: str, dtype: str, classes: int) -> int:
    """For every architecture and form of the backward."""
    return INSTRUCTIONS[code, dtype][classes >= LONG]


# csrc/cuda/launch/row_launch.h: elements of a row that a thread keeps, threads of a block that has
# a whole row, and of a block of a cluster.
_KEPT = 16
_BLOCK = 512 * _KEPT
_CLUSTER_BLOCK, _CLUSTER = 384 * _KEPT, 8
# Elements whose class sums a multiprocessor keeps: about 16 warps', as registers bound them.
_SUMS = 16 * 32 * _KEPT
_ROWS_OF_SUMS = 4  # that a block has, at least

# Forward and backward on an H100, ms, as the makers of other losses have published them. quack's
# shares of the bandwidth: benchmarks/results/README.md.
PUBLISHED = {
    (8192, 32000, "bf16"): ("Liger", 0.7215),
    (8192, 128256, "bf16"): ("Liger", 2.2067),
}


@dataclass(frozen=True)
class Pass:
    """Over the logits."""

    code: str  # of INSTRUCTIONS
    reads_and_writes: int
    other_bytes: float = 0  # class sums, statistics, targets


@dataclass(frozen=True)
class Time:
    captured: float  # seconds, without launches
    launches: float
    share_of_copy: float  # of a copy that moves the same logits, launches not counted
    limit: str  # memory, issue or launches; of each pass, where they differ

    @property
    def seconds(self) -> float:
        return self.captured + self.launches


def _elements(dtype: str, classes: int) -> int:
    """Of a row as the kernels see it: whole 16 bytes."""
    vector = 16 // SIZES[dtype]
    before = 0 if classes % vector == 0 else vector - 1  # rows begin anywhere
    return -(-(before + classes) // vector) * vector


def _tiled(gpu: Gpu, step: str, dtype: str, classes: int) -> bool:
    """Whether forward has several blocks a row, and no cluster of them."""
    elements = _elements(dtype, classes)
    calibrated = step != "plain"
    # Scale and bias lie in shared memory, for whole warps.
    shared = 8 * -(-elements // (32 * _KEPT)) * 32 * _KEPT if calibrated else 0
    if elements <= _BLOCK and shared < gpu.capability.shared_bytes_of_a_block:
        return False
    clustered = calibrated and gpu.capability.has_clusters
    return not (clustered and -(-elements // _CLUSTER_BLOCK) <= _CLUSTER)


def class_sum_bytes(gpu: Gpu, rows: int, classes: int) -> int:
    """Of scale and of bias, written by the blocks and read by the last kernel: at most."""
    return 2 * 2 * 4 * min(gpu.multiprocessors * _SUMS, rows * classes // _ROWS_OF_SUMS)


def passes(gpu: Gpu, step: str, dtype: str, rows: int, classes: int) -> list[Pass]:
    """What the kernels of a step read and write."""
    statistics = rows * (8 + 8)  # two floats and the target
    if step == "plain":
        return [Pass("forward", 1, statistics), Pass("backward", 2, statistics)]
    sums = class_sum_bytes(gpu, rows, classes)
    positions = statistics + rows * 8  # the confidence and its gradient
    found = [Pass("stage 2", 1, sums + positions)]
    if _tiled(gpu, step, dtype, classes):  # class sums from a second read
        found = [Pass("stage 2", 1, positions), Pass("backward", 1, sums + positions)]
    if step == "all gradients":
        found.append(Pass("backward", 2, positions))
    return found


def reads(gpu: Gpu, step: str, dtype: str, classes: int) -> int:
    """Kernels that walk over the logits."""
    return len(passes(gpu, step, dtype, 1, classes))


def launches(gpu: Gpu, step: str, dtype: str, classes: int) -> int:
    """Passes, the sum over tiles, and the end of forward."""
    tiled = _tiled(gpu, step, dtype, classes)
    return reads(gpu, step, dtype, classes) + int(tiled) + 1


def predict(gpu: Gpu, step: str, dtype: str, rows: int, classes: int) -> Time:
    logits = rows * classes * SIZES[dtype]
    bandwidth = SHARE_OF_BANDWIDTH * gpu.gigabytes_per_second * 1e9
    captured = 0.0
    limits = []
    for one in passes(gpu, step, dtype, rows, classes):
        memory = (one.reads_and_writes * logits + one.other_bytes) / bandwidth
        issued = instructions(one.code, dtype, classes) * logits / BYTES_OF_A_READ
        issue = issued / (SHARE_OF_ISSUE * gpu.instructions_per_second)
        captured += max(memory, issue)
        limits.append("memory" if memory >= issue else "issue")
    of_launches = SECONDS_OF_A_LAUNCH * launches(gpu, step, dtype, classes)
    if of_launches > captured:
        limits = ["launches"]
    elif len(set(limits)) == 1:
        limits = limits[:1]
    needed = 1 if step == "stage 2" else 3  # reads and writes
    return Time(
        captured=captured,
        launches=of_launches,
        share_of_copy=needed * logits / bandwidth / captured,
        limit=" / ".join(limits),
    )


HEADINGS = ("N x C", "dtype", "step", *SHOWN, "published, H100")


def table(
    shapes: Iterable[tuple[int, int]] = SHAPES, gpus: Iterable[str] = SHOWN
) -> list[list[str]]:
    """Its cells: ms (ms captured), share of a copy, what limits."""
    found = []
    for rows, classes in shapes:
        for dtype in SIZES:
            for step in STEPS:
                cells = [f"{rows} x {classes}", dtype, step]
                for name in gpus:
                    time = predict(GPUS[name], step, dtype, rows, classes)
                    cells.append(
                        f"{time.seconds * 1e3:.3f} ({time.captured * 1e3:.3f}), "
                        f"{time.share_of_copy:.0%}, {time.limit}"
                    )
                peer, ms = PUBLISHED.get((rows, classes, dtype), ("", 0.0))
                cells.append(f"{peer} {ms:.3f}" if peer and step == "plain" else "")
                found.append(cells)
    return found


def markdown() -> str:
    """The table of benchmarks/results/README.md."""
    lines = [list(HEADINGS), ["---"] * len(HEADINGS), *table()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--markdown", action="store_true", help="as in results/README.md")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(markdown())
        return 0
    shown = Table(title="Predicted: ms (captured in a CUDA graph), share of a copy, limit")
    for heading in HEADINGS:
        shown.add_column(heading, overflow="fold")
    for cells in table():
        shown.add_row(*cells)
    Console().print(shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
