"""Modules, thin over functional.py: the losses, the DisAlign layers, and what stage 2 needs.

Stage 2 of DisAlign, from a trained classifier:

    model = convert_to_disalign(model)  # its last nn.Linear becomes a DisAlignLinear
    optimizer = torch.optim.SGD(freeze_for_stage2(model), lr=0.1, momentum=0.9)
    criterion = GRWCrossEntropyLoss(counts, rho=1.2)

Where the features x are at hand, `layer.loss(x, target, weight=criterion.weight)` is
`criterion(layer(x), target)` without the calibrated logits.
"""

from __future__ import annotations

from .linear import DisAlignCosineLinear, DisAlignLinear
from .losses import CrossEntropyLoss, GRWCrossEntropyLoss, UpsampleCrossEntropyLoss
from .segmentation import DisAlignSegHead
from .stage2 import convert_form, convert_to_disalign, freeze_for_stage1, freeze_for_stage2

__all__ = [
    "CrossEntropyLoss",
    "DisAlignCosineLinear",
    "DisAlignLinear",
    "DisAlignSegHead",
    "GRWCrossEntropyLoss",
    "UpsampleCrossEntropyLoss",
    "convert_form",
    "convert_to_disalign",
    "freeze_for_stage1",
    "freeze_for_stage2",
]
