"""How the logits of a linear head are divided into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Rows and classes of a chunk."""

    rows: int
    classes: int

    def row_parts(self, rows: int) -> Iterator[slice]:
        for begin in range(0, rows, self.rows):
            yield slice(begin, min(begin + self.rows, rows))

    def class_parts(self, classes: int) -> list[slice]:
        step = max(self.classes, 1)
        return [slice(j, min(j + step, classes)) for j in range(0, classes, step)]


# A matmul gets near its peak where every entry of the weight that is read is used for some hundred
# rows, on a CPU for some dozens. Chunks are whole rows while this many of them fit in the memory,
# or all there are. With more classes, chunks are parts of the classes for up to _MOST_ROWS rows,
# and their logits are made a second time for the gradients: a fourth matmul beside the three, but
# each at its peak.
_FEWEST_ROWS, _FEWEST_ROWS_ON_CPU, _MOST_ROWS = 256, 64, 1024
# Bytes that go with a class of a chunk. CPU kernels: of every thread, four rows of arithmetic and
# two sums in float64; CUDA and Triton: two float32 sums of every fourth row (row_plan.h).
_SCRATCH_OF_A_THREAD, _SCRATCH_OF_A_ROW = 4 * 8 + 2 * 8, 2
_COPIES_OF_THE_REFERENCE = 12  # of a chunk's logits, in float32 at least


def plan(rows: int, classes: int, like: Tensor, chunk_bytes: int, backend: str) -> Plan:
    """The chunks of logits (rows, classes), of the dtype and device of `like`.

    The logits take a third of chunk_bytes, with what goes with them two thirds at most. (More than
    a third of whole rows, if that makes _FEWEST_ROWS of them.) The rest is for sums in float32 of
    gradients in half precision.
    """
    on_cpu = like.device.type == "cpu"
    fixed, each = (0, _SCRATCH_OF_A_ROW) if not on_cpu else (
        _SCRATCH_OF_A_THREAD * torch.get_num_threads(), 0
    )  # fmt: skip
    size = like.element_size()
    if backend == "reference":
        size = max(size, 4) * _COPIES_OF_THE_REFERENCE
    third, most = chunk_bytes // 3, chunk_bytes * 2 // 3
    of_a_class = most // max(classes, 1)
    fitting = min(
        (of_a_class - fixed) // (size + each), max(third // (size * max(classes, 1)), _FEWEST_ROWS)
    )
    if fitting >= min(rows, _FEWEST_ROWS_ON_CPU if on_cpu else _FEWEST_ROWS):
        return Plan(max(min(fitting, rows), 1), classes)
    part = max(min(rows, _MOST_ROWS, third // size), 1)
    return Plan(part, max(min(third // (part * size), most // (part * (size + each) + fixed)), 1))
