"""Checkpoints: from the released code's, and to what needs nothing of this library."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._call.arguments import check_choice
from ._ops.backends import set_backend
from ._sharded.chunks import smallest_norm
from .errors import ArgumentError
from .nn.calibration import FORM_KEY, Calibration
from .nn.linear import DisAlignCosineLinear, DisAlignLinear
from .nn.segmentation import DisAlignSegHead


@dataclass(frozen=True)
class _Layout:
    """Where the released code keeps its layer, in which form, and names that differ from ours."""

    prefix: str
    form: str
    renamed: Mapping[str, str]


_LAYOUTS = {
    "classification": _Layout("network.linear.", "residual", {}),
    "detection": _Layout(
        "roi_heads.box_predictor.", "interpolated",
        {f"cls_score.{name}": name for name in ("weight", "bias", "scale")},
    ),
    "segmentation": _Layout("decode_head.", "interpolated", {}),
}  # fmt: skip
_VECTORS = ("logit_scale", "logit_bias")


def load_released(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    layout: Literal["auto", "classification", "detection", "segmentation"] = "auto",
) -> str:
    """Loads a checkpoint of the released DisAlign code into a layer of ours, in place.

    Args:
        module: a DisAlignLinear, DisAlignCosineLinear or DisAlignSegHead, in either form: the
            released classification layer is residual, the heads are interpolated, and logit_scale
            is converted.
        state_dict: of the whole released model, or a checkpoint that has it as "state_dict" or
            "model"; names may begin with "module.".
        layout: where the layer is: "classification" network.linear, "detection"
            roi_heads.box_predictor, "segmentation" decode_head. "auto": the one that is there.

    Returns the layout. Raises ArgumentError, and loads nothing: a module of another kind; no such
    layout, or several; entries that are missing, of another shape, or of the layer but unexpected,
    all of them listed.
    Source: the released code's checkpoints; classification, cosine and linear detection, ADE20K.
    """
    if not isinstance(module, Calibration):
        raise ArgumentError(
            "module must be a DisAlignLinear, DisAlignCosineLinear or DisAlignSegHead, got a "
            f"{type(module).__name__}"
        )
    check_choice("layout", layout, ("auto", *_LAYOUTS))
    for name in ("state_dict", "model"):
        inner = state_dict.get(name)
        if isinstance(inner, Mapping):
            state_dict = inner
    given = {str(key).removeprefix("module."): value for key, value in state_dict.items()}
    if layout == "auto":
        layout = _layout_of(given)
    about = _LAYOUTS[layout]
    found = {
        about.renamed.get(key.removeprefix(about.prefix), key.removeprefix(about.prefix)): value
        for key, value in given.items()
        if key.startswith(about.prefix)
    }
    own = module.state_dict()
    del own[FORM_KEY]  # this layer's, converted to below
    # The prefix is that of a predictor or decoder with other parts, which are none of ours.
    parts = {name.split(".")[0] for name in own} | {"cls_score", "weight", "bias", "scale"}
    problems = [f"missing {about.prefix}{name}" for name in own if name not in found]
    loaded: dict[str, Tensor] = {}
    for name, value in found.items():
        if name not in own:
            if name.split(".")[0] in parts:
                problems.append(f"unexpected {about.prefix}{name}")
            continue
        value = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        if name in _VECTORS and value.numel() == own[name].numel():
            value = value.reshape(own[name].shape)
        if value.shape != own[name].shape:
            problems.append(
                f"{about.prefix}{name} of shape {tuple(value.shape)}, not {tuple(own[name].shape)}"
            )
        loaded[name] = value
    if problems:
        raise ArgumentError(
            f"state_dict (layout {layout!r}) must fit a {type(module).__name__}, got one with "
            + "; ".join(problems)
        )
    if module.form != about.form:
        change = 1 if module.form == "interpolated" else -1
        loaded["logit_scale"] = loaded["logit_scale"] + change
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(loaded[name])
    return layout


def _layout_of(given: Mapping[str, Any]) -> Any:
    there = [name for name, about in _LAYOUTS.items() if f"{about.prefix}logit_scale" in given]
    if len(there) != 1:
        found = f"the layouts {', '.join(there)}" if there else "no released layout"
        allowed = ", ".join(f"{about.prefix}logit_scale" for about in _LAYOUTS.values())
        raise ArgumentError(f"state_dict must have one of {allowed}, got {found}")
    return there[0]


class NormalizedLinear(nn.Linear):
    """A linear layer of features that are normalised to length 1: what a cosine head folds into."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(
            F.normalize(input, dim=-1, eps=smallest_norm(input.dtype)), self.weight, self.bias
        )


