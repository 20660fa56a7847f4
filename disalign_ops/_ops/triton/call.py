"""What the operators of every layout share: their arguments, memory and sums.

Operators take their arguments in the order of the schemas, as one tuple: tensors first
(logits, target, weight, scale, bias, confidence, prior, margin, sample_weight), then the
denominator, or in backward the statistics and the denominator, then the numbers. They return what
is wanted, as the schemas say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import BIAS, CONFIDENCE, NORMALIZERS, REDUCTIONS, SCALE, STATISTICS
from ..reference import accumulate_dtype
from . import launch
from .finish import loss_kernel, sum_kernel

_TENSORS = 9
_NUMBERS = 3  # ignore_index, label_smoothing, focal_gamma
_REDUCE_NONE = REDUCTIONS["none"]
_BY_WEIGHTS = NORMALIZERS["weights"]
_BLOCK = 256  # of the kernels that sum up


_MARGIN = 7  # among the tensors


def without_margin(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tensors[:_MARGIN] + tensors[_MARGIN + 1 :]


@dataclass(frozen=True)
class Given:
    """The arguments of a loss."""

    tensors: tuple[Tensor | None, ...]
    ignore_index: int
    label_smoothing: float
    focal_gamma: float

    @property
    def logits(self) -> Tensor:
        assert self.tensors[0] is not None
        return self.tensors[0]

    @property
    def target(self) -> Tensor:
        assert self.tensors[1] is not None
        return self.tensors[1]

    @property
    def soft(self) -> bool:
        """Whether the target is class probabilities."""
        return self.target.is_floating_point()

    @property
    def soft_tensors(self) -> tuple[Tensor | None, ...]:
        """Of the kernels of class probabilities, which have no margin."""
        return without_margin(self.tensors)

    @property
    def soft_numbers(self) -> tuple[float, float]:
        """keep and share of all classes together, of such a kernel."""
        return 1.0 - self.label_smoothing, self.label_smoothing

    @property
    def numbers(self) -> tuple[int, float, float]:
        return self.ignore_index, self.label_smoothing, self.focal_gamma

    @property
    def weights(self) -> Tensor | None:
        """sum_j w_j, one entry; None without weights. Without smoothing nobody uses it, and any
        entry will do: a kernel of its own would be compiled for None.
        """
        weight = self.tensors[2]
        return weight.sum() if weight is not None and self.label_smoothing > 0 else weight


@dataclass(frozen=True)
class Forward:
    given: Given
    denominator: Tensor | None
    options: tuple[Any, ...]  # of the layout
    reduction: int
    normalizer: int
    wanted: int

    @staticmethod
    def of(arguments: tuple[Any, ...]) -> Forward:
        tensors, (denominator, *rest) = arguments[:_TENSORS], arguments[_TENSORS:]
        numbers, options, last = rest[:_NUMBERS], rest[_NUMBERS:-3], rest[-3:]
        return Forward(Given(tensors, *numbers), denominator, tuple(options), *last)

    @property
    def each(self) -> bool:
        """Whether every position's loss is the result."""
        return self.reduction == _REDUCE_NONE

    @property
    def by_weights(self) -> int:
        return int(self.normalizer == _BY_WEIGHTS)


@dataclass(frozen=True)
class Backward:
    given: Given
    grad_loss: Tensor | None  # None: 1
    statistics: Tensor
    denominator: Tensor | None  # None: 1
    options: tuple[Any, ...]  # of the layout
    wanted: int

    @staticmethod
    def of(arguments: tuple[Any, ...]) -> Backward:
        grad_loss, *rest = arguments
        tensors, rest = rest[:_TENSORS], rest[_TENSORS:]
        statistics, denominator, *numbers, wanted = rest
        given = Given(tuple(tensors), *numbers[:_NUMBERS])
        options = tuple(numbers[_NUMBERS:])
        return Backward(given, grad_loss, statistics, denominator, options, wanted)

    @property
    def upstream_stride(self) -> int:
        return int(self.grad_loss is not None and self.grad_loss.dim() > 0)


def vector(logits: Tensor, entries: int) -> Tensor:
    return logits.new_empty((entries,), dtype=accumulate_dtype(logits.dtype))


def arithmetic(logits: Tensor) -> Any:
    return tl.float64 if logits.dtype == torch.float64 else tl.float32


def partial_sums(positions: int, logits: Tensor, *shape: int, doubles: bool = False) -> Tensor:
    """A place for every program's sums; zeros where none is launched."""
    dtype = torch.float64 if doubles else accumulate_dtype(logits.dtype)
    return (logits.new_empty if positions else logits.new_zeros)(shape, dtype=dtype)


class Loss:
    """A forward's loss, statistics and denominator, of so many positions and programs."""

    def __init__(self, call: Forward, positions: int, programs: int) -> None:
        logits = call.given.logits
        self.positions, self.programs, self._call = positions, programs, call
        rows = 3 if call.given.soft else 2
        self.statistics = vector(logits, rows * positions).view(rows, positions)
        self.denominator = logits.new_empty((), dtype=torch.float64)
        self.value = vector(logits, positions) if call.each else self.statistics.new_empty(())
        self.block_sums = None
        if not call.each:
            self.block_sums = partial_sums(positions, logits, programs, 2, doubles=True)

    def finish(self) -> list[Tensor]:
        call = self._call
        launch.start(
            loss_kernel, (1,),
            (
                self.block_sums, call.denominator, None if call.each else self.value,
                self.denominator, self.programs, self.positions, call.reduction, call.normalizer,
            ),
            BLOCK=_BLOCK,
        )  # fmt: skip
        known = [self.statistics, self.denominator] if call.wanted & STATISTICS else []
        return [self.value, *known]


def sum_of(sums: Tensor, denominator: Tensor | None, entries: int, offset: int = 0) -> Tensor:
    """Over the programs of [programs][...]: `entries` from `offset` on; see sum_kernel."""
    out = sums.new_empty((entries,))
    if entries:
        launch.start(
            sum_kernel, (triton.cdiv(entries, _BLOCK),),
            (
                sums.view(-1)[offset:], denominator, out, sums.shape[0], entries, sums.stride(0),
            ),
            BLOCK=_BLOCK,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class CalibrationSums:
    """Partial sums of the gradients of scale and bias [programs][2][classes], and of confidence
    [parts][confidences]; None where not wanted.
    """

    classes: Tensor | None
    confidence: Tensor | None

    @staticmethod
    def of(
        logits: Tensor, wanted: int, positions: int, programs: int, parts: int, confidences: int
    ) -> CalibrationSums:
        classes = confidence = None
        if wanted & (SCALE | BIAS):
            classes = partial_sums(positions, logits, programs, 2, logits.shape[1])
        if wanted & CONFIDENCE:
            confidence = partial_sums(positions, logits, parts, confidences)
        return CalibrationSums(classes, confidence)

    def gradients(self, denominator: Tensor | None, wanted: int) -> list[Tensor]:
        """Of scale, bias and confidence, divided by the denominator; those that are wanted."""
        found = []
        for k, bit in enumerate((SCALE, BIAS)):
            if wanted & bit:
                assert self.classes is not None
                classes = self.classes.shape[2]
                found.append(sum_of(self.classes, denominator, classes, k * classes))
        if wanted & CONFIDENCE:
            assert self.confidence is not None
            found.append(sum_of(self.confidence, denominator, self.confidence.shape[1]))
        return found
