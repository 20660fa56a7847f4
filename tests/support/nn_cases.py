"""What the tests of the modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


# The released formulas, transcribed.


def released_classification(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, DisAlignCosineLinear):
        x = F.normalize(x, dim=1)
        before = layer.scale * x.mm(F.normalize(layer.weight, dim=1).t())
    else:
        before = F.linear(x, layer.weight, layer.bias)
    confidence = layer.confidence_layer(x).sigmoid()
    return (1 + confidence * layer.logit_scale) * before + confidence * layer.logit_bias


def released_detection(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, DisAlignCosineLinear):
        scores = layer.scale * F.normalize(x, dim=1).mm(F.normalize(layer.weight, dim=1).t())
    else:
        scores = F.linear(x, layer.weight, layer.bias)
    scale, bias = layer.logit_scale.flatten(), layer.logit_bias.flatten()
    confidence = layer.confidence_layer(x).sigmoid()
    foreground = confidence * (scores[:, :-1] * scale + bias)
    foreground = foreground + (1 - confidence) * scores[:, :-1]
    return torch.cat([foreground, scores[:, -1].view(-1, 1)], dim=1)


RELEASED: list[tuple[str, str | None, Callable[[Any, Tensor], Tensor]]] = [
    ("residual", None, released_classification),
    ("interpolated", "last", released_detection),
]
