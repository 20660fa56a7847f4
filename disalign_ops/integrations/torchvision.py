"""torchvision: detectors with DisAlign and GRW weights, segmentation models with the fused loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import cross_entropy
from .. import nn as dnn
from .._call.types import Form, Normalizer
from ..denominator import loss_denominator
from ..errors import ArgumentError
from ..upsample import upsample_cross_entropy

FastRCNNLoss = Callable[[Tensor, Tensor, list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]


class DisAlignFastRCNNPredictor(nn.Module):
    """torchvision's FastRCNNPredictor with a calibrated `cls_score`; class 0 is the background.

    Args:
        in_channels, num_classes: as FastRCNNPredictor's; num_classes counts the background.
        form: as in `disalign_ops.nn.DisAlignLinear`.
        cosine_scale: None, or where the learnable scale of a `DisAlignCosineLinear` starts; the
            released detectors have 20. torchvision has no cosine head: its stage 1 is this one
            after `disalign_ops.nn.freeze_for_stage1(model)`.

    forward(x) gives the calibrated scores (R, num_classes) and box deltas (R, 4 num_classes) of box
    features (R, in_channels) or (R, in_channels, 1, 1).
    """

    cls_score: dnn.DisAlignLinear | dnn.DisAlignCosineLinear

    def __init__(
        self, in_channels: int, num_classes: int, *, form: Form = "interpolated",
        cosine_scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if cosine_scale is None:
            self.cls_score = dnn.DisAlignLinear(
                in_channels, num_classes, form=form, background="first"
            )
        else:
            self.cls_score = dnn.DisAlignCosineLinear(
                in_channels, num_classes, scale_init=cosine_scale, form=form, background="first"
            )
        self.bbox_pred = nn.Linear(in_channels, num_classes * 4)

    @classmethod
    def from_predictor(
        cls, predictor: nn.Module, *, form: Form = "interpolated"
    ) -> DisAlignFastRCNNPredictor:
        """Of a trained FastRCNNPredictor, whose weights it takes over."""
        score, boxes = getattr(predictor, "cls_score", None), getattr(predictor, "bbox_pred", None)
        if not isinstance(score, nn.Linear) or not isinstance(boxes, nn.Linear):
            raise ArgumentError(
                f"predictor must be a FastRCNNPredictor, got a {type(predictor).__name__}"
            )
        new = cls(score.in_features, score.out_features, form=form)
        new.cls_score = dnn.convert_to_disalign(score, form=form, background="first")
        new.bbox_pred = boxes
        return new.train(predictor.training)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() == 4:
            torch._assert(x.shape[2:] == (1, 1), "x has more than one position a box")
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)


def grw_fastrcnn_loss(weight: Tensor | None, *, all_ranks: bool = False) -> FastRCNNLoss:
    """torchvision's `fastrcnn_loss` with class weights.

    Args:
        weight: (num_classes,), of the background 1: grw_weights(counts, rho, background="first").
        all_ranks: the classification loss is the weighted mean over the boxes of all ranks, under
            DistributedDataParallel, where else it is the mean of the ranks' means. Every rank must
            call it. The boxes' loss stays torchvision's, a mean of each rank.

    With gradient accumulation the denominator of a step cannot be known: a detector samples a
    batch's boxes in its forward.
    """
    from torchvision.models.detection import roi_heads

    plain = roi_heads.fastrcnn_loss

    def loss(
        class_logits: Tensor, box_regression: Tensor, labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        _, boxes = plain(class_logits, box_regression, labels, regression_targets)
        given = None if weight is None else weight.to(class_logits.device)
        target = torch.cat(labels)
        normalizer: Normalizer = loss_denominator(target, given) if all_ranks else "weights"
        return cross_entropy(class_logits, target, given, normalizer=normalizer), boxes

    return loss


@contextmanager
def replace_fastrcnn_loss(weight: Tensor | None, *, all_ranks: bool = False) -> Iterator[None]:
    """Within it, torchvision's detectors train with `grw_fastrcnn_loss(weight)`."""
    from torchvision.models.detection import roi_heads

    plain = roi_heads.fastrcnn_loss
    roi_heads.fastrcnn_loss = grw_fastrcnn_loss(weight, all_ranks=all_ranks)
    try:
        yield
    finally:
        roi_heads.fastrcnn_loss = plain


def low_resolution_logits(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits of a torchvision segmentation model before its upsampling: "out", perhaps "aux"."""
    parts: Any = model
    if not hasattr(model, "backbone") or not hasattr(model, "classifier"):
        raise ArgumentError(
            f"model must be a segmentation model of torchvision, got a {type(model).__name__}"
        )
    features = parts.backbone(images)
    found = {"out": parts.classifier(features["out"])}
    if getattr(model, "aux_classifier", None) is not None:
        found["aux"] = parts.aux_classifier(features["aux"])
    return found


def segmentation_loss(
    model: nn.Module, images: Tensor, masks: Tensor, weight: Tensor | None = None,
    *, aux_weight: float = 0.5, **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of a torchvision segmentation model at the masks' size, without upsampled logits.

    Args:
        images, masks: (N, 3, H, W) and (N, H, W).
        aux_weight: of the auxiliary classifier's loss, as torchvision's reference training.
        options: of `upsample_cross_entropy`; ignore_index is 255. With gradient accumulation or
            several ranks, normalizer=loss_denominator([masks, ...], weight, ignore_index=255) of
            all masks of the step.
    """
    losses = {}
    for name, logits in low_resolution_logits(model, images).items():
        loss = upsample_cross_entropy(logits, masks, weight, **options)
        assert isinstance(loss, Tensor)
        losses[name] = loss
    if "aux" in losses:
        return losses["out"] + aux_weight * losses["aux"]
    return losses["out"]
