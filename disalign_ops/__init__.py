"""Fused DisAlign logits and class-weighted softmax cross-entropy for long-tailed recognition."""

from __future__ import annotations

__version__ = "0.1.0"

from torch import fx as _fx

from . import (
    checkpoints,
    class_stats,
    integrations,
    losses,
    metrics,
    nn,
    plots,
    segmentation_metrics,
    sweep,
)
from ._call.details import LossDetails
from ._call.shard import Shard
from ._ops.backends import backend_info, set_backend
from .denominator import loss_denominator
from .functional import calibrate, cross_entropy, disalign_cross_entropy
from .linear import disalign_linear_cross_entropy, linear_cross_entropy
from .replace import replace_cross_entropy
from .upsample import UpsampleDetails, upsample_cross_entropy, upsample_predict

# In a graph of torch.fx each is one call, by its name here as in the file it is from.
for _name in (
    "calibrate", "cross_entropy", "disalign_cross_entropy", "disalign_linear_cross_entropy",
    "linear_cross_entropy", "upsample_cross_entropy", "upsample_predict",
):  # fmt: skip
    _fx.wrap(_name)

__all__ = [
    "LossDetails",
    "Shard",
    "UpsampleDetails",
    "backend_info",
    "calibrate",
    "checkpoints",
    "class_stats",
    "cross_entropy",
    "disalign_cross_entropy",
    "disalign_linear_cross_entropy",
    "integrations",
    "linear_cross_entropy",
    "loss_denominator",
    "losses",
    "metrics",
    "nn",
    "plots",
    "replace_cross_entropy",
    "segmentation_metrics",
    "set_backend",
    "sweep",
    "upsample_cross_entropy",
    "upsample_predict",
]
