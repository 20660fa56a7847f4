"""Who is compared: disalign_ops, PyTorch eager and compiled, and fused losses where installed.

A fused cross-entropy that knows no calibration gets logits calibrated by eager PyTorch: what a
user of it would write.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import disalign_ops

from .case import IGNORED, Case, Inputs

OURS = "disalign_ops"
TRITON = "disalign_ops, Triton"  # beside what serves the device by itself
EAGER = "torch eager"
COMPILED = "torch.compile"

# The loss of (inputs, logits); the logits are inputs.logits or a copy of them.
Loss = Callable[[Inputs, Tensor], Tensor]
CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A way to compute a case's loss. `overwrites`: it may destroy the logits it is given."""

    name: str
    loss: Loss
    overwrites: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A peer that a case or this machine cannot have, and why."""

    name: str
    reason: str


def _calibrate(logits: Tensor, confidence: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The paper's definition, c (scale z + bias) + (1 - c) z, as one writes it."""
    c = torch.sigmoid(confidence)
    if logits.dim() == 2:
        c = c[:, None]
    else:
        scale, bias = scale[:, None, None], bias[:, None, None]
    return c * (scale * logits + bias) + (1 - c) * logits


def _weighted(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    # float(): what autocast does for cross_entropy; nothing for float32.
    if target.is_floating_point() or logits.dim() == 2:
        return F.cross_entropy(logits.float(), target, weight=weight)
    if target.shape[1:] != logits.shape[2:]:
        logits = F.interpolate(logits, target.shape[1:], mode="bilinear")
    return F.cross_entropy(logits.float(), target, weight=weight, ignore_index=IGNORED)


def _disalign(
    logits: Tensor,
    target: Tensor,
    confidence: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
) -> Tensor:
    return _weighted(_calibrate(logits, confidence, scale, bias), target, weight)


def _composition(weighted: Callable[..., Tensor], disalign: Callable[..., Tensor]) -> Loss:
    def loss(inputs: Inputs, logits: Tensor) -> Tensor:
        if inputs.head is not None:
            logits = F.linear(logits, inputs.head)
        if not inputs.mode.calibrated:
            return weighted(logits, inputs.target, inputs.weight)
        return disalign(
            logits, inputs.target, inputs.confidence, inputs.scale, inputs.bias, inputs.weight
        )

    return loss


# What a training script has today.
eager_loss = _composition(_weighted, _disalign)


def _compiled_loss() -> Loss:
    # Forgets the other cases: past eight shapes of one function dynamo would go on in eager mode.
    torch.compiler.reset()

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # fullgraph: a graph break raises instead of timing eager PyTorch under this name.
        return torch.compile(function, dynamic=False, fullgraph=True)

    return _composition(compiled(_weighted), compiled(_disalign))


def our_loss(inputs: Inputs, logits: Tensor) -> Tensor:
    calibration: dict[str, Any] = {}
    if inputs.mode.calibrated:
        calibration = {
            "confidence": inputs.confidence, "scale": inputs.scale, "bias": inputs.bias,
        }  # fmt: skip
    if inputs.head is not None:
        head = (logits, inputs.head, inputs.target)
        if calibration:
            of_head: Tensor = disalign_ops.disalign_linear_cross_entropy(
                *head, **calibration, weight=inputs.weight
            )
            return of_head
        return disalign_ops.linear_cross_entropy(*head, weight=inputs.weight)
    options: dict[str, Any] = {
        "weight": inputs.weight,
        "inplace_backward": inputs.mode.in_place,
        **calibration,
    }
    soft = inputs.target.is_floating_point()
    if logits.dim() == 4 and not soft:
        options["ignore_index"] = IGNORED
    loss: Tensor
    if logits.dim() == 4 and not soft and inputs.target.shape[1:] != logits.shape[2:]:
        found = disalign_ops.upsample_cross_entropy(logits, inputs.target, **options)
        assert isinstance(found, Tensor)
        loss = found
    elif calibration:
        loss = disalign_ops.disalign_cross_entropy(logits, inputs.target, **options)
    else:
        loss = disalign_ops.cross_entropy(logits, inputs.target, **options)
    return loss


def _triton_loss(inputs: Inputs, logits: Tensor) -> Tensor:
    with disalign_ops.set_backend("triton"):  # backward is that of the operators of forward
        return our_loss(inputs, logits)


def _triton_contestant(case: Case, device: torch.device) -> Contestant | LeftOut:
    about: Any = disalign_ops.backend_info()["triton"]
    why_not = about.get("why_not") or about[f"why_not_{device.type}"]
    if why_not:
        return LeftOut(TRITON, why_not)
    return Contestant(TRITON, _triton_loss, overwrites=case.mode.in_place)


def _mean_of_rows(row_losses: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    w = weight[target]
    return (row_losses * w).sum() / w.sum()


def _liger(module: Any) -> CrossEntropy:
    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = module.liger_cross_entropy(logits, target, weight=weight)
        return value

    return loss


def _quack(module: Any) -> CrossEntropy:
    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        # Weighted row by row: not every version takes class weights.
        rows = module.cross_entropy(logits, target, reduction="none")
        return _mean_of_rows(rows, target, weight)

    return loss


def _flash_attention(module: Any) -> CrossEntropy:
    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return _mean_of_rows(module.cross_entropy_loss(logits, target)[0], target, weight)

    return loss


@dataclass(frozen=True)
class _Fused:
    """A fused cross-entropy of logits on CUDA. `overwrites`: it keeps its gradient in them."""

    name: str
    module: str
    adapter: Callable[[Any], CrossEntropy]
    overwrites: bool = False


_FUSED = (
    _Fused("Liger-Kernel", "liger_kernel.transformers.functional", _liger, overwrites=True),
    _Fused("quack", "quack.cross_entropy", _quack),
    _Fused("flash-attn", "flash_attn.ops.triton.cross_entropy", _flash_attention),
)
# Of features, head, target and class weights.
LinearLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _torch_linear(module: Any) -> LinearLoss:
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(features: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = module.linear_cross_entropy(
            features, head, target, weight=weight, options=options
        )
        return value

    return loss


def _liger_linear(module: Any) -> LinearLoss:
    def loss(features: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = module.liger_fused_linear_cross_entropy(
            features, head, target, ce_weight=weight
        )
        return value

    return loss


def _cut_linear(module: Any) -> LinearLoss:
    def loss(features: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        # Weighted row by row: it takes no class weights.
        rows = module.linear_cross_entropy(features, head, target, reduction="none")
        return _mean_of_rows(rows, target, weight)

    return loss


def _quack_linear(module: Any) -> LinearLoss:
    def loss(features: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        rows = module.linear_cross_entropy(features, head, target, reduction="none")
        return _mean_of_rows(rows, target, weight)

    return loss


@dataclass(frozen=True)
class _FusedLinear:
    """A loss of a linear head without its logits. `devices`: where it runs."""

    name: str
    module: str
    adapter: Callable[[Any], LinearLoss]
    devices: tuple[str, ...] = ("cuda",)


_FUSED_LINEAR = (
    _FusedLinear("F.linear_cross_entropy", "torch.nn.functional", _torch_linear, ("cpu", "cuda")),
    _FusedLinear("Liger-Kernel, linear", "liger_kernel.transformers.functional", _liger_linear),
    _FusedLinear("cut-cross-entropy", "cut_cross_entropy", _cut_linear),
    _FusedLinear("quack, linear", "quack.linear_cross_entropy", _quack_linear),
)
_LINEAR_NAMES = tuple(fused.name for fused in _FUSED_LINEAR)
NAMES = (TRITON, EAGER, COMPILED, *(fused.name for fused in _FUSED), *_LINEAR_NAMES)


def names_for(case: Case) -> tuple[str, ...]:
    """The peers that a case is for: those of linear heads only where it is one."""
    return NAMES if case.features else NAMES[: -len(_LINEAR_NAMES)]


def _import(module: str) -> tuple[Any, str]:
    """The module, or None and why there is none."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a package built for another torch may raise anything
        return None, f"cannot be imported: {first_line(error)}"


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _fused_contestant(fused: _Fused, case: Case, device: torch.device) -> Contestant | LeftOut:
    module, why_not = _import(fused.module)
    if module is None:
        return LeftOut(fused.name, why_not)
    if case.size:
        return LeftOut(fused.name, "takes rows (N, C), not class planes")
    if case.soft:
        return LeftOut(fused.name, "takes class indices, not probabilities")
    if device.type != "cuda":
        return LeftOut(fused.name, f"has kernels for CUDA only, not for {device.type}")
    weighted = fused.adapter(module)

    def disalign(
        logits: Tensor, target: Tensor, confidence: Tensor, scale: Tensor, bias: Tensor, w: Tensor
    ) -> Tensor:
        return weighted(_calibrate(logits, confidence, scale, bias), target, w)

    # With a calibration it is the calibrated logits that it overwrites: nobody else's.
    overwrites = fused.overwrites and not case.mode.calibrated
    return Contestant(fused.name, _composition(weighted, disalign), overwrites)


def _linear_contestant(
    fused: _FusedLinear, case: Case, device: torch.device
) -> Contestant | LeftOut:
    module, why_not = _import(fused.module)
    if module is None:
        return LeftOut(fused.name, why_not)
    if not case.features:
        return LeftOut(fused.name, "takes a linear head, where a case has logits")
    if device.type not in fused.devices:
        return LeftOut(fused.name, f"has kernels for CUDA only, not for {device.type}")
    if case.mode.calibrated:
        return LeftOut(fused.name, "knows no calibration, and gives no logits to calibrate")
    try:
        linear_loss = fused.adapter(module)
    except AttributeError as error:
        return LeftOut(fused.name, f"is not in this version: {first_line(error)}")

    def loss(inputs: Inputs, features: Tensor) -> Tensor:
        assert inputs.head is not None
        return linear_loss(features, inputs.head, inputs.target, inputs.weight)

    return Contestant(fused.name, loss)


def contestants(
    case: Case, device: torch.device, peers: tuple[str, ...] = NAMES
) -> tuple[list[Contestant], list[LeftOut]]:
    """Ours first, then the named peers that can take part; and those that cannot."""
    found: list[Contestant | LeftOut] = [Contestant(OURS, our_loss, overwrites=case.mode.in_place)]
    if TRITON in peers:
        found.append(_triton_contestant(case, device))
    if EAGER in peers:
        found.append(Contestant(EAGER, eager_loss))
    if COMPILED in peers:
        found.append(Contestant(COMPILED, _compiled_loss()))
    found += [_fused_contestant(fused, case, device) for fused in _FUSED if fused.name in peers]
    found += [
        _linear_contestant(fused, case, device) for fused in _FUSED_LINEAR if fused.name in peers
    ]
    return (
        [c for c in found if isinstance(c, Contestant)],
        [c for c in found if isinstance(c, LeftOut)],
    )
