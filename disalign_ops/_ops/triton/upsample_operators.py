"""The operators of logits (N, C, h, w) under a target of another size; arguments: call.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..codes import CALIBRATION, DETAILS, LOGITS
from ..new_gradient import new_gradient
from . import launch
from .call import Backward, CalibrationSums, Forward, Loss, arithmetic, vector
from .soft_upsample import soft_factors_kernel, soft_upsample_kernel
from .upsample import axis_kernel, forward_kernel
from .upsample_backward import backward_kernel, factors_kernel

_BLOCK = 256  # of axis_kernel
_FACTORS = launch.Tile(128, 1, 4, False)


def _tiles(dtype: torch.dtype) -> tuple[launch.Tile, launch.Tile]:
    """Of outputs in forward and of nodes in backward, by classes: each needs four nodes around."""
    if dtype == torch.float64:
        return launch.Tile(16, 16, 4, True), launch.Tile(16, 16, 4, True)
    return launch.Tile(32, 16, 4, True), launch.Tile(16, 32, 4, True)


@dataclass(frozen=True)
class Axis:
    source: Tensor
    weight: Tensor
    first: Tensor

    @staticmethod
    def of(size: int, out: int, align_corners: bool, like: Tensor) -> Axis:
        axis = Axis(
            like.new_empty((out,), dtype=torch.int32),
            vector(like, out),
            like.new_empty((size + 1,), dtype=torch.int32),
        )
        launch.start(
            axis_kernel, (triton.cdiv(max(out, size + 1), _BLOCK),),
            (axis.source, axis.weight, axis.first, size, out, int(align_corners)), BLOCK=_BLOCK,
        )  # fmt: skip
        return axis


@dataclass(frozen=True)
class Grid:
    """Sizes and strides as the kernels take them, and the axes."""

    logits: Tensor
    out_height: int
    out_width: int
    y: Axis
    x: Axis

    @staticmethod
    def of(logits: Tensor, height: int, width: int, align_corners: bool) -> Grid:
        return Grid(
            logits, height, width,
            Axis.of(logits.shape[2], height, align_corners, logits),
            Axis.of(logits.shape[3], width, align_corners, logits),
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, ...]:
        n, classes, h, w = self.logits.shape
        return n, classes, h, w, self.out_height, self.out_width, *self.logits.stride()

    @property
    def axes(self) -> tuple[Tensor, ...]:
        return self.y.source, self.y.weight, self.x.source, self.x.weight

    @property
    def positions(self) -> int:
        return self.logits.shape[0] * self.out_height * self.out_width

    @property
    def nodes(self) -> int:
        return self.logits.shape[0] * self.logits.shape[2] * self.logits.shape[3]

    def blocks(self, outputs: int) -> int:
        return int(self.logits.shape[0] * triton.cdiv(self.out_height * self.out_width, outputs))

    @property
    def forward_programs(self) -> int:
        tile = _tiles(self.logits.dtype)[0]
        return launch.programs(self.blocks(tile.positions), tile, 1, self.logits.device)

    def start_forward(self, arguments: tuple[Any, ...], kernel: Any = forward_kernel) -> None:
        if self.positions:
            tile = _tiles(self.logits.dtype)[0]
            launch.start(
                kernel, (self.forward_programs,), arguments, tile, self.logits.device,
                POSITIONS=tile.positions, CLASSES=tile.classes, ACC=arithmetic(self.logits),
            )  # fmt: skip


def forward(*arguments: Any) -> list[Tensor]:
    """As operators.forward, and the details."""
    call = Forward.of(arguments)
    given, logits = call.given, call.given.logits
    grid = Grid.of(logits, *given.target.shape[-2:], *call.options)
    loss = Loss(call, grid.positions, grid.forward_programs)
    details, losses = [], loss.value if call.each else None
    probability = prediction = None
    if call.wanted & DETAILS:
        probability = vector(logits, grid.positions)
        prediction = logits.new_empty((grid.positions,), dtype=torch.int64)
        details = [probability, prediction]
        if losses is None:
            losses = vector(logits, grid.positions)
            details.insert(0, losses)
    if given.soft:  # which has no details
        arguments = (
            *given.soft_tensors, *grid.axes, losses, *loss.statistics, loss.block_sums, *grid.sizes,
            *given.target.stride()[:2], *given.soft_numbers, call.by_weights,
        )  # fmt: skip
        grid.start_forward(arguments, soft_upsample_kernel)
    else:
        grid.start_forward((
            *given.tensors, given.weights, *grid.axes, losses, *loss.statistics, loss.block_sums,
            probability, prediction, *grid.sizes, *given.numbers, call.by_weights,
        ))  # fmt: skip
    results = loss.finish()
    wanted = call.wanted & CALIBRATION
    again = Backward(given, None, loss.statistics, loss.denominator, call.options, wanted)
    return results + _gradients(again, grid) + details


def _factors(call: Backward, grid: Grid) -> tuple[Tensor | None, Tensor]:
    """Targets and factors of the outputs; of class probabilities the factors alone."""
    given, logits = call.given, call.given.logits
    factors = vector(logits, (3 if given.soft else 4) * grid.positions)
    constants = {"POSITIONS": _FACTORS.positions, "ACC": arithmetic(logits)}
    if given.soft:
        blocks = triton.cdiv(grid.positions, _FACTORS.positions)
        launch.start(
            soft_factors_kernel, (blocks,),
            (
                given.tensors[-1], call.grad_loss, *call.statistics, call.denominator, factors,
                grid.positions, call.upstream_stride,
            ),
            _FACTORS, logits.device, **constants,
        )  # fmt: skip
        return None, factors
    targets = logits.new_empty((grid.positions,), dtype=torch.int32)
    launch.start(
        factors_kernel, (grid.blocks(_FACTORS.positions),),
        (
            *given.tensors, given.weights, *grid.axes, call.grad_loss, *call.statistics,
            call.denominator, targets, factors, *grid.sizes, call.upstream_stride, *given.numbers,
        ),
        _FACTORS, logits.device, **constants,
    )  # fmt: skip
    return targets, factors


def _gradients(call: Backward, grid: Grid) -> list[Tensor]:
    given, logits, wanted = call.given, call.given.logits, call.wanted
    n, classes, h, w = logits.shape
    whole = [new_gradient(logits)] if wanted & LOGITS else []
    tile = _tiles(logits.dtype)[1]
    parts = triton.cdiv(classes, tile.classes)
    programs = launch.programs(n * h * triton.cdiv(w, tile.positions), tile, parts, logits.device)
    sums = CalibrationSums.of(logits, wanted, grid.nodes, programs, parts, grid.nodes)
    if grid.nodes and wanted:
        targets, factors = _factors(call, grid)
        _, target, weight, scale, bias, confidence, prior, margin, _ = given.tensors
        soft = given.soft
        launch.start(
            backward_kernel, (programs, parts),
            (
                logits, target if soft else None, weight, scale, bias, confidence, prior, margin,
                grid.y.weight, grid.y.first, grid.x.weight, grid.x.first, targets, factors,
                whole[0] if whole else None, sums.classes, sums.confidence, *grid.sizes,
                *(given.target.stride()[:2] if soft else (0, 0)), *given.soft_numbers,
            ),
            tile, logits.device,
            NODES=tile.positions, CLASSES=tile.classes, ACC=arithmetic(logits),
        )  # fmt: skip
    return whole + sums.gradients(None, wanted)


def backward(*arguments: Any) -> list[Tensor]:
    """The gradients that are wanted of logits (contiguous), scale, bias and confidence."""
    call = Backward.of(arguments)
    height, width = call.given.target.shape[-2:]
    return _gradients(call, Grid.of(call.given.logits, height, width, *call.options))


def backward_in_place(*arguments: Any) -> list[Tensor]:
    """The same, that of the logits written over them, by way of a buffer: programs read the nodes
    around theirs.
    """
    found = backward(*arguments)
    if arguments[-1] & LOGITS:
        arguments[1].copy_(found.pop(0))
    return found


def predict(
    logits: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
    prior: Tensor | None,
    height: int,
    width: int,
    align_corners: bool,
) -> Tensor:
    """The most probable class of every output."""
    grid = Grid.of(logits, height, width, align_corners)
    prediction = logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)
    nothing = (None,) * 3
    grid.start_forward((
        logits, None, None, scale, bias, confidence, prior, *nothing, *grid.axes,
        *nothing, None, None, prediction, *grid.sizes, 0, 0.0, 0.0, 0,
    ))  # fmt: skip
    return prediction
