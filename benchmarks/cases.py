"""The registry of cases, and the inputs of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from disalign_ops import class_stats


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
_MODE_REASONS = {
    Mode.FULL: "gradients of logits, confidence, scale and bias",
    Mode.STAGE2: "frozen logits: gradients of confidence, scale and bias",
    Mode.PLAIN: "the drop-in for F.cross_entropy, gradient of the logits",
    Mode.IN_PLACE: "all gradients, that of the logits written over them; peers allocate theirs",
    Mode.PLAIN_IN_PLACE: "the gradient of the logits written over them; peers allocate theirs",
}
IGNORED = 255  # of dense targets
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: logits of a dtype, and what is done with them.

    The logits are (rows, classes), or with a `size` (rows, classes, *size), the target of that size
    or, where it has another, of `target_size`. With `features` they are a linear head's: the loss
    is given so many features a row, and the head. upstream: the gradient of the loss, which forward
    does not know.
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

    @property
    def dtype_name(self) -> str:
        return _DTYPE_NAMES[self.dtype]

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
        return f"{WORK[self.mode]}, {shape}{to} {self.dtype_name}{times}"

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


# Rows shrink as classes grow: the logits stay near 64 MB, beyond every cache and far below the
# memory of a small machine, of which the eager composition takes eight times as much.
_SHAPES = (
    ("imagenet", 256, 1000, "ImageNet-LT, its batch: 1 MB, inside the cache"),
    ("lvis", 4096, 1204, "LVIS with background, 8 images of 512 boxes"),
    ("inat", 2048, 8142, "iNaturalist 2018"),
    ("100k", 256, 100_000, "a row larger than the first-level cache"),
    (
        "1m",
        16,
        1_000_000,
        "a row larger than the second-level cache, fewer rows than work to share",
    ),
)
_ROW_MODES = (Mode.FULL, Mode.STAGE2, Mode.PLAIN, Mode.IN_PLACE)
_UPSTREAM = (
    ("third", 171 / 512, "1/3 in bfloat16: the mean of three losses"),
    ("65536", 65536.0, "GradScaler's first factor"),
)
_ADE = "ADE20K, 150 classes, ignored frame"
_DENSE = (
    ("dense-plain", 2, (256, 256), (), Mode.PLAIN, "logits at the target's size", True),
    ("dense-in-place", 2, (256, 256), (), Mode.PLAIN_IN_PLACE, "the same over the logits", True),
    ("dense-stage2", 2, (256, 256), (), Mode.STAGE2, "frozen logits at the target's size", False),
    ("upsample-full", 2, (32, 32), (256, 256), Mode.FULL, "logits at 1/8 of the target", True),
    ("upsample-stage2", 2, (32, 32), (256, 256), Mode.STAGE2, "the same, frozen", False),
    ("upsample-large", 4, (128, 128), (512, 512), Mode.FULL, "mmsegmentation's batch", False),
)
_HEADS = (
    ("inat-head-plain", 4096, 8142, Mode.PLAIN, "iNaturalist 2018: all gradients of a head", True),
    ("inat-head-full", 4096, 8142, Mode.FULL, "the same, calibrated", False),
    ("inat-head-stage2", 4096, 8142, Mode.STAGE2, "frozen head and features", True),
    ("60k-head-plain", 1024, 60_000, Mode.PLAIN, "few whole rows in a chunk", False),
    ("100k-head-plain", 1024, 100_000, Mode.PLAIN, "chunks of classes, logits made twice", False),
)
_QUICK = ("lvis-full", "lvis-stage2", "lvis-plain", "inat-in-place", "inat-stage2")


def _registry() -> dict[str, Case]:
    cases = []
    for data, rows, classes, why in _SHAPES:
        for dtype, dtype_name in _DTYPE_NAMES.items():
            for mode in _ROW_MODES:
                name = f"{data}-{mode.value}" + ("" if dtype == torch.float32 else f"-{dtype_name}")
                reason = f"{why}; {_MODE_REASONS[mode]}"
                cases.append(Case(name, rows, classes, dtype, mode, reason, name in _QUICK))
    for dtype, dtype_name in _DTYPE_NAMES.items():
        for times, upstream, why in _UPSTREAM:
            name = f"lvis-plain-{dtype_name}-upstream-{times}"
            case = Case(name, 4096, 1204, dtype, Mode.PLAIN, why, upstream=upstream)
            cases.append(case)
    for mode in (Mode.PLAIN, Mode.FULL, Mode.STAGE2):
        cases.append(
            Case(
                f"small-{mode.value}",
                64,
                1000,
                torch.float32,
                mode,
                f"a batch so small that the overhead per call is most of it; {_MODE_REASONS[mode]}",
                mode is Mode.PLAIN,
            )
        )
    for name, images, size, target_size, mode, why, quick in _DENSE:
        reason = f"{_ADE}: {why}; {_MODE_REASONS[mode]}"
        case = Case(
            f"ade-{name}", images, 150, torch.float32, mode, reason, quick, size, target_size
        )
        cases.append(case)
    for name, rows, classes, mode, why, quick in _HEADS:
        reason = f"features at hand, the head with its loss: {why}"
        cases.append(Case(name, rows, classes, torch.float32, mode, reason, quick, features=512))
    return {case.name: case for case in cases}


CASES = _registry()


def select(patterns: list[str], full: bool) -> list[Case]:
    """The cases that a pattern names (shell wildcards), or else the quick set or all.

    Raises ValueError for a pattern that matches nothing.
    """
    if not patterns:
        return [case for case in CASES.values() if full or case.quick]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES):
            raise ValueError(f"a case must be one of {', '.join(CASES)}, got {pattern!r}")
    return [c for c in CASES.values() if any(fnmatchcase(c.name, p) for p in patterns)]


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
        return torch.randn(shape, generator=generator)

    # From 1280 samples to 5, as ImageNet-LT.
    counts = 1280.0 * (5 / 1280) ** torch.linspace(0, 1, case.classes, dtype=torch.float64)
    shape = case.target_shape
    drawn = torch.multinomial(counts, math.prod(shape), replacement=True, generator=generator)
    target = drawn.reshape(shape)
    if case.size:
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
