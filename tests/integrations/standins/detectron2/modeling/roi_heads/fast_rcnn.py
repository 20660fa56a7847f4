from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import configurable

LOGGED: list[tuple[Tensor, Tensor]] = []


@dataclass
class ShapeSpec:
    channels: int
    height: int | None = None
    width: int | None = None


def _log_classification_stats(pred_logits: Tensor, gt_classes: Tensor) -> None:
    LOGGED.append((pred_logits, gt_classes))


class FastRCNNOutputLayers(nn.Module):
    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, box2box_transform: Any, num_classes: int,
        loss_weight: float | dict[str, float] = 1.0, use_fed_loss: bool = False,
        use_sigmoid_ce: bool = False, get_fed_loss_cls_weights: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        size = input_shape.channels * (input_shape.width or 1) * (input_shape.height or 1)
        self.cls_score = nn.Linear(size, num_classes + 1)
        self.bbox_pred = nn.Linear(size, num_classes * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        if isinstance(loss_weight, float):
            loss_weight = {"loss_cls": loss_weight, "loss_box_reg": loss_weight}
        self.loss_weight = loss_weight
        self.box2box_transform = box2box_transform
        self.use_fed_loss, self.use_sigmoid_ce = use_fed_loss, use_sigmoid_ce

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec) -> dict[str, Any]:
        return {
            "input_shape": input_shape,
            "box2box_transform": None,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "loss_weight": {"loss_box_reg": 0.5},
        }

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x.flatten(1)), self.bbox_pred(x.flatten(1))

    def losses(self, predictions: Any, proposals: list[Any]) -> dict[str, Tensor]:
        scores, deltas = predictions
        classes = torch.cat([p.gt_classes for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        true = [p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes for p in proposals]
        loss = F.cross_entropy(scores, classes)
        box_loss = self.box_reg_loss(boxes, torch.cat([b.tensor for b in true]), deltas, classes)
        found = {"loss_cls": loss, "loss_box_reg": box_loss}
        return {name: value * self.loss_weight.get(name, 1.0) for name, value in found.items()}

    def box_reg_loss(
        self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        assert len(proposal_boxes) == len(gt_boxes) == len(pred_deltas) == len(gt_classes)
        return pred_deltas.sum() + (gt_boxes - proposal_boxes).sum()
