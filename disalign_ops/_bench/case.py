"""A case of a benchmark, and its inputs: what is computed, and of which tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import class_stats


class Mode(Enum):
    """What is computed; forward and backward in every mode."""

    FULL = "full"
    STAGE2 = "stage2"
    PLAIN = "plain"
    IN_PLACE = "in-place"
    PLAIN_IN_PLACE = "plain-in-place"

    @property
    def calibrated(self) -> bool:
        return self not in (Mode.PLAIN, Mode.PLAIN_IN_PLACE)

    @property
    def in_place(self) -> bool:
        return self in (Mode.IN_PLACE, Mode.PLAIN_IN_PLACE)


WORK = {
    Mode.FULL: "DisAlign loss, all gradients",
    Mode.STAGE2: "DisAlign loss, stage 2",
    Mode.PLAIN: "weighted cross_entropy",
    Mode.IN_PLACE: "DisAlign loss in place",
    Mode.PLAIN_IN_PLACE: "weighted cross_entropy in place",
}
IGNORED = 255  # of dense targets
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: logits of a dtype, and what is done with them.

    The logits are (rows, classes), or with a `size` (rows, classes, *size), the target of that size
    or, where it has another, of `target_size`. With `features` they are a linear head's: the loss
    is given so many features a row, and the head. upstream: the gradient of the loss, which forward
    does not know. soft: the target is class probabilities, as mixup makes them of two classes.
    """

    name: str
    rows: int
    classes: int
    dtype: torch.dtype
    mode: Mode
    reason: str
    quick: bool = False
    size: tuple[int, ...] = ()
    target_size: tuple[int, ...] = ()
    features: int = 0
    upstream: float = 1.0
    soft: bool = False

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.classes, *self.size)

    @property
    def target_shape(self) -> tuple[int, ...]:
        return (self.rows, *(self.target_size or self.size))

    @property
    def title(self) -> str:
        shape = " x ".join(str(n) for n in self.shape)
        if self.features:
            head = f"{self.features} features to {self.classes} classes"
            return f"{WORK[self.mode]} of a linear head, {self.rows} x {head} {self.dtype_name}"
        to = " to " + " x ".join(str(n) for n in self.target_size) if self.target_size else ""
        times = "" if self.upstream == 1 else f", upstream gradient {self.upstream:g}"
        soft = ", class probabilities" if self.soft else ""
        return f"{WORK[self.mode]}, {shape}{to} {self.dtype_name}{times}{soft}"

    @property
    def logits_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def full_bytes(self) -> int:
        """Of the logits at the target's size: what memory is compared with."""
        return math.prod(self.target_shape) * self.classes * self.dtype.itemsize

    @property
    def overhead(self) -> bool:
        """Whether the overhead per call is what the case is about."""
        return self.logits_bytes < 1_000_000


@dataclass(frozen=True)
class Inputs:
    """What every contestant gets. Learned tensors require a gradient if the mode wants one.

    head: (classes, features) of a linear head, and then `logits` are its features; or None.
    """

    mode: Mode
    upstream: float
    logits: Tensor
    head: Tensor | None
    target: Tensor
    confidence: Tensor
    scale: Tensor
    bias: Tensor
    weight: Tensor

    def wanted(self, logits: Tensor) -> dict[str, Tensor]:
        """The tensors whose gradients the mode wants; `logits`: those that the loss was given."""
        found = {} if self.mode is Mode.STAGE2 else {"logits": logits}
        if self.head is not None and self.mode is not Mode.STAGE2:
            found["head"] = self.head
        if self.mode.calibrated:
            found |= {"confidence": self.confidence, "scale": self.scale, "bias": self.bias}
        return found


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Logits with a trained classifier's spread, long-tailed targets, a calibration half learned.

    The vectors are float32 whatever the logits are, as under autocast.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    # From 1280 samples to 5, as ImageNet-LT.
    steps = torch.linspace(0, 1, case.classes, dtype=torch.float64, device="cpu")
    counts = 1280.0 * (5 / 1280) ** steps
    shape = case.target_shape
    drawn = torch.multinomial(counts, math.prod(shape), replacement=True, generator=generator)
    target = drawn.reshape(shape)
    if case.soft:
        mixed = [F.one_hot(t, case.classes).movedim(-1, 1) for t in (target, target.flip(0))]
        target = (0.7 * mixed[0] + 0.3 * mixed[1]).to(case.dtype).contiguous()
    elif case.size:
        target[:, :4] = target[..., :4] = IGNORED
    head = None
    if case.features:
        logits = normal(case.rows, case.features).to(device, case.dtype)
        drawn_head = normal(case.classes, case.features) * (3 / case.features**0.5)
        head = drawn_head.to(device, case.dtype).requires_grad_(case.mode is not Mode.STAGE2)
    else:
        logits = (normal(*case.shape) * 3).to(device, case.dtype)
    learned = {
        "confidence": normal(case.rows, *(1 for _ in case.size[:1]), *case.size),
        "scale": 1 + 0.3 * normal(case.classes),
        "bias": 0.5 * normal(case.classes),
    }
    return Inputs(
        case.mode,
        case.upstream,
        logits.requires_grad_(case.mode is not Mode.STAGE2),
        head,
        target.to(device),
        **{k: v.to(device).requires_grad_(case.mode.calibrated) for k, v in learned.items()},
        weight=class_stats.grw_weights(counts.round().long()).to(device),
    )
