"""Fused DisAlign logits and class-weighted softmax cross-entropy for long-tailed recognition."""

from __future__ import annotations

__version__ = "0.1.0"

from . import class_stats, metrics, nn, segmentation_metrics
from ._backends import backend_info, set_backend
from ._replace import replace_cross_entropy
from .functional import calibrate, cross_entropy, disalign_cross_entropy
from .upsample import UpsampleDetails, upsample_cross_entropy, upsample_predict

__all__ = [
    "UpsampleDetails",
    "backend_info",
    "calibrate",
    "class_stats",
    "cross_entropy",
    "disalign_cross_entropy",
    "metrics",
    "nn",
    "replace_cross_entropy",
    "segmentation_metrics",
    "set_backend",
    "upsample_cross_entropy",
    "upsample_predict",
]
