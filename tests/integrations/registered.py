"""Shared by the tests of adapters that a framework's config names: stand-ins, comparisons."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent / "standins"))  # behind what is installed

COUNTS = [400.0, 60.0, 9.0]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def grads(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}
