"""Tiles and grids of the kernels of rows and class planes.

Tiles are powers of two, so that few kernels are compiled for all class counts, and so small that a
thread's registers hold what it works on: tests/_ops/test_triton.py. A row that one warp has needs
no barrier, and what is computed once a row is computed by one warp.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.library import wrap_triton


@dataclass(frozen=True)
class Tile:
    positions: int
    classes: int
    warps: int
    tiled: bool  # whether the classes need more than one

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor's registers hold, at 128 a thread."""
        return max(1, 16 // self.warps)

    def options(self, device: torch.device) -> dict[str, int]:
        """Options of a launch.

        maxnreg: all registers that a program of this size can have; left to itself the assembler
        stops at half of them and spills. Of NVIDIA's back end alone.
        """
        options = {"num_warps": self.warps}
        if device.type != "xpu" and torch.version.hip is None:
            options["maxnreg"] = min(255, 65536 // (32 * self.warps))
        return options


def passing_tile(
    classes: int, planes: bool, dtype: torch.dtype, aligned: bool, confidence: bool
) -> Tile:
    """The tile that passes through C classes, where nothing is summed over the positions.

    rows, C <= 256: 512 logits, 4 warps
    rows, C <= 2048: 8 logits a thread (float64: 4), 1 warp
    rows beyond: 16 (float64: 8), without the gradient of the confidence, which has sums of its own;
        a warp for each 4096 classes, at most 8
    planes: 4 classes of 4 positions a thread (float64: 2), 1 warp
    planes of half precision, aligned, without that gradient: 4 classes of 8 positions, 2 warps
    """
    size = dtype.itemsize
    if planes:
        wide = size == 2 and aligned and not confidence
        return Tile(512, 4, 2, True) if wide else _planes(size)
    width = max(16, triton.next_power_of_2(classes))
    if width <= 256:
        return Tile(512 // width, width, 4, True)
    warps = min(8, max(1, width // 4096))
    logits = (8 if width <= 2048 or confidence else 16) // max(1, size // 4)
    return Tile(1, 32 * logits * warps, warps, True)


def _planes(size: int) -> Tile:
    return Tile(64 if size == 8 else 128, 4, 1, True)


def tile(classes: int, planes: bool, dtype: torch.dtype) -> Tile:
    """The tile for C classes: of the power of two at or above C, or a part of them; of kernels that
    sum over the positions, for each class.

    rows, C <= 512: 512 logits (float64: 256), 4 warps
    rows, C <= 4096 (float64: 2048): one row, 8 logits a thread
    rows beyond: parts of 2048 classes, 8 logits a thread
    planes: 4 classes of 4 positions a thread (float64: 2), 1 warp
    """
    doubles = dtype == torch.float64
    width = max(16, triton.next_power_of_2(classes))
    if planes:
        return _planes(dtype.itemsize)
    if width > (2048 if doubles else 4096):
        return Tile(1, 2048, 8, True)
    logits = max(256 if doubles else 512, width)
    return Tile(logits // width, width, max(4, logits // 256), False)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # under TRITON_INTERPRET: few programs, so each loops
    properties = torch.get_device_module(device).get_device_properties(device)
    for name in ("multi_processor_count", "gpu_subslice_count"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    return 64


def programs(blocks: int, tile: Tile, parts: int, device: torch.device) -> int:
    """Programs along the positions: as many as run at once, or as there are blocks."""
    resident = multiprocessors(device) * tile.resident
    return int(max(1, min(blocks, resident // parts)))


_AUTOTUNE = "DISALIGN_OPS_TRITON_AUTOTUNE"
_SIZE_CLASS = ("PLANES", "UNIT", "POSITIONS", "CLASSES", "NODES")
_SMALL = Tile(1, 256, 4, False)  # of kernels that sum up


@functools.cache
def autotuned(kernel: Any) -> Any:
    """The kernel with the number of warps that is fastest, tried once a size class and dtype."""
    configs = [
        triton.Config({}, **Tile(1, 1, warps, False).options(torch.device("cuda")))
        for warps in (4, 8, 16)
    ]
    key = [name for name in _SIZE_CLASS if name in kernel.arg_names]
    # In place, what it reads is what it writes: trials must leave it as it was.
    restore = [name for name in ("grad_logits",) if name in kernel.arg_names]
    return triton.autotune(configs, key=key, restore_value=restore)(kernel)


def start(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    tile: Tile = _SMALL,
    device: torch.device | None = None,
    **constants: Any,
) -> None:
    """Launches a kernel; one that works on logits with the tile and device that they have."""
    if device is None:
        options = {"num_warps": tile.warps}
    elif os.environ.get(_AUTOTUNE) == "1":
        kernel, options = autotuned(kernel), {}
    else:
        options = tile.options(device)
    _call(kernel, grid, arguments, {**constants, **options})


def _call(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    wrapped = wrap_triton(kernel)
    if wrapped is not kernel:  # traced, for torch.compile, which does not know the option
        options = {name: value for name, value in options.items() if name != "maxnreg"}
    wrapped[grid](*arguments, **options)