@torch.no_grad()
def export_folded(module: nn.Module, confidence: float | None = None) -> nn.Module:
    """A plain layer with the calibration folded into its weight and bias, for a confidence that is
    the same for every input: (1 + c a_j) w_j and (1 + c a_j) b_j + c beta_j.

    Args:
        module: a DisAlignLinear (gives an nn.Linear), DisAlignCosineLinear (a linear layer that
            normalises its input) or DisAlignSegHead (a 1x1 nn.Conv2d).
        confidence: c in [0, 1]. None: that of the module, whose confidence layer must be constant,
            with a weight of 0.

    The layer has the module's device, dtype and mode. Raises ArgumentError: another module; a
    confidence that depends on the input.
    """
    if not isinstance(module, DisAlignLinear | DisAlignCosineLinear | DisAlignSegHead):
        raise ArgumentError(
            "module must be a DisAlignLinear, DisAlignCosineLinear or DisAlignSegHead, got a "
            f"{type(module).__name__}"
        )
    if confidence is None:
        c = _constant_confidence(module)
    else:
        c = torch.tensor(float(confidence), device="cpu")
    if not 0 <= float(c) <= 1:
        raise ArgumentError(f"confidence must be a number from 0 to 1, got {float(c)}")
    a, beta = (t.detach().flatten().double() for t in (module.logit_scale, module.logit_bias))
    if module.form == "interpolated":
        a = a - 1
    if module.background is not None:
        column = (1, 0) if module.background == "first" else (0, 1)
        a, beta = F.pad(a, column), F.pad(beta, column)
    c = c.to(a)
    gain, offset = 1 + c * a, c * beta
    if isinstance(module, DisAlignSegHead):
        old = module.conv_seg
        conv = nn.Conv2d(old.in_channels, old.out_channels, 1)
        return _filled(conv, old.weight, old.bias, gain, offset, module)
    weight, bias = module.weight, module.bias
    size = (module.in_features, module.out_features)
    if isinstance(module, DisAlignCosineLinear):
        weight = module.scale * F.normalize(weight, dim=1, eps=smallest_norm(weight.dtype))
        return _filled(NormalizedLinear(*size), weight, None, gain, offset, module)
    return _filled(nn.Linear(*size), weight, bias, gain, offset, module)


def _filled(
    layer: Any, weight: Tensor, bias: Tensor | None, gain: Tensor, offset: Tensor,
    like: Calibration,
) -> nn.Module:  # fmt: skip
    layer = layer.to(weight.device, weight.dtype).train(like.training)
    shape = (-1, *(1 for _ in weight.shape[1:]))
    layer.weight.copy_(weight.double() * gain.reshape(shape))
    layer.bias.copy_(offset if bias is None else bias.double() * gain + offset)
    filled: nn.Module = layer
    return filled


def _constant_confidence(module: Calibration) -> Tensor:
    layer: Any = module.confidence_layer
    weight: Tensor
    if isinstance(module, DisAlignSegHead):
        norm: nn.BatchNorm2d = layer.bn
        weight = layer.conv.weight
        assert norm.running_mean is not None
        assert norm.running_var is not None
        # What the normalisation makes of 0, whatever it has run over.
        centred = -norm.running_mean / (norm.running_var + norm.eps).sqrt()
        before = torch.relu(norm.weight * centred + norm.bias)
    else:
        weight, before = layer.weight, layer.bias
    if bool((weight != 0).any()):
        raise ArgumentError(
            "confidence must be given where the module's depends on its input (its confidence "
            "layer's weight is not 0), got None"
        )
    return torch.sigmoid(before.detach().double()).reshape(())


def export_onnx(module: nn.Module, file: str | PathLike[str] | io.BytesIO, example: Tensor) -> None:
    """Writes a calibrated head as ONNX, of standard operators, for any number of rows or images.

    Args:
        module: a DisAlign layer, or a model with some; exported in eval mode, as it is after.
        file: a path, or a buffer.
        example: an input, whose first dimension stands for any number.
    Needs the extra disalign_ops[onnx] (onnx, onnxscript). Raises what torch.onnx.export raises.
    """
    training = module.training
    # At most two: torch.export takes a dimension of 1 for a constant.
    if example.shape[0] < 2:
        example = example.expand(2, *example.shape[1:])
    module.eval()
    try:
        with set_backend("reference"):  # kernels of ours are no operators of ONNX
            program = torch.onnx.export(
                module, (example,), dynamo=True, verbose=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    finally:
        module.train(training)
    assert program is not None
    program.save(file)  # type: ignore[arg-type]
