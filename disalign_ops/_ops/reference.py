"""The oracle: calibrated, class-weighted softmax cross-entropy in plain PyTorch.

It reads as the formulas of docs/math.md, is differentiable any number of times, runs on every
device, and is what every backend is compared with. It makes several tensors of the logits' size.

Rows: logits z (N, C), target (N,), or class probabilities y (N, C). Class vectors (C,): scale a,
bias b, weight w, prior o, margin m. Row vectors (N,): confidence (before the sigmoid),
sample_weight v. `scale` is a of `u = (1 + c a) z + c b + o`: functional.py converts from the
published forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic for logits of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def class_indices(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The target as int64, without a copy where it is one, and which of its positions count.

    Every comparison of a target with ignore_index is this one: in uint8, -100 would be class 156
    and 300 class 44.
    """
    target = target.to(torch.int64)
    return target, target != ignore_index


def no_class(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Where a target is neither a class nor ignored."""
    target, valid = class_indices(target, ignore_index)
    return ((target < 0) | (target >= classes)) & valid


def calibrate(logits: Tensor, scale: Tensor, bias: Tensor, confidence: Tensor) -> Tensor:
    """u = (1 + c a) z + c b of (N, C) or (N, C, S) logits, in their accumulation dtype.

    confidence: flat, (N,) or (N * S,).
    """
    z = logits.to(accumulate_dtype(logits.dtype))
    c = torch.sigmoid(confidence)[:, None]
    if logits.dim() == 3:
        c = c.reshape(logits.shape[0], 1, logits.shape[2])
        scale, bias = scale[:, None], bias[:, None]
    gain, offset = 1 + c * scale, c * bias
    # A masked class (z = -inf) stays masked and adds nothing to the gradients of scale and
    # confidence, where the formula's q z would be 0 * inf.
    masked = z == float("-inf")
    unmasked_u = gain * torch.where(masked, 0.0, z) + offset
    masked_u = gain.detach() * torch.where(masked, z, 0.0) + c.detach() * bias
    return torch.where(masked, masked_u, unmasked_u)


def calibrated_logits(
    logits: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
    prior: Tensor | None,
) -> Tensor:
    """u = (1 + c a) z + c b + o of (N, C) or (N, C, S) logits, by what of it is given."""
    if confidence is None or scale is None or bias is None:
        u = logits.to(accumulate_dtype(logits.dtype))
    else:
        u = calibrate(logits, scale, bias, confidence)
    if prior is None:
        return u
    return u + (prior[:, None] if u.dim() == 3 else prior)


def position_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    confidence: Tensor | None = None,
    prior: Tensor | None = None,
    margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> Tensor:
    """v [(1 - e) w_t (1 - p_t)^gamma nll + (e / C) sum_j w_j (lse - u_j)] a row; ignored: 0.

    With class probabilities v sum_j b_j (lse - u_j), b_j = w_j ((1 - e) y_j + e / C).
    """
    classes = logits.shape[1]
    if target.is_floating_point():
        u = calibrated_logits(logits, scale, bias, confidence, prior)
        b = soft_weights(target, u, weight, 1 - label_smoothing, label_smoothing / max(classes, 1))
        maximum = u.detach().amax(1, keepdim=True) if classes else u.new_zeros(u.shape[0], 1)
        log_sum = (u - maximum).exp().sum(1, keepdim=True).log()
        # A masked class (u = -inf) that the target does not ask for adds 0, not 0 * inf.
        masked = (b == 0) & (u == float("-inf"))
        loss = (b * torch.where(masked, 0.0, (maximum - u) + log_sum)).sum(1)
        return loss if sample_weight is None else loss * sample_weight
    target, valid = class_indices(target, ignore_index)
    t = torch.where(valid, target, 0)[:, None]
    # An ignored row is replaced, not multiplied by 0: what it holds may be NaN.
    z = torch.where(valid[:, None], logits, 0.0)
    u = calibrated_logits(z, scale, bias, confidence, prior)
    if margin is not None:
        u = u - torch.zeros_like(u).scatter(1, t, margin[t])

    # max and log-sum are kept apart: their sum loses the digits of a small loss at a large offset.
    maximum = u.detach().amax(1, keepdim=True) if classes else u.new_zeros(u.shape[0], 1)
    log_sum = (u - maximum).exp().sum(1).log()
    nll = (maximum - u.gather(1, t))[:, 0] + log_sum
    w_t = u.new_ones(()) if weight is None else weight[t[:, 0]]

    loss = (1 - label_smoothing) * w_t * _focal(nll, focal_gamma)
    if label_smoothing > 0:
        w = u.new_ones(classes) if weight is None else weight
        smooth = w.sum() * log_sum + (w * (maximum - u)).sum(1)
        loss = loss + label_smoothing / classes * smooth
    if sample_weight is not None:
        loss = loss * sample_weight
    return torch.where(valid, loss, 0.0)


def soft_weights(
    target: Tensor, like: Tensor, weight: Tensor | None, keep: float, share: float
) -> Tensor:
    """b_j = w_j (keep y_j + share) of class probabilities, in the dtype of `like`."""
    b = keep * target.to(like.dtype) + share
    return b if weight is None else weight * b


def _focal(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma nll; at p_t = 1 the limit 0, with gradient 0, and at p_t = 0 nll."""
    if gamma == 0:
        return nll
    sure, masked = nll <= 0, nll == float("inf")
    rest = torch.where(sure | masked, 1.0, nll)
    value = torch.where(sure, 0.0, (-torch.expm1(-rest)) ** gamma * rest)
    return torch.where(masked, nll, value)


def denominator(
    target: Tensor,
    normalizer: str | Tensor,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """What reduction 'mean' divides the summed loss by, as a float64 0-d tensor.

    Class probabilities (N, C) have no weight of their own: 'weights' sums sample_weight alone, and
    every row is valid.
    """
    if target.is_floating_point():
        rows = target.new_ones(target.shape[0], dtype=torch.float64)
        return denominator_of(normalizer, rows > 0, rows, sample_weight)
    target, valid = class_indices(target, ignore_index)
    target_weight = torch.ones(target.shape, dtype=torch.float64, device=target.device)
    if weight is not None:
        target_weight = weight[torch.where(valid, target, 0)]
    return denominator_of(normalizer, valid, target_weight, sample_weight)


def denominator_of(
    normalizer: str | Tensor, valid: Tensor, target_weight: Tensor, sample_weight: Tensor | None
) -> Tensor:
    """The same from w_t of every row and whether the row counts."""
    if isinstance(normalizer, Tensor):
        return normalizer.to(torch.float64)
    if normalizer == "count":
        return torch.full((), float(valid.numel()), dtype=torch.float64, device=valid.device)
    if normalizer == "valid":
        return valid.sum().to(torch.float64)
    share = target_weight.to(torch.float64)
    if sample_weight is not None:
        share = share * sample_weight
    return torch.where(valid, share, 0.0).sum()


def reduce(losses: Tensor, reduction: str, normalizer: str | Tensor, divisor: Tensor) -> Tensor:
    """The (N,) losses as they are, summed, or divided by `divisor`; see `denominator`."""
    if reduction == "none":
        return losses
    total = losses.to(torch.float64).sum()
    if reduction == "mean":
        # Nothing left: gradients are 0 in every case; the loss is NaN with 'weights' as in
        # PyTorch, and 0 with a count.
        nothing = divisor == 0
        mean = torch.where(nothing, 0.0, total / torch.where(nothing, 1.0, divisor))
        total = mean + torch.where(nothing, float("nan"), 0.0) if normalizer == "weights" else mean
    return total.to(losses.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    normalizer: str | Tensor = "weights",
    **options: object,
) -> Tensor:
    """The loss of rows, in the accumulation dtype; options as in `position_loss`.

    target may have any shape of N entries, or of (N, C) where it holds class probabilities; 'none'
    is flat.
    """
    if not target.is_floating_point():
        target = target.reshape(-1)
    losses = position_loss(logits, target, **options)  # type: ignore[arg-type]
    shared = {k: v for k, v in options.items() if k in ("weight", "sample_weight", "ignore_index")}
    divisor = denominator(target, normalizer, **shared)  # type: ignore[arg-type]
    return reduce(losses, reduction, normalizer, divisor)


def dense_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The loss of class planes (N, C, S); position vectors and 'none' are flat, (N * S,)."""
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    if target.is_floating_point():
        target = target.movedim(1, -1).reshape(rows.shape)
    return cross_entropy(rows, target, **options)


class _Lowest(torch.autograd.Function):
    """Replaces values below `low` by `low`. Its gradient, of any order, is the identity's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, low: float) -> Tensor:  # type: ignore[override]
        return torch.where(u < low, low, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return tangent


def upsample(
    logits: Tensor,
    size: tuple[int, int],
    align_corners: bool,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    confidence: Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """Calibrated logits (N, C, h, w), interpolated bilinearly to (N, C, H, W).

    confidence: flat, (N * h * w,). Masked classes (-inf) are interpolated as a number so low that
    its exponential is 0, since 0 * -inf between two columns would be NaN; where no other class is
    left, every class is NaN. Their gradient is that of -inf in `cross_entropy`: the target's and
    the label smoothing's share, which adjacent positions add up.
    """
    n, classes, h, w = logits.shape
    rows = logits.movedim(1, -1).reshape(-1, classes)
    u = calibrated_logits(rows, scale, bias, confidence, prior)
    low = torch.finfo(u.dtype).min / 4
    u = _Lowest.apply(u, low)  # type: ignore[no-untyped-call]
    u = u.reshape(n, h, w, classes).movedim(-1, 1)
    u = torch.nn.functional.interpolate(u, size, mode="bilinear", align_corners=align_corners)
    nothing = u.detach().amax(1, keepdim=True) <= low / 16
    return torch.where(nothing, float("nan"), u)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    align_corners: bool,
    want_details: bool = False,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    confidence: Tensor | None = None,
    prior: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The loss of `upsample` at target (N, H, W), or (N, C, H, W) where it holds class
    probabilities; sample_weight and 'none' are flat.
    """
    size = (target.shape[-2], target.shape[-1])
    u = upsample(
        logits, size, align_corners, scale=scale, bias=bias, confidence=confidence, prior=prior
    )
    if target.is_floating_point():
        target = target.flatten(2)
    return dense_cross_entropy(u.flatten(2), target, **options)


def details(u: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Of u (N, C, S): softmax of the target, 0 where ignored, and the most probable class; flat."""
    target, valid = class_indices(target.reshape(-1), ignore_index)
    rows = u.movedim(1, -1).reshape(-1, u.shape[1])
    t = torch.where(valid, target, 0)[:, None]
    probability = torch.softmax(rows, 1).gather(1, t)[:, 0]
    return torch.where(valid, probability, 0.0), rows.argmax(1)


def entropy(u: Tensor, log_sum_exp: Tensor) -> Tensor:
    """-sum_j p_j log p_j of u (N, C) or (N, C, S), whose log-sum-exp (N,) or (N, S) is at hand; 0
    where all classes are masked.
    """
    log_p = u - log_sum_exp.unsqueeze(1)
    # p log p is 0 at p = 0, where log p is -inf; of masked classes alone it is NaN.
    return -torch.where(u == float("-inf"), 0.0, log_p.exp() * log_p).sum(1)
