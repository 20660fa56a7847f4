"""The operators of logits (N, C, h, w) under a target of another size; as operators.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from . import launch
from .finish import loss_kernel
from .operators import Given, arithmetic, class_gradients, sum_of, vector
from .upsample import axis_kernel, forward_kernel
from .upsample_backward import backward_kernel, factors_kernel

_REDUCE_NONE = 0
_BY_WEIGHTS = 0
_BLOCK = 256


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
        wrap_triton(axis_kernel)[(triton.cdiv(max(out, size + 1), _BLOCK),)](
            axis.source, axis.weight, axis.first, size, out, int(align_corners), BLOCK=_BLOCK,
            num_warps=4,
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
    def positions(self) -> int:
        return self.logits.shape[0] * self.out_height * self.out_width

    @property
    def nodes(self) -> int:
        return self.logits.shape[0] * self.logits.shape[2] * self.logits.shape[3]


def _options(logits: Tensor, tile: launch.Tile) -> dict[str, Any]:
    return {"ACC": arithmetic(logits), **tile.options(logits.device)}


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
    prior: Tensor | None,
    margin: Tensor | None,
    sample_weight: Tensor | None,
    denominator: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    focal_gamma: float,
    align_corners: bool,
    want_details: bool,
    reduction: int,
    normalizer: int,
    want_logits: bool,
    want_scale: bool,
    want_bias: bool,
    want_confidence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As operators.forward, and position_loss, probability and prediction, empty unless wanted."""
    given = Given(
        logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
        ignore_index, label_smoothing, focal_gamma,
    )  # fmt: skip
    grid = Grid.of(logits, target.shape[1], target.shape[2], align_corners)
    tile = _tiles(logits.dtype)[0]
    n = grid.positions
    blocks = logits.shape[0] * triton.cdiv(grid.out_height * grid.out_width, tile.positions)
    programs = launch.programs(blocks, tile, 1, logits.device)
    each = reduction == _REDUCE_NONE
    row_max, row_sum = vector(logits, n), vector(logits, n)
    divisor = logits.new_empty((), dtype=torch.float64)
    loss = vector(logits, n) if each else logits.new_empty((), dtype=row_max.dtype)
    position_loss = vector(logits, n if want_details and not each else 0)
    details = n if want_details else 0
    probability = vector(logits, details)
    prediction = logits.new_empty((details,), dtype=torch.int64)
    losses = loss if each else position_loss if want_details else None
    block_sums = None if each else logits.new_zeros((programs, 2), dtype=torch.float64)
    if n:
        wrap_triton(forward_kernel)[(programs,)](
            *given.tensors, grid.y.source, grid.y.weight, grid.x.source, grid.x.weight, losses,
            row_max, row_sum, block_sums, probability if want_details else None,
            prediction if want_details else None, *grid.sizes, ignore_index, label_smoothing,
            focal_gamma, int(normalizer == _BY_WEIGHTS), POSITIONS=tile.positions,
            CLASSES=tile.classes, **_options(logits, tile),
        )  # fmt: skip
    wrap_triton(loss_kernel)[(1,)](
        block_sums, denominator, None if each else loss, divisor, programs, n, reduction,
        normalizer, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    _, grad_scale, grad_bias, grad_confidence = _gradients(
        given, grid, None, (row_max, row_sum), divisor,
        (False, want_scale, want_bias, want_confidence),
    )  # fmt: skip
    return (
        loss, row_max, row_sum, divisor, logits.new_empty((0,)), grad_scale, grad_bias,
        grad_confidence, position_loss, probability, prediction,
    )  # fmt: skip


def _gradients(
    given: Given,
    grid: Grid,
    upstream: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    denominator: Tensor,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The wanted gradients of logits (contiguous), scale, bias and confidence; others empty."""
    logits, dtype = given.logits, statistics[0].dtype
    want_logits, want_scale, want_bias, want_confidence = wanted
    empty = vector(logits, 0)
    if True not in wanted:
        return logits.new_empty((0,)), empty, empty.clone(), empty.clone()
    n, classes, h, w = logits.shape
    tile = _tiles(logits.dtype)[1]
    grad_logits = logits.new_empty(logits.shape if want_logits else (0,))
    parts = triton.cdiv(classes, tile.classes)
    blocks = n * h * triton.cdiv(w, tile.positions)
    programs = launch.programs(blocks, tile, parts, logits.device)
    targets = logits.new_empty((grid.positions,), dtype=torch.int32)
    factors = vector(logits, 4 * grid.positions)
    class_sums = confidence_sums = None
    if want_scale or want_bias:
        class_sums = logits.new_zeros((programs, 2, classes), dtype=dtype)
    if want_confidence:
        confidence_sums = logits.new_empty((parts, grid.nodes), dtype=dtype)
    each = upstream is not None and upstream.dim() > 0
    options = _options(logits, tile)
    tensors = given.tensors
    if grid.nodes:
        outputs = triton.cdiv(grid.out_height * grid.out_width, 128)
        wrap_triton(factors_kernel)[(n * outputs,)](
            *tensors, grid.y.source, grid.y.weight, grid.x.source, grid.x.weight, upstream,
            *statistics, denominator, targets, factors, *grid.sizes, int(each),
            given.ignore_index, given.label_smoothing, given.focal_gamma, POSITIONS=128, **options,
        )  # fmt: skip
        wrap_triton(backward_kernel)[(programs, parts)](
            logits, given.weight, given.scale, given.bias, given.confidence, given.prior,
            given.margin, grid.y.weight, grid.y.first, grid.x.weight, grid.x.first, targets,
            factors, grad_logits if want_logits else None, class_sums, confidence_sums,
            *grid.sizes, given.label_smoothing, NODES=tile.positions, CLASSES=tile.classes,
            **options,
        )  # fmt: skip
    scale, bias = class_gradients(class_sums, None, (want_scale, want_bias), empty)
    confidence = empty if confidence_sums is None else sum_of(confidence_sums, None, grid.nodes)
    return grad_logits, scale, bias, confidence


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
    prior: Tensor | None,
    margin: Tensor | None,
    sample_weight: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    denominator: Tensor,
    ignore_index: int,
    label_smoothing: float,
    focal_gamma: float,
    align_corners: bool,
    want_details: bool,
    want_logits: bool,
    want_scale: bool,
    want_bias: bool,
    want_confidence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = Given(
        logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
        ignore_index, label_smoothing, focal_gamma,
    )  # fmt: skip
    grid = Grid.of(logits, target.shape[1], target.shape[2], align_corners)
    return _gradients(
        given, grid, grad_loss, (row_max, row_sum), denominator,
        (want_logits, want_scale, want_bias, want_confidence),
    )  # fmt: skip


def backward_in_place(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
    prior: Tensor | None,
    margin: Tensor | None,
    sample_weight: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    denominator: Tensor,
    ignore_index: int,
    label_smoothing: float,
    focal_gamma: float,
    align_corners: bool,
    want_details: bool,
    want_logits: bool,
    want_scale: bool,
    want_bias: bool,
    want_confidence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By way of a buffer: programs read the nodes around theirs."""
    found, *others = backward(
        grad_loss, logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
        row_max, row_sum, denominator, ignore_index, label_smoothing, focal_gamma, align_corners,
        want_details, want_logits, want_scale, want_bias, want_confidence,
    )  # fmt: skip
    if want_logits:
        logits.copy_(found)
    return logits.new_empty((0,)), others[0], others[1], others[2]


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
    tile = _tiles(logits.dtype)[0]
    prediction = logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)
    blocks = logits.shape[0] * triton.cdiv(height * width, tile.positions)
    if grid.positions:
        wrap_triton(forward_kernel)[(launch.programs(blocks, tile, 1, logits.device),)](
            logits, None, None, scale, bias, confidence, prior, None, None, None, grid.y.source,
            grid.y.weight, grid.x.source, grid.x.weight, None, None, None, None, None, prediction,
            *grid.sizes, 0, 0.0, 0.0, 0, POSITIONS=tile.positions, CLASSES=tile.classes,
            **_options(logits, tile),
        )  # fmt: skip
    return prediction
