"""Published losses for long tails by their names, all through the same kernels.

Each is a class, and the function of its name is that class: `balanced_softmax(counts)` and
`BalancedSoftmaxLoss(counts)` make the same module, called as `nn.CrossEntropyLoss` is:
`criterion(logits, target)`. Counts are the training samples of each class, in whatever form
`class_stats` takes them; classes without samples raise ValueError unless `empty` says what they
get. `options` are the keywords of `disalign_ops.nn.CrossEntropyLoss` that a loss does not set:
reduction, ignore_index, ...
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from . import class_stats, functional
from ._call.arguments import (
    check_input,
    check_integer,
    check_number,
    class_vector,
    positions_shape,
)
from ._losses.label_aware_smoothing import LabelAwareSmoothingLoss
from ._losses.seesaw import SeesawLoss
from ._ops.reference import accumulate_dtype
from .class_stats import Counts
from .errors import ArgumentError
from .nn import CrossEntropyLoss
from .nn.calibration import is_recorded

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "CosFaceLoss",
    "FocalLoss",
    "LDAMLoss",
    "LabelAwareSmoothingLoss",
    "LogitAdjustedLoss",
    "SeesawLoss",
    "VSLoss",
    "balanced_softmax",
    "class_balanced",
    "cosface",
    "focal",
    "label_aware_smoothing",
    "ldam",
    "logit_adjusted",
    "seesaw",
    "vs",
]


def _any_number(name: str, value: object) -> float:
    """Of any sign; class_stats has the range."""
    return check_number(name, value, -math.inf)


def _positive(name: str, value: object) -> float:
    number = check_number(name, value, -math.inf)
    if not 0 < number < math.inf:
        raise ArgumentError(f"{name} must be a finite number above 0, got {number}")
    return number


class BalancedSoftmaxLoss(CrossEntropyLoss):
    """-log n_t e^{z_t} / sum_j n_j e^{z_j}: the prior log n_j is added to the logits.

    Source: Ren et al., "Balanced Meta-Softmax", NeurIPS 2020, eq. 4.
    """

    _derived = ("prior",)

    def __init__(
        self, counts: Counts, *, empty: Literal["error", "min"] = "error", **options: Any
    ) -> None:
        n = class_stats._as_counts(counts)
        super().__init__(prior=class_stats.log_prior(n, 1.0, empty=empty), **options)
        self._keep(n, empty=empty)


class LogitAdjustedLoss(CrossEntropyLoss):
    """Cross-entropy of z_j + tau log pi_j, pi_j = n_j / sum n. At test time the logits are taken as
    they are.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10.
    """

    _derived = ("prior",)

    def __init__(
        self, counts: Counts, tau: float = 1.0, *,
        empty: Literal["error", "min"] = "error", **options: Any,
    ) -> None:  # fmt: skip
        n, tau = class_stats._as_counts(counts), _any_number("tau", tau)
        super().__init__(prior=class_stats.log_prior(n, tau, empty=empty), **options)
        self._keep(n, tau=tau, empty=empty)


class ClassBalancedLoss(CrossEntropyLoss):
    """Cross-entropy weighted by (1 - beta) / (1 - beta^{n_j}), normalised to the sum C. With
    `focal_gamma` the class-balanced focal loss.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    eq. 5.
    """

    _derived = ("weight",)

    def __init__(
        self, counts: Counts, beta: float = 0.9999, *,
        empty: Literal["error", "zero", "max"] = "error", **options: Any,
    ) -> None:  # fmt: skip
        n, beta = class_stats._as_counts(counts), _any_number("beta", beta)
        super().__init__(class_stats.class_balanced_weights(n, beta, empty=empty), **options)
        self._keep(n, beta=beta, empty=empty)


class FocalLoss(CrossEntropyLoss):
    """-w_t (1 - p_t)^gamma log p_t, p the softmax. weight: (C,), the paper's alpha.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 5, whose p is a
    sigmoid's.
    """

    _derived = ("focal_gamma",)

    def __init__(self, gamma: float = 2.0, weight: Tensor | None = None, **options: Any) -> None:
        gamma = check_number("gamma", gamma, 0.0)
        super().__init__(weight, focal_gamma=gamma, **options)
        self._needs_indices = gamma > 0
        self._keep(gamma=gamma)


class ScaledCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy of gain_j z_j + prior_j - margin_t [j = t], without a copy of the logits.

    gain: (C,) or a number above 0, constant.
    """

    gain: Tensor | float

    def __init__(self, gain: Tensor | float, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(weight, **options)
        if isinstance(gain, Tensor) and gain.dim():
            self.register_buffer("gain", gain, persistent=False)
        else:
            self.gain = _positive("gain", gain)
        self._check_vectors("weight", "prior", "margin", "gain")
        self._keep(gain=self.gain)

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        self._check_call(input, target)
        gain: Any = self.gain
        if not is_recorded(input):  # in a graph the number of classes is none
            classes = check_input(input)
            gain = class_vector("gain", gain, classes, input, accumulate_dtype(input.dtype))
            assert gain is not None
        # A calibration that is sure of itself: (1 + c a) z + c b with c = sigmoid(inf) = 1.
        sure = torch.full(positions_shape(input), math.inf, device=input.device)
        no_bias: Any = 0.0
        return functional.disalign_cross_entropy(
            input, target, sure, gain - 1, no_bias, self._weight(), self.ignore_index,
            self.reduction, self.label_smoothing, form="residual", sample_weight=sample_weight,
            normalizer=self.normalizer, prior=self.prior, margin=self.margin,
            focal_gamma=self.focal_gamma, inplace_backward=self.inplace_backward,
            gradient=self.gradient,
        )  # fmt: skip

    def _weight(self) -> Tensor | None:
        return self.weight


class DeferredLoss(ScaledCrossEntropyLoss):
    """A loss whose class weights begin to count at epoch `deferred_until`, None: at once.

    Call `set_epoch` at the start of every epoch, from 0 on.
    """

    def __init__(self, *arguments: Any, deferred_until: int | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if deferred_until is not None:
            deferred_until = check_integer("deferred_until", deferred_until)
        self.deferred_until, self.epoch = deferred_until, 0
        self._made_of = {**self._made_of, "deferred_until": deferred_until}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = check_integer("epoch", epoch)

    def _weight(self) -> Tensor | None:
        until = self.deferred_until
        return self.weight if until is None or self.epoch >= until else None


class LDAMLoss(DeferredLoss):
    """Cross-entropy of scale (z_j - m_j [j = t]), m_j = max_margin (n_j / min n)^{-1/4}.

    z are cosines, as of `DisAlignCosineLinear(scale_init=1, learn_scale=False)` or a normalised
    linear layer. deferred_until: the epoch at which class-balanced weights (`beta`) set in, the
    paper's DRW; then call `set_epoch`. None: no weights.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019, eq. 13 and algorithm 1; scale as in its released code.
    """

    _derived: tuple[str, ...] = ("margin",)
    _needs_indices = True

    def __init__(
        self, counts: Counts, max_margin: float = 0.5, scale: float = 30.0, *,
        beta: float = 0.9999, deferred_until: int | None = None,
        empty: Literal["error", "max"] = "error", **options: Any,
    ) -> None:  # fmt: skip
        max_margin, scale = _any_number("max_margin", max_margin), _positive("scale", scale)
        n, beta = class_stats._as_counts(counts), _any_number("beta", beta)
        margin = class_stats.ldam_margins(n, max_margin, empty=empty) * scale
        weight = class_stats.class_balanced_weights(n, beta, empty=empty)
        if deferred_until is None:
            super().__init__(scale, margin=margin, deferred_until=None, **options)
        else:
            super().__init__(scale, weight, margin=margin, deferred_until=deferred_until, **options)
            self._derived = ("margin", "weight")
        self._keep(
            n, max_margin=max_margin, scale=scale, empty=empty,
            beta=None if deferred_until is None else beta, deferred_until=self.deferred_until,
        )  # fmt: skip


class CosFaceLoss(ScaledCrossEntropyLoss):
    """Cross-entropy of scale (z_j - margin [j = t]), z being cosines.

    Source: Wang et al., "CosFace: Large Margin Cosine Loss", CVPR 2018, eq. 4.
    """

    _needs_indices = True

    def __init__(self, margin: float = 0.35, scale: float = 64.0, **options: Any) -> None:
        margin, scale = check_number("margin", margin, 0.0), _positive("scale", scale)
        super().__init__(scale, margin=margin * scale, **options)
        self._keep(margin=margin, scale=scale)


class VSLoss(ScaledCrossEntropyLoss):
    """Vector scaling: cross-entropy of (n_j / max n)^gamma z_j + tau log pi_j.

    Source: Kini et al., "Label-Imbalanced and Group-Sensitive Classification under
    Overparameterization", NeurIPS 2021, eq. 2; the parametrisation of its released code.
    """

    _derived = ("prior", "gain")

    def __init__(
        self, counts: Counts, gamma: float = 0.3, tau: float = 1.0, *,
        empty: Literal["error", "min"] = "error", **options: Any,
    ) -> None:  # fmt: skip
        gamma, tau = check_number("gamma", gamma, 0.0), _any_number("tau", tau)
        n = class_stats._as_counts(counts)
        log_pi = class_stats.log_prior(n, 1.0, empty=empty, dtype=torch.float64)
        gain = (gamma * (log_pi - log_pi.max())).exp()
        prior = class_stats.log_prior(n, tau, empty=empty)
        super().__init__(gain.to(prior.dtype), prior=prior, **options)
        self._keep(n, gamma=gamma, tau=tau, empty=empty)


# The functions of before there were classes.
balanced_softmax = BalancedSoftmaxLoss
logit_adjusted = LogitAdjustedLoss
class_balanced = ClassBalancedLoss
focal = FocalLoss
ldam = LDAMLoss
cosface = CosFaceLoss
vs = VSLoss
label_aware_smoothing = LabelAwareSmoothingLoss
seesaw = SeesawLoss
