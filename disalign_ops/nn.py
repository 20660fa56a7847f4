"""Modules, thin over functional.py: the losses, the DisAlign layers, and what stage 2 needs.

Stage 2 of DisAlign, from a trained classifier:

    model = convert_to_disalign(model)  # its last nn.Linear becomes a DisAlignLinear
    optimizer = torch.optim.SGD(freeze_for_stage2(model), lr=0.1, momentum=0.9)
    criterion = GRWCrossEntropyLoss(counts, rho=1.2)

and the same training loop. Where the features x are at hand, `layer.loss(x, target,
weight=criterion.weight)` saves the calibrated logits that `criterion(layer(x), target)` builds.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional
from ._arguments import check_choice, check_number
from .class_stats import Counts, grw_weights
from .errors import ArgumentError, ArgumentTypeError

__all__ = [
    "CrossEntropyLoss",
    "DisAlignCosineLinear",
    "DisAlignLinear",
    "GRWCrossEntropyLoss",
    "convert_form",
    "convert_to_disalign",
    "freeze_for_stage2",
]

Form = Literal["residual", "interpolated"]
Background = Literal["first", "last"]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`disalign_ops.cross_entropy` as a module; takes the place of `nn.CrossEntropyLoss`.

    Arguments, shapes, dtypes and errors as in `disalign_ops.cross_entropy`; they are checked when
    it is called. `weight`, and `prior` and `margin` where they are tensors, are buffers: they move
    with `.to()`. The state_dict is nn.CrossEntropyLoss's: `weight` alone.
    """

    margin: Tensor | float | None
    prior: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        normalizer: str | float = "weights",
        prior: Tensor | None = None,
        margin: Tensor | float | None = None,
        focal_gamma: float = 0.0,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.register_buffer("prior", prior, persistent=False)
        if margin is None or isinstance(margin, Tensor):
            self.register_buffer("margin", margin, persistent=False)
        else:
            self.margin = margin
        self.normalizer = normalizer
        self.focal_gamma = focal_gamma
        self.inplace_backward = inplace_backward

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            normalizer=self.normalizer,
            prior=self.prior,
            margin=self.margin,
            focal_gamma=self.focal_gamma,
            inplace_backward=self.inplace_backward,
        )


class GRWCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy with DisAlign's generalised re-weighting by class counts.

    Args:
        counts: (C,) training samples of each class, without the background.
        rho: strength; the released configurations use 1.2 (ImageNet-LT), 0.8 (LVIS), 0.2 (ADE20K).
        background, normalize, empty: as in `class_stats.grw_weights`. With a background the
            logits have C + 1 classes.
        options: every keyword of `CrossEntropyLoss` but `weight`.

    The weights are the float32 buffer `weight`.

    Raises:
        What `class_stats.grw_weights` raises: ValueError for a class without samples and others.

    Source: Zhang et al., "Distribution Alignment", CVPR 2021, section 3.3.
    """

    def __init__(
        self,
        counts: Counts,
        rho: float = 1.0,
        *,
        background: Background | None = None,
        normalize: Literal["sum_to_classes", "sum_to_one"] = "sum_to_classes",
        empty: Literal["error", "zero", "max"] = "error",
        **options: Any,
    ) -> None:
        weight = grw_weights(counts, rho, normalize=normalize, empty=empty, background=background)
        super().__init__(weight, **options)
        self.rho = rho

    def extra_repr(self) -> str:
        assert self.weight is not None
        return f"classes={self.weight.numel()}, rho={self.rho}"


class _DisAlign(nn.Module):
    """What both layers share: all but how features become raw logits."""

    weight: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: Form,
        background: Background | None,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_choice("form", form, functional._FORMS)
        check_choice("background", background, functional._BACKGROUNDS)
        foreground = out_features - (background is not None)
        if in_features < 1 or foreground < 1:
            raise ArgumentError(
                f"in_features is {in_features}, out_features {out_features} and background "
                f"{background!r}, needed is at least one feature and one calibrated class"
            )
        self.in_features, self.out_features = in_features, out_features
        self.form: Form = form
        self.background = background
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.logit_scale = nn.Parameter(torch.empty(1, foreground, **factory))
        self.logit_bias = nn.Parameter(torch.empty(1, foreground, **factory))
        self.confidence_layer = nn.Linear(in_features, 1, **factory)

    def reset_parameters(self) -> None:
        """The released initial values; `weight` as nn.Linear's."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.ones_(self.logit_scale)
        nn.init.zeros_(self.logit_bias)
        self.confidence_layer.reset_parameters()
        if self.form == "residual":
            nn.init.constant_(self.confidence_layer.weight, 0.1)
        else:
            nn.init.normal_(self.confidence_layer.weight, std=0.01)
            nn.init.zeros_(self.confidence_layer.bias)

    def _raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits (..., C), and the features that the confidence is computed of."""
        raise NotImplementedError

    def _logits_and_confidence(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ArgumentError(
                f"x has shape {tuple(x.shape)}, needed is (..., {self.in_features}): in_features "
                f"is {self.in_features}"
            )
        logits, features = self._raw(x)
        return logits, self.confidence_layer(features)

    def raw_logits(self, x: Tensor) -> Tensor:
        """The classifier's logits (..., C) before the calibration: those of stage 1."""
        return self._raw(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Calibrated logits (..., C) of features (..., in_features), in their dtype."""
        logits, confidence = self._logits_and_confidence(x)
        if x.dim() > 2:
            logits, confidence = logits.flatten(0, -2), confidence.flatten(0, -2)
        out = functional.calibrate(
            logits,
            confidence,
            self.logit_scale,
            self.logit_bias,
            form=self.form,
            background=self.background,
        )
        return out.reshape(*x.shape[:-1], self.out_features)

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The loss of the calibrated logits, without building them.

        Args:
            x: features (N, in_features) or (in_features,).
            target: (N,) or (), or class probabilities (N, C) or (C,).
            options: weight, ignore_index, reduction and every other keyword of
                `disalign_ops.disalign_cross_entropy` but form and background. inplace_backward is
                safe here: nothing else uses the raw logits.

        Raises:
            ArgumentError for x of another shape, and what `disalign_cross_entropy` raises.
        """
        if x.dim() > 2:
            raise ArgumentError(
                f"x has shape {tuple(x.shape)}, needed is (N, {self.in_features}): flatten x and "
                "target to rows"
            )
        logits, confidence = self._logits_and_confidence(x)
        return functional.disalign_cross_entropy(
            logits,
            target,
            confidence,
            self.logit_scale,
            self.logit_bias,
            form=self.form,
            background=self.background,
            **options,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"form={self.form!r}, background={self.background!r}"
        )

    # What a state_dict's tensors cannot say goes into its metadata, as nn.Module's version does:
    # the same scale means another calibration in the other form.
    _RECORDED = ("form", "background")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1], {})
        metadata.update({name: getattr(self, name) for name in self._RECORDED})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._RECORDED:
            saved, own = local_metadata.get(name, getattr(self, name)), getattr(self, name)
            if saved != own:
                error_msgs.append(
                    f"{prefix}{name} is {saved!r} in the checkpoint and {own!r} in the model"
                )
        # Released checkpoints: a detector's raw classifier is a child named cls_score, its
        # vectors are (K,), those of a segmentation head (1, C, 1, 1).
        for name in ("weight", "bias", "scale"):
            if f"{prefix}cls_score.{name}" in state_dict:
                state_dict[prefix + name] = state_dict.pop(f"{prefix}cls_score.{name}")
        for name in ("logit_scale", "logit_bias"):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.numel() == self.logit_scale.numel():
                state_dict[prefix + name] = value.reshape(1, -1)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class DisAlignLinear(_DisAlign):
    """A linear classifier whose logits z are calibrated by c = sigmoid(confidence_layer(x)).

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear. out_features = C counts
            the background.
        form: "residual", (1 + c logit_scale) z + c logit_bias: the released classification layer.
            It starts as (1 + c) z: the same order of classes, sharper. "interpolated",
            c (logit_scale z + logit_bias) + (1 - c) z: the paper's definition and the released
            detection head. It starts as the identity.
        background: None, "first" or "last": that column is not calibrated.

    Parameters, with the names of the released checkpoints:
        weight (C, in_features), bias (C,): initialised as nn.Linear's.
        logit_scale, logit_bias (1, K), K = C, or C - 1 with a background: ones, zeros.
        confidence_layer: nn.Linear(in_features, 1). Residual: weight 0.1, bias as nn.Linear's;
            interpolated: weight N(0, 0.01), bias 0.

    load_state_dict also takes a detector's (K,) vectors and `cls_score.weight`, and refuses a
    state_dict of this library saved in another form (see `convert_form`).

    Raises:
        ArgumentError: form, background, or sizes that leave nothing to calibrate.

    Source: Zhang et al., "Distribution Alignment", CVPR 2021, section 3.2; released code.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        form: Form = "residual",
        background: Background | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_features, out_features, form, background, **factory)
        own_bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None  # type: ignore[arg-type]
        self.register_parameter("bias", own_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def _raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight, self.bias), x

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class DisAlignCosineLinear(_DisAlign):
    """A cosine classifier, z = scale * normalize(x) normalize(weight)^T, calibrated.

    Args:
        scale_init: initial `scale`, > 0; the released detectors use 20.
        learn_scale: whether `scale` (1,) is a parameter; else it is a buffer of the same name.
        normalize_confidence: whether the confidence layer sees normalize(x), as in the released
            classification layer, or x, as in the released detection head. None: as in the code
            that `form` comes from, so True for "residual".
        others: as in `DisAlignLinear`. There is no bias.

    Parameters, the state_dict and errors as in `DisAlignLinear`; scale_init that is no number > 0
    raises ArgumentError or ArgumentTypeError.

    Source: Zhang et al., "Distribution Alignment", CVPR 2021; released code (there the weight of
    the classification layer was left uninitialised; here it is initialised as nn.Linear's).
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale_init: float = 20.0,
        learn_scale: bool = True,
        form: Form = "residual",
        background: Background | None = None,
        normalize_confidence: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_features, out_features, form, background, **factory)
        self.scale_init = check_number("scale_init", scale_init, 0.0)
        if not 0 < self.scale_init < math.inf:
            raise ArgumentError(f"scale_init is {scale_init}, needed is a finite number > 0")
        if normalize_confidence is None:
            normalize_confidence = form == "residual"
        self.normalize_confidence = normalize_confidence
        scale = torch.empty(1, **factory)  # type: ignore[arg-type]
        if learn_scale:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.scale, self.scale_init)

    def _raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        unit = _normalize(x)
        # The scale goes onto the features, in_features wide, not onto a second copy of the logits.
        logits = F.linear(self.scale * unit, _normalize(self.weight))
        return logits, unit if self.normalize_confidence else x

    def extra_repr(self) -> str:
        learned = isinstance(self.scale, nn.Parameter)
        return (
            f"{super().extra_repr()}, learn_scale={learned}, "
            f"normalize_confidence={self.normalize_confidence}"
        )


