"""What every DisAlign module shares: its form, and that a state_dict remembers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _composed, functional


def is_recorded(features: Tensor) -> bool:
    """Whether torch.fx or torch.jit.trace makes a graph, for features of any number."""
    return isinstance(features, torch.fx.Proxy) or _composed.is_tracing()


class Calibration(nn.Module):
    """A module with logit_scale, logit_bias and confidence_layer, read in a form.

    The same logit_scale means another calibration in the other form. So the form goes into the
    state_dict's metadata, beside nn.Module's version, and loading compares it.
    """

    if TYPE_CHECKING:  # torch.jit.script would read them, and cannot
        form: str
        background: str | None
        logit_scale: Tensor
        logit_bias: Tensor
        confidence_layer: nn.Module

    def _calibrated(self, logits: Tensor, confidence: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return _composed.calibrate(
                logits, confidence, self.logit_scale, self.logit_bias, self.form, self.background
            )
        else:  # which torch.jit.script does not compile
            return self._checked_calibrated(logits, confidence)

    def _checked_calibrated(self, logits: Tensor, confidence: Tensor) -> Tensor:
        vectors = (confidence, self.logit_scale, self.logit_bias)
        return functional.calibrate(logits, *vectors, **self._form())

    def _form(self) -> dict[str, Any]:
        return {"form": self.form, "background": self.background}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).get(prefix[:-1], {}).update(self._form())

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any
    ) -> None:
        for name, own in self._form().items():
            saved = local_metadata.get(name, own)
            if saved != own:
                others[-1].append(f"{prefix}{name} was {saved!r} when saved, is {own!r} here")
        # Released checkpoints: a detector's raw classifier is a child named cls_score. Vectors are
        # (1, C) in the classification layer, (K,) in detectors, (1, C, 1, 1) in segmentation heads.
        for name in ("weight", "bias", "scale"):
            if f"{prefix}cls_score.{name}" in state_dict:
                state_dict[prefix + name] = state_dict.pop(f"{prefix}cls_score.{name}")
        for name in ("logit_scale", "logit_bias"):
            value = state_dict.get(prefix + name)
            own = getattr(self, name)
            if isinstance(value, Tensor) and value.numel() == own.numel():
                state_dict[prefix + name] = value.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
