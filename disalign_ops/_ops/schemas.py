"""Schemas, fakes and registration of the native operators; the compiled library has the kernels.
triton/registration.py registers the same operators as Triton kernels, under names of their own.

One stem a layout of logits, each with `<stem>_forward`, `<stem>_backward` and `<stem>_backward_`:
row (N, C), dense (N, C, S) and upsample (N, C, h, w) under a target of another size.
`autograd.py` says what forward and backward leave to each other.

Below autograd an operator cannot know which gradients are wanted, so it is told by flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, reference

NORMALIZERS = {"weights": 0, "valid": 1, "count": 2}
GIVEN_NORMALIZER = 3
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# Where the operators' arguments stand. The first nine are tensors (see _INPUTS), then comes the
# caller's denominator, then the stem's options, reduction, normalizer and what is wanted.
TENSORS = 9
DENOMINATOR = 9
OPTIONS = 10
SHARD_VALUES = 5  # of a row's sums and factors
DIFFERENTIABLE = (0, 3, 4, 5)  # logits, scale, bias, confidence


@dataclass(frozen=True)
class Stem:
    """A family of operators.

    options: how many, the first three of _OPTIONS included. reference: the same loss in PyTorch,
    called with logits, target, the options after the third, and keywords. prefix: of the operators'
    names, "" for the native ones.
    """

    name: str
    options: int
    reference: Callable[..., Tensor]
    extra_schema: str = ""
    extra_results: str = ""
    prefix: str = ""

    @property
    def native(self) -> bool:
        return not self.prefix

    def operator(self, part: str) -> Any:
        return _OPERATORS[f"{self.prefix}{self.name}_{part}"]

    @property
    def forward(self) -> Any:
        return self.operator("forward")

    def backward(self, in_place: bool) -> Any:
        return self.operator("backward_" if in_place else "backward")


_OPERATORS: dict[str, Any] = {}  # looked up once: torch.ops does so on every call

ROW = Stem("row", 3, reference.cross_entropy)
DENSE = Stem("dense", 3, reference.dense_cross_entropy)
UPSAMPLE = Stem(
    "upsample",
    5,
    reference.upsample_cross_entropy,
    ", bool align_corners, bool want_details",
    ", Tensor position_loss, Tensor probability, Tensor prediction",
)
STEMS = (ROW, DENSE, UPSAMPLE)

_INPUTS = (
    "logits, Tensor target, Tensor? weight, Tensor? scale, Tensor? bias, Tensor? confidence, "
    "Tensor? prior, Tensor? margin, Tensor? sample_weight"
)
_OPTIONS = "int ignore_index, float label_smoothing, float focal_gamma"
_WANTED = "bool want_logits, bool want_scale, bool want_bias, bool want_confidence"
_STATISTICS = "Tensor row_max, Tensor row_sum, Tensor denominator"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"
PREDICT_SCHEMA = (
    "upsample_predict(Tensor logits, Tensor? scale, Tensor? bias, Tensor? confidence, "
    "Tensor? prior, SymInt height, SymInt width, bool align_corners) -> Tensor"
)

library = torch.library.Library("disalign_ops", "DEF")


def schemas(stem: Stem) -> tuple[str, ...]:
    """The schemas of a stem's operators."""
    name, options = stem.name, _OPTIONS + stem.extra_schema
    return (
        f"{name}_forward(Tensor {_INPUTS}, Tensor? denominator, {options}, int reduction, "
        f"int normalizer, {_WANTED}) -> (Tensor loss, {_STATISTICS}, Tensor grad_logits, "
        "Tensor grad_scale, Tensor grad_bias, Tensor grad_confidence" + stem.extra_results + ")",
        f"{name}_backward(Tensor grad_loss, Tensor {_INPUTS}, {_STATISTICS}, {options}, {_WANTED})"
        f" -> {_GRADIENTS}",
        # Writes the gradient over the logits; the first of the four results stays empty.
        f"{name}_backward_(Tensor grad_loss, Tensor(a!) {_INPUTS}, {_STATISTICS}, {options}, "
        f"{_WANTED}) -> {_GRADIENTS}",
    )


_SHARD = (
    "logits, Tensor target, Tensor? weight, Tensor? scale, Tensor? bias, Tensor? confidence, "
    "Tensor? prior, Tensor? margin, bool smoothing"
)
# Rows of which the logits are some of the classes; shards.py combines the sums, reference.py
# (shard_sums, shard_gradients) says what is computed.
SHARD_SCHEMAS = (
    f"row_shard_forward(Tensor {_SHARD}) -> Tensor",
    f"row_shard_backward(Tensor factors, Tensor {_SHARD}, {_WANTED}) -> {_GRADIENTS}",
    f"row_shard_backward_(Tensor factors, Tensor(a!) {_SHARD}, {_WANTED}) -> {_GRADIENTS}",
)


