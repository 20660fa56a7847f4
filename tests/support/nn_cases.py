"""What the tests of the modules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from disalign_ops.nn import DisAlignCosineLinear, DisAlignLinear

F64 = torch.float64
N, D, C = 7, 5, 9
COUNTS = [100, 60, 40, 30, 20, 10, 5, 3, 1]
LAYERS = [DisAlignLinear, DisAlignCosineLinear]
FORMS = ["residual", "interpolated"]


def trained(layer: nn.Module) -> Any:
    """The layer with parameters away from their start."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
