"""A problem whose classes are divided over processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from support.tolerances import assert_close

N, D, C = 13, 6, 29
# (processes, shards): uneven, a rank without classes, one with a single class.
SHARDS = {
    2: ((15, 14), (29, 0), (1, 28)),
    4: ((8, 7, 7, 7), (0, 13, 1, 15)),
}


@dataclass
class Whole:
    """A problem with all classes. Learned tensors require a gradient."""

    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            made = torch.randn(shape, generator=generator, dtype=torch.float64)
            return made.to(self.dtype).requires_grad_()

        self.logits, self.confidence = normal(N, C), normal(N, 1)
        self.scale, self.bias = normal(C), normal(C)
        self.features, self.weight, self.linear_bias = normal(N, D), normal(C, D), normal(C)
        self.target = torch.randint(0, C, (N,), generator=generator)
        self.options = {
            name: (torch.rand(C, generator=generator, dtype=torch.float64).to(self.dtype)
                   if value == "class" else
                   torch.rand(N, generator=generator, dtype=torch.float64).to(self.dtype)
                   if value == "row" else value)
            for name, value in self.options.items()
        }  # fmt: skip


def shard_of(tensor: Tensor, rank: int, sizes: tuple[int, ...], dim: int = 0) -> Tensor:
    """A rank's classes, as a leaf of its own."""
    part = tensor.detach().split(sizes, dim)[rank].clone()
    return part.requires_grad_(tensor.requires_grad)


def options_of(whole: Whole, rank: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    return {
        name: shard_of(value, rank, sizes)
        if isinstance(value, Tensor) and name != "sample_weight" else value
        for name, value in whole.options.items()
    }  # fmt: skip


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """By the tolerances of tolerances.py; in float32 twice as much, for both sides are rounded."""
    factor = 1.0 if actual.dtype == torch.float64 else 2.0
    assert_close(actual, expected.to(actual.dtype), actual.dtype, what, factor)
