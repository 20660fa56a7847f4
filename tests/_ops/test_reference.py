"""The oracle against PyTorch and against the published formulas, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disalign_ops._ops import reference
from support.cases import Rows, rows
from support.tolerances import assert_close


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_pytorch(reduction: str, smoothing: float, weighted: bool) -> None:
    r = rows(7, 23)
    r.target[3] = -100
    weight = torch.rand(23, dtype=torch.float64) if weighted else None
    shared = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    ours = reference.cross_entropy(r.logits, r.target, **shared)
    torch_ = F.cross_entropy(r.logits, r.target, **shared)
    assert_close(ours.detach(), torch_.detach(), torch.float64, "loss")
    upstream = torch.randn_like(ours)
    for a, e in zip(
        torch.autograd.grad(ours, r.logits, upstream),
        torch.autograd.grad(torch_, r.logits, upstream),
        strict=True,
    ):
        assert_close(a, e, torch.float64, "gradient")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_pytorch_for_class_probabilities(
    reduction: str, smoothing: float, weighted: bool
) -> None:
    z = torch.randn(6, 9, dtype=torch.float64)
    y = torch.rand(6, 9, dtype=torch.float64).softmax(1)
    weight = torch.rand(9, dtype=torch.float64) if weighted else None
    shared = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    ours = reference.cross_entropy(z, y, **shared)
    assert_close(ours, F.cross_entropy(z, y, **shared), torch.float64, "loss")


def test_interpolated_and_residual_forms_are_the_published_ones() -> None:
    r = rows(5, 11)
    c = torch.sigmoid(r.confidence)[:, None]
    released_classification = (1 + c * r.scale) * r.logits + c * r.bias
    released_detection = c * (r.scale * r.logits + r.bias) + (1 - c) * r.logits
    residual = reference.calibrate(r.logits, r.scale, r.bias, r.confidence)
    interpolated = reference.calibrate(r.logits, r.scale - 1, r.bias, r.confidence)
    assert_close(residual.detach(), released_classification.detach(), torch.float64, "residual")
    assert_close(interpolated.detach(), released_detection.detach(), torch.float64, "interpolated")


def _formula(r: Rows, gamma: float, e: float, m: Tensor, o: Tensor, w: Tensor) -> list[Tensor]:
    """Loss and gradients of docs/math.md, written out by hand for each row."""
    with torch.no_grad():
        c = torch.sigmoid(r.confidence)[:, None]
        hot = F.one_hot(r.target, r.logits.shape[1]).double()
        u = (1 + c * r.scale) * r.logits + c * r.bias + o - m * hot
        lse = torch.logsumexp(u, 1, keepdim=True)
        p = (u - lse).exp()
        nll = (lse - u)[hot.bool()]
        p_t, w_t = p[hot.bool()], w[r.target]
        classes = u.shape[1]
        loss = (1 - e) * w_t * (1 - p_t) ** gamma * nll + e / classes * (w * (lse - u)).sum(1)
        slope = (1 - p_t) ** gamma - gamma * (1 - p_t) ** (gamma - 1) * p_t * p_t.log()
        a = ((1 - e) * slope * w_t)[:, None]
        q = a * (p - hot) + e / classes * (p * w.sum() - w)
        dz = q * (1 + c * r.scale)
        da = (q * c * r.logits).sum(0)
        db = (q * c).sum(0)
        dconf = (c * (1 - c))[:, 0] * (q * (r.scale * r.logits + r.bias)).sum(1)
        return [loss.sum(), dz, dconf, da, db]


@pytest.mark.parametrize(("gamma", "e"), itertools.product((0.0, 0.5, 2.0), (0.0, 0.3)))
def test_loss_and_gradients_are_the_formulas_of_the_documentation(gamma: float, e: float) -> None:
    r = rows(6, 13)
    m, o, w = (torch.rand(13, dtype=torch.float64) for _ in range(3))
    loss = reference.cross_entropy(
        r.logits, r.target, scale=r.scale, bias=r.bias, confidence=r.confidence, weight=w,
        prior=o, margin=m, label_smoothing=e, focal_gamma=gamma, reduction="sum",
    )  # fmt: skip
    actual = [loss.detach(), *torch.autograd.grad(loss, r.learned)]
    m_t = m[r.target][:, None].expand(-1, 13)
    for what, a, expected in zip(
        ("loss", "input", "confidence", "scale", "bias"), actual, _formula(r, gamma, e, m_t, o, w),
        strict=True,
    ):  # fmt: skip
        assert_close(a, expected, torch.float64, what)


@pytest.mark.parametrize("normalizer", ["weights", "valid", "count"])
def test_denominators(normalizer: str) -> None:
    target = torch.tensor([2, -100, 0, 1])
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    sample_weight = torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=torch.float64)
    by_hand = {"weights": 0.5 * 4 + 3.0 * 1 + 2.0 * 2, "valid": 3.0, "count": 4.0}
    divisor = reference.denominator(target, normalizer, weight=weight, sample_weight=sample_weight)
    assert float(divisor) == by_hand[normalizer]


def test_gradients_are_right_twice() -> None:
    r = rows(3, 5)
    r.target[1] = -100

    def loss(z: Tensor, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return reference.cross_entropy(
            z, r.target, scale=a, bias=b, confidence=c, label_smoothing=0.1, focal_gamma=2.0
        )

    assert torch.autograd.gradcheck(loss, r.learned)
    assert torch.autograd.gradgradcheck(loss, r.learned)
