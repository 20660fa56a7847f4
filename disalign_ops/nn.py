"""Modules, thin over functional.py: the losses, the DisAlign layers, and what stage 2 needs.

Stage 2 of DisAlign, from a trained classifier:

    model = convert_to_disalign(model)  # its last nn.Linear becomes a DisAlignLinear
    optimizer = torch.optim.SGD(freeze_for_stage2(model), lr=0.1, momentum=0.9)
    criterion = GRWCrossEntropyLoss(counts, rho=1.2)

Where the features x are at hand, `layer.loss(x, target, weight=criterion.weight)` is
`criterion(layer(x), target)` without the calibrated logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional
from ._arguments import check_choice
from ._nn_dense import DisAlignSegHead as DisAlignSegHead
from ._nn_form import Calibration
from ._nn_linear import DisAlignCosineLinear as DisAlignCosineLinear
from ._nn_linear import DisAlignLinear as DisAlignLinear
from .class_stats import Counts, grw_weights
from .errors import ArgumentError
from .upsample import UpsampleDetails, upsample_cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`disalign_ops.cross_entropy` as a module; takes the place of `nn.CrossEntropyLoss`.

    Arguments, shapes, dtypes and errors as in `disalign_ops.cross_entropy`; they are checked when
    it is called. `weight`, and `prior` and `margin` where they are tensors, are buffers: they move
    with `.to()`. The state_dict is nn.CrossEntropyLoss's: `weight` alone.
    """

    prior: Tensor | None
    margin: Tensor | float | None

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None,
        ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
        label_smoothing: float = 0.0, *, normalizer: str | float = "weights",
        prior: Tensor | None = None, margin: Tensor | float | None = None,
        focal_gamma: float = 0.0, inplace_backward: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        for name, value in (("prior", prior), ("margin", margin)):
            if value is None or isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self.normalizer = normalizer
        self.focal_gamma = focal_gamma
        self.inplace_backward = inplace_backward

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        return functional.cross_entropy(
            input, target, self.weight, None, self.ignore_index, None, self.reduction,
            self.label_smoothing, sample_weight=sample_weight, normalizer=self.normalizer,
            prior=self.prior, margin=self.margin, focal_gamma=self.focal_gamma,
            inplace_backward=self.inplace_backward,
        )  # fmt: skip

    def __prepare_scriptable__(self) -> nn.Module:  # torch.jit.script calls it
        raise ArgumentError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.jit.trace or "
            "torch.export, or script a model that has no loss, or torch.nn's"
        )


class UpsampleCrossEntropyLoss(CrossEntropyLoss):
    """`disalign_ops.upsample_cross_entropy` as a module: logits (N, C, h, w), target (N, H, W).

    Arguments as in `CrossEntropyLoss`, with ignore_index 255 as segmentation masks have it, and
    align_corners. A calibration, sample_weight and return_details are given when it is called.
    """

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = 255, reduction: str = "mean",
        label_smoothing: float = 0.0, *, align_corners: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight, None, ignore_index, None, reduction, label_smoothing, **options)
        self.align_corners = align_corners

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, **options: Any
    ) -> Tensor | UpsampleDetails:
        return upsample_cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing,
            align_corners=self.align_corners, normalizer=self.normalizer, prior=self.prior,
            margin=self.margin, focal_gamma=self.focal_gamma,
            inplace_backward=self.inplace_backward, **options,
        )  # fmt: skip


class GRWCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy with DisAlign's generalised re-weighting by class counts.

    Args:
        counts: training samples of each class, a background not among them.
        rho: strength; the released configurations have 1.2 (ImageNet-LT), 0.8 (LVIS), 0.2 (ADE20K).
        background, normalize, empty: as in `class_stats.grw_weights`; a background adds a class.
        options: the keywords of `CrossEntropyLoss` but `weight`.

    Raises what `class_stats.grw_weights` raises. The weights are the float32 buffer `weight`.
    Source: Zhang et al., "Distribution Alignment", CVPR 2021, section 3.3.
    """

    weight: Tensor

    def __init__(
        self, counts: Counts, rho: float = 1.0,
        *, background: Literal["first", "last"] | None = None,
        normalize: Literal["sum_to_classes", "sum_to_one"] = "sum_to_classes",
        empty: Literal["error", "zero", "max"] = "error", **options: Any,
    ) -> None:  # fmt: skip
        weight = grw_weights(counts, rho, normalize=normalize, empty=empty, background=background)
        super().__init__(weight, **options)
        self.rho = rho

    def extra_repr(self) -> str:
        return f"classes={self.weight.numel()}, rho={self.rho}"


def _layers(model: nn.Module) -> list[Calibration]:
    layers = [m for m in model.modules() if isinstance(m, Calibration)]
    if not layers:
        given = f"model is a {type(model).__name__} without a DisAlign layer"
        raise ArgumentError(f"{given}, needed is one: see convert_to_disalign")
    return layers


def convert_form(model: nn.Module, form: str) -> nn.Module:
    """Puts a DisAlign layer, or every one of a model, into `form`, in place; returns the model.

    The calibrated logits stay the same, up to a rounding of logit_scale (interpolated: 1 more than
    residual). Its gradient is the same too, so an optimizer goes on with its state.
    Raises ArgumentError: another form, or no DisAlign layer.
    """
    check_choice("form", form, functional._FORMS)
    for layer in _layers(model):
        if layer.form != form:
            with torch.no_grad():
                layer.logit_scale.add_(1 if form == "interpolated" else -1)
            layer.form = form
    return model


def freeze_for_stage2(model: nn.Module, bn: str = "eval") -> list[nn.Parameter]:
    """Freezes all but logit_scale, logit_bias and confidence_layer of the model's DisAlign layers.

    Args:
        bn: "eval" keeps every BatchNorm but a confidence layer's own in eval mode, also after a
            later `model.train()`, so that stage 1's features stay as they are. "train" leaves them
            to `model.train()`, as the released code does; their running statistics then drift.
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
        if bn == "eval" and isinstance(module, _BatchNorm):
            # In the instance's __dict__ it hides the class's train. deepcopy and pickle carry a
            # partial of a function of this file along with its module; a closure they do not.
            module.eval()
            module.__dict__["train"] = partial(_stay_in_eval, module)
        elif getattr(module.__dict__.get("train"), "func", None) is _stay_in_eval:
            del module.__dict__["train"]
    return [p for p in model.parameters() if p.requires_grad]


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def convert_to_disalign(
    model: nn.Module, *, form: str = "residual", name: str | None = None,
    background: str | None = None,
) -> nn.Module:  # fmt: skip
    """Swaps a model's classifier, an nn.Linear, for a DisAlignLinear, in place.

    Args:
        model: the model, or the nn.Linear itself.
        form, background: as in `DisAlignLinear`.
        name: the layer's name in `model.named_modules()`; None: the last nn.Linear there.

    The new layer takes over weight and bias (the Parameters themselves, so that optimizers and ties
    hold on), device, dtype and mode. Returns the model, or the new layer where it is the nn.Linear.
    Raises ArgumentError: no nn.Linear (of that name); one that has several names in the model, is
    lazy, parametrized, or has hooks or a forward of its own, which would be lost; without a name,
    a model that has a DisAlign layer already.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    linears = {n: m for n, m in modules if isinstance(m, nn.Linear)}
    what = f"model is a {type(model).__name__}"
    if name is None and any(isinstance(m, Calibration) for _, m in modules):
        raise ArgumentError(f"{what} with a DisAlign layer already: needed is a name")
    if not linears:
        raise ArgumentError(f"{what} without an nn.Linear, needed is one")
    if name is None:
        name = next(reversed(linears))
    if name not in linears:
        raise ArgumentError(f"name is {name!r}, needed is an nn.Linear's: {', '.join(linears)}")
    old = linears[name]
    names = [n for n, m in linears.items() if m is old]
    if len(names) > 1:
        raise ArgumentError(f"the layer {name!r} is shared ({', '.join(names)}), needed is its own")
    if (
        nn.parameter.is_lazy(old.weight)
        or not {n for n, _ in old.named_parameters()} <= {"weight", "bias"}
        or old._forward_hooks or old._forward_pre_hooks or old._backward_hooks
        or type(old).forward is not nn.Linear.forward
    ):  # fmt: skip
        what = "is lazy, parametrized, or has hooks or a forward of its own"
        raise ArgumentError(f"the layer {name!r} {what}, needed is a plain nn.Linear")
    new = DisAlignLinear(
        old.in_features, old.out_features, old.bias is not None, form=form, background=background,
        device=old.weight.device, dtype=old.weight.dtype,
    ).train(old.training)  # fmt: skip
    new.weight, new.bias = old.weight, old.bias
    if old is model:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model
