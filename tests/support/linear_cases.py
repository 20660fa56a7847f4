"""A linear head for the tests of its losses, with and without its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import disalign_ops
from support.tolerances import assert_close

N, D, C = 23, 7, 19
LINEAR = ("features", "linear_weight", "linear_bias")
CALIBRATION = ("confidence", "scale", "bias")


@dataclass
class Problem:
    """A head with its calibration; learned tensors require a gradient."""

    tensors: dict[str, Tensor]
    target: Tensor

    @staticmethod
    def of(dtype: torch.dtype, n: int = N, d: int = D, c: int = C) -> Problem:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

        tensors = {
            "features": normal(n, d), "linear_weight": normal(c, d), "linear_bias": normal(c),
            "confidence": normal(n), "scale": normal(c), "bias": normal(c),
        }  # fmt: skip
        target = torch.randint(0, c, (n,))
        target[::5] = -100
        return Problem(tensors, target)

    def to(self, dtype: torch.dtype) -> Problem:
        tensors = {k: t.detach().to(dtype).requires_grad_() for k, t in self.tensors.items()}
        return Problem(tensors, self.target)

    def loss(self, calibrated: bool, **options: Any) -> Tensor:
        t = self.tensors
        head = (t["features"], t["linear_weight"], self.target)
        if calibrated:
            return disalign_ops.disalign_linear_cross_entropy(
                *head, *(t[name] for name in CALIBRATION), linear_bias=t["linear_bias"], **options
            )
        return disalign_ops.linear_cross_entropy(*head, linear_bias=t["linear_bias"], **options)

    def unfused(self, calibrated: bool, **options: Any) -> Tensor:
        t = self.tensors
        logits = F.linear(*(t[name] for name in LINEAR))
        if calibrated:
            calibration = (t[name] for name in CALIBRATION)
            return disalign_ops.disalign_cross_entropy(logits, self.target, *calibration, **options)
        return disalign_ops.cross_entropy(logits, self.target, **options)

    def learned(self, calibrated: bool) -> list[Tensor]:
        names = (*LINEAR, *CALIBRATION) if calibrated else LINEAR
        return [self.tensors[name] for name in names]


def compare_layer(target: Any) -> None:
    """A layer's loss of 13 rows and 29 classes: in chunks it is that of its logits."""
    layer = disalign_ops.nn.DisAlignLinear(6, 29).double()
    x = torch.randn(13, 6, dtype=torch.float64)
    whole, chunked = (layer.loss(x, target, chunk_bytes=n) for n in (1 << 26, 1 << 9))
    assert_close(chunked.detach(), whole.detach(), torch.float64, "loss")
    learned = [layer.weight, layer.logit_scale]
    gradients = (torch.autograd.grad(loss, learned) for loss in (chunked, whole))
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, torch.float64, "gradient")
