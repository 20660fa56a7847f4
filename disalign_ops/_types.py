"""The types of the public functions' options, each defined once."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

from torch import Tensor

ReductionName: TypeAlias = Literal["mean", "sum", "none"]
Form: TypeAlias = Literal["interpolated", "residual"]
Background: TypeAlias = Literal["first", "last"]
BatchNormMode: TypeAlias = Literal["eval", "train"]
Normalizer: TypeAlias = Literal["weights", "valid", "count"] | float | Tensor


class _Options(TypedDict, total=False):
    """Keywords of every loss; see `cross_entropy`."""

    sample_weight: Tensor | None
    normalizer: Normalizer
    prior: Tensor | None
    margin: Tensor | float | None
    focal_gamma: float
    inplace_backward: bool


class LossOptions(_Options, total=False):
    """The same, and what may be positional, but `weight`."""

    ignore_index: int
    reduction: ReductionName
    label_smoothing: float


class WeightedLossOptions(LossOptions, total=False):
    """The same with `weight`."""

    weight: Tensor | None


class UpsampleOptions(_Options, total=False):
    """Keywords of `upsample_cross_entropy` but `return_details`."""

    align_corners: bool
    confidence: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    form: Form
    background: Background | None
