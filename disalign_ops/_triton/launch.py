"""Tiles and grids of the kernels of rows and class planes.

A thread keeps about 16 logits (float64: 8) with what the class sums need of them, which is what 128
registers hold. Tiles are powers of two, so that few kernels are compiled for all class counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Tile:
    positions: int
    classes: int
    warps: int
    tiled: bool  # whether the classes need more than one

    @property
    def registers_resident(self) -> int:
        """Programs that a multiprocessor's registers hold, at 128 a thread."""
        return max(1, 16 // self.warps)


# Elements of a tile, and the classes that it holds at most where it holds all of them.
_ELEMENTS = 2048
_MOST_CLASSES = {False: 8192, True: 256}
# Where it does not: (positions, classes) of a tile.
_PART = {False: (1, 4096), True: (32, 64)}
# Neighbouring positions of planes: 128 bytes of float32.
_LEAST_POSITIONS = {False: 1, True: 32}


def tile(classes: int, planes: bool, dtype: torch.dtype) -> Tile:
    """The tile for C classes, (C, dtype) -> size class:

    rows, C <= 2048: the power of two at or above C, and rows that make it 2048 elements, 4 warps
    rows, C <= 8192: one row, 8 and 16 warps; rows beyond: parts of 4096 classes, 8 warps
    planes, C <= 256: 32 positions or more; planes beyond: 32 positions x 64 classes, 4 warps
    float64: as many elements by twice the warps
    """
    doubles = dtype == torch.float64
    most = _MOST_CLASSES[planes] // (2 if doubles else 1)
    tiled = classes > most
    if tiled:
        positions, width = _PART[planes]
        if doubles and not planes:
            width //= 2
    else:
        width = max(16, triton.next_power_of_2(classes))
        positions = max(_LEAST_POSITIONS[planes], _ELEMENTS // width)
    warps = positions * width // (32 * (8 if doubles else 16))
    return Tile(positions, width, max(1, min(16, warps)), tiled)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # under TRITON_INTERPRET: few, so that they go round
    properties = torch.get_device_module(device).get_device_properties(device)
    for name in ("multi_processor_count", "gpu_subslice_count"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    return 64


def programs(blocks: int, tile: Tile, parts: int, device: torch.device) -> int:
    """Programs along the positions: as many as run at once, or as there are blocks."""
    resident = multiprocessors(device) * tile.registers_resident
    return int(max(1, min(blocks, resident // parts)))
