"""mmsegmentation: decode heads that are calibrated and whose loss needs no upsampled logits.

custom_imports = dict(imports=["disalign_ops.integrations.mmseg"])
model = dict(
    type="DisAlignStage2",
    model=dict(
        type="EncoderDecoder", ...,
        decode_head=dict(
            type="DisAlignUPerHead", ...,
            loss_decode=dict(
                type="GRWCrossEntropyLoss", counts="objectInfo150.txt", rho=0.2,
                normalizer="count"))))

The loss of the released configuration (class_weight=objectInfo150.txt, exp_scale=0.2) is taken as
it is, too.
"""

from __future__ import annotations

from typing import Any

import torch
from mmseg.models import decode_heads
from mmseg.registry import MODELS
from torch import Tensor, nn

from .._call.types import Form, Start
from .._ops.reference import class_indices
from ..errors import ArgumentError
from ..functional import calibrate
from ..nn.calibration import Calibration
from ..nn.segmentation import ConfidenceConvolution, DisAlignSegHead
from ..upsample import UpsampleDetails, upsample_cross_entropy
from ._openmm import GRWCrossEntropyLoss as GRWCrossEntropyLoss
from ._openmm import register

# Those whose forward ends in cls_seg.
HEADS = (
    "FCNHead", "PSPHead", "ASPPHead", "DepthwiseSeparableASPPHead", "DepthwiseSeparableFCNHead",
    "UPerHead", "FPNHead", "SegformerHead",
)  # fmt: skip


class FusedLoss:
    """A mixin of mmseg's decode heads: `loss_by_feat` without the resize.

    It serves where every loss_decode is a GRWCrossEntropyLoss and there is no sampler; else the
    head does what it does without it.
    """

    def loss_by_feat(self: Any, seg_logits: Any, batch_data_samples: Any) -> dict[str, Tensor]:
        given = self.loss_decode
        losses: list[Any] = list(given) if isinstance(given, nn.ModuleList) else [given]
        if (
            not isinstance(seg_logits, Tensor) or self.sampler is not None
            or not all(isinstance(loss, GRWCrossEntropyLoss) for loss in losses)
        ):  # fmt: skip
            found: dict[str, Tensor] = super().loss_by_feat(seg_logits, batch_data_samples)  # type: ignore[misc]
            return found
        target = self._stack_batch_gt(batch_data_samples).squeeze(1)
        found, prediction = {}, None
        for loss in losses:
            term: Any = upsample_cross_entropy(
                seg_logits, target, align_corners=self.align_corners,
                return_details=prediction is None,
                **loss.options(target, seg_logits.shape[1], None, None, None, self.ignore_index),
            )  # fmt: skip
            if isinstance(term, UpsampleDetails):
                term, prediction = term.loss, term.prediction
            found[loss.loss_name] = found.get(loss.loss_name, 0) + loss.loss_weight * term
        # mmseg's accuracy, of the same shape: 100 of no positions.
        counted = class_indices(target, self.ignore_index)[1]
        right = ((prediction == target) & counted).sum(dtype=torch.float32).reshape(1)
        tiny = torch.finfo(torch.float32).eps
        found["acc_seg"] = 100 * (right + tiny) / (counted.sum() + tiny)
        return found


class _DisAlignHead(FusedLoss, Calibration):
    """What `disalign_head` adds to a decode head."""

    _confidence_range = DisAlignSegHead._confidence_range

    def __init__(
        self, *arguments: Any, form: Form = "interpolated", start: Start = "identity",
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*arguments, **options)
        head: Any = self
        self._add_calibration((1, head.conv_seg.out_channels, 1, 1), form, None, start, {})
        self.confidence_layer = ConfidenceConvolution(head.conv_seg.in_channels, {})

    def cls_seg(self, feat: Tensor) -> Tensor:
        """Calibrated logits, at the resolution of `feat`."""
        return calibrate(
            super().cls_seg(feat), self._confidence(feat), self.logit_scale,  # type: ignore[misc]
            self.logit_bias, form=self.form,
        )  # fmt: skip


def disalign_head(head: type[nn.Module]) -> type[nn.Module]:
    """A decode head of mmseg with DisAlign's calibration and a fused loss, and registers it.

    Args:
        head: a class of BaseDecodeHead whose forward ends in `cls_seg`, as all of `HEADS` do, which
            are registered already.

    The class has its name with "DisAlign" before it, its arguments, and `form` and `start` of
    `disalign_ops.nn.DisAlignSegHead`. Parameters have the released names (conv_seg, logit_scale,
    logit_bias, confidence_layer.conv and .bn), so that a checkpoint of stage 1 loads. Logits are
    calibrated at low resolution, in training and inference.
    Raises ArgumentError: no class with cls_seg.
    """
    if not isinstance(head, type) or not hasattr(head, "cls_seg"):
        raise ArgumentError(f"head must be a class with cls_seg, got {head!r}")
    name = f"DisAlign{head.__name__}"
    metaclass: Any = type(head)  # mmengine's modules have one of their own
    made: type[nn.Module] = metaclass(name, (_DisAlignHead, head), {"__doc__": head.__doc__})
    MODELS.register_module(name=name, module=made, force=True)
    return made


register(MODELS, GRWCrossEntropyLoss)
for _name in HEADS:
    if hasattr(decode_heads, _name):  # versions differ in which there are
        globals()[f"DisAlign{_name}"] = disalign_head(getattr(decode_heads, _name))
