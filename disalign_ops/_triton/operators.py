"""The operators of rows and class planes: what is launched for them, with what memory.

Signatures and results are those of the schemas in _ops.py, of `row_*` and of `dense_*` alike: the
two differ in how a logit is found (Layout).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ..reference import accumulate_dtype
from . import launch
from .calibrate import calibrate_backward_kernel, calibrate_kernel
from .finish import loss_kernel, sum_kernel
from .loss import backward_kernel, forward_kernel

_REDUCE_NONE = 0
_BY_WEIGHTS = 0
_BLOCK = 256  # of the kernels that sum up

Optional = Tensor | None


@dataclass(frozen=True)
class Layout:
    """Logits (N, C) with neighbouring classes, or (N, C, S) with neighbouring positions."""

    images: int
    inner: int
    classes: int
    image_stride: int
    stride: int
    planes: bool
    dtype: torch.dtype

    @staticmethod
    def of(logits: Tensor) -> Layout:
        if logits.dim() == 2:
            n, classes = logits.shape
            return Layout(1, n, classes, 0, logits.stride(0), False, logits.dtype)
        n, classes, inner = logits.shape
        return Layout(n, inner, classes, logits.stride(0), logits.stride(1), True, logits.dtype)

    @property
    def positions(self) -> int:
        return self.images * self.inner

    @property
    def unit(self) -> int:
        """See loss.py."""
        last = self.inner if self.planes else self.classes
        steps = (self.stride, self.image_stride, *self._contiguous, last)
        return 16 if all(s % 16 == 0 for s in steps) else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """As kernels take them: images, inner, classes, image_stride, stride."""
        inner, classes = self.inner, self.classes
        if self.planes:
            inner //= self.unit
        else:
            classes //= self.unit
        return self.images, inner, classes, *self.strides(self.image_stride, self.stride)

    def strides(self, image_stride: int, stride: int) -> tuple[int, int]:
        return image_stride // self.unit, stride // self.unit

    @property
    def contiguous(self) -> tuple[int, int]:
        """Strides, as kernels take them, of a contiguous tensor of this shape."""
        return self.strides(*self._contiguous)

    @property
    def _contiguous(self) -> tuple[int, int]:
        return (self.classes * self.inner, self.inner) if self.planes else (0, self.classes)


def vector(logits: Tensor, entries: int) -> Tensor:
    return logits.new_empty((entries,), dtype=accumulate_dtype(logits.dtype))


def arithmetic(logits: Tensor) -> Any:
    return tl.float64 if logits.dtype == torch.float64 else tl.float32


def sum_of(sums: Tensor, denominator: Tensor | None, entries: int, offset: int = 0) -> Tensor:
    """Over the programs of [programs][...]: `entries` from `offset` on; see sum_kernel."""
    out = sums.new_empty((entries,))
    count, stride = sums.shape[0], sums.stride(0)
    if entries:
        wrap_triton(sum_kernel)[(triton.cdiv(entries, _BLOCK),)](
            sums.view(-1)[offset:], denominator, out, count, entries, stride, BLOCK=_BLOCK,
            num_warps=4,
        )  # fmt: skip
    return out


def class_gradients(
    sums: Tensor | None, denominator: Tensor | None, wanted: tuple[bool, bool], empty: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of scale and bias from [programs][2][classes]."""
    grads = [empty.new_empty((0,)), empty.new_empty((0,))]
    for k in (0, 1):
        if wanted[k]:
            assert sums is not None
            classes = sums.shape[2]
            grads[k] = sum_of(sums, denominator, classes, k * classes)
    return grads[0], grads[1]


