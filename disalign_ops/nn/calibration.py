"""What every DisAlign module shares: its form, its start, its checkpoints, its mean confidence."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from .._call.arguments import check_choice
from .._call.types import BACKGROUNDS, FORMS, Background, Form, Start
from .._ops import composed

if TYPE_CHECKING:
    from typing_extensions import Self

_STARTS = ("identity", "released")
FORM_KEY = "calibration_form"  # of the state_dict
_VECTORS = ("logit_scale", "logit_bias")


class ConfidenceLinear(nn.Linear):
    """Features (..., in_features) to the confidence before its sigmoid (..., 1).

    start: "identity" begins at 0, so that c = 0.5 whatever the features are. "released" begins as
    the released code: weight 0.1 ("residual"), or N(0, 0.01) with bias 0 ("interpolated").
    """

    def __init__(self, in_features: int, form: Form, start: Start, **factory: Any) -> None:
        self.form, self.start = form, start  # reset_parameters, called by nn.Linear, reads them
        super().__init__(in_features, 1, **factory)

    def reset_parameters(self) -> None:
        if self.start == "released" and self.form == "residual":
            super().reset_parameters()
            nn.init.constant_(self.weight, 0.1)
            return
        if self.start == "released":
            nn.init.normal_(self.weight, std=0.01)
        else:
            nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ConfidenceWatch:
    """The mean confidence of a batch now and then, and a warning, once, if it has collapsed.

    The mean stays on its device until it is asked for, so that no training step waits for a GPU.
    """

    __slots__ = ("_calls", "_latest", "_warned")
    _EVERY = 16  # training calls

    def __init__(self) -> None:
        self._calls, self._warned = 0, False
        self._latest: Tensor | None = None

    def note(self, confidence_logit: Tensor) -> bool:
        """Takes the mean of this call's confidence if its turn has come; returns whether."""
        self._calls += 1
        if self._calls % self._EVERY != 1:
            return False
        self._latest = confidence_logit.detach().float().sigmoid().mean()
        return True

    def mean(self) -> float | None:
        return None if self._latest is None or self._latest.is_meta else float(self._latest)

    def warn(self, low: float, high: float) -> None:
        mean = self.mean()
        if self._warned or mean is None or low <= mean <= high:
            return
        self._warned = True
        what = "nearly no input is calibrated" if mean < low else "all inputs are calibrated alike"
        warnings.warn(
            f"the mean confidence of a DisAlign layer must be between {low} and {high} for its "
            f"confidence to learn, got {mean:.4f}: {what}. See 'Stage 2 changes nothing, why?' in "
            "docs/two_stages.md",
            stacklevel=4,
        )


def is_recorded(features: Tensor) -> bool:
    """Whether torch.fx or torch.jit.trace makes a graph, for features of any number."""
    return isinstance(features, torch.fx.Proxy) or composed.is_tracing()


