"""transformers: the loss of Segformer and UPerNet for Trainer, without upsampled logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError
from ..upsample import upsample_cross_entropy

_NO_ITEM = -100  # what Trainer does not count, whatever ignore_index is


def semantic_segmentation_loss(
    weight: Tensor | None = None, ignore_index: int = 255, **options: Any
) -> Callable[..., Tensor]:
    """A `compute_loss_func` for transformers.Trainer.

    Takes the model's logits at whatever resolution they have (Segformer's at a quarter; UPerNet's
    after `keep_low_resolution`) and the labels (N, H, W) at full size.

    Args:
        weight: (C,) class weights. options: of `upsample_cross_entropy`.

    Trainer adds up the batches of a step (gradient_accumulation_steps, processes) without dividing,
    and says how many positions all of them have: num_items_in_batch. A batch's mean counts by its
    share of these, so that a step is the mean of its batches.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        given = None if weight is None else weight.to(logits.device)
        mean = upsample_cross_entropy(
            logits, labels, given, ignore_index=ignore_index, align_corners=False, **options
        )
        assert isinstance(mean, Tensor)
        if num_items_in_batch is None:
            return mean
        share: Tensor = (labels != _NO_ITEM).sum() / num_items_in_batch
        return mean * share

    return loss


def keep_low_resolution(model: nn.Module) -> nn.Module:
    """Makes a UperNetForSemanticSegmentation give its logits before it upsamples them, in place.

    Then it computes no loss of its own: labels are `semantic_segmentation_loss`'s. At test time
    `upsample_predict(logits, size)` gives the classes at any size. Returns the model.
    """
    from transformers.modeling_outputs import SemanticSegmenterOutput

    parts: Any = model
    if not hasattr(model, "decode_head") or not hasattr(model, "backbone"):
        raise ArgumentError(
            f"model must be a UperNetForSemanticSegmentation, got a {type(model).__name__}"
        )

    def forward(pixel_values: Tensor, **_: Any) -> Any:
        features = parts.backbone(pixel_values).feature_maps
        return SemanticSegmenterOutput(logits=parts.decode_head(features))

    parts.forward = forward
    return model
