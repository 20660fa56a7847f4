"""Modules of dense prediction, exported by nn.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from ._arguments import check_bool, check_choice
from ._nn_form import Calibration, is_recorded
from .errors import ArgumentError
from .upsample import UpsampleDetails, upsample_cross_entropy, upsample_predict


class ConfidenceConvolution(nn.Module):
    """1x1 convolution to one channel, BatchNorm, ReLU: the released head's ConvModule."""

    def __init__(self, in_channels: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 1, 1, bias=False, **factory)
        self.bn = nn.BatchNorm2d(1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class DisAlignSegHead(Calibration):
    """A 1x1 classifier of dense features, calibrated at their resolution.

    Args:
        in_channels, num_classes: of the features (N, in_channels, h, w), and C.
        form: "interpolated" as the released segmentation head, or "residual".
        align_corners: of the interpolation to the target's size.
        dropout: probability of dropping a channel before the classifier, in training mode; the
            released head's decoder has 0.1.
        device, dtype: of the parameters.

    Parameters have the released checkpoints' names and shapes: conv_seg (Conv2d, 1x1, with bias),
    logit_scale and logit_bias (1, C, 1, 1), initially 1 and 0, confidence_layer.conv (1x1 to one
    channel, no bias) and confidence_layer.bn. The confidence is ReLU'd before the sigmoid, so
    c is in [0.5, 1). load_state_dict refuses a state_dict that was saved in the other form.
    Raises ArgumentError: form, or sizes below 1.
    Source: Zhang et al., "Distribution Alignment", CVPR 2021; the released DisAlignFCNHead.
    """

    background = None

    def __init__(
        self, in_channels: int, num_classes: int,
        *, form: str = "interpolated", align_corners: bool = False, dropout: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("form", form, functional._FORMS)
        check_bool("align_corners", align_corners)
        if in_channels < 1 or num_classes < 1:
            raise ArgumentError(
                f"in_channels is {in_channels}, num_classes {num_classes}: needed is at least 1"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.num_classes = in_channels, num_classes
        self.form, self.align_corners = form, align_corners
        self.background = None  # torch.jit.script reads no attribute of the class
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(in_channels, num_classes, 1, **factory)
        self.logit_scale = nn.Parameter(torch.ones(1, num_classes, 1, 1, **factory))
        self.logit_bias = nn.Parameter(torch.zeros(1, num_classes, 1, 1, **factory))
        self.confidence_layer = ConfidenceConvolution(in_channels, factory)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        if self.conv_seg.bias is not None:
            nn.init.zeros_(self.conv_seg.bias)

    def raw_logits(self, features: Tensor) -> Tensor:
        """Logits (N, C, h, w) before the calibration: those of stage 1."""
        if not is_recorded(features) and (
            features.dim() != 4 or features.shape[1] != self.in_channels
        ):
            raise ArgumentError(
                f"features have shape {tuple(features.shape)}, needed is "
                f"(N, {self.in_channels}, h, w)"
            )
        return self._raw(features)

    def _raw(self, features: Tensor) -> Tensor:
        logits: Tensor = self.conv_seg(self.dropout(features))
        return logits

    def _calibration(self, features: Tensor) -> dict[str, Any]:
        return {
            "confidence": self.confidence_layer(features),
            "scale": self.logit_scale,
            "bias": self.logit_bias,
            "form": self.form,
        }

    def forward(self, features: Tensor) -> Tensor:
        """Calibrated logits (N, C, h, w), at the resolution of the features (N, in_channels, h, w).

        Upsample them for anything but `loss` and `predict`, which need no upsampled logits.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            logits = self._raw(features)
        else:
            logits = self.raw_logits(features)
        return self._calibrated(logits, self.confidence_layer(features))

    @torch.no_grad()
    def predict(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """The most probable class at every position of `size` (H, W): (N, H, W), int64."""
        return upsample_predict(
            self.raw_logits(features), size, align_corners=self.align_corners,
            **self._calibration(features),
        )  # fmt: skip

    def loss(
        self, features: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
    ) -> Tensor | UpsampleDetails:
        """`upsample_cross_entropy` of the calibrated logits at the resolution of target (N, H, W).

        options: its keywords but the calibration, form and align_corners. inplace_backward is safe:
        only this loss has the raw logits.
        """
        return upsample_cross_entropy(
            self.raw_logits(features), target, weight, align_corners=self.align_corners,
            **self._calibration(features), **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"form={self.form!r}, align_corners={self.align_corners}"
