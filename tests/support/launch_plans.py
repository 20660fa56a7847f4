"""What the row operators launch on a GPU that is not here, and how it fills that GPU."""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpus import REGISTERS, SCHEDULERS, Gpu

VECTOR_BYTES = 16
SIZES = {"fp32": 4, "bf16": 2}
_CODES = {"fp32": 1, "bf16": 2}  # Dtype of csrc/cuda/kernels/launch.h
_STAGED = 20  # kWarpStaged of csrc/cuda/kernels/row_warp_kernel.cuh
# Of a lane, of one warp and of several: kSoftWarpVectors of soft_row_warp_kernel.cuh there and
# kSoftSumsVectors of soft_row_sums_kernel.cuh.
_SOFT_ELEMENTS = {"warp": (40, 32), "sums": (40, 32)}


def blocks_per_multiprocessor(gpu: Gpu, registers: int, threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel are resident on a multiprocessor: CUDA's occupancy.

    A warp gets registers by 256, from those of its own scheduler, and a block gets warps as a
    whole; shared memory comes by 128 bytes, with what CUDA reserves of it for every block. The same
    as cuda_occupancy.h, where the driver gives shared memory all that it can.
    """
    limits = gpu.capability
    warps = _divide_up(threads, 32)
    of_a_warp = _round_up(registers * 32, 256)
    by_registers = REGISTERS // SCHEDULERS // of_a_warp * SCHEDULERS // warps
    by_threads = limits.threads // 32 // warps
    shared = _round_up(shared_bytes + limits.reserved_bytes, 128)
    by_shared = limits.shared_bytes // shared if shared else limits.blocks
    return min(by_registers, by_threads, by_shared, limits.blocks)


@dataclass(frozen=True)
class WarpRows:
    """A row_warp_kernel, soft_row_warp_kernel or soft_row_sums_kernel."""

    vectors: int  # of a lane
    wide: bool  # a row is that of several warps
    stages: int  # rows that it keeps in shared memory

    @staticmethod
    def of(declaration: str) -> WarpRows | None:
        """None: another kernel."""
        found = re.search(r"soft_row_(warp|sums)_kernel<(\w+), (\d)>", declaration)
        if found:
            wide = found[3] != "0"
            elements = _SOFT_ELEMENTS[found[1]][wide]
            return WarpRows(elements // (4 if found[2] == "float" else 8), wide, 0)
        found = re.search(r"row_warp_kernel<.*?, (\d+),.*, (\d)>", declaration)
        return WarpRows(int(found[1]), found[2] != "0", _STAGED // int(found[1])) if found else None

    def rows_ahead(self, gpu: Gpu) -> int:
        """That are asked for while a row is computed. Before compute capability 8.0 there are no
        asynchronous copies: a row is waited for before the next is asked for. So it is of rows in
        registers.
        """
        return self.stages - 1 if self.stages and int(gpu.architecture) >= 80 else 1


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _divide_up(a, b) * b


class Device:
    """A GPU, as the planner asks for it. registers: of a thread, by a kernel's symbol."""

    def __init__(self, gpu: Gpu, registers: Mapping[str, int]) -> None:
        self.gpu, self._registers = gpu, registers
        self.multiprocessors = gpu.multiprocessors
        self.shared_bytes = gpu.capability.shared_bytes_of_a_block
        self.has_clusters = gpu.capability.has_clusters

    def blocks_per_multiprocessor(self, kernel: str, threads: int, shared_bytes: int) -> int:
        return blocks_per_multiprocessor(self.gpu, self._registers[kernel], threads, shared_bytes)

    def clusters(self, kernel: str, threads: int, shared_bytes: int, size: int) -> int:
        """As many as all multiprocessors hold: at most, as a cluster lies within one of the GPU's
        parts, whose number of multiprocessors need not be a multiple of its size."""
        if not self.has_clusters:
            return 0
        blocks = self.blocks_per_multiprocessor(kernel, threads, shared_bytes)
        return self.multiprocessors * blocks // size


@dataclass(frozen=True)
class Launch:
    """One that walks over rows (Tile in row_tile.cuh)."""

    rows: int
    grid_x: int
    tiles: int  # of a row
    team: int  # blocks of a cluster, with rows of their own
    groups: int  # of a block, with a row each
    warp_rows: WarpRows | None
    rows_ahead: int  # of a group
    period: int
    row_vectors: int
    tile_vectors: int
    per_multiprocessor: int  # blocks that are resident
    multiprocessors: int

    @property
    def waves(self) -> float:
        grid = self.grid_x * self.team * self.tiles
        return grid / (self.per_multiprocessor * self.multiprocessors)

    def rows_of(self, block: int, member: int = 0) -> int:
        """Of blockIdx.x and of a team's member."""
        residue, block = block % self.period, block // self.period * self.team + member
        blocks = self.grid_x // self.period * self.team
        rows = _divide_up(self.rows - residue, self.period)
        if self.warp_rows:  # neighbouring rows are those of different blocks
            return _divide_up(max(rows - block, 0), blocks)
        whole, left = divmod(rows, blocks * self.groups)
        return whole * self.groups + min(max(left - block * self.groups, 0), self.groups)

    @functools.cached_property
    def balance(self) -> float:
        """Bytes of the busiest multiprocessor, of the mean.

        Blocks start in their order, on one multiprocessor after another; what is not resident
        then starts where a block has ended first.
        """
        bytes_of = [
            self.rows_of(x, member)
            * min(self.tile_vectors, self.row_vectors - y * self.tile_vectors)
            for y in range(self.tiles)
            for x in range(self.grid_x)
            for member in range(self.team)
        ]
        total = [0] * self.multiprocessors
        resident = self.multiprocessors * self.per_multiprocessor
        ends = []
        for block, size in enumerate(bytes_of[:resident]):
            total[block % self.multiprocessors] += size
            ends.append((size, block % self.multiprocessors))
        heapq.heapify(ends)
        for size in bytes_of[resident:]:
            end, where = ends[0]
            heapq.heapreplace(ends, (end + size, where))
            total[where] += size
        return max(total) / (sum(total) / self.multiprocessors)

    @property
    def bytes_in_flight(self) -> float:
        """Of a multiprocessor: each resident block has read all vectors of its groups' rows, or of
        its tile, before it needs the first. So it is while the next row is fetched ahead; where a
        kernel does not, it is what is outstanding at most. row_warp_kernel: the rows that are asked
        for while one is computed, of which a group may have fewer.
        """
        grid = self.grid_x * self.team * self.tiles
        blocks = min(self.per_multiprocessor, grid / self.multiprocessors)
        rows = float(self.groups)
        if self.warp_rows:
            rows *= min(self.rows_ahead, self.rows / (self.grid_x * self.team * self.groups))
        return blocks * rows * self.row_vectors / self.tiles * VECTOR_BYTES


@dataclass(frozen=True)
class Plan:
    """Of an operator's call: all launches, and those among them that walk over rows."""

    launches: list[dict[str, Any]]
    walks: list[Launch]


FORWARD = {"forward": True, "calibrated": False, "class_gradients": False, "grad_logits": False}
BACKWARD = FORWARD | {"forward": False, "grad_logits": True}
STAGE_2 = FORWARD | {"calibrated": True, "class_gradients": True}
# A training step's calls. Backward is a kernel that returns at once where forward has made the
# gradient of the logits and the upstream gradient is 1: not among them.
STEPS: dict[str, list[dict[str, bool]]] = {
    "plain": [FORWARD | {"grad_logits": True}],
    "all gradients": [STAGE_2 | {"grad_logits": True}],
    "stage 2": [STAGE_2],
    # In half precision, in place, reduction 'none' and under torch.compile.
    "plain, by backward": [FORWARD, BACKWARD],
}


def plan(
    record: Callable[..., list[dict[str, Any]]],
    gpu: Gpu,
    registers: dict[str, int],
    step: str,
    dtype: str,
    rows: int,
    classes: int,
) -> Plan:
    """record: row_launches of simt/planner.cpp."""
    device = Device(gpu, registers)
    launches = [
        launch
        for wanted in STEPS[step]
        for launch in record(
            dtype=_CODES[dtype], rows=rows, classes=classes, weighted=False, device=device, **wanted
        )
    ]
    # The others add up, or read one element of a row.
    walks = [_walk(launch, device, dtype, rows, classes) for launch in launches if launch["fills"]]
    return Plan(launches, walks)


def _walk(launch: dict[str, Any], device: Device, dtype: str, rows: int, classes: int) -> Launch:
    of_a_vector = VECTOR_BYTES // SIZES[dtype]
    lanes = launch["lanes"] or launch["threads"]
    phase = 0 if launch["period"] == 1 else of_a_vector - 1
    warp_rows = WarpRows.of(launch["declaration"])
    return Launch(
        rows=rows,
        grid_x=launch["grid_x"],
        tiles=launch["row_tiles"],
        team=launch["grid_y"] // launch["row_tiles"],
        groups=launch["threads"] // lanes,
        warp_rows=warp_rows,
        rows_ahead=warp_rows.rows_ahead(device.gpu) if warp_rows else 1,
        period=launch["period"],
        row_vectors=_divide_up(phase + classes, of_a_vector),
        tile_vectors=launch["tile_vectors"],
        per_multiprocessor=max(
            1,
            device.blocks_per_multiprocessor(
                launch["kernel"], launch["threads"], launch["shared_bytes"]
            ),
        ),
        multiprocessors=device.multiprocessors,
    )