def calibrate_schemas(stem: Stem) -> tuple[str, ...]:
    """The schemas of the calibrated logits, rows and class planes."""
    return (
        f"{stem.name}_calibrate(Tensor logits, Tensor scale, Tensor bias, Tensor confidence)"
        " -> Tensor",
        f"{stem.name}_calibrate_backward(Tensor grad_output, Tensor logits, Tensor scale, "
        f"Tensor bias, Tensor confidence, {_WANTED}) -> {_GRADIENTS}",
    )


library.define("build_info() -> str")
library.define("cuda_build_info() -> str")
library.define("cuda_why_not(int device) -> str")
for _stem in STEMS:
    for _schema in schemas(_stem):
        library.define(_schema)
for _stem in (ROW, DENSE):
    for _schema in calibrate_schemas(_stem):
        library.define(_schema)
for _schema in SHARD_SCHEMAS:
    library.define(_schema)
library.define(PREDICT_SCHEMA)
backends.load_native()


def _gradient_fakes(logits: Tensor, want: tuple[bool, ...]) -> tuple[Tensor, ...]:
    dtype = reference.accumulate_dtype(logits.dtype)
    n, classes, *spatial = logits.shape
    shapes = (logits.shape, (classes,), (classes,), (n * math.prod(spatial),))
    dtypes = (logits.dtype, dtype, dtype, dtype)
    return tuple(
        logits.new_empty(tuple(shape) if wanted else (0,), dtype=dt)
        for shape, dt, wanted in zip(shapes, dtypes, want, strict=True)
    )


def _forward_fake(stem: Stem) -> Callable[..., tuple[Tensor, ...]]:
    def fake(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        after = OPTIONS + stem.options - 2
        reduction, want = rest[after], rest[after + 2 : after + 6]
        dtype = reference.accumulate_dtype(logits.dtype)
        positions = target.numel()
        each = reduction == REDUCTIONS["none"]
        loss = logits.new_empty((positions,) if each else (), dtype=dtype)
        statistics = (
            logits.new_empty((positions,), dtype=dtype),
            logits.new_empty((positions,), dtype=dtype),
            logits.new_empty((), dtype=torch.float64),
        )
        results = (loss, *statistics, *_gradient_fakes(logits, want))
        if stem is not UPSAMPLE:
            return results
        details = positions if rest[after - 1] else 0
        return (
            *results,
            logits.new_empty((0 if each else details,), dtype=dtype),
            logits.new_empty((details,), dtype=dtype),
            logits.new_empty((details,), dtype=torch.int64),
        )

    return fake


def _backward_fake(grad_loss: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradient_fakes(logits, rest[-4:])


def _in_place_fake(grad_loss: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradient_fakes(logits, (False, *rest[-3:]))


def _predict_fake(
    logits: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
    prior: Tensor | None,
    height: int,
    width: int,
    align_corners: bool,
) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


def _calibrate_fake(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _shard_forward_fake(logits: Tensor, *args: Any) -> Tensor:
    dtype = reference.accumulate_dtype(logits.dtype)
    return logits.new_empty((SHARD_VALUES, logits.shape[0]), dtype=dtype)


def fakes() -> dict[str, Callable[..., Any]]:
    """The fake of every operator, by its name without prefix."""
    found: dict[str, Callable[..., Any]] = {"upsample_predict": _predict_fake}
    for stem in STEMS:
        found[f"{stem.name}_forward"] = _forward_fake(stem)
        found[f"{stem.name}_backward"] = _backward_fake
        found[f"{stem.name}_backward_"] = _in_place_fake
    found["row_shard_forward"] = _shard_forward_fake
    found["row_shard_backward"] = _backward_fake
    found["row_shard_backward_"] = _in_place_fake
    for stem in (ROW, DENSE):
        found[f"{stem.name}_calibrate"] = _calibrate_fake
        found[f"{stem.name}_calibrate_backward"] = _backward_fake
    return found


for _name, _fake in fakes().items():
    _OPERATORS[_name] = getattr(torch.ops.disalign_ops, _name).default
    torch.library.register_fake(f"disalign_ops::{_name}", _fake, lib=library)
