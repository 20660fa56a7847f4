"""Modules, thin over functional.py: the losses, the DisAlign layers, and what stage 2 needs.

Stage 2 of DisAlign, from a trained classifier:

    model = convert_to_disalign(model)  # its last nn.Linear becomes a DisAlignLinear
    optimizer = torch.optim.SGD(freeze_for_stage2(model), lr=0.1, momentum=0.9)
    criterion = GRWCrossEntropyLoss(counts, rho=1.2)

Where the features x are at hand, `layer.loss(x, target, weight=criterion.weight)` is
`criterion(layer(x), target)` without the calibrated logits.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional
from ._arguments import (
    check_bool,
    check_choice,
    check_class_indices,
    check_input,
    check_integer,
    check_number,
    check_tensor,
    given_denominator,
    given_reduction,
)
from ._nn_dense import DisAlignSegHead as DisAlignSegHead
from ._nn_form import Calibration, is_recorded
from ._nn_linear import DisAlignCosineLinear as DisAlignCosineLinear
from ._nn_linear import DisAlignLinear as DisAlignLinear
from ._types import (
    Background,
    BatchNormMode,
    CriterionOptions,
    ExtendedOptions,
    Form,
    Normalizer,
    ReductionName,
    Start,
)
from .class_stats import Counts, _as_counts, grw_weights
from .errors import ArgumentError, ArgumentTypeError
from .upsample import UpsampleDetails, upsample_cross_entropy

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`disalign_ops.cross_entropy` as a module; takes the place of `nn.CrossEntropyLoss`.

    Arguments, shapes, dtypes and errors as in `disalign_ops.cross_entropy`; they are checked here,
    and against the logits when it is called. `weight`, and `prior` and `margin` where they are
    tensors, are buffers: they move with `.to()`. The state_dict is nn.CrossEntropyLoss's: `weight`
    alone.
    """

    prior: Tensor | None
    margin: Tensor | float | None
    normalizer: Normalizer
    reduction: ReductionName

    # What print shows: the arguments of a subclass (_made_of), and the options whose values differ
    # from _defaults, without those that the subclass derives from its arguments.
    _made_of: dict[str, object] = {}  # noqa: RUF012 - replaced in `_keep`, never changed
    _defaults: ClassVar[dict[str, object]] = {
        "weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0,
        "normalizer": "weights", "prior": None, "margin": None, "focal_gamma": 0.0,
        "inplace_backward": False,
    }  # fmt: skip
    _derived: tuple[str, ...] = ()
    _needs_indices: bool = False  # probabilities as targets have no meaning
    _classes: int | None = None  # as counts have them

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None,
        ignore_index: int = -100, reduce: bool | None = None, reduction: ReductionName = "mean",
        label_smoothing: float = 0.0, *, normalizer: Normalizer = "weights",
        prior: Tensor | None = None, margin: Tensor | float | None = None,
        focal_gamma: float = 0.0, inplace_backward: bool = False,
    ) -> None:  # fmt: skip
        if weight is not None:
            check_tensor("weight", weight)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.reduction = given_reduction(self.reduction)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        self.focal_gamma = check_number("focal_gamma", focal_gamma, 0.0)
        self.normalizer = _normalizer(normalizer)
        check_bool("inplace_backward", inplace_backward)
        self.inplace_backward = inplace_backward
        for name, value in (("prior", prior), ("margin", margin)):
            if value is None or (isinstance(value, Tensor) and value.is_floating_point()):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, check_number(name, value, -math.inf))
        self._check_vectors("weight", "prior", "margin")

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        # torch.export pairs the inputs of a root module with its _buffers by position, and counts
        # those that are None: they go last.
        for empty in [k for k, buffer in self._buffers.items() if buffer is None]:
            self._buffers[empty] = self._buffers.pop(empty)

    def _check_vectors(self, *names: str) -> None:
        """Vectors with an entry a class, as far as they are known without logits."""
        entries: dict[str, int] = {}
        for name in names:
            vector = getattr(self, name)
            if not isinstance(vector, Tensor):
                continue
            if not vector.is_floating_point():
                raise ArgumentTypeError(f"{name} must have a floating dtype, got {vector.dtype}")
            if name == "weight" and vector.dim() != 1:
                raise ArgumentError(f"weight must have the shape (C,), got {tuple(vector.shape)}")
            if vector.numel() != 1:
                entries["counts" if name in self._derived else name] = vector.numel()
        if len({*entries.values()}) > 1:
            found = ", ".join(f"{name} {n}" for name, n in entries.items())
            raise ArgumentError(f"{' and '.join(entries)} must have one entry a class, got {found}")

    def _keep(self, counts: Tensor | None = None, **arguments: object) -> None:
        """Keeps the arguments of a subclass, for print and for errors about the logits' classes."""
        if counts is not None:
            self._classes = len(counts) + (arguments.get("background") is not None)
            arguments = {"counts": counts, **arguments}
        defaults = (None, "error", "sum_to_classes")  # of empty, background, normalize, ...
        self._made_of = {
            k: v for k, v in arguments.items() if isinstance(v, Tensor) or v not in defaults
        }

    def _check_call(self, input: Tensor, target: Tensor) -> None:
        """What would else be an error about an option that the subclass made of its arguments."""
        if is_recorded(input):  # there is no number to compare; the loss checks what it can
            return
        if self._needs_indices:
            check_class_indices(target)
        if self._classes is not None and (classes := check_input(input)) != self._classes:
            but = " but the background" if "background" in self._made_of else ""
            raise ArgumentError(
                f"counts must have an entry for each of the logits' {classes} classes{but}, got "
                f"{len(self._made_of['counts'])}"  # type: ignore[arg-type]
            )

    def extra_repr(self) -> str:
        shown = dict(self._made_of)
        for name, default in self._defaults.items():
            value = getattr(self, name, default)
            if name not in (*shown, *self._derived) and (
                isinstance(value, Tensor) or value != default
            ):
                shown[name] = value
        return ", ".join(f"{name}={_shown(value)}" for name, value in shown.items())

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        self._check_call(input, target)
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

    _defaults: ClassVar[dict[str, object]] = {
        **CrossEntropyLoss._defaults, "ignore_index": 255, "align_corners": False
    }  # fmt: skip

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = 255,
        reduction: ReductionName = "mean", label_smoothing: float = 0.0, *,
        align_corners: bool = False, **options: Unpack[ExtendedOptions],
    ) -> None:  # fmt: skip
        super().__init__(weight, None, ignore_index, None, reduction, label_smoothing, **options)
        check_bool("align_corners", align_corners)
        self.align_corners = align_corners

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, **options: Any
    ) -> Tensor | UpsampleDetails:
        found: Tensor | UpsampleDetails = upsample_cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing,
            align_corners=self.align_corners, normalizer=self.normalizer, prior=self.prior,
            margin=self.margin, focal_gamma=self.focal_gamma,
            inplace_backward=self.inplace_backward, **options,
        )  # fmt: skip
        return found


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
    _derived = ("weight",)

    def __init__(
        self, counts: Counts, rho: float = 1.0,
        *, background: Background | None = None,
        normalize: Literal["sum_to_classes", "sum_to_one"] = "sum_to_classes",
        empty: Literal["error", "zero", "max"] = "error", **options: Unpack[CriterionOptions],
    ) -> None:  # fmt: skip
        n, rho = _as_counts(counts), check_number("rho", rho, -math.inf)
        weight = grw_weights(n, rho, normalize=normalize, empty=empty, background=background)
        super().__init__(weight, **options)
        self.rho = rho
        self._keep(n, rho=rho, background=background, normalize=normalize, empty=empty)


