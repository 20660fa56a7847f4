"""segmentation-models-pytorch: models without their last upsampling, and the fused loss in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import nn as dnn
from ..errors import ArgumentError
from ..upsample import upsample_predict


class SegmentationLoss(dnn.UpsampleCrossEntropyLoss):
    """The loss of a model from `without_upsampling`, at the masks' size, as smp would upsample.

    predict(logits, size): the classes at that size.
    """

    def predict(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return upsample_predict(logits, size, align_corners=self.align_corners)


def without_upsampling(
    model: nn.Module, weight: Tensor | None = None, **options: Any
) -> tuple[nn.Module, SegmentationLoss]:
    """Takes the upsampling out of an smp model's segmentation head, in place.

    Args:
        model: of smp, with `segmentation_head` = (convolution, upsampling, activation), whose
            activation is none.
        weight, options: of `disalign_ops.nn.UpsampleCrossEntropyLoss`; align_corners is the head's.

    Returns the model, whose logits are the decoder's, and the loss.
    """
    head: Any = getattr(model, "segmentation_head", None)
    if not isinstance(head, nn.Sequential) or len(head) < 2:
        raise ArgumentError(f"model must be a model of smp, got a {type(model).__name__}")
    upsampling = head[1]
    if not isinstance(upsampling, nn.Upsample | nn.Identity):
        raise ArgumentError(
            "the segmentation head must have an nn.Upsample for upsampling, got "
            f"{type(upsampling).__name__}"
        )
    activation = getattr(head[2], "activation", head[2]) if len(head) > 2 else nn.Identity()
    if not isinstance(activation, nn.Identity):
        raise ArgumentError(
            "the segmentation head must give logits (activation=None), got the activation "
            f"{type(activation).__name__}"
        )
    if isinstance(upsampling, nn.Upsample) and upsampling.mode != "bilinear":
        raise ArgumentError(
            f"the segmentation head's upsampling must be bilinear, got {upsampling.mode}"
        )
    head[1] = nn.Identity()
    corners = bool(getattr(upsampling, "align_corners", True))
    return model, SegmentationLoss(weight, align_corners=corners, **options)