@dataclass(frozen=True)
class Given:
    """What the loss operators are called with, forward and backward."""

    logits: Tensor
    target: Tensor
    weight: Optional
    scale: Optional
    bias: Optional
    confidence: Optional
    prior: Optional
    margin: Optional
    sample_weight: Optional
    ignore_index: int
    label_smoothing: float
    focal_gamma: float

    @property
    def tensors(self) -> tuple[Optional, ...]:
        weights = None
        if self.weight is not None and self.label_smoothing > 0:
            weights = self.weight.sum()
        elif self.weight is not None:
            weights = self.weight  # its first entry is read, and not used
        return (
            self.logits, self.target, self.weight, self.scale, self.bias, self.confidence,
            self.prior, self.margin, self.sample_weight, weights,
        )  # fmt: skip


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
    reduction: int,
    normalizer: int,
    want_logits: bool,
    want_scale: bool,
    want_bias: bool,
    want_confidence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, denominator, and the gradients of the calibration for an upstream of 1.

    That of the logits is backward's: _autograd.py never asks for it here.
    """
    given = Given(
        logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
        ignore_index, label_smoothing, focal_gamma,
    )  # fmt: skip
    layout = Layout.of(logits)
    tile = launch.tile(layout.classes, layout.planes, logits.dtype)
    n = layout.positions
    blocks = layout.images * triton.cdiv(layout.inner, tile.positions)
    programs = launch.programs(blocks, tile, 1, logits.device)
    each = reduction == _REDUCE_NONE
    row_max, row_sum = vector(logits, n), vector(logits, n)
    loss = vector(logits, n) if each else logits.new_empty((), dtype=row_max.dtype)
    divisor = logits.new_empty((), dtype=torch.float64)
    block_sums = None if each else logits.new_zeros((programs, 2), dtype=torch.float64)
    classes = want_scale or want_bias
    class_sums = None
    if classes and not tile.tiled:
        class_sums = logits.new_zeros((programs, 2, layout.classes), dtype=row_max.dtype)
    grad_confidence = vector(logits, n) if want_confidence else None
    if n:
        wrap_triton(forward_kernel)[(programs,)](
            *given.tensors, loss if each else None, row_max, row_sum, block_sums, class_sums,
            grad_confidence, *layout.sizes, given.ignore_index, given.label_smoothing,
            given.focal_gamma, int(normalizer == _BY_WEIGHTS),
            PLANES=layout.planes, UNIT=layout.unit, TILED=tile.tiled,
            POSITIONS=tile.positions, CLASSES=tile.classes, ACC=arithmetic(logits),
            **tile.options(logits.device),
        )  # fmt: skip
    wrap_triton(loss_kernel)[(1,)](
        block_sums, denominator, None if each else loss, divisor, programs, n, reduction,
        normalizer, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    if classes and class_sums is None and n:
        # Their sums, not yet divided: the loss's gradient for an upstream gradient of 1.
        class_sums = _sums_of_classes(given, row_max, row_sum)
    scale, bias = class_gradients(class_sums, divisor, (want_scale, want_bias), row_max)
    if grad_confidence is not None:
        confidence = sum_of(grad_confidence.view(1, n), divisor, n)
    else:
        confidence = row_max.new_empty((0,))
    return loss, row_max, row_sum, divisor, logits.new_empty((0,)), scale, bias, confidence


def _launch_backward(
    given: Given,
    upstream: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    denominator: Tensor | None,
    target_logits: Tensor | None,
    grad_logits: Tensor | None,
    classes: bool,
    confidence: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Launches backward_kernel; returns class_sums and confidence_sums, None where not wanted."""
    logits = given.logits
    layout = Layout.of(logits)
    tile = launch.tile(layout.classes, layout.planes, logits.dtype)
    parts = triton.cdiv(layout.classes, tile.classes)
    blocks = layout.images * triton.cdiv(layout.inner, tile.positions)
    programs = launch.programs(blocks, tile, parts, logits.device)
    n, dtype = layout.positions, statistics[0].dtype
    class_sums = confidence_sums = None
    if classes:
        class_sums = logits.new_zeros((programs, 2, layout.classes), dtype=dtype)
    if confidence:
        confidence_sums = logits.new_empty((parts, n), dtype=dtype)
    strides = layout.contiguous
    if grad_logits is logits:
        strides = layout.strides(layout.image_stride, layout.stride)
    each = upstream is not None and upstream.dim() > 0
    if n:
        wrap_triton(backward_kernel)[(programs, parts)](
            *given.tensors, upstream, *statistics, denominator, target_logits, grad_logits,
            class_sums, confidence_sums, *layout.sizes, int(each), *strides, given.ignore_index,
            given.label_smoothing, given.focal_gamma,
            PLANES=layout.planes, UNIT=layout.unit, POSITIONS=tile.positions,
            CLASSES=tile.classes, ACC=arithmetic(logits), **tile.options(logits.device),
        )  # fmt: skip
    return class_sums, confidence_sums


def _sums_of_classes(given: Given, row_max: Tensor, row_sum: Tensor) -> Tensor | None:
    return _launch_backward(given, None, (row_max, row_sum), None, None, None, True, False)[0]


def _target_logits(given: Given) -> Tensor:
    """z_t of every position; for a backward that writes over the logits, where not every program
    that needs it has read it.
    """
    logits = given.logits
    t = given.target.reshape(-1).to(torch.int64)
    t = torch.where(t == given.ignore_index, 0, t)
    if logits.dim() == 2:
        z = logits.gather(1, t[:, None])
    else:
        z = logits.gather(1, t.view(logits.shape[0], 1, logits.shape[2]))
    return z.reshape(-1).to(accumulate_dtype(logits.dtype))


