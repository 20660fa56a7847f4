"""Shapes and inputs of the row tests, each with the reason it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SHAPES = {
    (0, 17): "an empty batch",
    (1, 1): "one row, one class: every loop has a tail only",
    (3, 2): "fewer rows than a block, binary",
    (5, 16): "a block and a rest; exactly one AVX-512 register of floats",
    (7, 17): "one class beyond a register",
    (5, 257): "on a GPU the least that a warp keeps",
    (6, 365): "Places-LT: a warp's, with fewer vectors than it has room for",
    (4, 1203): "LVIS: odd, rows never 16-byte aligned",
    (9, 1204): "LVIS with background",
    (64, 1204): "enough work for two threads",
    (6, 8142): "iNaturalist 2018",
}


@dataclass
class Rows:
    """Inputs of one loss. Learned tensors require gradients."""

    logits: Tensor
    target: Tensor
    confidence: Tensor
    scale: Tensor
    bias: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def learned(self) -> list[Tensor]:
        return [self.logits, self.confidence, self.scale, self.bias]

    def to(self, dtype: torch.dtype) -> Rows:
        """The same values in another dtype, as new leaves."""

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(dtype)
            return value

        learned = [cast(t).requires_grad_() for t in self.learned]
        options = {k: cast(v) for k, v in self.options.items()}
        return Rows(learned[0], self.target, *learned[1:], options)


def rows(n: int, c: int, dtype: torch.dtype = torch.float64, **options: Any) -> Rows:
    """Random logits with a spread of a trained classifier's, a calibration near its start."""
    return Rows(
        (torch.randn(n, c, dtype=dtype) * 3).requires_grad_(),
        torch.randint(0, c, (n,)),
        torch.randn(n, dtype=dtype).requires_grad_(),
        (torch.randn(c, dtype=dtype) * 0.3).requires_grad_(),
        torch.randn(c, dtype=dtype).requires_grad_(),
        options,
    )


def _stride(r: Rows) -> Rows:
    n, c = r.logits.shape
    wide = torch.randn(n, c + 5, dtype=r.logits.dtype) * 3
    r.logits = wide.requires_grad_()[:, 2 : c + 2]
    return r


def _expanded(r: Rows) -> Rows:
    n, c = r.logits.shape
    r.logits = r.logits[:1].expand(n, c)
    return r


def _transposed(r: Rows) -> Rows:
    r.logits = r.logits.t().contiguous().detach().requires_grad_().t()
    return r


def _ignored(r: Rows) -> Rows:
    r.target[::2] = -100
    return r


def _all_ignored(r: Rows) -> Rows:
    r.target[:] = -100
    return r


def _masked(r: Rows) -> Rows:
    z = r.logits.detach().clone()
    mask = torch.rand(z.shape) < 0.3
    mask[torch.arange(len(z)), r.target] = False
    z[mask] = float("-inf")
    r.logits = z.requires_grad_()
    return r


def _offset(r: Rows) -> Rows:
    r.logits = (r.logits.detach() + 1e4).requires_grad_()
    # The calibration multiplies the offset too; keep u's spread that of the logits.
    r.scale = (r.scale.detach() * 1e-4).requires_grad_()
    return r


def _dominating(r: Rows) -> Rows:
    z = r.logits.detach().clone()
    z[torch.arange(len(z)), r.target] += 60.0
    r.logits = z.requires_grad_()
    return r


def _hopeless(r: Rows) -> Rows:
    z = r.logits.detach().clone()
    z[torch.arange(len(z)), r.target] -= 90.0
    r.logits = z.requires_grad_()
    return r


def _reversed(r: Rows) -> Rows:
    r.scale = (r.scale.detach() - 3.0).requires_grad_()  # 1 + c scale is negative for most rows
    return r


CONTENTS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "plain": (lambda r: r, "nothing special"),
    "strided": (_stride, "rows with a stride and an unaligned start, without a copy"),
    "expanded": (_expanded, "row stride 0"),
    "transposed": (_transposed, "classes not next to each other: one copy"),
    "ignored": (_ignored, "every second row ignored: blocks are gathered"),
    "all_ignored": (_all_ignored, "nothing left: NaN loss, zero gradients, as PyTorch"),
    "masked": (_masked, "-inf logits mask classes: 0, not 0 * inf"),
    "offset": (_offset, "a common offset of 1e4: max and log-sum are kept apart"),
    "dominating": (_dominating, "p_t next to 1: a loss far below one rounding of the logits"),
    "reversed": (_reversed, "a calibration that turns the order of the classes round"),
    "hopeless": (_hopeless, "p_t underflows: the loss stays exact"),
}
