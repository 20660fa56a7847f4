"""Gradients of the upsampling loss where a class is masked (-inf)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops import upsample_cross_entropy
from support.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_masked_target_has_no_share_in_the_confidence(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 3, 2, 2, dtype=dtype)
    logits[0, 1, 0, 0] = float("-inf")
    target = torch.ones(1, 4, 4, dtype=torch.int64)
    found = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        c = torch.randn(1, 1, 2, 2, dtype=dtype, requires_grad=True)
        scale, bias = torch.rand(3, dtype=dtype), torch.randn(3, dtype=dtype)
        with disalign_ops.set_backend(name):
            disalign_ops.upsample_cross_entropy(
                logits, target, confidence=c, scale=scale, bias=bias
            ).backward()
        found.append(c.grad)
    assert_close(found[0], found[1], dtype, "confidence")


@pytest.mark.parametrize("by", ["logits", "prior"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_masked_class_has_the_gradient_of_rows(backend: str, by: str, weighted: bool) -> None:
    """At the logits' own size the loss is the one of dense logits, whose smoothing gives a class of
    -inf the gradient -e / C w_j and a masked target that of p_t = 0, as F.cross_entropy does.
    """
    z = torch.randn(1, 4, 3, 3)
    t = torch.randint(0, 4, (1, 3, 3))
    prior = torch.zeros(4)
    if by == "logits":
        z[0, 2, 1:] = float("-inf")
        t[0, 1, 1] = 2
    else:
        prior[2] = float("-inf")
    options: dict[str, Any] = {
        "prior": prior, "weight": torch.rand(4) + 0.1 if weighted else None, "ignore_index": -100,
        "label_smoothing": 0.2, "reduction": "sum", "scale": torch.rand(4) + 0.5,
        "bias": torch.randn(4), "confidence": torch.randn(1, 1, 3, 3),
    }  # fmt: skip
    found = []
    for function in (upsample_cross_entropy, disalign_ops.disalign_cross_entropy):
        learned = [z.clone(), *(options[k].clone() for k in ("scale", "bias", "confidence"))]
        for tensor in learned:
            tensor.requires_grad_()
        given = dict(zip(("scale", "bias", "confidence"), learned[1:], strict=True))
        if function is disalign_ops.disalign_cross_entropy:
            given["confidence"] = learned[3][:, 0]
        value = function(learned[0], t, **options | {"form": "residual"} | given)
        found.append(torch.autograd.grad(value, learned))
    for what, ours, dense_ in zip(("input", "scale", "bias", "confidence"), *found, strict=True):
        assert_close(ours, dense_, torch.float32, what)
    if by == "logits":
        assert (found[0][0][0, 2, 1:] < 0).all()


def test_a_masked_class_between_positions_has_the_gradient_of_every_backend() -> None:
    z = torch.randn(1, 5, 3, 2, dtype=torch.float64)
    z[0, 1, 0, 0] = z[0, 3, 2] = float("-inf")
    t = torch.randint(0, 5, (1, 6, 8))
    found = []
    for name in ("native", "reference"):
        logits = z.clone().requires_grad_()
        c = torch.linspace(-1, 1, 6, dtype=torch.float64).view(1, 1, 3, 2).requires_grad_()
        scale, bias = (torch.linspace(low, 1, 5, dtype=torch.float64) for low in (0.5, -1.0))
        bias.requires_grad_()
        with disalign_ops.set_backend(name):
            value = upsample_cross_entropy(
                logits, t, confidence=c, scale=scale, bias=bias, label_smoothing=0.1, focal_gamma=1
            )
            found.append(torch.autograd.grad(value, [logits, c, bias]))
    for what, a, e in zip(("input", "confidence", "bias"), *found, strict=True):
        assert_close(a, e, torch.float64, what)


def test_a_masked_class_is_differentiable_twice_and_under_vmap() -> None:
    z = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    z[0, 1, 0, 0] = float("-inf")
    t = torch.zeros(1, 4, 4, dtype=torch.int64)

    def smoothed(x: Tensor) -> Tensor:
        with disalign_ops.set_backend("reference"):
            value = upsample_cross_entropy(x, t, label_smoothing=0.1)
        assert isinstance(value, Tensor)
        return value

    (once,) = torch.autograd.grad(smoothed(z.requires_grad_()), z, create_graph=True)
    (twice,) = torch.autograd.grad(once[0, 0].sum(), z)
    assert twice.isfinite().all()
    each = torch.func.vmap(torch.func.grad(smoothed))(torch.stack([z.detach()] * 2))
    assert_close(each[1], once.detach(), torch.float64, "input")
