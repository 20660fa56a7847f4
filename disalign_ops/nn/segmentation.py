"""Modules of dense prediction, exported by nn.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from .._call.arguments import check_bool, check_integer, check_tensor
from .._call.types import Form, LossOptions, Start
from ..errors import ArgumentError
from ..upsample import UpsampleDetails, upsample_cross_entropy, upsample_predict
from .calibration import Calibration, is_recorded

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ConfidenceConvolution(nn.Module):
    """1x1 convolution to one channel, BatchNorm, ReLU: the released head's ConvModule."""

    def __init__(self, in_channels: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 1, 1, bias=False, **factory)
        self.bn = nn.BatchNorm2d(1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class _Classifier(nn.Conv2d):
    """The 1x1 convolution of the raw logits, with the released head's start: N(0, 0.01), bias 0."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DisAlignSegHead(Calibration):
    """A 1x1 classifier of dense features, calibrated at their resolution.

    Args:
        in_channels, num_classes: of the features (N, in_channels, h, w), and C.
        form: "interpolated" as the released segmentation head, or "residual".
        start: "identity", u = z. "released": logit_scale is 1 in the residual form too, which then
            starts at (1 + c) z.
        align_corners: of the interpolation to the target's size.
        dropout: probability of dropping a channel before the classifier, in training mode; the
            released head's decoder has 0.1.
        device, dtype: of the parameters.

    Parameters have the released checkpoints' names and shapes: conv_seg (Conv2d, 1x1, with bias),
    logit_scale and logit_bias (1, C, 1, 1), confidence_layer.conv (1x1 to one channel, no bias) and
    confidence_layer.bn. The confidence is normalised and ReLU'd before the sigmoid, so c is in
    [0.5, 1), near 0.58 on average at the start whatever the features are. The buffer
    calibration_form says in the state_dict which form it is; load_state_dict needs no such entry,
    and refuses a state_dict of the other form. `mean_confidence()` as in `DisAlignLinear`.
    Raises ArgumentError: form, start, or sizes below 1.
    Source: Zhang et al., "Distribution Alignment", CVPR 2021; the released DisAlignFCNHead.
    """

    _confidence_range = (0.501, 0.999)  # at 0.5 the ReLU lets nothing through

    def __init__(
        self, in_channels: int, num_classes: int,
        *, form: Form = "interpolated", start: Start = "identity", align_corners: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_bool("align_corners", align_corners)
        in_channels = check_integer("in_channels", in_channels)
        num_classes = check_integer("num_classes", num_classes)
        if in_channels < 1 or num_classes < 1:
            raise ArgumentError(
                f"in_channels and num_classes must be at least 1, got {in_channels} and "
                f"{num_classes}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.num_classes = in_channels, num_classes
        self.align_corners = align_corners
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = _Classifier(in_channels, num_classes, 1, **factory)
        self._add_calibration((1, num_classes, 1, 1), form, None, start, factory)
        self.confidence_layer = ConfidenceConvolution(in_channels, factory)

    def reset_parameters(self) -> None:
        """logit_scale and logit_bias as `start` says; the other parts have their own."""
        self._reset_calibration()

    def raw_logits(self, features: Tensor) -> Tensor:
        """Logits (N, C, h, w) before the calibration: those of stage 1."""
        if not is_recorded(features) and (
            features.dim() != 4 or features.shape[1] != self.in_channels
        ):
            raise ArgumentError(
                f"features must have shape (N, {self.in_channels}, h, w), got "
                f"{tuple(features.shape)}"
            )
        if type(features) is Tensor:
            check_tensor("logit_scale", self.logit_scale)
        return self._raw(features)

    def _raw(self, features: Tensor) -> Tensor:
        logits: Tensor = self.conv_seg(self.dropout(features))
        return logits

    def _calibration(self, features: Tensor) -> dict[str, Any]:
        return {
            "confidence": self._confidence(features),
            "scale": self.logit_scale,
            "bias": self.logit_bias,
            "form": self.form,
        }

    def forward(self, features: Tensor) -> Tensor:
        """Calibrated logits (N, C, h, w), at the resolution of the features (N, in_channels, h, w).

        Upsample them for anything but `loss` and `predict`, which need no upsampled logits.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            logits, confidence = self._raw(features), self.confidence_layer(features)
        else:
            logits, confidence = self.raw_logits(features), self._confidence(features)
        return self._calibrated(logits, confidence)

    @torch.no_grad()
    def predict(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """The most probable class at every position of `size` (H, W): (N, H, W), int64."""
        return upsample_predict(
            self.raw_logits(features), size, align_corners=self.align_corners,
            **self._calibration(features),
        )  # fmt: skip

    @overload
    def loss(
        self, features: Tensor, target: Tensor, weight: Tensor | None = None,
        *, return_details: Literal[False] = False, **options: Unpack[LossOptions],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def loss(
        self, features: Tensor, target: Tensor, weight: Tensor | None = None,
        *, return_details: Literal[True], **options: Unpack[LossOptions],
    ) -> UpsampleDetails: ...  # fmt: skip

    def loss(
        self, features: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
    ) -> Tensor | UpsampleDetails:
        """`upsample_cross_entropy` of the calibrated logits at the resolution of target (N, H, W).

        options: its keywords but the calibration, form and align_corners. inplace_backward is safe:
        only this loss has the raw logits.
        """
        found: Tensor | UpsampleDetails = upsample_cross_entropy(
            self.raw_logits(features), target, weight, align_corners=self.align_corners,
            **self._calibration(features), **options,
        )  # fmt: skip
        return found

    def extra_repr(self) -> str:
        return f"form={self.form!r}, start={self.start!r}, align_corners={self.align_corners}"
