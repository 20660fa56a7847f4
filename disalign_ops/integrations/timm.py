"""timm: its models with a DisAlign classifier, and a loss for its training script."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import nn as dnn
from .._call.types import Background, Form, Start
from ..class_stats import Counts
from ..errors import ArgumentError


def disalign_timm_model(
    model: nn.Module, *, form: Form = "interpolated", background: Background | None = None,
    start: Start = "identity",
) -> nn.Module:  # fmt: skip
    """Swaps the classifier of a timm model for a DisAlignLinear that keeps its weights, in place.

    Args:
        model: from timm.create_model, its `get_classifier()` an nn.Linear.
        form, background, start: as in `disalign_ops.nn.DisAlignLinear`.

    Returns the model; `get_classifier()` finds the new layer. Raises ArgumentError: a model without
    get_classifier, or whose classifier is none (num_classes=0), several, or no nn.Linear.
    """
    find: Any = getattr(model, "get_classifier", None)
    if find is None:
        raise ArgumentError(f"model must be one of timm's, got a {type(model).__name__}")
    classifier = find()
    names = [name for name, module in model.named_modules() if module is classifier]
    if type(classifier) is not nn.Linear or len(names) != 1:
        raise ArgumentError(
            "model's classifier must be one nn.Linear (num_classes above 0), got "
            f"{type(classifier).__name__}"
        )
    return dnn.convert_to_disalign(
        model, form=form, name=names[0], background=background, start=start
    )


class GRWLoss(dnn.GRWCrossEntropyLoss):
    """timm's `train_loss_fn` for stage 2: GRW weights of the training counts.

    Called as `loss_fn(output, target)` with class indices or, under mixup, class probabilities.
    smoothing has timm's name.
    """

    def __init__(
        self, counts: Counts, rho: float = 1.2, smoothing: float = 0.0, **options: Any
    ) -> None:
        super().__init__(counts, rho, label_smoothing=smoothing, **options)
