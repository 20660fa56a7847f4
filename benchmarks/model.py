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

# Warp instructions for 512 bytes of logits in fp32 and in bf16, in the machine code for sm_90. The
# first word is how a row is worked on (`way`), the second the kernel: forward with the gradient of
# the logits; with the gradients of scale, bias and confidence; with all of them. Tiles need two
# kernels. Counted with 1203 classes ("warp"), 8192 ("warps"; "block": for sm_89, which has too
# little shared memory for the former), 32000 ("cluster") and 128256 ("tiles"; plain ones for sm_80,
# which has no clusters): `python -m machine_code.rows model` of tests/ prints this, and
# tests/cuda/test_machine_code.py compares.
INSTRUCTIONS = {
    ("warp", "gradient"): (80, 172),
    ("warp", "stage2"): (129, 270),
    ("warp", "all"): (151, 331),
    ("warps", "gradient"): (53, 99),
    ("warps", "stage2"): (91, 199),
    ("warps", "all"): (112, 254),
    ("block", "stage2"): (148, 312),
    ("block", "all"): (182, 380),
    ("cluster", "gradient"): (53, 90),
    ("cluster", "stage2"): (94, 203),
    ("cluster", "all"): (115, 259),
    ("tiles", "forward"): (68, 135),
    ("tiles", "calibrated forward"): (90, 186),
    ("tiles", "stage2 forward"): (108, 227),
    ("tiles", "backward"): (73, 141),
    ("tiles", "stage2 backward"): (144, 289),
    ("tiles", "all backward"): (154, 302),
}

# csrc/cuda/launch/row_plan.h and the kernels' headers. Vectors of 16 bytes that a warp keeps of a
# row, warps of a block at most, and in bytes the shared memory of such a warp, class vectors aside,
# and of the block besides.
_WARP_VECTORS, _WARPS, _WARP_BYTES, _BLOCK_BYTES = 320, 8, 12544, 2560
# Of plain fp32 rows; of plain rows; of a cluster's blocks, and how many it has at most.
_PLAIN_WARPS, _PLAIN_WARP_BYTES, _CLUSTER_BYTES, _CLUSTER = 16, 11904, 4608, 8
# Elements of a row that a thread keeps, and of a block that has a whole row by other kernels.
_KEPT = 16
_BLOCK = 512 * _KEPT
# Elements whose class sums a multiprocessor keeps by these kernels: about 16 warps', as registers
# bound them.
_SUMS = 16 * 32 * _KEPT

# Shares of a copy on an H100 that steps should reach.
AIMS = {
    ("plain", "fp32"): 0.8,
    ("plain", "bf16"): 0.75,
    ("stage 2", "fp32"): 0.8,
    ("stage 2", "bf16"): 0.65,
}
OF_AIMS = "H100 SXM"

# Forward and backward on an H100, ms, as the makers of other losses have published them. quack's
# shares of the bandwidth: benchmarks/results/README.md.
PUBLISHED = {
    (8192, 32000, "bf16"): ("Liger", 0.7215),
    (8192, 128256, "bf16"): ("Liger", 2.2067),
}


@dataclass(frozen=True)
class Pass:
    """Over the logits."""

    code: str  # of INSTRUCTIONS, the second word
    reads_and_writes: int
    other_bytes: float = 0  # class sums, statistics, targets


@dataclass(frozen=True)
class Time:
    captured: float  # seconds, without launches
    launches: float
    share_of_copy: float  # of a copy that moves the same logits, launches not counted
    limit_of_passes: str  # memory or issue; of each, where they differ

    @property
    def limit(self) -> str:
        return "launches" if self.launches > self.captured else self.limit_of_passes

    @property
    def seconds(self) -> float:
        return self.captured + self.launches


