"""What mmsegmentation and mmdetection share: their losses' signature, and stage 2 in a config."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import nn as dnn
from ..class_stats import grw_weights
from ..count_files import read_counts
from ..errors import ArgumentError
from ..functional import cross_entropy

_EPSILON = torch.finfo(torch.float32).eps


class GRWCrossEntropyLoss(nn.Module):
    """Cross-entropy with class weights, called as the frameworks call their losses.

    Args:
        counts: training samples (mmseg: pixels) of each class, a list or a file that
            `class_stats.read_counts` reads; the weights are `class_stats.grw_weights(counts, rho)`.
        rho: strength.
        background: "last" for mmdet's additional column, which has weight 1.
        class_weight: weights as they are, instead of counts: a list, or a .npy or .json file of
            one. Neither: no weights.
        reduction: "mean", "sum" or "none".
        loss_weight: a factor.
        loss_name: of mmseg's log; with another prefix than "loss_" it is not differentiated.
        normalizer: what "mean" divides by where the caller gives no avg_factor, as in
            `disalign_ops.cross_entropy`: "weights" is PyTorch's weighted mean (mmsegmentation 1.x
            with class weights and avg_non_ignore=True), "valid" the number of positions that are
            not ignored (avg_non_ignore=True of mmdetection, of mmsegmentation 0.x, and of 1.x
            without class weights), "count" that of all positions (avg_non_ignore=False there).
        label_smoothing: as F.cross_entropy's.

    forward(cls_score (N, C, ...), label (N, ...), weight of label's shape, avg_factor,
    reduction_override, ignore_index). The mean of a crop without a position that counts is 0, as in
    the frameworks, where `cross_entropy` gives NaN. The class weights are no entry of the
    state_dict, so a checkpoint of stage 1 loads. Raises ArgumentError: both counts and
    class_weight; one channel (a sigmoid's); avg_factor with reduction "sum", as the frameworks do.
    """

    weight: Tensor | None

    def __init__(
        self, counts: Sequence[float] | str | os.PathLike[str] | None = None, rho: float = 1.0,
        *, background: Literal["first", "last"] | None = None,
        class_weight: Sequence[float] | str | os.PathLike[str] | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0, loss_name: str = "loss_ce",
        normalizer: str = "weights", label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if counts is not None and class_weight is not None:
            raise ArgumentError("counts and class_weight are given, needed is one of them")
        weight = None
        if counts is not None:
            given = read_counts(counts) if isinstance(counts, str | os.PathLike) else counts
            weight = grw_weights(given, rho, background=background)
        elif class_weight is not None:
            weight = _class_weight(class_weight)
        self.register_buffer("weight", weight, persistent=False)
        self.reduction, self.loss_weight, self.loss_name = reduction, loss_weight, loss_name
        self.normalizer, self.label_smoothing = normalizer, label_smoothing

    def options(
        self, classes: int, weight: Tensor | None, avg_factor: float | Tensor | None,
        reduction_override: str | None, ignore_index: int | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The keywords of `cross_entropy`, and of `upsample_cross_entropy`, for one call."""
        if classes == 1:
            raise ArgumentError("cls_score has one channel, needed is one a class: it is a softmax")
        reduction = reduction_override or self.reduction
        if avg_factor is not None and reduction == "sum":
            raise ArgumentError("avg_factor is given, needed is reduction 'mean', not 'sum'")
        own = self.weight
        return {
            "weight": own,
            "ignore_index": -100 if ignore_index is None else ignore_index,
            "reduction": reduction,
            "label_smoothing": self.label_smoothing,
            "sample_weight": weight,
            # The frameworks' epsilon: an avg_factor may be 0.
            "normalizer": self.normalizer if avg_factor is None else avg_factor + _EPSILON,
        }

    def finish(
        self, loss: Tensor, label: Tensor, weight: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """The loss times its factor, and 0 for the mean of no positions."""
        named = isinstance(options["normalizer"], str)
        if named and options["reduction"] == "mean" and not label.is_floating_point():
            wide = label.long()
            counted = wide != options["ignore_index"]
            if self.weight is not None:
                counted &= self.weight[wide.clamp(0, len(self.weight) - 1)] != 0
            if weight is not None:
                counted &= weight != 0
            loss = loss.masked_fill(~counted.any(), 0.0)
        return self.loss_weight * loss

    def forward(
        self, cls_score: Tensor, label: Tensor, weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None, reduction_override: str | None = None,
        ignore_index: int | None = -100,
    ) -> Tensor:  # fmt: skip
        options = self.options(
            cls_score.shape[1], weight, avg_factor, reduction_override, ignore_index
        )
        return self.finish(cross_entropy(cls_score, label, **options), label, weight, options)


def _class_weight(given: Any) -> Tensor:
    """The weights of a config: numbers, or a file of them, as mmsegmentation's."""
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        try:
            if path.suffix == ".npy":
                given = np.load(path, allow_pickle=False)
            elif path.suffix == ".json":
                given = json.loads(path.read_text(encoding="utf-8"))
            else:
                raise ValueError("a pickle could run code")
            given = np.asarray(given, dtype=np.float32)
        except (ValueError, TypeError, EOFError) as error:
            raise ArgumentError(
                f"class_weight must be numbers, or a .npy or .json file of them, got {path} "
                f"({error})"
            ) from error
    device = given.device if isinstance(given, Tensor) else "cpu"
    weight = torch.as_tensor(given, dtype=torch.float32, device=device)
    if weight.dim() != 1:
        raise ArgumentError(f"class_weight must be (C,), got shape {tuple(weight.shape)}")
    return weight


def register(models: Any) -> None:
    """Adds to a framework's registry what is the same in all of them."""

    def stage2(model: dict[str, Any], bn: str = "eval", **arguments: Any) -> nn.Module:
        """A model as its config says, frozen but for its DisAlign layers: see freeze_for_stage2.

        When it is built, before DistributedDataParallel looks for what has gradients.
        """
        built: nn.Module = models.build({**model, **arguments})
        dnn.freeze_for_stage2(built, bn=bn)
        return built

    models.register_module(name="GRWCrossEntropyLoss", module=GRWCrossEntropyLoss, force=True)
    models.register_module(name="DisAlignStage2", module=stage2, force=True)
