"""Losses as modules, thin over functional.py and upsample.py."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from .. import functional
from .._call.arguments import (
    check_bool,
    check_choice,
    check_class_indices,
    check_input,
    check_integer,
    check_normalizer,
    check_number,
    check_reduction,
    check_tensor,
)
from .._call.types import (
    GRADIENT_PASSES,
    Background,
    CriterionOptions,
    ExtendedOptions,
    GradientPass,
    Normalizer,
    ReductionName,
)
from ..class_stats import Counts, _as_counts, grw_weights
from ..errors import ArgumentError, ArgumentTypeError
from ..upsample import UpsampleDetails, upsample_cross_entropy
from .calibration import is_recorded
from .linear import DisAlignCosineLinear as DisAlignCosineLinear
from .linear import DisAlignLinear as DisAlignLinear
from .segmentation import DisAlignSegHead as DisAlignSegHead

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
    gradient: GradientPass = "auto"  # of criteria that an earlier version pickled

    # What print shows: the arguments of a subclass (_made_of), and the options whose values differ
    # from _defaults, without those that the subclass derives from its arguments.
    _made_of: dict[str, object] = {}  # noqa: RUF012 - replaced in `_keep`, never changed
    _defaults: ClassVar[dict[str, object]] = {
        "weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0,
        "normalizer": "weights", "prior": None, "margin": None, "focal_gamma": 0.0,
        "inplace_backward": False, "gradient": "auto",
    }  # fmt: skip
    _derived: tuple[str, ...] = ()
    _needs_indices: bool = False  # probabilities as targets have no meaning
    _classes: int | None = None  # as counts have them

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None,
        ignore_index: int = -100, reduce: bool | None = None, reduction: ReductionName = "mean",
        label_smoothing: float = 0.0, *, normalizer: Normalizer = "weights",
        prior: Tensor | None = None, margin: Tensor | float | None = None,
        focal_gamma: float = 0.0, inplace_backward: bool = False, gradient: GradientPass = "auto",
    ) -> None:  # fmt: skip
        if weight is not None:
            check_tensor("weight", weight)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.reduction = check_reduction(self.reduction)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        self.focal_gamma = check_number("focal_gamma", focal_gamma, 0.0)
        self.normalizer = _normalizer(normalizer)
        check_bool("inplace_backward", inplace_backward)
        self.inplace_backward = inplace_backward
        check_choice("gradient", gradient, GRADIENT_PASSES)
        self.gradient = gradient
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
            inplace_backward=self.inplace_backward, gradient=self.gradient,
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
            inplace_backward=self.inplace_backward, gradient=self.gradient, **options,
        )  # fmt: skip
        return found


class GRWCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy with DisAlign's generalised re-weighting by class counts.

    Args:
        counts: training samples of each class, a background not among them.
        rho: strength; the released configurations have 1.2 (ImageNet-LT), 0.8 (LVIS), 0.2 (ADE20K).
        background, normalize, empty: as in `class_stats.grw_weights`; a background adds a class.
        num_samples_list, exp_scale: the released constructor's names of counts and rho.
        num_classes: raises ArgumentError if counts are not of so many classes. Those that a mapping
            lacks count 0.
        options: the keywords of `CrossEntropyLoss` but `weight`.

    Raises what `class_stats.grw_weights` raises. The weights are the float32 buffer `weight`.
    Source: Zhang et al., "Distribution Alignment", CVPR 2021, section 3.3.
    """

    weight: Tensor
    _derived = ("weight",)

    def __init__(
        self, counts: Counts | None = None, rho: float = 1.0,
        *, background: Background | None = None,
        normalize: Literal["sum_to_classes", "sum_to_one"] = "sum_to_classes",
        empty: Literal["error", "zero", "max"] = "error", num_samples_list: Counts | None = None,
        num_classes: int | None = None, exp_scale: float | None = None,
        **options: Unpack[CriterionOptions],
    ) -> None:  # fmt: skip
        given: Counts | None
        given, rho = released_names(counts, rho, num_samples_list, exp_scale)
        if given is None:
            raise ArgumentError("counts must be one number a class, got None")
        n, rho = _as_counts(given, num_classes=num_classes), check_number("rho", rho, -math.inf)
        check_number_of_classes(n, num_classes)
        weight = grw_weights(n, rho, normalize=normalize, empty=empty, background=background)
        super().__init__(weight, **options)
        self.rho = rho
        self._keep(n, rho=rho, background=background, normalize=normalize, empty=empty)


Given = TypeVar("Given")


def released_names(
    counts: Given | None, rho: float, num_samples_list: Given | None, exp_scale: float | None
) -> tuple[Given | None, float]:
    """counts and rho, each by one of its two names."""
    if counts is not None and num_samples_list is not None:
        raise ArgumentError("counts or num_samples_list must be None, got both")
    if exp_scale is not None and rho != 1.0:
        raise ArgumentError(f"rho must be left out where exp_scale is given, got {rho}")
    return counts if num_samples_list is None else num_samples_list, (
        rho if exp_scale is None else exp_scale
    )


def check_number_of_classes(counts: Sized, num_classes: int | None) -> None:
    if num_classes is not None and len(counts) != num_classes:
        raise ArgumentError(
            f"num_classes must be the number of counts ({len(counts)}), got {num_classes}"
        )


def _normalizer(value: Normalizer) -> Normalizer:
    """A checked normalizer; a number is Python's."""
    check_normalizer(value, value if isinstance(value, Tensor) else torch.empty(0, device="cpu"))
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
