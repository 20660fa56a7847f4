"""What every DisAlign module shares: its form, and that a state_dict remembers it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._types import Background, Form


class Calibration(nn.Module):
    """A module with logit_scale, logit_bias and confidence_layer, read in a form.

    The same logit_scale means another calibration in the other form. So the form goes into the
    state_dict's metadata, beside nn.Module's version, and loading compares it.
    """

    form: Form
    background: Background | None
    logit_scale: Tensor
    logit_bias: Tensor
    confidence_layer: nn.Module

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
