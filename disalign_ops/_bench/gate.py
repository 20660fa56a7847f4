"""The correctness gate: no speed is reported of a loss or gradient that is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._ops import reference
from .case import IGNORED, Inputs
from .peers import Contestant

# Error allowed relative to the largest magnitude of the expected tensor. float32: torch.compile
# adds thousands of rows one after another, which was seen to cost 1.4e-5; the tests hold ours to
# less. bfloat16: the result's rounding, 2^-9, and as much again for one in between; so float16.
RELATIVE = {torch.float32: 5e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def exact(inputs: Inputs) -> dict[str, Tensor]:
    """Loss and wanted gradients by the reference in float64."""
    logits = inputs.logits.detach().double().requires_grad_(inputs.logits.requires_grad)
    calibration: dict[str, Tensor] = {}
    wanted = {"logits": logits} if logits.requires_grad else {}
    given = logits
    if inputs.head is not None:
        head = inputs.head.detach().double().requires_grad_(inputs.head.requires_grad)
        wanted |= {"head": head} if head.requires_grad else {}
        given = logits @ head.t()
    if inputs.mode.calibrated:
        for name in ("confidence", "scale", "bias"):
            calibration[name] = getattr(inputs, name).detach().double().requires_grad_()
        wanted |= calibration
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, target, part_calibration in _parts(inputs, given, calibration):
        value = _part_loss(inputs, part, target, part_calibration)
        value.backward(torch.full_like(value, inputs.upstream))
        loss += value.detach()
    return {
        "loss": loss,
        **{name: tensor.grad for name, tensor in wanted.items() if tensor.grad is not None},
    }


def _parts(
    inputs: Inputs, logits: Tensor, calibration: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Rows all at once, images one at a time: in float64 they take gigabytes."""
    if logits.dim() == 2:
        yield logits, inputs.target, calibration
        return
    for i in range(len(logits)):
        image = slice(i, i + 1)
        own = dict(calibration)
        if own:
            own["confidence"] = own["confidence"][image]
        yield logits[image], inputs.target[image], own


def _part_loss(
    inputs: Inputs, logits: Tensor, target: Tensor, calibration: dict[str, Tensor]
) -> Tensor:
    """The part's share of the mean."""
    weight = inputs.weight.double()
    options: dict[str, Any] = {"weight": weight}
    if calibration:
        # The reference knows u = (1 + c a) z + c b alone; the form compared here has a = scale - 1.
        options |= calibration | {"scale": calibration["scale"] - 1}
        options["confidence"] = options["confidence"].flatten()
    if logits.dim() == 2:
        return reference.cross_entropy(logits, target, **options)
    if target.is_floating_point():
        whole = inputs.target[:, 0].numel()
        options["normalizer"] = target.new_full((), whole, dtype=torch.float64)
        return reference.dense_cross_entropy(logits.flatten(2), target.flatten(2), **options)
    counted = inputs.target[inputs.target != IGNORED]
    options |= {"ignore_index": IGNORED, "normalizer": weight[counted].sum()}
    if target.shape[1:] == logits.shape[2:]:
        return reference.dense_cross_entropy(logits.flatten(2), target, **options)
    return reference.upsample_cross_entropy(logits, target, False, **options)


def computed(contestant: Contestant, inputs: Inputs, logits: Tensor) -> dict[str, Tensor]:
    """Loss and wanted gradients by a contestant; it may overwrite `logits`."""
    loss = contestant.loss(inputs, logits)
    wanted = inputs.wanted(logits)
    upstream = torch.full_like(loss, inputs.upstream)
    grads = torch.autograd.grad(loss, list(wanted.values()), upstream)
    return {"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))}


def errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to the largest magnitude expected in it."""
    found = {}
    for name, right in expected.items():
        difference = (actual[name].to(right.dtype) - right).abs().max()
        found[name] = float(difference) / max(float(right.abs().max()), 1e-300)
    return found


def objections(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> str:
    """What is wrong with a result, for logits of `dtype`; empty if nothing is."""
    for name, right in expected.items():
        if actual[name].shape != right.shape:
            return f"{name} must have shape {tuple(right.shape)}, got {tuple(actual[name].shape)}"
    allowed = RELATIVE[dtype]
    return "; ".join(
        f"{name}: relative error {error:.2g}, allowed {allowed:.2g}"
        for name, error in errors(actual, expected).items()
        if not error <= allowed  # NaN is an error
    )
