"""What mmsegmentation and mmdetection share: their losses' signature, and stage 2 in a config."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import nn as dnn
from .._call.types import Background, BatchNormMode, Normalizer, ReductionName
from .._ops.reference import class_indices, denominator_of
from ..class_stats import grw_weights
from ..count_files import CountKind, read_counts
from ..errors import ArgumentError
from ..functional import cross_entropy
from ..nn.losses import check_number_of_classes, released_names

_EPSILON = torch.finfo(torch.float32).eps
_RELEASED_EXP_SCALE = 0.3  # the released segmentation loss's default; its configuration has 0.2


class GRWCrossEntropyLoss(nn.Module):
    """Cross-entropy with class weights, called as the frameworks call their losses.

    Args:
        counts: training samples (mmseg: pixels) of each class, a list or a file that
            `class_stats.read_counts` reads; the weights are `class_stats.grw_weights(counts, rho)`.
        rho: strength.
        count: which counts of a file, as in `read_counts`: "pixel" (mmseg's default), "image"
            (mmdet's) or "instance".
        num_classes: raises ArgumentError if counts are not of so many classes.
        background: "last" for mmdet's additional column, which has weight 1.
        class_weight: weights as they are, instead of counts: a list, or a .npy or .json file of
            one. Neither: no weights. A .txt file is ADE20K's object list, as in the released
            configuration: the counts are its pixel shares, rho is 0.3 unless exp_scale is given,
            and the normalizer "count".
        reduction: "mean", "sum" or "none".
        loss_weight: a factor.
        loss_name: of mmseg's log; with another prefix than "loss_" it is not differentiated.
        normalizer: what "mean" divides by, as in `disalign_ops.cross_entropy`. "weights": the sum
            of the weights of the positions that are not ignored, PyTorch's weighted mean and that
            of the released detectors. "valid": their number, the frameworks' avg_non_ignore=True.
            "count": all positions, ignored ones too, the frameworks' default and the released
            segmentation loss. None: the caller's avg_factor, which a box head of mmdet gives, and
            "weights" where there is none. Where nothing counts, the loss is 0, as theirs.
        label_smoothing: as F.cross_entropy's.
        num_samples_list, exp_scale: the released constructors' names of counts and rho.
        use_sigmoid, use_mask: as in the frameworks' configs, False.

    forward(cls_score (N, C, ...), label (N, ...), weight of label's shape, avg_factor,
    reduction_override, ignore_index). The class weights are no entry of the state_dict, so a
    checkpoint of stage 1 loads. Raises ArgumentError: both counts and class_weight; one channel
    or use_sigmoid; avg_factor with reduction "sum", as the frameworks do.
    """

    weight: Tensor | None
    _count: CountKind = "pixel"

    def __init__(
        self, counts: Sequence[float] | str | os.PathLike[str] | None = None, rho: float = 1.0,
        *, count: CountKind | None = None, num_classes: int | None = None,
        background: Background | None = None,
        class_weight: Sequence[float] | str | os.PathLike[str] | None = None,
        reduction: ReductionName = "mean", loss_weight: float = 1.0, loss_name: str = "loss_ce",
        normalizer: Normalizer | None = None, label_smoothing: float = 0.0,
        num_samples_list: Sequence[float] | str | os.PathLike[str] | None = None,
        exp_scale: float | None = None, use_sigmoid: bool = False, use_mask: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if use_sigmoid or use_mask:
            raise ArgumentError(
                "use_sigmoid and use_mask must be False, since this is a softmax, got True"
            )
        counts, rho = released_names(counts, rho, num_samples_list, exp_scale)
        if counts is not None and class_weight is not None:
            raise ArgumentError("counts or class_weight must be None, got both")
        if isinstance(class_weight, str | os.PathLike) and Path(class_weight).suffix == ".txt":
            counts, class_weight, count = class_weight, None, "pixel"
            rho = _RELEASED_EXP_SCALE if exp_scale is None else rho
            normalizer = "count" if normalizer is None else normalizer
        weight = None
        if counts is not None:
            given: Any = counts
            if isinstance(counts, str | os.PathLike):
                given = read_counts(counts, num_classes=num_classes, count=count or self._count)
            check_number_of_classes(given, num_classes)
            weight = grw_weights(given, rho, background=background)
        elif class_weight is not None:
            weight = _class_weight(class_weight)
        self.register_buffer("weight", weight, persistent=False)
        self.reduction, self.loss_weight, self.loss_name = reduction, loss_weight, loss_name
        self.normalizer, self.label_smoothing = normalizer, label_smoothing

    def options(
        self, label: Tensor, classes: int, weight: Tensor | None, avg_factor: float | Tensor | None,
        reduction_override: str | None, ignore_index: int | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The keywords of `cross_entropy`, and of `upsample_cross_entropy`, for one call."""
        if classes == 1:
            raise ArgumentError(
                "cls_score must have a channel a class, since this is a softmax, got one channel"
            )
        reduction = reduction_override or self.reduction
        if avg_factor is not None and reduction == "sum":
            raise ArgumentError("reduction must be 'mean' where avg_factor is given, got 'sum'")
        ignore_index = -100 if ignore_index is None else ignore_index
        normalizer = self.normalizer
        if normalizer is None and avg_factor is not None:
            normalizer = avg_factor + _EPSILON  # as the frameworks: an avg_factor may be 0
        elif normalizer is None:
            normalizer = "weights"
        if isinstance(normalizer, str) and normalizer == "weights" and reduction == "mean":
            # As a number, of which 0 gives the loss 0; the name would give NaN, as PyTorch.
            normalizer = self._weights(label, weight, ignore_index)
        return {
            "weight": self.weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": self.label_smoothing,
            "sample_weight": weight,
            "normalizer": normalizer,
        }

    def _weights(self, label: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
        """The sum of class and sample weights of the positions that are not ignored."""
        target, valid = class_indices(label, ignore_index)
        shares = torch.ones_like(target, dtype=torch.float64)
        if self.weight is not None:  # clamped: that a target is no class, the loss says
            shares = self.weight[target.clamp(0, len(self.weight) - 1)]
        return denominator_of("weights", valid, shares, weight)

    def forward(
        self, cls_score: Tensor, label: Tensor, weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None, reduction_override: str | None = None,
        ignore_index: int | None = -100,
    ) -> Tensor:  # fmt: skip
        options = self.options(
            label, cls_score.shape[1], weight, avg_factor, reduction_override, ignore_index
        )
        loss: Tensor = cross_entropy(cls_score, label, **options)
        return self.loss_weight * loss


def _class_weight(given: Any) -> Tensor:
    """(C,) float32 weights of a config: numbers, or a file of them, as mmsegmentation takes."""
    try:
        if isinstance(given, str | os.PathLike):
            path = Path(given)
            if path.suffix == ".npy":
                values = np.load(path, allow_pickle=False)
            elif path.suffix == ".json":
                values = np.asarray(json.loads(path.read_text(encoding="utf-8")), np.float32)
            else:
                raise ValueError("a pickle can run code: save it as .npy")
        else:
            values = given
        device = values.device if isinstance(values, Tensor) else "cpu"
        weight = torch.as_tensor(values, dtype=torch.float32, device=device)
    except (ValueError, TypeError, EOFError) as error:
        raise ArgumentError(
            f"class_weight must be numbers, or a .npy or .json file of them, got {given} ({error})"
        ) from error
    if weight.dim() != 1:
        raise ArgumentError(f"class_weight must have shape (C,), got {tuple(weight.shape)}")
    return weight


def register(models: Any, loss: type[GRWCrossEntropyLoss]) -> None:
    """Adds to a framework's registry its loss, and what is the same in all of them."""

    def stage1(model: dict[str, Any], **arguments: Any) -> nn.Module:
        """A model as its config says, the calibration of its DisAlign layers frozen: for a head,
        such as DisAlignCosineLinear, that has no plain counterpart. See freeze_for_stage1.
        """
        built: nn.Module = models.build({**model, **arguments})
        dnn.freeze_for_stage1(built)
        return built

    def stage2(model: dict[str, Any], bn: BatchNormMode = "eval", **arguments: Any) -> nn.Module:
        """A model as its config says, frozen but for its DisAlign layers: see freeze_for_stage2.

        When it is built, before DistributedDataParallel looks for what has gradients.
        """
        built: nn.Module = models.build({**model, **arguments})
        dnn.freeze_for_stage2(built, bn=bn)
        return built

    models.register_module(name="GRWCrossEntropyLoss", module=loss, force=True)
    models.register_module(name="DisAlignStage1", module=stage1, force=True)
    models.register_module(name="DisAlignStage2", module=stage2, force=True)
