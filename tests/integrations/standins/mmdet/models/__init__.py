from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet.registry import MODELS


class Shared2FCBBoxHead(nn.Module):
    def __init__(
        self, fc_out_channels: int = 1024, in_channels: int = 256, roi_feat_size: int = 7,
        num_classes: int = 80, cls_predictor_cfg: Any = None, loss_cls: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        self.loss_cls = MODELS.build(loss_cls)
        width = in_channels * roi_feat_size**2
        self.shared_fcs = nn.ModuleList(
            nn.Linear(size, fc_out_channels) for size in (width, fc_out_channels)
        )
        self.fc_cls = MODELS.build(
            {**cls_predictor_cfg, "in_features": fc_out_channels, "out_features": num_classes + 1}
        )
        self.fc_reg = nn.Linear(fc_out_channels, 4 * num_classes)

    def init_weights(self) -> None:
        for module in self.fc_cls.modules():
            if hasattr(module, "weight"):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x)

    def loss(
        self, cls_score: Tensor, bbox_pred: Tensor, rois: Tensor, labels: Tensor,
        label_weights: Tensor, bbox_targets: Tensor, bbox_weights: Tensor,
        reduction_override: str | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        avg_factor = max(torch.sum(label_weights > 0).float().item(), 1.0)
        loss = self.loss_cls(
            cls_score, labels, label_weights, avg_factor=avg_factor,
            reduction_override=reduction_override,
        )  # fmt: skip
        return {"loss_cls": loss}


MODELS.register_module("Linear", nn.Linear)
MODELS.register_module("Shared2FCBBoxHead", Shared2FCBBoxHead)
