"""How logits, and class probabilities beside them, are divided over the programs of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from ..codes import BIAS, CONFIDENCE, SCALE
from . import launch
from .call import arithmetic

CLASS_SUMS = SCALE | BIAS


def _strides(tensor: Tensor) -> tuple[int, int]:
    """From outer to outer (0 of rows), and from row to row or from class to class."""
    return (tensor.stride(0), tensor.stride(1)) if tensor.dim() == 3 else (0, tensor.stride(0))


@dataclass(frozen=True)
class LogitsView:
    """Logits (N, C) with neighbouring classes, or (N, C, S) with neighbouring positions, and how
    they are divided over programs. target_strides: those of class probabilities, else none.
    """

    logits: Tensor
    outer: int
    inner: int
    classes: int
    outer_stride: int
    stride: int
    planes: bool
    wanted: int
    target_strides: tuple[int, ...] = ()

    @staticmethod
    def of(logits: Tensor, wanted: int, target: Tensor | None = None) -> LogitsView:
        """wanted: gradients of what is launched; its tiles depend on them."""
        soft = target is not None and target.is_floating_point()
        beside = _strides(target) if target is not None and soft else ()
        planes = logits.dim() == 3
        outer, classes, inner = logits.shape if planes else (1, *logits.shape[::-1])
        return LogitsView(logits, outer, inner, classes, *_strides(logits), planes, wanted, beside)

    @property
    def positions(self) -> int:
        return self.outer * self.inner

    @property
    def tile(self) -> launch.Tile:
        kind = self.classes, self.planes, self.logits.dtype
        if self.wanted & CLASS_SUMS:
            return launch.tile(*kind)
        return launch.passing_tile(*kind, self.unit > 1, bool(self.wanted & CONFIDENCE))

    @property
    def parts(self) -> int:
        """Programs that a position's classes are divided over."""
        return int(triton.cdiv(self.classes, self.tile.classes)) if self.wanted & CLASS_SUMS else 1

    def programs(self, parts: int) -> int:
        """Along the positions, beside `parts` along the classes."""
        blocks = self.outer * triton.cdiv(self.inner, self.tile.positions)
        return launch.programs(blocks, self.tile, parts, self.logits.device)

    @property
    def unit(self) -> int:
        """See loss.py."""
        last = self.inner if self.planes else self.classes
        own = self.stride, self.outer_stride, *self._contiguous
        steps = (*own, *self.target_strides, last)
        return 16 if all(s % 16 == 0 for s in steps) else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """As kernels take them: outer, inner, classes, outer_stride, stride, and these two again of
        class probabilities.
        """
        inner, classes = self.inner, self.classes
        if self.planes:
            inner //= self.unit
        else:
            classes //= self.unit
        beside = (stride // self.unit for stride in self.target_strides)
        return self.outer, inner, classes, *self.strides_of(self.logits), *beside

    def strides_of(self, other: Tensor | None) -> tuple[int, int]:
        """Of a tensor of this shape, as kernels take them: those of the logits, contiguous ones, or
        new_gradient's. None: any.
        """
        outer_stride, stride = (0, 0) if other is None else _strides(other)
        return outer_stride // self.unit, stride // self.unit

    @property
    def _contiguous(self) -> tuple[int, int]:
        return (self.classes * self.inner, self.inner) if self.planes else (0, self.classes)

    def start(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        if self.positions:
            launch.start(
                kernel, grid, arguments, self.tile, self.logits.device, PLANES=self.planes,
                UNIT=self.unit, POSITIONS=self.tile.positions, CLASSES=self.tile.classes,
                ACC=arithmetic(self.logits),
            )  # fmt: skip
