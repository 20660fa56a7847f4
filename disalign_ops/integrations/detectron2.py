"""detectron2: a box predictor with DisAlign and GRW weights; the last column is the background.

cfg = get_cfg()
add_disalign_config(cfg)
cfg.MODEL.ROI_HEADS.NAME = "DisAlignROIHeads"
cfg.MODEL.ROI_BOX_HEAD.DISALIGN.COUNTS = "lvis_v1_train.json"
model = build_model(cfg)
DetectionCheckpointer(model).load("stage1.pth")
parameters = disalign_ops.nn.freeze_for_stage2(model)

Cascade R-CNN has "DisAlignCascadeROIHeads". A cosine head, DISALIGN.COSINE = True, has no
counterpart in detectron2: its stage 1 is this model with disalign_ops.nn.freeze_for_stage1(model).
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    StandardROIHeads,
    fast_rcnn,
)
from torch import Tensor

from .. import nn as dnn
from .._call.types import Form, Normalizer
from ..class_stats import grw_weights
from ..count_files import read_counts
from ..errors import ArgumentError
from ..functional import cross_entropy


def add_disalign_config(cfg: Any) -> None:
    """MODEL.ROI_BOX_HEAD.DISALIGN: FORM, RHO, COUNTS (a file of `read_counts`, "": no weights),
    COUNT (its argument count: "image" or "instance"), NORMALIZER (of `cross_entropy`), COSINE and
    COSINE_SCALE (where its learnable scale starts).
    """
    cfg.MODEL.ROI_BOX_HEAD.DISALIGN = CfgNode(
        {
            "FORM": "interpolated", "COUNTS": "", "COUNT": "image", "RHO": 0.8,
            "NORMALIZER": "weights", "COSINE": False, "COSINE_SCALE": 20.0,
        }
    )  # fmt: skip


class DisAlignFastRCNNOutputLayers(fast_rcnn.FastRCNNOutputLayers):  # type: ignore[misc]
    """detectron2's FastRCNNOutputLayers with a calibrated `cls_score` and class weights.

    Args:
        input_shape: of the box features.
        class_weight: (num_classes + 1,), of the background 1, or None:
            `grw_weights(counts, rho, background="last")`.
        form: as in `disalign_ops.nn.DisAlignLinear`.
        normalizer: as in `disalign_ops.cross_entropy`: "weights" is the released detectors',
            "valid" detectron2's own.
        cosine_scale: None, or where the learnable scale of a `DisAlignCosineLinear` starts; the
            released detectors have 20.
        options: of FastRCNNOutputLayers; use_sigmoid_ce and use_fed_loss are refused.

    From a config: `DisAlignFastRCNNOutputLayers(cfg, input_shape)`, see `add_disalign_config`.
    cls_score keeps its parameters' names, so a checkpoint of stage 1 loads. The weights are no
    entry of the state_dict.
    """

    cls_score: Any

    @configurable  # type: ignore[misc]
    def __init__(
        self, input_shape: Any, *, class_weight: Tensor | None = None, form: Form = "interpolated",
        normalizer: Normalizer = "weights", cosine_scale: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(input_shape, **options)
        if getattr(self, "use_sigmoid_ce", False) or getattr(self, "use_fed_loss", False):
            raise ArgumentError(
                "use_sigmoid_ce and use_fed_loss must be False, since this is a softmax, got True"
            )
        linear = self.cls_score
        sizes = linear.in_features, linear.out_features
        if cosine_scale is None:
            self.cls_score = dnn.DisAlignLinear(*sizes, form=form, background="last")
            self.cls_score.bias = linear.bias
        else:
            self.cls_score = dnn.DisAlignCosineLinear(
                *sizes, scale_init=cosine_scale, form=form, background="last"
            )
        self.cls_score.weight = linear.weight
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.normalizer = normalizer

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().from_config(cfg, input_shape)
        given = cfg.MODEL.ROI_BOX_HEAD.DISALIGN
        found["form"], found["normalizer"] = given.FORM, given.NORMALIZER
        if given.COSINE:
            found["cosine_scale"] = given.COSINE_SCALE
        if given.COUNTS:
            counts = read_counts(given.COUNTS, count=given.COUNT)
            found["class_weight"] = grw_weights(counts, given.RHO, background="last")
        return found

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Any]) -> dict[str, Tensor]:
        """loss_cls, weighted, and loss_box_reg of detectron2; see there."""
        scores, deltas = predictions
        if proposals:
            classes = torch.cat([p.gt_classes for p in proposals])
            boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
            true = [p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes for p in proposals]
            true_boxes = torch.cat([box.tensor for box in true])
        else:
            classes = torch.empty(0, dtype=torch.int64, device=scores.device)
            boxes = true_boxes = torch.empty(0, 4, device=deltas.device)
        fast_rcnn._log_classification_stats(scores, classes)
        if len(classes):
            loss = cross_entropy(scores, classes, self.class_weight, normalizer=self.normalizer)
        else:  # no mean of nothing, but a gradient for all ranks
            loss = 0.0 * scores.sum()
        found = {
            "loss_cls": loss,
            "loss_box_reg": self.box_reg_loss(boxes, true_boxes, deltas, classes),
        }
        return {name: value * self.loss_weight.get(name, 1.0) for name, value in found.items()}


class _DisAlignBoxes:
    """A mixin of detectron2's RoI heads: their box predictors are ours."""

    @classmethod
    def _init_box_head(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        found: dict[str, Any] = super()._init_box_head(cfg, input_shape)  # type: ignore[misc]

        def ours(head: Any, plain: Any) -> Any:
            return DisAlignFastRCNNOutputLayers(
                cfg, head.output_shape, box2box_transform=plain.box2box_transform
            )

        if "box_predictors" in found:  # one a stage of a cascade
            both = zip(found["box_heads"], found["box_predictors"], strict=True)
            found["box_predictors"] = [ours(head, plain) for head, plain in both]
        else:
            found["box_predictor"] = ours(found["box_head"], found["box_predictor"])
        return found


@ROI_HEADS_REGISTRY.register()  # type: ignore[misc]
class DisAlignROIHeads(_DisAlignBoxes, StandardROIHeads):  # type: ignore[misc]
    """StandardROIHeads with a DisAlignFastRCNNOutputLayers, by name in a config."""


@ROI_HEADS_REGISTRY.register()  # type: ignore[misc]
class DisAlignCascadeROIHeads(_DisAlignBoxes, CascadeROIHeads):  # type: ignore[misc]
    """CascadeROIHeads with a DisAlignFastRCNNOutputLayers a stage, by name in a config."""
