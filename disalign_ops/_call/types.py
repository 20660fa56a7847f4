"""The types of the public functions' options, each defined once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

from torch import Generator, Tensor

if TYPE_CHECKING:
    from .shard import Shard

ReductionName: TypeAlias = Literal["mean", "sum", "none"]
Form: TypeAlias = Literal["interpolated", "residual"]
Start: TypeAlias = Literal["identity", "released"]
Background: TypeAlias = Literal["first", "last"]
FORMS: tuple[Form, ...] = ("interpolated", "residual")
BACKGROUNDS: tuple[Background | None, ...] = (None, "first", "last")
BatchNormMode: TypeAlias = Literal["eval", "train"]
GradientPass: TypeAlias = Literal["auto", "forward", "backward"]
GRADIENT_PASSES: tuple[GradientPass, ...] = ("auto", "forward", "backward")
Normalizer: TypeAlias = Literal["weights", "valid", "count"] | float | Tensor
# Class indices, class probabilities, or two classes a position with the first one's share.
Target: TypeAlias = Tensor | tuple[Tensor, Tensor, Tensor | float]


class ExtendedOptions(TypedDict, total=False):
    """Keywords of every loss and criterion that F.cross_entropy does not have."""

    normalizer: Normalizer
    prior: Tensor | None
    margin: Tensor | float | None
    focal_gamma: float
    inplace_backward: bool
    gradient: GradientPass


class FunctionOptions(ExtendedOptions, total=False):
    """Keywords of the functions of logits but `return_details`."""

    sample_weight: Tensor | None
    shard: Shard | None


class CalibratedFunctionOptions(FunctionOptions, total=False):
    """Those of `disalign_cross_entropy`."""

    form: Form
    background: Background | None


class LinearOptions(TypedDict, total=False):
    """Keywords of `linear_cross_entropy` but `return_details`."""

    sample_weight: Tensor | None
    normalizer: Normalizer
    prior: Tensor | None
    margin: Tensor | float | None
    focal_gamma: float
    cosine_scale: Tensor | float | None
    sample_rate: float | None
    generator: Generator | None
    chunk_bytes: int
    shard: Shard | None


class CalibratedLinearOptions(LinearOptions, total=False):
    """Those of `disalign_linear_cross_entropy`."""

    form: Form
    background: Background | None


class CriterionOptions(ExtendedOptions, total=False):
    """Arguments of `nn.CrossEntropyLoss` but `weight`."""

    size_average: bool | None
    reduce: bool | None
    ignore_index: int
    reduction: ReductionName
    label_smoothing: float


class LossOptions(ExtendedOptions, total=False):
    """Arguments of `disalign_cross_entropy` beside the calibration and `weight`."""

    sample_weight: Tensor | None
    ignore_index: int
    reduction: ReductionName
    label_smoothing: float


class WeightedLossOptions(LossOptions, total=False):
    """The same with `weight`."""

    weight: Tensor | None


class UpsampleOptions(ExtendedOptions, total=False):
    """Keywords of `upsample_cross_entropy` but `return_details`."""

    sample_weight: Tensor | None
    align_corners: bool
    confidence: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    form: Form
    background: Background | None