def _normalizer(value: Normalizer) -> Normalizer:
    """A checked normalizer; a number is Python's."""
    given_denominator(value, value if isinstance(value, Tensor) else torch.empty(0, device="cpu"))
    return value if isinstance(value, str | Tensor) else check_number("normalizer", value, 0.0)


def _shown(value: object) -> str:
    """For print; of a tensor what tells it from another of its kind."""
    if not isinstance(value, Tensor) or not value.numel():
        return repr(value)
    if value.is_meta or type(value) not in (Tensor, nn.Parameter):  # no values to be read
        return f"{value.numel()} entries"
    v = value.detach().double()
    if v.numel() == 1:
        return f"{float(v):g}"
    return f"{v.numel()} entries (min {v.min():.6g}, max {v.max():.6g}, sum {v.sum():.6g})"


def _layers(model: nn.Module) -> list[Calibration]:
    layers = [m for m in model.modules() if isinstance(m, Calibration)]
    if not layers:
        given = f"model is a {type(model).__name__} without a DisAlign layer"
        raise ArgumentError(f"{given}, needed is one: see convert_to_disalign")
    return layers


def convert_form(model: Model, form: Form) -> Model:
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
            layer._set_form(form)
    return model


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
        start=start, device=old.weight.device, dtype=old.weight.dtype,
    ).train(old.training)  # fmt: skip
    new.weight, new.bias = old.weight, old.bias
    if old is model:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model
