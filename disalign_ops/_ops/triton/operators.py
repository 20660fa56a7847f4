"""The operators of rows and class planes: what is launched for them, with what memory.

Arguments: call.py. `row_*` and `dense_*` are the same functions: they differ in how a logit is
found (LogitsView).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..codes import BIAS, CALIBRATION, CONFIDENCE, LOGITS, SCALE, SHARD_VALUES
from ..reference import IGNORED, accumulate_dtype, class_indices
from . import launch
from .calibrate import calibrate_backward_kernel, calibrate_kernel
from .call import Backward, CalibrationSums, Forward, Given, Loss, arithmetic, vector
from .loss import forward_kernel
from .loss_backward import backward_kernel

_CLASS_SUMS = SCALE | BIAS


@dataclass(frozen=True)
class LogitsView:
    """Logits (N, C) with neighbouring classes, or (N, C, S) with neighbouring positions, and how
    they are divided over programs.
    """

    logits: Tensor
    outer: int
    inner: int
    classes: int
    outer_stride: int
    stride: int
    planes: bool
    wanted: int

    @staticmethod
    def of(logits: Tensor, wanted: int) -> LogitsView:
        """wanted: gradients of what is launched; its tiles depend on them."""
        if logits.dim() == 2:
            n, classes = logits.shape
            return LogitsView(logits, 1, n, classes, 0, logits.stride(0), False, wanted)
        n, classes, inner = logits.shape
        outer_stride, stride, _ = logits.stride()
        return LogitsView(logits, n, inner, classes, outer_stride, stride, True, wanted)

    @property
    def positions(self) -> int:
        return self.outer * self.inner

    @property
    def tile(self) -> launch.Tile:
        kind = self.classes, self.planes, self.logits.dtype
        if self.wanted & _CLASS_SUMS:
            return launch.tile(*kind)
        return launch.passing_tile(*kind, self.unit > 1, bool(self.wanted & CONFIDENCE))

    @property
    def parts(self) -> int:
        """Programs that a position's classes are divided over."""
        return int(triton.cdiv(self.classes, self.tile.classes)) if self.wanted & _CLASS_SUMS else 1

    def programs(self, parts: int) -> int:
        """Along the positions, beside `parts` along the classes."""
        blocks = self.outer * triton.cdiv(self.inner, self.tile.positions)
        return launch.programs(blocks, self.tile, parts, self.logits.device)

    @property
    def unit(self) -> int:
        """See loss.py."""
        last = self.inner if self.planes else self.classes
        steps = (self.stride, self.outer_stride, *self._contiguous, last)
        return 16 if all(s % 16 == 0 for s in steps) else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """As kernels take them: outer, inner, classes, outer_stride, stride."""
        inner, classes = self.inner, self.classes
        if self.planes:
            inner //= self.unit
        else:
            classes //= self.unit
        return self.outer, inner, classes, *self.strides

    @property
    def strides(self) -> tuple[int, int]:
        """As kernels take them."""
        return self.outer_stride // self.unit, self.stride // self.unit

    @property
    def contiguous(self) -> tuple[int, int]:
        """Strides, as kernels take them, of a contiguous tensor of this shape."""
        outer_stride, stride = self._contiguous
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


def forward(*arguments: Any) -> list[Tensor]:
    """Loss, statistics, denominator, and the gradients of the calibration for an upstream of 1.

    That of the logits is backward's: autograd.py never asks for it here.
    """
    call = Forward.of(arguments)
    given, logits = call.given, call.given.logits
    class_sums = call.wanted & _CLASS_SUMS
    view = LogitsView.of(logits, call.wanted & CALIBRATION)
    # Where one tile has not all classes, their sums are backward's.
    later = class_sums and view.tile.tiled
    here = call.wanted & (CONFIDENCE if later else CALIBRATION)
    if later:
        view = LogitsView.of(logits, here)
    n = view.positions
    loss = Loss(call, n, view.programs(1))
    sums = CalibrationSums.of(logits, here, n, loss.programs, 1, n)
    view.start(
        forward_kernel, (loss.programs,),
        (
            *given.tensors, given.weights, loss.value if call.each else None, *loss.statistics,
            loss.block_sums, sums.classes, sums.confidence, None, *view.sizes, *given.numbers,
            call.by_weights,
        ),
    )  # fmt: skip
    results = loss.finish()
    if later:
        # For an upstream gradient of 1, not yet divided.
        again = Backward(given, None, loss.statistics, None, (), class_sums)
        sums = CalibrationSums(_gradients(again, None, None).classes, sums.confidence)
    return results + sums.gradients(loss.denominator, call.wanted)


def _gradients(
    call: Backward, grad_logits: Tensor | None, target_logits: Tensor | None
) -> CalibrationSums:
    """Fills in grad_logits, unless None, and returns what sums there are over programs."""
    given, logits = call.given, call.given.logits
    view = LogitsView.of(logits, call.wanted)
    programs, n = view.programs(view.parts), view.positions
    sums = CalibrationSums.of(logits, call.wanted, n, programs, view.parts, n)
    view.start(
        backward_kernel, (programs, view.parts),
        (
            *given.tensors, given.weights, call.grad_loss, *call.statistics, call.denominator,
            target_logits, None, grad_logits, sums.classes, sums.confidence, *view.sizes,
            call.upstream_stride,
            *(view.strides if grad_logits is logits else view.contiguous), *given.numbers,
        ),
    )  # fmt: skip
    return sums


