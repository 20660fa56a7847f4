"""Schemas, fakes and registration of the native operators; the compiled library has the kernels.
triton/registration.py registers the same operators as Triton kernels, under names of their own.

Each layout of logits has `<layout>_forward`, `<layout>_backward` and `<layout>_backward_`: row
(N, C), dense (N, C, S) and upsample (N, C, h, w) under a target of another size. Rows have
`row_backward_made` too. `autograd.py` says what forward and backward leave to each other.

Below autograd an operator cannot know which gradients are wanted, so it is told by the bits of
`wanted` (codes.py). Results are what is wanted, in this order, and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .codes import (
    DETAILS,
    ENTROPY,
    GRADIENTS,
    LOGITS,
    PREDICTION,
    REDUCTIONS,
    SHARD_VALUES,
    STATISTICS,
)
from .namespace import NAMESPACE
from .new_gradient import new_gradient


@dataclass(frozen=True)
class Layout:
    """How logits lie in memory, and the operators that read them there.

    reference: the same loss in PyTorch; it takes the arguments of _INPUTS and _NUMBERS by name.
    options: more arguments, by name. prefix: of the operators' names, "" for the native ones.
    """

    name: str
    reference: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def native(self) -> bool:
        return not self.prefix

    def operator(self, part: str) -> Any:
        return _OPERATORS[f"{self.prefix}{self.name}_{part}"]

    @functools.cached_property
    def forward(self) -> str:
        """The name of the operator "forward", in BOXED."""
        return f"{self.prefix}{self.name}_forward"


_OPERATORS: dict[str, Any] = {}  # looked up once: torch.ops does so on every call
# The same for a call of which no argument has a __torch_function__, in eager mode: it does not ask
# each of them once more.
BOXED: dict[str, Any] = {}


_call_boxed = getattr(torch._C, "_dispatch_call_boxed", None)  # not public: may go


def keep(name: str, operator: Any) -> None:
    """What `Layout.operator` and `BOXED` have by this name."""
    _OPERATORS[name] = BOXED[name] = operator
    if _call_boxed is not None and hasattr(operator, "_handle"):
        BOXED[name] = functools.partial(_call_boxed, operator._handle)


ROW = Layout("row", reference.cross_entropy)
DENSE = Layout("dense", reference.dense_cross_entropy)
UPSAMPLE = Layout("upsample", reference.upsample_cross_entropy, ("align_corners",))
LAYOUTS = (ROW, DENSE, UPSAMPLE)

_CLASS_VECTORS = (
    "Tensor? weight, Tensor? scale, Tensor? bias, Tensor? confidence, Tensor? prior, Tensor? margin"
)
_INPUTS = f"logits, Tensor target, {_CLASS_VECTORS}, Tensor? sample_weight"
_NUMBERS = "int ignore_index, float label_smoothing, float focal_gamma"
PREDICT_SCHEMA = (
    "upsample_predict(Tensor logits, Tensor? scale, Tensor? bias, Tensor? confidence, "
    "Tensor? prior, SymInt height, SymInt width, bool align_corners) -> Tensor"
)

library = torch.library.Library(NAMESPACE, "DEF")


def schemas(layout: Layout) -> tuple[str, ...]:
    """The schemas of a layout's loss.

    target: class indices, or class probabilities of the logits' dtype or the accumulation dtype,
    and of the logits' shape (upsample: at the size of the loss).
    forward: loss; statistics (2, positions; with probabilities 3) and denominator; gradients; with
    details the positions' loss (where `loss` is not that), and of an upsampled loss the target's
    softmax and prediction; prediction and entropy, each if wanted, where in_forward.py says so.
    backward: gradients. backward_: that of the logits is written over them, and is no result.
    """
    name = layout.name
    numbers = _NUMBERS + "".join(f", bool {option}" for option in layout.options)
    statistics = "Tensor statistics, Tensor denominator"
    return (
        f"{name}_forward(Tensor {_INPUTS}, Tensor? denominator, {numbers}, int reduction, "
        "int normalizer, int wanted) -> Tensor[]",
        f"{name}_backward(Tensor grad_loss, Tensor {_INPUTS}, {statistics}, {numbers}, int wanted)"
        " -> Tensor[]",
        f"{name}_backward_(Tensor grad_loss, Tensor(a!) {_INPUTS}, {statistics}, {numbers}, "
        "int wanted) -> Tensor[]",
    )


# The layouts whose gradient of the logits forward can make on a GPU, and their backward where
# grad_logits holds it: it is made anew where the one upstream gradient, read on the device, is
# not 1.
MADE_LAYOUTS = (ROW, DENSE)
MADE_SCHEMAS = tuple(
    schemas(layout)[1].replace(
        "backward(Tensor grad_loss, ", "backward_made(Tensor grad_loss, Tensor(a!) grad_logits, "
    )
    for layout in MADE_LAYOUTS
)

_SHARD = f"logits, Tensor target, {_CLASS_VECTORS}, float keep, float share"
# Rows of which the logits are some of the classes; shards.py combines the sums, shard_reference.py
# (shard_sums, shard_gradients) says what is computed. On the CPU forward also gives, each if wanted
# and without the margin, the most probable of these classes and the entropy of their softmax.
SHARD_SCHEMAS = (
    f"row_shard_forward(Tensor {_SHARD}, int wanted) -> Tensor[]",
    f"row_shard_backward(Tensor factors, Tensor {_SHARD}, int wanted) -> Tensor[]",
    f"row_shard_backward_(Tensor factors, Tensor(a!) {_SHARD}, int wanted) -> Tensor[]",
)


def calibrate_schemas(layout: Layout) -> tuple[str, ...]:
    """The schemas of the calibrated logits, rows and class planes."""
    return (
        f"{layout.name}_calibrate(Tensor logits, Tensor scale, Tensor bias, Tensor confidence)"
        " -> Tensor",
        f"{layout.name}_calibrate_backward(Tensor grad_output, Tensor logits, Tensor scale, "
        "Tensor bias, Tensor confidence, int wanted) -> Tensor[]",
    )


library.define("build_info() -> str")
library.define("cuda_build_info() -> str")
library.define("cuda_why_not(int device) -> str")
for _layout in LAYOUTS:
    for _schema in schemas(_layout):
        library.define(_schema)
for _layout in (ROW, DENSE):
    for _schema in calibrate_schemas(_layout):
        library.define(_schema)
for _schema in (*MADE_SCHEMAS, *SHARD_SCHEMAS):
    library.define(_schema)
library.define(PREDICT_SCHEMA)
backends.load_native()


def _gradient_fakes(logits: Tensor, wanted: int) -> list[Tensor]:
    dtype = reference.accumulate_dtype(logits.dtype)
    n, classes, *spatial = logits.shape
    vectors = [
        logits.new_empty((entries,), dtype=dtype)
        for entries, bit in zip(
            (classes, classes, n * math.prod(spatial)), GRADIENTS[1:], strict=True
        )
        if wanted & bit
    ]
    return [new_gradient(logits), *vectors] if wanted & LOGITS else vectors


def _forward_fake(
    logits: Tensor, target: Tensor, *rest: Any, predicts: bool = False
) -> list[Tensor]:
    reduction, _, wanted = rest[-3:]
    dtype = reference.accumulate_dtype(logits.dtype)
    soft = target.is_floating_point()
    positions = target.numel() // logits.shape[1] if soft else target.numel()
    each = reduction == REDUCTIONS["none"]
    results = [logits.new_empty((positions,) if each else (), dtype=dtype)]
    if wanted & STATISTICS:
        results.append(logits.new_empty((3 if soft else 2, positions), dtype=dtype))
        results.append(logits.new_empty((), dtype=torch.float64))
    results += _gradient_fakes(logits, wanted)
    upsampled = predicts and wanted & DETAILS
    if wanted & DETAILS and not each:
        results.append(logits.new_empty((positions,), dtype=dtype))
    if upsampled:
        results.append(logits.new_empty((positions,), dtype=dtype))
    return results + _details_fakes(logits, positions, PREDICTION if upsampled else wanted)


def _details_fakes(logits: Tensor, positions: int, wanted: int) -> list[Tensor]:
    dtypes = (
        (PREDICTION, torch.int64),
        (ENTROPY, reference.accumulate_dtype(logits.dtype)),
    )
    return [logits.new_empty((positions,), dtype=dtype) for bit, dtype in dtypes if wanted & bit]


def _backward_fake(upstream: Tensor, logits: Tensor, *rest: Any) -> list[Tensor]:
    return _gradient_fakes(logits, rest[-1])


def _in_place_fake(upstream: Tensor, logits: Tensor, *rest: Any) -> list[Tensor]:
    return _gradient_fakes(logits, rest[-1] & ~LOGITS)


def _made_fake(upstream: Tensor, made: Tensor, logits: Tensor, *rest: Any) -> list[Tensor]:
    return _gradient_fakes(logits, rest[-1] & ~LOGITS)


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


def _shard_forward_fake(logits: Tensor, *args: Any) -> list[Tensor]:
    dtype = reference.accumulate_dtype(logits.dtype)
    sums = logits.new_empty((SHARD_VALUES, logits.shape[0]), dtype=dtype)
    return [sums, *_details_fakes(logits, logits.shape[0], args[-1])]


def fakes(native: bool = True) -> dict[str, Callable[..., Any]]:
    """The fake of every operator, by its name without prefix. `native`: Triton lacks some."""
    found: dict[str, Callable[..., Any]] = {"upsample_predict": _predict_fake}
    if native:
        found |= {f"{layout.name}_backward_made": _made_fake for layout in MADE_LAYOUTS}
    for layout in LAYOUTS:
        predicts = layout is UPSAMPLE
        found[f"{layout.name}_forward"] = functools.partial(_forward_fake, predicts=predicts)
        found[f"{layout.name}_backward"] = _backward_fake
        found[f"{layout.name}_backward_"] = _in_place_fake
    found["row_shard_forward"] = _shard_forward_fake
    found["row_shard_backward"] = _backward_fake
    found["row_shard_backward_"] = _in_place_fake
    for layout in (ROW, DENSE):
        found[f"{layout.name}_calibrate"] = _calibrate_fake
        found[f"{layout.name}_calibrate_backward"] = _backward_fake
    return found


for _name, _fake in fakes().items():
    keep(_name, getattr(getattr(torch.ops, NAMESPACE), _name).default)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=library)