class Calibration(nn.Module):
    """A module with logit_scale, logit_bias and confidence_layer, read in a form.

    The same logit_scale means another calibration in the other form. So the state_dict has a buffer
    `calibration_form`, two int8 codes for the form and the background column, which survives where
    metadata is lost (renamed keys, safetensors). Loading compares it; where it is missing (released
    checkpoints, version 0.1.0) the form is taken for this layer's. Nothing else reads the buffer.
    """

    if TYPE_CHECKING:  # torch.jit.script would read them, and cannot
        form: Form
        background: Background | None
        start: Start
        logit_scale: nn.Parameter
        logit_bias: nn.Parameter
        confidence_layer: nn.Module
        calibration_form: Tensor

    # Outside it the sigmoid is flat: the confidence no longer learns, and near 0 nothing else does.
    _confidence_range = (0.01, 0.999)

    def _add_calibration(
        self, shape: tuple[int, ...], form: Form, background: Background | None, start: Start,
        factory: dict[str, Any],
    ) -> None:  # fmt: skip
        """logit_scale and logit_bias of `shape`, and all that says how to read them."""
        check_choice("form", form, FORMS)
        check_choice("background", background, BACKGROUNDS)
        check_choice("start", start, _STARTS)
        self.form, self.background, self.start = form, background, start
        self.logit_scale = nn.Parameter(torch.empty(shape, **factory))
        self.logit_bias = nn.Parameter(torch.empty(shape, **factory))
        code = torch.empty(2, dtype=torch.int8, device=factory.get("device"))
        self.register_buffer(FORM_KEY, code)
        self._watch = ConfidenceWatch()
        self._reset_calibration()

    def _reset_calibration(self) -> None:
        """The start: u = z, or with start="released" logit_scale 1 in either form."""
        identity = self.form == "residual" and self.start == "identity"
        nn.init.constant_(self.logit_scale, 0.0 if identity else 1.0)
        nn.init.zeros_(self.logit_bias)
        self._set_form(self.form)

    def _set_form(self, form: Form) -> None:
        self.form = form
        with torch.no_grad():
            self.calibration_form.copy_(self._form_code())

    def _calibrated(self, logits: Tensor, confidence: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return composed.calibrate(
                logits, confidence, self.logit_scale, self.logit_bias, self.form, self.background
            )
        else:  # which torch.jit.script does not compile
            return self._checked_calibrated(logits, confidence)

    def _checked_calibrated(self, logits: Tensor, confidence: Tensor) -> Tensor:
        vectors = (confidence, self.logit_scale, self.logit_bias)
        return functional.calibrate(logits, *vectors, **self._form())

    def _form(self) -> dict[str, Any]:
        return {"form": self.form, "background": self.background}

    def _form_code(self, device: torch.device | None = None) -> Tensor:
        codes = [FORMS.index(self.form), BACKGROUNDS.index(self.background)]
        device = device or self.calibration_form.device
        return torch.tensor(codes, dtype=torch.int8, device=device)

    def mean_confidence(self) -> float | None:
        """The mean of c over a recent training batch; None before the first one.

        Every 16th call in training mode is looked at, but none under torch.compile, in torch.func
        transforms or where the confidence requires no gradient. Waits for the device.
        """
        return self._watch.mean()

    def _confidence(self, features: Tensor) -> Tensor:
        """What the confidence layer makes of the features, before the sigmoid."""
        confidence_logit: Tensor = self.confidence_layer(features)
        self._note_confidence(confidence_logit)
        return confidence_logit

    def _note_confidence(self, confidence_logit: Any) -> None:
        """Where the confidence learns, remembers its mean and warns if it has collapsed."""
        if (
            type(confidence_logit) is Tensor  # not a proxy, nor a fake or distributed one
            and self.training
            and confidence_logit.requires_grad
            and not torch.compiler.is_compiling()
            and not torch._C._get_tracing_state()
            and confidence_logit.numel()
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._are_functorch_transforms_active()
            and self._watch.note(confidence_logit)
            and confidence_logit.is_cpu  # elsewhere it is looked at in `train`, which may wait
        ):
            self._watch.warn(*self._confidence_range)

    def train(self, mode: bool = True) -> Self:
        if hasattr(self, "_watch"):
            self._watch.warn(*self._confidence_range)
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_watch" not in self.__dict__:  # pickled whole by version 0.1.0
            self.background = getattr(self, "background", None)
            self.start, self._watch = "released", ConfidenceWatch()
            code = torch.empty(2, dtype=torch.int8, device=self.logit_scale.device)
            self.register_buffer(FORM_KEY, code)
            self._set_form(self.form)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Whatever averaging, to_empty or a broadcast made of the buffer, a file has the form.
        destination[prefix + FORM_KEY] = self._form_code()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any
    ) -> None:
        saved = _saved_form(state_dict.get(prefix + FORM_KEY), local_metadata)
        for name, own in self._form().items():
            if saved.get(name, own) != own:
                others[-1].append(
                    f"{prefix}{name} must be {own!r}, as in this layer, got {saved[name]!r} in the "
                    "state_dict: build the layer with it, or load it into such a layer and use "
                    "disalign_ops.nn.convert_form"
                )
        loaded = state_dict.get(prefix + "logit_scale")
        # Beside the parameters: load_state_dict(assign=True) keeps what is here, on its device.
        device = loaded.device if isinstance(loaded, Tensor) else None
        state_dict[prefix + FORM_KEY] = self._form_code(device)
        # Released checkpoints: a detector's raw classifier is a child named cls_score. Vectors are
        # (1, C) in the classification layer, (K,) in detectors, (1, C, 1, 1) in segmentation heads.
        for name in ("weight", "bias", "scale"):
            if f"{prefix}cls_score.{name}" in state_dict:
                state_dict[prefix + name] = state_dict.pop(f"{prefix}cls_score.{name}")
        for name in _VECTORS:
            value = state_dict.get(prefix + name)
            own = getattr(self, name)
            if isinstance(value, Tensor) and value.numel() == own.numel():
                state_dict[prefix + name] = value.reshape(own.shape)
        if not any(prefix + name in state_dict for name in _VECTORS) and any(
            prefix + name in state_dict for name in ("weight", "conv_seg.weight")
        ):
            warnings.warn(
                f"state_dict must have {prefix}logit_scale to change the calibration, got a "
                "checkpoint of stage 1: the calibration stays as it is. Load it before "
                "convert_to_disalign, or with strict=False",
                stacklevel=6,
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def _saved_form(code: Tensor | None, metadata: dict[str, Any]) -> dict[str, Any]:
    """Form and background of a state_dict, as far as it says: by its buffer, or (version 0.1.0) by
    its metadata.
    """
    if code is None or code.is_meta:
        return {name: metadata[name] for name in ("form", "background") if name in metadata}
    codes = [round(k) for k in code.flatten().tolist()]  # floats, where all of a file was cast
    known = (FORMS, BACKGROUNDS)
    if len(codes) != 2 or not all(
        0 <= k < len(names) for k, names in zip(codes, known, strict=True)
    ):
        return {"form": f"code {codes}"}
    return {"form": FORMS[codes[0]], "background": BACKGROUNDS[codes[1]]}
