"""The oracle of a shard, rows of which the logits are some of the classes: what it adds to their
loss, and its gradients. Names and shapes as in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import calibrated_logits, soft_weights

ELSEWHERE, IGNORED = -1, -2  # of a shard's targets: a class of another shard; counts nothing


def shard_sums(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
    prior: Tensor | None,
    margin: Tensor | None,
    keep: float,
    share: float,
) -> Tensor:
    """What a shard (N, C) of a row's classes adds to its loss: (5, N), 0 for ignored rows.

    The maximum m of u; sum_j exp(u_j - m) without the target; u_t and d_t, where d = a z + b, 0 if
    the target is elsewhere; with smoothing sum_j w_j (u_j - m). With class probabilities: m,
    sum_j exp(u_j - m), sum_j b_j, 0, sum_j b_j (u_j - m).
    """
    if target.is_floating_point():
        u = calibrated_logits(logits, scale, bias, confidence, prior)
        b = soft_weights(target, u, weight, keep, share)
        maximum = u.amax(1).clamp(min=torch.finfo(u.dtype).min)
        at = u - maximum[:, None]
        sums = [maximum, at.exp().sum(1), b.sum(1), torch.zeros_like(maximum)]
        return torch.stack([*sums, torch.where(b == 0, 0.0, b * at).sum(1)])
    u, d, here = _shard_logits(logits, target, scale, bias, confidence, prior, margin)
    nothing = u.new_zeros(())
    maximum = u.amax(1).clamp(min=torch.finfo(u.dtype).min)
    at = u - maximum[:, None]
    sums = [
        maximum,
        torch.where(here, nothing, at.exp()).sum(1),
        torch.where(here, u, nothing).sum(1),
        torch.where(here, d, nothing).sum(1),
        (at if weight is None else weight * at).sum(1) if share else torch.zeros_like(maximum),
    ]
    return torch.where(target == IGNORED, nothing, torch.stack(sums))


def shard_gradients(
    factors: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
    prior: Tensor | None,
    margin: Tensor | None,
    keep: float,
    share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A shard's gradients of logits, scale and bias, and its share of the confidence's.

    factors (5, N), of the rows: the maximum M over all shards; F, G and T of
    q_j = F exp(u_j - M) - G w_j - T [j = t], everything included; d_t. With class probabilities
    b_j in place of w_j, T and d_t are 0.
    """
    if target.is_floating_point():
        u = calibrated_logits(logits, scale, bias, confidence, prior)
        b = soft_weights(target, u, weight, keep, share)
        q = factors[1, :, None] * (u - factors[0, :, None]).exp() - factors[2, :, None] * b
        return _shard_gradients_of(q, 0.0, logits, scale, bias, confidence)
    u, _, here = _shard_logits(logits, target, scale, bias, confidence, prior, margin)
    maximum, softmax, smooth, at_target, target_du_dc = factors[:, :, None]
    q = softmax * (u - maximum).exp()
    if share:
        q = q - smooth * (torch.ones_like(u) if weight is None else weight)
    q = torch.where(here, q - at_target, q)
    ignored = (target == IGNORED)[:, None]
    q = torch.where(ignored, 0.0, q)
    logits = torch.where(ignored, 0.0, logits)  # which may be NaN
    return _shard_gradients_of(q, target_du_dc, logits, scale, bias, confidence)


def _shard_gradients_of(
    q: Tensor,
    target_du_dc: Tensor | float,
    logits: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if confidence is None or scale is None or bias is None:
        nothing = q.new_zeros((0,))
        return q.to(logits.dtype), nothing, nothing, nothing
    c = torch.sigmoid(confidence)[:, None]
    z = logits.to(q.dtype)
    d = scale * z + bias
    d = torch.where(d.isfinite(), d, 0.0)
    z = torch.where(z == float("-inf"), 0.0, z)
    grad_confidence = (c * (1 - c))[:, 0] * (q * (d - target_du_dc)).sum(1)
    grad_logits = (q * (1 + c * scale)).to(logits.dtype)
    return grad_logits, (q * c * z).sum(0), (q * c).sum(0), grad_confidence


def _shard_logits(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    confidence: Tensor | None,
    prior: Tensor | None,
    margin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """u and d of a shard, and where j = t. Ignored rows are 0."""
    here = target[:, None] == torch.arange(logits.shape[1], device=logits.device)
    z = torch.where((target == IGNORED)[:, None], 0.0, logits)
    u = calibrated_logits(z, scale, bias, confidence, prior)
    d = torch.zeros_like(u)
    if scale is not None and bias is not None:
        d = scale * z + bias
        d = torch.where(d.isfinite(), d, 0.0)
    if margin is not None:
        u = torch.where(here, u - margin, u)
    return u, d, here
