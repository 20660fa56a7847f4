"""From a model of stage 1 to one of stage 2: its layers, its form, what is trained."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._call.arguments import (
    check_choice,
)
from .._call.types import (
    FORMS,
    Background,
    BatchNormMode,
    Form,
    Start,
)
from ..errors import ArgumentError
from .calibration import Calibration
from .linear import DisAlignCosineLinear as DisAlignCosineLinear
from .linear import DisAlignLinear as DisAlignLinear
from .segmentation import DisAlignSegHead as DisAlignSegHead

if TYPE_CHECKING:
    pass

Model = TypeVar("Model", bound=nn.Module)


def _layers(model: nn.Module) -> list[Calibration]:
    layers = [m for m in model.modules() if isinstance(m, Calibration)]
    if not layers:
        kind = type(model).__name__
        raise ArgumentError(
            f"model must have a DisAlign layer (see convert_to_disalign), got a {kind} without one"
        )
    return layers


def convert_form(model: Model, form: Form) -> Model:
    """Puts a DisAlign layer, or every one of a model, into `form`, in place; returns the model.

    The calibrated logits stay the same, up to a rounding of logit_scale (interpolated: 1 more than
    residual). Its gradient is the same too, so an optimizer goes on with its state.
    Raises ArgumentError: another form, or no DisAlign layer.
    """
    check_choice("form", form, FORMS)
    for layer in _layers(model):
        if layer.form != form:
            with torch.no_grad():
                layer.logit_scale.add_(1 if form == "interpolated" else -1)
            layer._set_form(form)
    return model


def freeze_for_stage1(model: nn.Module) -> list[nn.Parameter]:
    """Freezes the calibration of the model's DisAlign layers, and nothing else.

    For a head that has no plain counterpart to be trained in stage 1, such as
    `DisAlignCosineLinear`: at start="identity" its logits are those of a plain cosine classifier.
    Returns the trained parameters, for an optimizer. Raises ArgumentError: no DisAlign layer.
    """
    for layer in _layers(model):
        for frozen in (layer.logit_scale, layer.logit_bias, layer.confidence_layer):
            frozen.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


def freeze_for_stage2(model: nn.Module, bn: BatchNormMode = "eval") -> list[nn.Parameter]:
    """Freezes all but logit_scale, logit_bias and confidence_layer of the model's DisAlign layers.

    Args:
        bn: "eval" keeps every BatchNorm but a confidence layer's own in eval mode, also after a
            later `model.train()` and after SyncBatchNorm.convert_sync_batchnorm, so that stage 1's
            features stay as they are. "train" leaves them to `model.train()`, as the released code
            does; their running statistics then drift.
    Returns the trained parameters, for an optimizer. Raises ArgumentError: another bn, or no
    DisAlign layer. Source: Zhang et al., CVPR 2021, section 3.3; released code.
    """
    check_choice("bn", bn, ("eval", "train"))
    layers = _layers(model)
    model.requires_grad_(False)
    for layer in layers:
        for learned in (layer.logit_scale, layer.logit_bias, layer.confidence_layer):
            learned.requires_grad_()
    learned_modules = {m for layer in layers for m in layer.confidence_layer.modules()}
    for module in model.modules():
        if module in learned_modules:
            continue
        held = [m for m in (module, *module.children()) if isinstance(m, _BatchNorm)]
        if bn == "eval" and held:
            for one in held:
                one.eval()
            # In the instance's __dict__ it hides the class's train. deepcopy and pickle carry a
            # partial of a function of this file along with its module; a closure they do not.
            module.__dict__["train"] = partial(_train_but_batch_norm, module)
        elif getattr(module.__dict__.get("train"), "func", None) is _train_but_batch_norm:
            del module.__dict__["train"]
    return [p for p in model.parameters() if p.requires_grad]


def _train_but_batch_norm(module: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a frozen BatchNorm and of every module that has one as a child: the parent goes
    on holding it where another took its place (SyncBatchNorm.convert_sync_batchnorm).
    """
    if isinstance(module, _BatchNorm):
        return module
    type(module).train(module, mode)
    for child in module.children():
        if isinstance(child, _BatchNorm):
            child.eval()
    return module


_stay_in_eval = _train_but_batch_norm  # its name in models that version 0.1.0 pickled


@overload
def convert_to_disalign(  # type: ignore[overload-overlap]
    model: nn.Linear, *, form: Form = ..., name: str | None = None,
    background: Background | None = None, start: Start = ...,
) -> DisAlignLinear: ...  # fmt: skip


@overload
def convert_to_disalign(
    model: Model, *, form: Form = ..., name: str | None = None,
    background: Background | None = None, start: Start = ...,
) -> Model: ...  # fmt: skip


def convert_to_disalign(
    model: nn.Module, *, form: Form = "interpolated", name: str | None = None,
    background: Background | None = None, start: Start = "identity",
) -> nn.Module:  # fmt: skip
    """Swaps a model's classifier, an nn.Linear, for a DisAlignLinear, in place.

    Args:
        model: the model, or the nn.Linear itself.
        form, background, start: as in `DisAlignLinear`.
        name: the layer's name in `model.named_modules()`; None: the last nn.Linear there.

    The new layer takes over weight and bias (the Parameters themselves, so that optimizers and ties
    hold on), device, dtype and mode. Returns the model, or the new layer where it is the nn.Linear.
    Raises ArgumentError: no nn.Linear (of that name); one that has several names in the model, is
    lazy, parametrized, or has hooks or a forward of its own, which would be lost; without a name,
    a model that has a DisAlign layer already.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    linears = {n: m for n, m in modules if isinstance(m, nn.Linear)}
    kind = type(model).__name__
    if name is None and any(isinstance(m, Calibration) for _, m in modules):
        raise ArgumentError(
            f"name must be given where model has a DisAlign layer already, got None and a {kind}"
        )
    if not linears:
        raise ArgumentError(f"model must have an nn.Linear, got a {kind} without one")
    if name is None:
        name = next(reversed(linears))
    if name not in linears:
        raise ArgumentError(f"name must be an nn.Linear's ({', '.join(linears)}), got {name!r}")
    old = linears[name]
    names = [n for n, m in linears.items() if m is old]
    if len(names) > 1:
        raise ArgumentError(
            f"the layer {name!r} must have one name, got {', '.join(names)}: it is shared"
        )
    if (
        nn.parameter.is_lazy(old.weight)
        or not {n for n, _ in old.named_parameters()} <= {"weight", "bias"}
        or old._forward_hooks or old._forward_pre_hooks or old._backward_hooks
        or type(old).forward is not nn.Linear.forward
    ):  # fmt: skip
        what = "is lazy, parametrized, or has hooks or a forward of its own"
        raise ArgumentError(f"the layer {name!r} must be a plain nn.Linear, got one that {what}")
    new = DisAlignLinear(
        old.in_features, old.out_features, old.bias is not None, form=form, background=background,
        start=start, device=old.weight.device, dtype=old.weight.dtype,
    ).train(old.training)  # fmt: skip
    new.weight, new.bias = old.weight, old.bias
    if old is model:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model