def _elements(dtype: str, classes: int) -> int:
    """Of a row as the kernels of blocks and clusters see it: whole 16 bytes."""
    vector = 16 // SIZES[dtype]
    before = 0 if classes % vector == 0 else vector - 1  # rows begin anywhere
    return -(-(before + classes) // vector) * vector


def _blocks(gpu: Gpu, calibrated: bool, sums: bool, dtype: str, classes: int) -> int | None:
    """Whose warps keep a row: 0 where one warp does, and None where no cluster's do."""
    vectors = classes * SIZES[dtype] // 16
    # The class sums of a half precision's elements do not fit into registers, nor need short rows
    # so many.
    half = dtype == "bf16" and (sums or vectors <= _WARP_VECTORS // 2)
    of_a_warp = _WARP_VECTORS // 2 if half else _WARP_VECTORS
    if vectors <= of_a_warp:
        return 0
    most = _WARPS if calibrated or dtype == "bf16" else _PLAIN_WARPS
    class_bytes = 2 * of_a_warp * (16 // SIZES[dtype]) * 4 if calibrated else 0
    warp_bytes = class_bytes + (_WARP_BYTES if calibrated else _PLAIN_WARP_BYTES)
    for blocks in range(1, _CLUSTER + 1 if gpu.capability.has_clusters else 2):
        warps = -(-vectors // (of_a_warp * blocks))
        besides = _BLOCK_BYTES if blocks == 1 else _CLUSTER_BYTES
        if warps <= most and warps * warp_bytes + besides <= gpu.capability.shared_bytes_of_a_block:
            return blocks
    return None


def way(gpu: Gpu, step: str, dtype: str, classes: int) -> str:
    """How forward works on a row of more than 512 classes.

    warp: a warp keeps it. warps: several of a block. cluster: those of a cluster's blocks. block: a
    block, where there is too little shared memory for the former. tiles: several blocks, none of
    which keeps it until the row's sums are known.
    """
    sums = step != "plain"
    blocks = _blocks(gpu, sums, sums, dtype, classes)
    if blocks is not None:
        return ("warp", "warps", "cluster")[min(blocks, 2)]
    elements = _elements(dtype, classes)
    # Scale and bias lie in shared memory, for whole warps.
    shared = 8 * -(-elements // (32 * _KEPT)) * 32 * _KEPT if sums else 0
    enough = elements <= _BLOCK and shared < gpu.capability.shared_bytes_of_a_block
    return "block" if enough else "tiles"


def class_sum_bytes(gpu: Gpu, step: str, dtype: str, rows: int, classes: int) -> int:
    """Of scale and of bias, written by the blocks and read by the last kernel: at most.

    Kernels of warps have a block a multiprocessor, and no more than there are rows for. Where their
    sums would be more than a tenth of the logits, blocks of a cluster add them up before.
    """
    how = way(gpu, step, dtype, classes)
    blocks = -(-rows // (_WARPS if how == "warp" else 1))
    # A cluster's block has fewer: at most.
    if how not in ("warp", "warps"):
        return 2 * 2 * 4 * min(gpu.multiprocessors * _SUMS, blocks * classes)
    team, partials = 1, min(gpu.multiprocessors, blocks)
    while gpu.capability.has_clusters and team < _CLUSTER:
        if 10 * partials * 2 * 4 <= rows * SIZES[dtype]:
            break
        team *= 2
        partials = min(gpu.multiprocessors // team, -(-blocks // team))
    return 2 * 2 * 4 * partials * classes


def passes(gpu: Gpu, step: str, dtype: str, rows: int, classes: int) -> list[Pass]:
    """What the kernels of a step read and write. The last but one of tiles' is forward without the
    gradient of the logits.
    """
    tiled = way(gpu, step, dtype, classes) == "tiles"
    statistics = rows * (8 + 8)  # two floats and the target
    if step == "plain":
        if tiled:
            return [Pass("forward", 1, statistics), Pass("backward", 2, statistics)]
        # The denominator comes from the targets.
        return [Pass("gradient", 2, statistics + rows * 8)]
    sums = class_sum_bytes(gpu, step, dtype, rows, classes)
    positions = statistics + rows * 8  # the confidence and its gradient
    if step == "stage 2":
        if tiled:
            return [
                Pass("stage2 forward", 1, positions), Pass("stage2 backward", 1, sums + positions)
            ]  # fmt: skip
        return [Pass("stage2", 1, sums + positions)]
    if tiled:
        return [
            Pass("calibrated forward", 1, positions), Pass("all backward", 2, sums + positions)
        ]  # fmt: skip
    return [Pass("all", 2, sums + positions + rows * 8)]


def reads(gpu: Gpu, step: str, dtype: str, classes: int) -> int:
    """Kernels that walk over the logits."""
    return len(passes(gpu, step, dtype, 1, classes))


def launches(gpu: Gpu, step: str, dtype: str, classes: int) -> int:
    """Of forward, which makes all gradients.

    Its passes. Where the gradient of the logits comes from one read, the targets' share of the
    denominator; of tiles, the sum over them, and the end of the loss. The gradients of scale, bias
    and confidence have an end of their own.
    """
    tiled = way(gpu, step, dtype, classes) == "tiles"
    of_loss = 2 if tiled and step != "stage 2" else 1 if tiled or step != "stage 2" else 0
    if tiled and step != "stage 2":  # forward alone may be a cluster's
        of_loss -= _blocks(gpu, step != "plain", False, dtype, classes) is not None
    return reads(gpu, step, dtype, classes) + of_loss + int(step != "plain")


def predict(gpu: Gpu, step: str, dtype: str, rows: int, classes: int) -> Time:
    logits = rows * classes * SIZES[dtype]
    bandwidth = SHARE_OF_BANDWIDTH * gpu.gigabytes_per_second * 1e9
    how = way(gpu, step, dtype, classes)
    captured = 0.0
    limits = []
    for one in passes(gpu, step, dtype, rows, classes):
        memory = (one.reads_and_writes * logits + one.other_bytes) / bandwidth
        issued = INSTRUCTIONS[how, one.code][list(SIZES).index(dtype)] * logits / BYTES_OF_A_READ
        issue = issued / (SHARE_OF_ISSUE * gpu.instructions_per_second)
        captured += max(memory, issue)
        limits.append("memory" if memory >= issue else "issue")
    # Backward's kernel, which returns at once where the upstream gradient is 1.
    of_backward = int(step != "stage 2")
    of_launches = SECONDS_OF_A_LAUNCH * (launches(gpu, step, dtype, classes) + of_backward)
    needed = 1 if step == "stage 2" else 2  # reads and writes
    return Time(
        captured=captured,
        launches=of_launches,
        share_of_copy=needed * logits / bandwidth / captured,
        limit_of_passes=" / ".join(limits[:1] if len(set(limits)) == 1 else limits),
    )


HEADINGS = ("N x C", "dtype", "step", *SHOWN, "share aimed at, H100", "published, H100")


def _aim(step: str, dtype: str, rows: int, classes: int) -> str:
    """The aim, and what is in its way."""
    aim, gpu = AIMS.get((step, dtype)), GPUS[OF_AIMS]
    if aim is None:
        return ""
    time = predict(gpu, step, dtype, rows, classes)
    if time.share_of_copy >= aim:
        return f"{aim:.0%}: met"
    # Without the launches, which the share leaves out.
    twice = ", two reads" if reads(gpu, step, dtype, classes) > 1 else ""
    return f"{aim:.0%}: missed, {time.limit_of_passes}{twice}"


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
                cells.append(_aim(step, dtype, rows, classes))
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
    # Here: what compares measurements with the model needs no rich.
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Predicted: ms (captured in a CUDA graph), share of a copy, limit")
    for heading in HEADINGS:
        shown.add_column(heading, overflow="fold")
    for cells in table():
        shown.add_row(*cells)
    Console().print(shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
