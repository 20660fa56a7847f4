"""Label-aware smoothing: a label smoothing of its own for each class."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .. import class_stats, functional
from .._call.arguments import (
    check_choice,
    check_input,
    check_number,
    check_target,
    class_vector,
    positions_shape,
    row_vector,
)
from .._ops.dispatch import check_classes
from .._ops.reference import accumulate_dtype, class_indices, denominator
from ..class_stats import Counts
from ..errors import ArgumentError
from ..nn import CrossEntropyLoss


class LabelAwareSmoothingLoss(CrossEntropyLoss):
    """(1 - e_t) nll_t + e_t / C sum_j nll_j; e from smooth_head at max n to smooth_tail at min n.

    With r = (n - min n) / (max n - min n): e = smooth_tail + (smooth_head - smooth_tail) times
    sin(pi r / 2) ("concave"), r ("linear") or 1 + sin(3 pi / 2 + pi r / 2) ("convex"). The mean is
    over the positions that are not ignored (normalizer="valid"). Reads the logits twice.

    Source: Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, eq. 8 and
    9, as in its released code.
    """

    __module__ = "disalign_ops.losses"  # where it is imported from, and pickled by

    smoothing: Tensor  # (C,), e of every class
    _defaults = CrossEntropyLoss._defaults | {"normalizer": "valid"}
    _needs_indices = True

    def __init__(
        self, counts: Counts, smooth_head: float = 0.3, smooth_tail: float = 0.0, *,
        shape: Literal["concave", "linear", "convex"] = "concave", **options: Any,
    ) -> None:  # fmt: skip
        for name in ("label_smoothing", "inplace_backward"):
            if options.get(name):
                raise ArgumentError(
                    f"{name} must not be given, which this loss does not take, got {options[name]}"
                )
        options.setdefault("normalizer", "valid")
        super().__init__(**options)
        check_choice("shape", shape, ("concave", "linear", "convex"))
        head = check_number("smooth_head", smooth_head, 0.0, 1.0)
        tail = check_number("smooth_tail", smooth_tail, 0.0, 1.0)
        n = class_stats._as_counts(counts)
        spread = n.max() - n.min()
        r = (n - n.min()) / spread if spread > 0 else torch.ones_like(n)
        if shape == "concave":
            r = torch.sin(math.pi / 2 * r)
        elif shape == "convex":
            r = 1 + torch.sin(math.pi * 1.5 + math.pi / 2 * r)
        self.register_buffer("smoothing", (tail + (head - tail) * r).float(), persistent=False)
        self._keep(n, smooth_head=head, smooth_tail=tail, shape=shape)

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        self._check_call(input, target)
        classes, shape = check_input(input), positions_shape(input)
        check_target(input, target, shape)
        check_classes(target, classes, self.ignore_index)
        dtype = accumulate_dtype(input.dtype)
        weight = class_vector("weight", self.weight, classes, input, dtype, exact=True)
        v = row_vector("sample_weight", sample_weight, input, shape, dtype)
        t, valid = class_indices(target.reshape(-1), self.ignore_index)
        e = torch.where(valid, self.smoothing.to(dtype)[torch.where(valid, t, 0)], 0.0)
        # Both ends below divide by the denominator of the whole, not of their shares of it.
        normalizer, by_weights = self.normalizer, None
        if self.reduction == "mean" and isinstance(normalizer, str) and normalizer == "weights":
            normalizer = by_weights = denominator(
                t, normalizer, weight=weight, sample_weight=v, ignore_index=self.ignore_index
            )
        # The loss is linear in e, which kernels take as one number: its two ends, weighted.
        ends = []
        for smoothing, share in ((0.0, 1 - e), (1.0, e)):
            end = functional.cross_entropy(
                input, target, weight, None, self.ignore_index, None, self.reduction, smoothing,
                sample_weight=(share if v is None else v * share).reshape(shape),
                normalizer=normalizer, prior=self.prior, margin=self.margin,
                focal_gamma=self.focal_gamma, gradient=self.gradient,
            )  # fmt: skip
            ends.append(end)
        loss = ends[0] + ends[1]
        if by_weights is None:
            return loss
        return torch.where(by_weights == 0, math.nan, loss)  # as with one denominator's name