def _backward(
    grad_loss: Tensor, arguments: tuple[Any, ...], in_place: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of logits (in place: over them, the result empty), scale, bias, confidence."""
    given = Given(*arguments[:9], *arguments[12:15])
    row_max, row_sum, denominator = arguments[9:12]
    want_logits, want_scale, want_bias, want_confidence = arguments[15:]
    logits = given.logits
    grad_logits = target_logits = None
    if want_logits and in_place:
        grad_logits = logits
        if given.focal_gamma > 0 or want_confidence:
            target_logits = _target_logits(given)
    elif want_logits:
        grad_logits = logits.new_empty(logits.shape)
    class_sums, confidence_sums = _launch_backward(
        given, grad_loss, (row_max, row_sum), denominator, target_logits, grad_logits,
        want_scale or want_bias, want_confidence,
    )  # fmt: skip
    scale, bias = class_gradients(class_sums, None, (want_scale, want_bias), row_max)
    confidence = row_max.new_empty((0,))
    if confidence_sums is not None:
        confidence = sum_of(confidence_sums, None, confidence_sums.shape[1])
    if grad_logits is None or in_place:
        grad_logits = logits.new_empty((0,))
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
    want_logits: bool,
    want_scale: bool,
    want_bias: bool,
    want_confidence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(
        grad_loss,
        (
            logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
            row_max, row_sum, denominator, ignore_index, label_smoothing, focal_gamma,
            want_logits, want_scale, want_bias, want_confidence,
        ),
        in_place=False,
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
    want_logits: bool,
    want_scale: bool,
    want_bias: bool,
    want_confidence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(
        grad_loss,
        (
            logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
            row_max, row_sum, denominator, ignore_index, label_smoothing, focal_gamma,
            want_logits, want_scale, want_bias, want_confidence,
        ),
        in_place=True,
    )  # fmt: skip


def calibrate(logits: Tensor, scale: Tensor, bias: Tensor, confidence: Tensor) -> Tensor:
    out = logits.new_empty(logits.shape)
    layout = Layout.of(logits)
    tile = launch.tile(layout.classes, layout.planes, logits.dtype)
    parts = triton.cdiv(layout.classes, tile.classes)
    blocks = layout.images * triton.cdiv(layout.inner, tile.positions)
    if layout.positions:
        wrap_triton(calibrate_kernel)[
            (launch.programs(blocks, tile, parts, logits.device), parts)
        ](
            logits, scale, bias, confidence, out, *layout.sizes, *layout.contiguous,
            PLANES=layout.planes, UNIT=layout.unit, POSITIONS=tile.positions,
            CLASSES=tile.classes, ACC=arithmetic(logits), **tile.options(logits.device),
        )  # fmt: skip
    return out


def calibrate_backward(
    grad_output: Tensor,
    logits: Tensor,
    scale: Tensor,
    bias: Tensor,
    confidence: Tensor,
    want_logits: bool,
    want_scale: bool,
    want_bias: bool,
    want_confidence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = Layout.of(logits)
    tile = launch.tile(layout.classes, layout.planes, logits.dtype)
    parts = triton.cdiv(layout.classes, tile.classes)
    blocks = layout.images * triton.cdiv(layout.inner, tile.positions)
    programs = launch.programs(blocks, tile, parts, logits.device)
    n, dtype = layout.positions, accumulate_dtype(logits.dtype)
    grad_logits = logits.new_empty(logits.shape if want_logits else (0,))
    class_sums = confidence_sums = None
    if want_scale or want_bias:
        class_sums = logits.new_zeros((programs, 2, layout.classes), dtype=dtype)
    if want_confidence:
        confidence_sums = logits.new_empty((parts, n), dtype=dtype)
    if n:
        wrap_triton(calibrate_backward_kernel)[(programs, parts)](
            grad_output, logits, scale, bias, confidence, grad_logits if want_logits else None,
            class_sums, confidence_sums, *layout.sizes, *layout.contiguous,
            PLANES=layout.planes, UNIT=layout.unit, POSITIONS=tile.positions,
            CLASSES=tile.classes, ACC=arithmetic(logits), **tile.options(logits.device),
        )  # fmt: skip
    empty = logits.new_empty((0,), dtype=dtype)
    grad_scale, grad_bias = class_gradients(class_sums, None, (want_scale, want_bias), empty)
    found = empty if confidence_sums is None else sum_of(confidence_sums, None, n)
    return grad_logits, grad_scale, grad_bias, found
