"""The classification layers of DisAlign: a linear or cosine classifier, calibrated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from .._call.arguments import check_integer, check_number, check_tensor
from .._call.shard import refuse_shard
from .._call.types import Background, Form, Start, Target, WeightedLossOptions
from .._sharded.chunks import smallest_norm
from ..errors import ArgumentError
from ..linear import CHUNK_BYTES, disalign_linear_cross_entropy
from .calibration import Calibration, ConfidenceLinear, is_recorded

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _DisAlign(Calibration):
    """What both layers share: all but how features become raw logits."""

    if TYPE_CHECKING:
        weight: Tensor
        bias: Tensor | None
        confidence_layer: ConfidenceLinear

    def __init__(
        self, in_features: int, out_features: int, bias: bool,
        form: Form, background: Background | None, start: Start, factory: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        in_features = check_integer("in_features", in_features)
        out_features = check_integer("out_features", out_features)
        foreground = out_features - (background is not None)
        if in_features < 1 or foreground < 1:
            raise ArgumentError(
                "in_features must be at least 1, and out_features one more than the background's "
                f"columns, got in_features {in_features}, out_features {out_features}, background "
                f"{background!r}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        own_bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.register_parameter("bias", own_bias)
        self._add_calibration((1, foreground), form, background, start, factory)
        self.confidence_layer = ConfidenceLinear(in_features, form, start, **factory)

    def reset_parameters(self) -> None:
        """weight and bias as nn.Linear's, logit_scale and logit_bias as `start` says. The
        confidence layer has a reset_parameters of its own.
        """
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self._reset_calibration()

    def _raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits (..., C), and the features that the confidence is computed from."""
        raise NotImplementedError

    def _confidence_features(self, x: Tensor) -> Tensor:
        """Those features, without the logits."""
        return x

    def _cosine_scale(self) -> Tensor | None:
        """Of a cosine classifier; a linear one has none."""
        return None

    def _check_gathered(self, x: Tensor) -> None:
        """Raises for a weight that FSDP has sharded; a DTensor x goes with a DTensor weight."""
        if type(x) is Tensor:
            check_tensor("weight", self.weight)

    def _checked_raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not is_recorded(x) and (x.dim() < 1 or x.shape[-1] != self.in_features):
            raise ArgumentError(
                f"x must have shape (..., {self.in_features}), got {tuple(x.shape)}"
            )
        self._check_gathered(x)
        return self._raw(x)

    def raw_logits(self, x: Tensor) -> Tensor:
        """The logits (..., C) before the calibration: those of stage 1."""
        return self._checked_raw(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Calibrated logits (..., C) of features (..., in_features)."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            logits, features = self._raw(x)
            confidence = self.confidence_layer(features).reshape(-1)
        else:
            logits, features = self._checked_raw(x)
            confidence = self._confidence(features).reshape(-1)
        rows = logits.reshape(-1, self.out_features)
        return self._calibrated(rows, confidence).reshape(logits.shape)

    def loss(
        self, x: Tensor, target: Target, *, chunk_bytes: int = CHUNK_BYTES,
        **options: Unpack[WeightedLossOptions],
    ) -> Tensor:  # fmt: skip
        """The loss of the calibrated logits, without building them.

        Where the raw logits would take more than chunk_bytes, they are not built either:
        `disalign_linear_cross_entropy` makes them in chunks. (While torch.compile or torch.jit
        traces, and for class probabilities that require a gradient, they are.)

        Args:
            x, target: features (N, in_features) or (in_features,); target as in `cross_entropy`.
            options: weight and every other keyword of `disalign_ops.disalign_cross_entropy` but
                form, background and shard. inplace_backward is safe: only this loss has the raw
                logits. In chunks it has no effect, and neither has gradient.
        Raises ArgumentError for x of another shape, and what `disalign_cross_entropy` raises.
        """
        refuse_shard(
            {**options}.get("shard"), f"{type(self).__name__}.loss",
            "which does not sum the gradient of x over the ranks",
        )  # fmt: skip
        recorded = is_recorded(x)
        if not recorded and (x.dim() < 1 or x.dim() > 2 or x.shape[-1] != self.in_features):
            raise ArgumentError(
                f"x must have shape (N, {self.in_features}), got {tuple(x.shape)}: flatten x and "
                "target to rows"
            )
        self._check_gathered(x)
        chunk_bytes = check_integer("chunk_bytes", chunk_bytes)
        if not (
            recorded or torch.compiler.is_compiling()
            or (isinstance(target, Tensor) and target.requires_grad)
        ):  # fmt: skip
            kind = x.device.type
            autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            itemsize = torch.get_autocast_dtype(kind).itemsize if autocast else x.element_size()
            rows = x.shape[0] if x.dim() == 2 else 1
            if rows * self.out_features * itemsize > chunk_bytes:
                others: dict[str, Any] = {**options}
                for name in ("inplace_backward", "gradient"):  # chunks have their own way
                    others.pop(name, None)
                confidence = self._confidence(self._confidence_features(x))
                in_chunks: Tensor = disalign_linear_cross_entropy(
                    x, self.weight, target, confidence, self.logit_scale, self.logit_bias,
                    self.bias, cosine_scale=self._cosine_scale(), chunk_bytes=chunk_bytes,
                    **self._form(), **others,
                )  # fmt: skip
                return in_chunks
        logits, features = self._checked_raw(x)
        confidence = self._confidence(features)
        found: Tensor = functional.disalign_cross_entropy(
            logits, target, confidence, self.logit_scale, self.logit_bias, **self._form(), **options
        )
        return found

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        form = f"form={self.form!r}, background={self.background!r}, start={self.start!r}"
        return f"{sizes}, {form}"


class DisAlignLinear(_DisAlign):
    """A linear classifier whose logits z are calibrated by c = sigmoid(confidence_layer(x)).

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear; out_features = C counts
            the background.
        form: "interpolated", c (logit_scale z + logit_bias) + (1 - c) z: the paper's definition and
            the released detection head. "residual", (1 + c logit_scale) z + c logit_bias: the
            released classification layer.
        background: None, "first" or "last": that column is not calibrated.
        start: "identity", u = z and c = 0.5 for every input. "released", as in the released code:
            logit_scale 1, so that the residual form starts at (1 + c) z, and a confidence that
            depends on the features: near 1 for many ReLU features in the residual form.

    Parameters have the released checkpoints' names: weight (C, in_features), bias (C,), logit_scale
    and logit_bias (1, K), K = C or with a background C - 1, and confidence_layer, an
    nn.Linear(in_features, 1). At the start logit_bias is 0 and logit_scale 1 (0 in the residual
    form with start="identity"). The buffer calibration_form says in the state_dict which form it
    is; load_state_dict also takes a released detector's (K,) vectors and `cls_score.weight`, needs
    no calibration_form, and refuses a state_dict of another form or with another background.
    `mean_confidence()` tells whether the confidence learns; a UserWarning says, once, if it has
    collapsed.
    Raises ArgumentError: form, background, start, or sizes that leave nothing to calibrate.
    Source: Zhang et al., "Distribution Alignment", CVPR 2021, section 3.2; released code.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        *, form: Form = "interpolated", background: Background | None = None,
        start: Start = "identity",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_features, out_features, bias, form, background, start, factory)
        self.reset_parameters()

    def _raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight, self.bias), x


class DisAlignCosineLinear(_DisAlign):
    """A cosine classifier, z = scale * normalize(x) normalize(weight)^T, calibrated.

    Args:
        scale_init: initial `scale`, > 0; the released detectors have 20.
        learn_scale: whether the parameter `scale` (1,) requires a gradient.
        normalize_confidence: whether the confidence layer sees normalize(x), as in the released
            classification layer, or x, as in the released detection head. None: True for
            "residual", False for "interpolated", as in the released code.

    The rest as in `DisAlignLinear`; there is no bias.
    Source: released code (where the classification layer's weight is left uninitialised).
    """

    def __init__(
        self, in_features: int, out_features: int,
        *, scale_init: float = 20.0, learn_scale: bool = True, form: Form = "interpolated",
        background: Background | None = None, start: Start = "identity",
        normalize_confidence: bool | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_features, out_features, False, form, background, start, factory)
        self.scale_init = check_number("scale_init", scale_init, 0.0)
        if not 0 < self.scale_init < math.inf:
            raise ArgumentError(f"scale_init must be a finite number > 0, got {scale_init}")
        if normalize_confidence is None:
            normalize_confidence = form == "residual"
        self.normalize_confidence = normalize_confidence
        self.scale = nn.Parameter(torch.empty(1, **factory), requires_grad=learn_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.scale, self.scale_init)

    def _raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        unit = _normalize(x)
        # The scale goes onto the features, in_features wide, not onto a second copy of the logits.
        logits = F.linear(self.scale * unit, _normalize(self.weight))
        return logits, unit if self.normalize_confidence else x

    def _confidence_features(self, x: Tensor) -> Tensor:
        return _normalize(x) if self.normalize_confidence else x

    def _cosine_scale(self) -> Tensor:
        return self.scale


@torch.fx.wrap  # its eps depends on the dtype
def _normalize(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=smallest_norm(x.dtype))
