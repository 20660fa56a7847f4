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
from collections import deque
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from . import class_stats, functional
from ._call.arguments import (
    check_choice,
    check_input,
    check_integer,
    check_number,
    check_target,
    class_vector,
    positions_shape,
    row_vector,
)
from ._ops.dispatch import check_classes, transformed
from ._ops.reference import accumulate_dtype, class_indices, denominator
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
        return functional.disalign_cross_entropy(
            input, target, sure, gain - 1, 0.0, self._weight(), self.ignore_index,  # type: ignore[arg-type]
            self.reduction, self.label_smoothing, form="residual", sample_weight=sample_weight,
            normalizer=self.normalizer, prior=self.prior, margin=self.margin,
            focal_gamma=self.focal_gamma, inplace_backward=self.inplace_backward,
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


class LabelAwareSmoothingLoss(CrossEntropyLoss):
    """(1 - e_t) nll_t + e_t / C sum_j nll_j; e from smooth_head at max n to smooth_tail at min n.

    With r = (n - min n) / (max n - min n): e = smooth_tail + (smooth_head - smooth_tail) times
    sin(pi r / 2) ("concave"), r ("linear") or 1 + sin(3 pi / 2 + pi r / 2) ("convex"). The mean is
    over the positions that are not ignored (normalizer="valid"). Reads the logits twice.

    Source: Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, eq. 8 and
    9, as in its released code.
    """

    smoothing: Tensor  # (C,), e of every class
    _defaults: ClassVar[dict[str, object]] = {**CrossEntropyLoss._defaults, "normalizer": "valid"}
    _needs_indices = True

    def __init__(
        self, counts: Counts, smooth_head: float = 0.3, smooth_tail: float = 0.0, *,
        shape: Literal["concave", "linear", "convex"] = "concave", **options: Any,
    ) -> None:  # fmt: skip
        for name in ("label_smoothing", "inplace_backward"):
            if options.get(name):
                raise ArgumentError(
                    f"{name} must not be given, which this loss does not take, got {options[name]}"
                )
        options.setdefault("normalizer", "valid")
        super().__init__(**options)
        check_choice("shape", shape, ("concave", "linear", "convex"))
        head = check_number("smooth_head", smooth_head, 0.0, 1.0)
        tail = check_number("smooth_tail", smooth_tail, 0.0, 1.0)
        n = class_stats._as_counts(counts)
        spread = n.max() - n.min()
        r = (n - n.min()) / spread if spread > 0 else torch.ones_like(n)
        if shape == "concave":
            r = torch.sin(math.pi / 2 * r)
        elif shape == "convex":
            r = 1 + torch.sin(math.pi * 1.5 + math.pi / 2 * r)
        self.register_buffer("smoothing", (tail + (head - tail) * r).float(), persistent=False)
        self._keep(n, smooth_head=head, smooth_tail=tail, shape=shape)

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        self._check_call(input, target)
        classes, shape = check_input(input), positions_shape(input)
        check_target(input, target, shape)
        check_classes(target, classes, self.ignore_index)
        dtype = accumulate_dtype(input.dtype)
        weight = class_vector("weight", self.weight, classes, input, dtype, exact=True)
        v = row_vector("sample_weight", sample_weight, input, shape, dtype)
        t, valid = class_indices(target.reshape(-1), self.ignore_index)
        e = torch.where(valid, self.smoothing.to(dtype)[torch.where(valid, t, 0)], 0.0)
        # Both ends below divide by the denominator of the whole, not of their shares of it.
        normalizer, by_weights = self.normalizer, None
        if self.reduction == "mean" and isinstance(normalizer, str) and normalizer == "weights":
            normalizer = by_weights = denominator(
                t, normalizer, weight=weight, sample_weight=v, ignore_index=self.ignore_index
            )
        # The loss is linear in e, which kernels take as one number: its two ends, weighted.
        ends = []
        for smoothing, share in ((0.0, 1 - e), (1.0, e)):
            end = functional.cross_entropy(
                input, target, weight, None, self.ignore_index, None, self.reduction, smoothing,
                sample_weight=(share if v is None else v * share).reshape(shape),
                normalizer=normalizer, prior=self.prior, margin=self.margin,
                focal_gamma=self.focal_gamma,
            )  # fmt: skip
            ends.append(end)
        loss = ends[0] + ends[1]
        if by_weights is None:
            return loss
        return torch.where(by_weights == 0, math.nan, loss)  # as with one denominator's name


# A pass that torch.utils.checkpoint repeats is found among so many before it.
_FIRST_PASSES = 64


class SeesawLoss(CrossEntropyLoss):
    """-log e^{z_t} / (e^{z_t} + sum_{j != t} S_tj e^{z_j}), S_tj = M_tj C_tj, both constant in
    backward:

        M_tj = min(1, N_j / N_t)^p       N: samples seen so far, counted in training mode
        C_tj = max(1, p_j / max(p_t, eps))^q

    Logits (N, C). Takes at most two tensors of their size beyond the gradient. The buffer
    cumulative_samples (C,), int64, is N and part of the state_dict; `reset_parameters` sets it to
    0. A call that raises counts nothing. Neither does a forward pass within backward, as
    torch.utils.checkpoint makes: it takes the N that the first pass had. (Compiled code does not
    know that it is run again.)

    Source: Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021, eq. 3 to 7;
    eps as in its released code, whose objectness branch is not here.
    """

    cumulative_samples: Tensor
    _needs_indices = True

    def __init__(
        self, classes: int, p: float = 0.8, q: float = 2.0, eps: float = 1e-2, **options: Any
    ) -> None:
        super().__init__(**options)
        classes = check_integer("classes", classes)
        if classes < 1:
            raise ArgumentError(f"classes must be 1 or more, got {classes}")
        self.p, self.q = check_number("p", p, 0.0), check_number("q", q, 0.0)
        self.eps = check_number("eps", eps, 0.0, 1.0)
        # Integers stay exact in a model that is cast to half precision. On the CPU also within
        # `torch.device("meta")`, where they would have no values.
        none = torch.zeros(classes, dtype=torch.int64, device="cpu")
        self.register_buffer("cumulative_samples", none)
        # Of passes that may be repeated: their losses of the target, by which they are recognised,
        # and N.
        self._first_passes: deque[tuple[Tensor, Tensor]] = deque(maxlen=_FIRST_PASSES)
        self._keep(classes=classes, p=self.p, q=self.q, eps=self.eps)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Of a criterion that version 0.1.0 pickled whole.
        self.__dict__.setdefault("_first_passes", deque(maxlen=_FIRST_PASSES))

    def reset_parameters(self) -> None:
        self.cumulative_samples.zero_()

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        self._check_call(input, target)
        classes = len(self.cumulative_samples)
        check_input(input)
        if input.dim() != 2 or input.shape[1] != classes:
            raise ArgumentError(f"input must have shape (N, {classes}), got {tuple(input.shape)}")
        check_target(input, target, positions_shape(input))
        check_classes(target, classes, self.ignore_index)
        t, valid = class_indices(target, self.ignore_index)
        t = torch.where(valid, t, 0)
        counting = self.training and not _in_backward()
        keeping = counting and _may_be_repeated()
        z = input.detach()  # torch.jit.trace records no no_grad
        with torch.no_grad():
            # log p_j - log max(p_t, eps), from the loss of the target: no softmax is made.
            nll = functional.cross_entropy(z, t, reduction="none")
            seen = self.cumulative_samples
            if counting:
                seen = seen.index_add(0, t, valid.to(seen.dtype))
                if keeping:
                    self._first_passes.append((nll, seen))
            elif self.training:
                seen = self._seen_before(nll)
            own = (-nll).clamp(min=math.log(self.eps)) if self.eps else -nll
            z_t = z.gather(1, t[:, None])
            factor = (z - (z_t + (nll + own)[:, None])).clamp_(min=0.0).mul_(self.q)
            # float16 ends at 65504.
            log_n = seen.clamp(min=1).to(accumulate_dtype(nll.dtype)).log()
            factor += (log_n - log_n[t][:, None]).clamp_(max=0.0).mul_(self.p)
            factor.scatter_(1, t[:, None], 0.0)
        loss = super().forward(factor.add_(input), target, sample_weight=sample_weight)
        if counting:  # last: what raises does not count
            self.cumulative_samples.copy_(seen)
        return loss

    def _seen_before(self, nll: Tensor) -> Tensor:
        """The counts that the first pass with these losses (N,) had; without one, today's.

        It is the nearest one, so that sums in another order do no harm, and is chosen on the
        device, without a synchronisation.
        """
        known = [
            (losses, seen) for losses, seen in self._first_passes
            if losses.shape == nll.shape and losses.device == nll.device
        ]  # fmt: skip
        if not known:
            return self.cumulative_samples
        apart = (torch.stack([losses for losses, _ in known]) - nll).abs().nan_to_num_().sum(1)
        return torch.stack([seen for _, seen in known])[apart.argmin()]


def _in_backward() -> bool:
    """Whether autograd runs backward, within which torch.utils.checkpoint repeats a pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _may_be_repeated() -> bool:
    """Whether torch.utils.checkpoint may run this pass: without gradients, or with hooks on what
    autograd saves.
    """
    if torch.compiler.is_compiling() or transformed():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or not torch.is_grad_enabled()


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
