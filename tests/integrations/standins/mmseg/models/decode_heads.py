from __future__ import annotations

from abc import ABCMeta, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmseg.registry import MODELS


class BaseDecodeHead(nn.Module, metaclass=ABCMeta):
    def __init__(
        self, in_channels: int, channels: int, *, num_classes: int, out_channels: int | None = None,
        dropout_ratio: float = 0.1, loss_decode: Any = None, ignore_index: int = 255,
        sampler: Any = None, align_corners: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ignore_index, self.align_corners, self.sampler = ignore_index, align_corners, sampler
        self.out_channels = num_classes if out_channels is None else out_channels
        if isinstance(loss_decode, dict):
            self.loss_decode = MODELS.build(loss_decode)
        else:
            self.loss_decode = nn.ModuleList(MODELS.build(loss) for loss in loss_decode)
        self.conv_seg = nn.Conv2d(channels, self.out_channels, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout_ratio) if dropout_ratio > 0 else None

    @abstractmethod
    def forward(self, inputs: list[Tensor]) -> Tensor: ...

    def cls_seg(self, feat: Tensor) -> Tensor:
        return self.conv_seg(feat if self.dropout is None else self.dropout(feat))

    def loss(self, inputs: Any, batch_data_samples: Any, train_cfg: Any) -> dict[str, Tensor]:
        return self.loss_by_feat(self.forward(inputs), batch_data_samples)

    def _stack_batch_gt(self, batch_data_samples: Any) -> Tensor:
        return torch.stack([sample.gt_sem_seg.data for sample in batch_data_samples])

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: Any) -> dict[str, Tensor]:
        label = self._stack_batch_gt(batch_data_samples)
        logits = F.interpolate(
            seg_logits, label.shape[2:], mode="bilinear", align_corners=self.align_corners
        )
        weight = None if self.sampler is None else self.sampler.sample(logits, label)
        label = label.squeeze(1)
        several = isinstance(self.loss_decode, nn.ModuleList)
        found: dict[str, Tensor] = {}
        for loss in self.loss_decode if several else [self.loss_decode]:
            term = loss(logits, label, weight=weight, ignore_index=self.ignore_index)
            found[loss.loss_name] = found.get(loss.loss_name, 0) + term
        counted = label != self.ignore_index
        right = (logits.argmax(1) == label)[counted].float().sum(0, keepdim=True)
        tiny = torch.finfo(torch.float32).eps
        found["acc_seg"] = (right + tiny) * (100 / (counted.sum() + tiny))
        return found


class FCNHead(BaseDecodeHead):
    def __init__(
        self, num_convs: int = 2, kernel_size: int = 3, concat_input: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        assert num_convs == 0
        assert not concat_input

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.cls_seg(inputs[-1])


MODELS.register_module("FCNHead", FCNHead)
