"""mmdetection: calibrated box classifiers and GRW weights, by name in a config.

custom_imports = dict(imports=["disalign_ops.integrations.mmdet"])
bbox_head = dict(
    type="Shared2FCBBoxHead", ...,
    cls_predictor_cfg=dict(type="DisAlignLinear"),
    loss_cls=dict(type="GRWCrossEntropyLoss", counts="lvis_v1_train.json", rho=0.8))
model = dict(type="DisAlignStage2", model=dict(type="FasterRCNN", ...))
"""

from __future__ import annotations

from typing import Any

from mmdet.registry import MODELS

from .. import nn as dnn
from ._openmm import GRWCrossEntropyLoss as _Loss
from ._openmm import register


class GRWCrossEntropyLoss(_Loss):
    """`loss_cls` of a box head: counts of the foreground classes, the background last.

    Arguments as mmsegmentation's, with count "image" ("instance": the boxes) and class_weight with
    the background's. The box head calls it with (cls_score (R, K + 1), labels, label_weights,
    avg_factor, reduction_override). normalizer="weights" is the mean of the released detectors;
    by default it is the box head's, over its sampled boxes.
    """

    _count = "image"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"background": "last", **options})


class DisAlignLinear(dnn.DisAlignLinear):
    """`cls_predictor_cfg` of a box head: `disalign_ops.nn.DisAlignLinear`, the background last.

    In the released detection head's form, so that stage 2 starts from the scores of stage 1.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"background": "last", **options})


class DisAlignCosineLinear(dnn.DisAlignCosineLinear):
    """The same of `disalign_ops.nn.DisAlignCosineLinear`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"background": "last", **options})


register(MODELS, GRWCrossEntropyLoss)
for _module in (DisAlignLinear, DisAlignCosineLinear):
    MODELS.register_module(name=_module.__name__, module=_module, force=True)