def _new_gradient(logits: Tensor, wanted: int) -> list[Tensor]:
    """That of the logits, if it is wanted."""
    return [logits.new_empty(logits.shape)] if wanted & LOGITS else []


def _target_logits(given: Given) -> Tensor:
    """z_t of every position; for a backward that writes over the logits, where not every program
    that needs it has read it.
    """
    logits = given.logits
    t, valid = class_indices(given.target.reshape(-1), given.ignore_index)
    t = torch.where(valid, t, 0)
    if logits.dim() == 2:
        z = logits.gather(1, t[:, None])
    else:
        z = logits.gather(1, t.view(logits.shape[0], 1, logits.shape[2]))
    return z.reshape(-1).to(accumulate_dtype(logits.dtype))


def backward(*arguments: Any) -> list[Tensor]:
    """The gradients that are wanted of logits, scale, bias and confidence."""
    call = Backward.of(arguments)
    whole = _new_gradient(call.given.logits, call.wanted)
    sums = _gradients(call, whole[0] if whole else None, None)
    return whole + sums.gradients(None, call.wanted)


def backward_in_place(*arguments: Any) -> list[Tensor]:
    """The same, that of the logits written over them, and no result."""
    call = Backward.of(arguments)
    given, wanted = call.given, call.wanted
    target_logits = None
    if wanted & LOGITS and (given.focal_gamma > 0 or wanted & CONFIDENCE):
        target_logits = _target_logits(given)
    sums = _gradients(call, given.logits if wanted & LOGITS else None, target_logits)
    return sums.gradients(None, wanted)


def _shard_numbers(share: float) -> tuple[int, float, float]:
    """As the kernels take them: ignore_index, label_smoothing, focal_gamma."""
    return IGNORED, float(share > 0), 0.0


def shard_forward(logits: Tensor, target: Tensor, *rest: Any) -> Tensor:
    """The sums of a shard's rows; arguments as in reference.shard_sums."""
    *vectors, _, share = rest
    scale = vectors[1]
    view = LogitsView.of(logits, 0 if scale is None else CONFIDENCE)  # whose sums are among them
    sums = vector(logits, SHARD_VALUES * view.positions).view(SHARD_VALUES, -1)
    nothing = (None,) * 6
    view.start(
        forward_kernel, (view.programs(1),),
        (
            logits, target, *vectors, None, None, *nothing, sums, *view.sizes,
            *_shard_numbers(share), 0,
        ),
    )  # fmt: skip
    return sums


def _shard_gradients(
    arguments: tuple[Any, ...], wanted: int, grad_logits: Tensor | None
) -> list[Tensor]:
    factors, logits, target, *vectors, _, share = arguments
    view = LogitsView.of(logits, wanted)
    programs, n = view.programs(view.parts), view.positions
    sums = CalibrationSums.of(logits, wanted, n, programs, view.parts, n)
    nothing = (None,) * 5
    view.start(
        backward_kernel, (programs, view.parts),
        (
            logits, target, *vectors, None, None, *nothing, factors, grad_logits, sums.classes,
            sums.confidence, *view.sizes, 0,
            *(view.strides if grad_logits is logits else view.contiguous),
            *_shard_numbers(share),
        ),
    )  # fmt: skip
    return sums.gradients(None, wanted)


def shard_backward(*arguments: Any) -> list[Tensor]:
    """A shard's gradients; arguments as in reference.shard_gradients, then what is wanted."""
    *given, wanted = arguments
    whole = _new_gradient(arguments[1], wanted)
    return whole + _shard_gradients(tuple(given), wanted, whole[0] if whole else None)


def shard_backward_in_place(*arguments: Any) -> list[Tensor]:
    *given, wanted = arguments
    return _shard_gradients(tuple(given), wanted, arguments[1] if wanted & LOGITS else None)


def calibrate(logits: Tensor, scale: Tensor, bias: Tensor, confidence: Tensor) -> Tensor:
    out = logits.new_empty(logits.shape)
    view = LogitsView.of(logits, _CLASS_SUMS)
    view.start(
        calibrate_kernel, (view.programs(view.parts), view.parts),
        (logits, scale, bias, confidence, out, *view.sizes, *view.contiguous),
    )  # fmt: skip
    return out


def calibrate_backward(
    grad_output: Tensor,
    logits: Tensor,
    scale: Tensor,
    bias: Tensor,
    confidence: Tensor,
    wanted: int,
) -> list[Tensor]:
    view = LogitsView.of(logits, _CLASS_SUMS)
    programs, n = view.programs(view.parts), view.positions
    whole = _new_gradient(logits, wanted)
    sums = CalibrationSums.of(logits, wanted, n, programs, view.parts, n)
    view.start(
        calibrate_backward_kernel, (programs, view.parts),
        (
            grad_output, logits, scale, bias, confidence, whole[0] if whole else None,
            sums.classes, sums.confidence, *view.sizes, *view.contiguous,
        ),
    )  # fmt: skip
    return whole + sums.gradients(None, wanted)
