"""Published losses for long tails by their names, all through the same kernels.

Each function returns a module, called as `nn.CrossEntropyLoss` is: `criterion(logits, target)`.
Counts are the training samples of each class, in whatever form `class_stats` takes them; classes
without samples raise ValueError unless `empty` says what they get. `options` are the keywords of
`disalign_ops.nn.CrossEntropyLoss` that a function does not set: reduction, ignore_index, ...
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from . import class_stats, functional
from ._arguments import check_integer, check_number, positions_shape
from .class_stats import Counts
from .errors import ArgumentError
from .nn import CrossEntropyLoss

__all__ = [
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


def balanced_softmax(
    counts: Counts, *, empty: Literal["error", "min"] = "error", **options: Any
) -> CrossEntropyLoss:
    """-log n_t e^{z_t} / sum_j n_j e^{z_j}: the prior log n_j is added to the logits.

    Source: Ren et al., "Balanced Meta-Softmax", NeurIPS 2020, eq. 4.
    """
    return CrossEntropyLoss(prior=class_stats.log_prior(counts, 1.0, empty=empty), **options)


def logit_adjusted(
    counts: Counts, tau: float = 1.0, *, empty: Literal["error", "min"] = "error", **options: Any
) -> CrossEntropyLoss:
    """Cross-entropy of z_j + tau log pi_j, pi_j = n_j / sum n. At test time the logits are taken as
    they are.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10.
    """
    return CrossEntropyLoss(prior=class_stats.log_prior(counts, tau, empty=empty), **options)


def class_balanced(
    counts: Counts, beta: float = 0.9999, *,
    empty: Literal["error", "zero", "max"] = "error", **options: Any,
) -> CrossEntropyLoss:  # fmt: skip
    """Cross-entropy weighted by (1 - beta) / (1 - beta^{n_j}), normalised to the sum C. With
    `focal_gamma` the class-balanced focal loss.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    eq. 5.
    """
    weight = class_stats.class_balanced_weights(counts, beta, empty=empty)
    return CrossEntropyLoss(weight, **options)


def focal(gamma: float = 2.0, weight: Tensor | None = None, **options: Any) -> CrossEntropyLoss:
    """-w_t (1 - p_t)^gamma log p_t, p the softmax. weight: (C,), the paper's alpha.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 5, whose p is a
    sigmoid's.
    """
    return CrossEntropyLoss(weight, focal_gamma=gamma, **options)


class ScaledCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy of gain_j z_j + prior_j - margin_t [j = t], without a copy of the logits.

    gain: (C,) or a number above 0, constant.
    """

    gain: Tensor | float

    def __init__(self, gain: Tensor | float, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(weight, **options)
        if isinstance(gain, Tensor):
            self.register_buffer("gain", gain, persistent=False)
        else:
            self.gain = check_number("gain", gain, 0.0)
        if isinstance(gain, float | int) and not 0 < gain < math.inf:
            raise ArgumentError(f"gain is {gain}, needed is a finite number > 0")

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        # A calibration that is sure of itself: (1 + c a) z + c b with c = sigmoid(inf) = 1.
        sure = torch.full(positions_shape(input), math.inf, device=input.device)
        return functional.disalign_cross_entropy(
            input, target, sure, self.gain - 1, 0.0, self._weight(), self.ignore_index,  # type: ignore[arg-type]
            self.reduction, self.label_smoothing, form="residual", sample_weight=sample_weight,
            normalizer=self.normalizer, prior=self.prior, margin=self.margin,
            focal_gamma=self.focal_gamma, inplace_backward=self.inplace_backward,
        )  # fmt: skip

    def _weight(self) -> Tensor | None:
        return self.weight


class DeferredLoss(ScaledCrossEntropyLoss):
    """A loss whose class weights begin to count at epoch `deferred_until`: see `ldam`.

    Call `set_epoch` at the start of every epoch, from 0 on.
    """

    def __init__(self, *arguments: Any, deferred_until: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        check_integer("deferred_until", deferred_until)
        self.deferred_until, self.epoch = deferred_until, 0

    def set_epoch(self, epoch: int) -> None:
        check_integer("epoch", epoch)
        self.epoch = epoch

    def _weight(self) -> Tensor | None:
        return self.weight if self.epoch >= self.deferred_until else None


def ldam(
    counts: Counts, max_margin: float = 0.5, scale: float = 30.0, *,
    beta: float = 0.9999, deferred_until: int | None = None,
    empty: Literal["error", "max"] = "error", **options: Any,
) -> ScaledCrossEntropyLoss:  # fmt: skip
    """Cross-entropy of scale (z_j - m_j [j = t]), m_j = max_margin (n_j / min n)^{-1/4}.

    z are cosines, as of `DisAlignCosineLinear(scale_init=1, learn_scale=False)` or a normalised
    linear layer. deferred_until: the epoch at which class-balanced weights (`beta`) set in, the
    paper's DRW; then call `set_epoch`. None: no weights.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019, eq. 13 and algorithm 1; scale as in its released code.
    """
    margin = class_stats.ldam_margins(counts, max_margin, empty=empty) * scale
    if deferred_until is None:
        return ScaledCrossEntropyLoss(scale, margin=margin, **options)
    weight = class_stats.class_balanced_weights(counts, beta, empty=empty)
    return DeferredLoss(scale, weight, margin=margin, deferred_until=deferred_until, **options)


def cosface(margin: float = 0.35, scale: float = 64.0, **options: Any) -> ScaledCrossEntropyLoss:
    """Cross-entropy of scale (z_j - margin [j = t]), z being cosines.

    Source: Wang et al., "CosFace: Large Margin Cosine Loss", CVPR 2018, eq. 4.
    """
    margin = check_number("margin", margin, 0.0)
    return ScaledCrossEntropyLoss(scale, margin=margin * scale, **options)


def vs(
    counts: Counts, gamma: float = 0.3, tau: float = 1.0, *,
    empty: Literal["error", "min"] = "error", **options: Any,
) -> ScaledCrossEntropyLoss:  # fmt: skip
    """Vector scaling: cross-entropy of (n_j / max n)^gamma z_j + tau log pi_j.

    Source: Kini et al., "Label-Imbalanced and Group-Sensitive Classification under
    Overparameterization", NeurIPS 2021, eq. 2; the parametrisation of its released code.
    """
    gamma = check_number("gamma", gamma, 0.0)
    log_pi = class_stats.log_prior(counts, 1.0, empty=empty, dtype=torch.float64)
    gain = (gamma * (log_pi - log_pi.max())).exp()
    prior = class_stats.log_prior(counts, tau, empty=empty)
    return ScaledCrossEntropyLoss(gain.to(prior.dtype), prior=prior, **options)


class LabelAwareSmoothingLoss(CrossEntropyLoss):
    """See `label_aware_smoothing`. smoothing: (C,), e of every class."""

    smoothing: Tensor

    def __init__(self, smoothing: Tensor, **options: Any) -> None:
        for name in ("label_smoothing", "inplace_backward"):
            if options.get(name):
                raise ArgumentError(f"{name} is {options[name]}: this loss does not take it")
        options.setdefault("normalizer", "valid")
        super().__init__(**options)
        self.register_buffer("smoothing", smoothing, persistent=False)

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        valid = target != self.ignore_index
        e = torch.where(valid, self.smoothing[torch.where(valid, target, 0).long()], 0.0)
        v = 1.0 if sample_weight is None else sample_weight
        # The loss is linear in e, which kernels take as one number: its two ends, weighted.
        ends = []
        for smoothing, share in ((0.0, 1 - e), (1.0, e)):
            end = functional.cross_entropy(
                input, target, self.weight, None, self.ignore_index, None, self.reduction,
                smoothing, sample_weight=v * share, normalizer=self.normalizer, prior=self.prior,
                margin=self.margin, focal_gamma=self.focal_gamma,
            )  # fmt: skip
            ends.append(end)
        return ends[0] + ends[1]


def label_aware_smoothing(
    counts: Counts, smooth_head: float = 0.3, smooth_tail: float = 0.0, *,
    shape: Literal["concave", "linear", "convex"] = "concave", **options: Any,
) -> LabelAwareSmoothingLoss:  # fmt: skip
    """(1 - e_t) nll_t + e_t / C sum_j nll_j; e from smooth_head at max n to smooth_tail at min n.

    With r = (n - min n) / (max n - min n): e = smooth_tail + (smooth_head - smooth_tail) times
    sin(pi r / 2) ("concave"), r ("linear") or 1 + sin(3 pi / 2 + pi r / 2) ("convex"). The mean is
    over the positions that are not ignored. Reads the logits twice.

    Source: Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, eq. 8 and
    9, as in its released code.
    """
    if shape not in ("concave", "linear", "convex"):
        raise ArgumentError(f"shape is {shape!r}, needed is 'concave', 'linear' or 'convex'")
    head = check_number("smooth_head", smooth_head, 0.0, 1.0)
    tail = check_number("smooth_tail", smooth_tail, 0.0, 1.0)
    n = class_stats._as_counts(counts)
    spread = n.max() - n.min()
    r = (n - n.min()) / spread if spread > 0 else torch.ones_like(n)
    if shape == "concave":
        r = torch.sin(math.pi / 2 * r)
    elif shape == "convex":
        r = 1 + torch.sin(math.pi * 1.5 + math.pi / 2 * r)
    return LabelAwareSmoothingLoss((tail + (head - tail) * r).float(), **options)


class SeesawLoss(CrossEntropyLoss):
    """See `seesaw`. The buffer cumulative_samples (C,) is part of the state_dict."""

    cumulative_samples: Tensor

    def __init__(self, classes: int, p: float, q: float, eps: float, **options: Any) -> None:
        super().__init__(**options)
        check_integer("classes", classes)
        if classes < 1:
            raise ArgumentError(f"classes is {classes}, needed is 1 or more")
        self.p, self.q = check_number("p", p, 0.0), check_number("q", q, 0.0)
        self.eps = check_number("eps", eps, 0.0, 1.0)
        self.register_buffer("cumulative_samples", torch.zeros(classes, dtype=torch.float64))

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        classes = self.cumulative_samples.numel()
        if input.dim() != 2 or input.shape[1] != classes:
            raise ArgumentError(f"input has shape {tuple(input.shape)}, needed is (N, {classes})")
        counted = target != self.ignore_index
        t = torch.where(counted, target, 0).long()
        if self.training:
            self.cumulative_samples.index_add_(0, t, counted.to(torch.float64))
        with torch.no_grad():
            # log p_j - log max(p_t, eps), from the loss of the target: no softmax is made.
            nll = functional.cross_entropy(input, t, reduction="none")
            own = (-nll).clamp(min=math.log(self.eps)) if self.eps else -nll
            z_t = input.gather(1, t[:, None])
            factor = (input - (z_t + (nll + own)[:, None])).clamp_(min=0.0).mul_(self.q)
            log_n = self.cumulative_samples.clamp(min=1.0).log().to(input.dtype)
            factor += (log_n - log_n[t][:, None]).clamp_(max=0.0).mul_(self.p)
            factor.scatter_(1, t[:, None], 0.0)
        return super().forward(factor.add_(input), target, sample_weight=sample_weight)


def seesaw(
    classes: int, p: float = 0.8, q: float = 2.0, *, eps: float = 1e-2, **options: Any
) -> SeesawLoss:
    """-log e^{z_t} / (e^{z_t} + sum_{j != t} S_tj e^{z_j}), S_tj = M_tj C_tj, both constant in
    backward:

        M_tj = min(1, N_j / N_t)^p       N: samples seen so far, counted in training mode
        C_tj = max(1, p_j / max(p_t, eps))^q

    Logits (N, C). Takes at most two tensors of their size beyond the gradient.

    Source: Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021, eq. 3 to 7;
    eps as in its released code, whose objectness branch is not here.
    """
    return SeesawLoss(classes, p, q, eps, **options)