def _normalize(x: Tensor) -> Tensor:
    # normalize's own 1e-12 is 0 in float16, and a row of zeros would be NaN.
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


def _layers(model: nn.Module) -> list[_DisAlign]:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model is a {type(model).__name__}, needed is a torch.nn.Module")
    return [m for m in model.modules() if isinstance(m, _DisAlign)]


def _some_layers(model: nn.Module) -> list[_DisAlign]:
    layers = _layers(model)
    if not layers:
        raise ArgumentError(
            f"model is a {type(model).__name__} without a DisAlign layer, needed is one: "
            "see convert_to_disalign"
        )
    return layers


def convert_form(model: nn.Module, form: Form) -> nn.Module:
    """Puts every DisAlign layer of the model, or the layer itself, into `form`, in place.

    Calibrated logits stay the same, up to a rounding of logit_scale (interpolated = residual + 1).
    Its gradient is the same in both forms, so an optimizer goes on with its state.

    Returns the model. Raises ArgumentError: another form, or a model without a DisAlign layer.
    """
    check_choice("form", form, functional._FORMS)
    for layer in _some_layers(model):
        if layer.form != form:
            with torch.no_grad():
                layer.logit_scale += 1 if form == "interpolated" else -1
            layer.form = form
    return model


def freeze_for_stage2(
    model: nn.Module, bn: Literal["eval", "train"] = "eval"
) -> list[nn.Parameter]:
    """Freezes all but logit_scale, logit_bias and confidence_layer of the model's DisAlign layers.

    Args:
        bn: "eval" keeps every BatchNorm in eval mode, also after a later `model.train()`: the
            running statistics, and with them stage 1's features, stay as they are. "train" leaves
            them to `model.train()` and `model.eval()`, as the released code does; their statistics
            then drift.

    Returns:
        The parameters that are trained, for an optimizer.

    Raises:
        ArgumentError: another bn, or a model without a DisAlign layer.

    Source: Zhang et al., "Distribution Alignment", CVPR 2021, section 3.3; released code.
    """
    check_choice("bn", bn, ("eval", "train"))
    trained: set[int] = set()
    for layer in _some_layers(model):
        learned = (layer.logit_scale, layer.logit_bias, *layer.confidence_layer.parameters())
        trained.update(id(p) for p in learned)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            continue
        if bn == "eval":
            # In the instance's __dict__ it stands before the class's train. A partial of a function
            # of this file is copied by deepcopy and pickle together with its module, which a
            # closure or a bound method is not.
            module.eval()
            module.__dict__["train"] = partial(_stay_in_eval, module)
        elif getattr(module.__dict__.get("train"), "func", None) is _stay_in_eval:
            del module.__dict__["train"]
    return [p for p in model.parameters() if p.requires_grad]


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def convert_to_disalign(
    model: nn.Module,
    *,
    form: Form = "residual",
    name: str | None = None,
    background: Background | None = None,
) -> nn.Module:
    """Swaps a model's classifier, an nn.Linear, for a DisAlignLinear, in place.

    Args:
        model: the model, or the nn.Linear itself.
        form, background: as in `DisAlignLinear`.
        name: the classifier's name in `model.named_modules()`. None: the last nn.Linear there.

    The new layer holds the same weight and bias (the Parameters themselves: an optimizer's
    reference and a tie to another layer's weight hold on), device, dtype and mode.

    Returns:
        The model, or the new layer where the model itself is the nn.Linear.

    Raises:
        ArgumentError: no nn.Linear; a name of no nn.Linear; a layer that the model uses under
            several names, that is lazy, parametrized or has hooks or a forward of its own, which
            the new layer would lose; without a name, a model that has a DisAlign layer already.
    """
    present = _layers(model)
    if present and name is None:
        raise ArgumentError(
            f"model is a {type(model).__name__} with a {type(present[0]).__name__} already, needed "
            "is one without, or the name of the layer to convert"
        )
    every = list(model.named_modules(remove_duplicate=False))
    linears = {n: m for n, m in every if isinstance(m, nn.Linear)}
    if not linears:
        raise ArgumentError(f"model is a {type(model).__name__} without an nn.Linear")
    if name is None:
        name = next(reversed(linears))
    if name not in linears:
        listed = ", ".join(map(repr, linears))
        raise ArgumentError(f"name is {name!r}, which is no nn.Linear; there are {listed}")
    layer = linears[name]
    _check_convertible(name, layer, [n for n, m in linears.items() if m is layer])

    new = DisAlignLinear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        form=form,
        background=background,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    ).train(layer.training)
    new.weight, new.bias = layer.weight, layer.bias
    if layer is model:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


def _check_convertible(name: str, layer: nn.Linear, names: list[str]) -> None:
    if len(names) > 1:
        raise ArgumentError(
            f"the nn.Linear {name!r} is shared: the model has it as {', '.join(map(repr, names))}; "
            "needed is a layer of its own"
        )
    lost = None
    if nn.parameter.is_lazy(layer.weight):
        lost = "is not initialised: call the model once"
    elif {n for n, _ in layer.named_parameters()} - {"weight", "bias"}:
        lost = "is parametrized, which would be lost: remove the parametrization"
    elif layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        lost = "has hooks, which would be lost: remove them"
    elif type(layer).forward is not nn.Linear.forward:
        lost = f"is a {type(layer).__name__} with a forward of its own, which would be lost"
    if lost:
        raise ArgumentError(f"the layer {name!r} {lost}")
