"""Shapes and inputs of the dense and upsampling tests, each with the reason it is there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SHAPES = {
    (0, 5, 4, 4): "no images",
    (2, 3, 0, 7): "no positions",
    (1, 1, 3, 5): "one class",
    (2, 2, 4, 4): "binary, exactly one AVX-512 register of positions",
    (2, 21, 5, 7): "Pascal VOC, odd sizes: every tile has a tail",
    (3, 21, 17): "one inner dimension",
    (1, 4, 2, 3, 3): "three inner dimensions",
    (2, 150, 24, 30): "ADE20K: several tiles, two threads",
    (1, 847, 9, 16): "ADE20K-full: narrow tiles",
    (1, 5000, 1, 20): "more classes than a float may sum (kSumClasses)",
}


@dataclass
class Dense:
    """Inputs of one loss. Learned tensors require gradients; confidence is (N, 1, d1, ...)."""

    logits: Tensor
    target: Tensor
    confidence: Tensor
    scale: Tensor
    bias: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def learned(self) -> list[Tensor]:
        return [self.logits, self.confidence, self.scale, self.bias]

    def to(self, dtype: torch.dtype) -> Dense:
        """The same values and strides in another dtype, as new leaves."""

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(dtype)
            return value

        learned = [cast(t).requires_grad_() for t in self.learned]
        options = {k: cast(v) for k, v in self.options.items()}
        return Dense(learned[0], self.target, *learned[1:], options)


def dense(
    shape: tuple[int, ...],
    target_size: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Dense:
    """Random logits of `shape`, and a target of their spatial size or another."""
    n, c, *spatial = shape
    size = spatial if target_size is None else target_size
    return Dense(
        (torch.randn(shape, dtype=dtype) * 3).requires_grad_(),
        torch.randint(0, c, (n, *size)),
        torch.randn(n, 1, *spatial, dtype=dtype).requires_grad_(),
        (torch.randn(c, dtype=dtype) * 0.3).requires_grad_(),
        torch.randn(c, dtype=dtype).requires_grad_(),
        options,
    )


def _sliced_images(d: Dense) -> Dense:
    d.logits = torch.cat([d.logits.detach()] * 2, 1).requires_grad_()[:, : d.logits.shape[1]]
    return d


def _cropped(d: Dense) -> Dense:
    wide = torch.nn.functional.pad(d.logits.detach(), (3, 2)).requires_grad_()
    d.logits = wide[..., 3:-2]
    return d


def _channels_last(d: Dense) -> Dense:
    d.logits = d.logits.detach().movedim(1, -1).contiguous().requires_grad_().movedim(-1, 1)
    return d


def _expanded(d: Dense) -> Dense:
    d.logits = d.logits.detach()[:1].requires_grad_().expand(d.logits.shape)
    return d


def _ignored_border(d: Dense) -> Dense:
    d.target[..., :2] = 255
    d.target[..., -1:] = 255
    return d


def _all_ignored(d: Dense) -> Dense:
    d.target[:] = 255
    return d


def _an_ignored_image(d: Dense) -> Dense:
    d.target[0] = 255
    return d


def _nan_where_ignored(d: Dense) -> Dense:
    d = _ignored_border(d)
    if d.target.shape[1:] != d.logits.shape[2:]:
        return d
    z = d.logits.detach().clone()
    z.movedim(1, -1)[d.target == 255] = float("nan")
    d.logits = z.requires_grad_()
    return d


def _masked(d: Dense) -> Dense:
    z = d.logits.detach().clone()
    z[:, 1::3] = float("-inf")
    d.logits = z.requires_grad_()
    d.target = d.target // 3 * 3
    return d


def _offset(d: Dense) -> Dense:
    d.logits = (d.logits.detach() + 1e4).requires_grad_()
    # The calibration multiplies the offset too; keep u's spread that of the logits.
    d.scale = (d.scale.detach() * 1e-4).requires_grad_()
    return d


CONTENTS: dict[str, tuple[Callable[[Dense], Dense], str]] = {
    "plain": (lambda d: d, "nothing special"),
    "sliced": (_sliced_images, "images further apart than their planes, without a copy"),
    "cropped": (_cropped, "rows of an image apart: one copy"),
    "channels_last": (_channels_last, "the row operators, without a copy"),
    "expanded": (_expanded, "image stride 0"),
    "ignored_border": (_ignored_border, "an ignored frame, as crops have"),
    "all_ignored": (_all_ignored, "nothing left: NaN loss, zero gradients, as PyTorch"),
    "an_ignored_image": (_an_ignored_image, "whole tiles are skipped"),
    "nan_where_ignored": (_nan_where_ignored, "what an ignored position holds goes no further"),
    "masked": (_masked, "-inf logits mask classes: 0, not 0 * inf"),
    "offset": (_offset, "a common offset of 1e4"),
}

EXTRAS: dict[str, dict[str, Any]] = {
    "none": {},
    "prior": {"prior": torch.linspace(-3, 3, 18, dtype=torch.float64)},
    "margin": {"margin": torch.linspace(0.1, 4, 18, dtype=torch.float64)},
    "negative margin": {"margin": -30.0},
    "focal": {"focal_gamma": 2.0},
}


def combinations(
    shape: tuple[int, ...], target_size: tuple[int, ...] | None, extra: str, reduction: str
) -> Iterator[Dense]:
    """Weights, smoothing, sample weights and normalisers in every combination, 18 classes."""
    for weighted, smoothing, sampled, normalizer in itertools.product(
        (False, True), (0.0, 0.1), (False, True), ("weights", "valid", "count", 7.5)
    ):
        d = dense(shape, target_size)
        d.options = {
            "weight": torch.rand(18, dtype=torch.float64) + 0.1 if weighted else None,
            "label_smoothing": smoothing,
            "sample_weight": torch.rand(d.target.shape).double() if sampled else None,
            "normalizer": normalizer,
            "reduction": reduction,
            **EXTRAS[extra],
        }
        d.target[1, 2:4] = 255
        yield d
