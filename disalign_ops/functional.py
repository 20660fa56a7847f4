"""The public functions: the one place that validates what a user gives (with _arguments.py).

Every input is viewed as rows or as class planes (_layouts.py); a backend (see `backend_info`) then
computes their loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _autograd, _backends, _composed, _layouts, _shortcut, reference
from ._arguments import (
    check_bool,
    check_choice,
    check_input,
    check_integer,
    check_number,
    check_target,
    class_vector,
    given_denominator,
    given_reduction,
    is_probability,
    positions_shape,
    row_vector,
)
from ._ops import Stem
from ._types import Background, Form, Normalizer, ReductionName
from .errors import ArgumentError

_FORMS = ("interpolated", "residual")
_BACKGROUNDS = (None, "first", "last")


@dataclass(slots=True)
class Options:
    """Keywords that both losses share; see `cross_entropy`."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    sample_weight: Tensor | None
    normalizer: Normalizer
    prior: Tensor | None
    margin: Tensor | float | None
    focal_gamma: float
    inplace_backward: bool


@torch.fx.wrap  # in a graph of torch.fx it is one call
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Normalizer = "weights",
    prior: Tensor | None = None,
    margin: Tensor | float | None = None,
    focal_gamma: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    """Class-weighted softmax cross-entropy; takes the place of `torch.nn.functional.cross_entropy`.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16.
        target: class indices (), (N,) or (N, d1, ...); int64, and beyond PyTorch int32, int16,
            uint8. Or class probabilities of the input's shape, which go through the reference.
        weight: (C,), any floating dtype: w_t multiplies the loss of class t.
        size_average, reduce: PyTorch's deprecated forms of `reduction`.
        ignore_index: positions with this target count nothing, whatever their logits hold.
        reduction: "mean", "sum" or "none".
        label_smoothing: e in [0, 1], as in PyTorch:
            (1 - e) w_t (lse - u_t) + e/C sum_j w_j (lse - u_j).
        sample_weight: one entry a position; multiplies its loss.
        normalizer: what "mean" divides by: "weights" (sum of sample_weight w_t over positions not
            ignored, PyTorch's), "valid" (their number), "count" (all positions), or a number or
            0-d tensor (avg_factor), read without a synchronisation.
        prior: (C,) or what broadcasts to it, added to the logits: log n for balanced softmax
            (Ren et al., NeurIPS 2020), tau log pi for logit adjustment (Menon et al., ICLR 2021).
        margin: (C,) or a number, subtracted from the target's logit: LDAM (Cao et al., NeurIPS
            2019), CosFace.
        focal_gamma: (1 - p_t)^gamma on the target's term, not on the smoothing (Lin et al.,
            ICCV 2017).
        inplace_backward: backward writes the gradient over the logits' memory. The logits must not
            be used afterwards: a second backward, a second loss on them, or a layer that needs its
            own output raises. Not under torch.compile.

    Numbers, here and in the other functions, may be Python's, numpy's or 0-d tensors on the CPU.

    Returns:
        What `F.cross_entropy` returns, a 0-d tensor or the positions' shape, in the input's dtype
        (float32 under autocast).

    Raises:
        ArgumentError: an argument of the wrong value or shape; weight, prior, margin or
            sample_weight that requires a gradient. It is a ValueError and a RuntimeError.
        ArgumentTypeError: one of the wrong type or dtype. It is a TypeError and a RuntimeError.
        IndexError: a target that is no class.

    Formula: docs/math.md; PyTorch's documentation of CrossEntropyLoss for weight and smoothing.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)  # type: ignore[assignment]
    if _shortcut.has_defaults(
        reduction, sample_weight, normalizer, prior, margin, focal_gamma, inplace_backward
    ) and _shortcut.is_plain(input, target, weight, ignore_index, label_smoothing):
        if (backend := serving_backend(input)) == "native":
            numbers = (ignore_index, label_smoothing, focal_gamma)
            return _shortcut.loss(input, target, weight, numbers)
        if composes(backend):
            mean = _composed.plain_mean(input, target, weight, ignore_index, label_smoothing)
            if mean is not None:
                return mean
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, inplace_backward,
    )  # fmt: skip
    return loss(input, target, None, options)


@torch.fx.wrap
def disalign_cross_entropy(
    input: Tensor,
    target: Tensor,
    confidence: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    form: Form = "interpolated",
    background: Background | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Normalizer = "weights",
    prior: Tensor | None = None,
    margin: Tensor | float | None = None,
    focal_gamma: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    """The loss of DisAlign's calibrated logits, without building them.

    Args:
        input, target, weight, ...: as in `cross_entropy`.
        confidence: (N,) or (N, 1), for (N, C, d1, ...) input (N, d1, ...) or (N, 1, d1, ...):
            before the sigmoid; c = sigmoid(confidence). Of a probability p it is torch.logit(p).
            A probability passed as it is stays unnoticed unless autograd's graph shows the sigmoid.
        scale, bias: (C,) or what broadcasts to it ((1, C), (1, C, 1, 1), one number a tensor).
        form: "interpolated", c (scale z + bias) + (1 - c) z: the paper's definition and the
            released detection and segmentation heads. "residual", (1 + c scale) z + c bias: the
            released classification layer.
        background: None, "first" or "last": that column is not calibrated; scale and bias then
            have C - 1 entries.

    Gradients go to input, confidence, scale and bias, each only if it requires one. With frozen
    logits and a scalar reduction, backward reads nothing of size N x C.

    Source: Zhang et al., "Distribution Alignment", CVPR 2021, sections 3.2 and 3.3.
    """
    if (
        _shortcut.has_defaults(
            reduction, sample_weight, normalizer, prior, margin, focal_gamma, inplace_backward
        )
        and _shortcut.is_plain(input, target, weight, ignore_index, label_smoothing)
        and _shortcut.is_plain_calibration(input, confidence, scale, bias, form, background)
        and serving_backend(input) == "native"
    ):
        numbers = (ignore_index, label_smoothing, focal_gamma)
        extension = _layouts.Extension.of(form, background)
        calibration = (scale, bias, confidence)
        return _shortcut.calibrated_loss(input, target, weight, numbers, calibration, extension)
    options = Options(
        weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, prior,
        margin, focal_gamma, inplace_backward,
    )  # fmt: skip
    calibration = given_calibration(input, confidence, scale, bias, form, background, None)
    return loss(input, target, calibration, options, _layouts.Extension.of(form, background))


@torch.fx.wrap
def calibrate(
    input: Tensor,
    confidence: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    form: Form = "interpolated",
    background: Background | None = None,
) -> Tensor:
    """DisAlign's calibrated logits, of the input's shape and dtype; differentiable.

    Arguments, forms, errors and source as in `disalign_cross_entropy`.
    """
    if _composed.is_tracing():
        a, b, c = given_calibration(input, confidence, scale, bias, form, background, None)
        return _composed.calibrate(input, c, a, b, form, background)
    classes = check_input(input)
    a, b, c = calibration_vectors(input, confidence, scale, bias, form, background)
    stem, flat, _ = _layouts.flatten(input)
    backend = serving_backend(input)
    if backend != "reference":
        out = _autograd.calibrate(operators_of(stem, backend), flat, a, b, c)
    else:
        out = reference.calibrate(flat, a, b, c).to(input.dtype)
    if input.dim() == 1:
        return out.reshape(classes)
    if out.dim() == 3:
        return out.reshape(input.shape)
    return out.reshape(*positions_shape(input), classes).movedim(-1, 1)


def calibration_vectors(
    input: Tensor,
    confidence: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    form: str,
    background: str | None,
    classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b (C,) and the confidence (rows,) of u = (1 + c a) z + c b, c = sigmoid(confidence).

    classes: their number, if it is not the input's.
    """
    a, b, c = given_calibration(input, confidence, scale, bias, form, background, classes)
    return (*_layouts.Extension.of(form, background).vectors(a, b), c)


def given_calibration(
    input: Tensor,
    confidence: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    form: str,
    background: str | None,
    classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scale and bias of the calibrated classes and the confidence (rows,), checked, flat."""
    if _composed.is_tracing():
        with _composed.unrecorded():
            given_calibration(input, confidence, scale, bias, form, background, None)
        dtype = reference.accumulate_dtype(input.dtype)
        foreground = input.shape[min(1, input.dim() - 1)] - int(background is not None)
        a, b, c = (_recorded(v, input, dtype) for v in (scale, bias, confidence))
        assert a is not None
        assert b is not None
        assert c is not None
        return a.expand(foreground).contiguous(), b.expand(foreground).contiguous(), c
    check_choice("form", form, _FORMS)
    check_choice("background", background, _BACKGROUNDS)
    classes = check_input(input) if classes is None else classes
    dtype = reference.accumulate_dtype(input.dtype)
    foreground = classes - (background is not None)
    a, b = (
        class_vector(name, value, foreground, input, dtype, learned=True, background=background)
        for name, value in (("scale", scale), ("bias", bias))
    )
    c = row_vector("confidence", confidence, input, positions_shape(input), dtype, learned=True)
    for name, vector in (("scale", a), ("bias", b), ("confidence", c)):
        if vector is None:
            raise ArgumentError(f"{name} is None, needed is a tensor")
    assert a is not None
    assert b is not None
    assert c is not None
    if is_probability(c):
        raise ArgumentError(
            "confidence must be what goes into the sigmoid, got the output of a sigmoid: it is "
            "applied here, to what a layer gives; of a probability p pass torch.logit(p)"
        )
    return a, b, c


def serving_backend(input: Tensor) -> str:
    """The backend that this input goes to."""
    return "reference" if transformed() else _backends.serving(input.device)


NO_TRANSFORMS = (
    "torch.func transforms, forward-mode differentiation, torch.export and torch.jit.trace are not "
    "supported with sample_rate or classes over several processes: leave the loss out of what is "
    "transformed, or leave out sample_rate"
)


def transformed() -> bool:
    """Whether plain PyTorch alone is right: registered operators know neither functorch transforms
    nor forward-mode tangents, which they would drop, and are none of ONNX's, nor torch.jit's.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def needs_logits() -> bool:
    """Whether a loss without logits must make them: its gradients are no part of a graph."""
    return transformed() or torch.compiler.is_exporting()


def composes(backend: str) -> bool:
    """Whether the loss is that of _composed.py: no kernel serves, and nobody asked for the
    reference.
    """
    return backend == "reference" and _backends.is_automatic() and not transformed()


def operators_of(stem: Stem, backend: str) -> Stem:
    """The stem's operators of a backend, "native" or "triton"."""
    if backend == "native":
        return stem
    from . import _ops_triton  # which imports triton

    return _ops_triton.stem_of(stem)


@dataclass(slots=True)
class Checked:
    """Options after their checks: class vectors (C,) of the accumulation dtype, and numbers."""

    weight: Tensor | None
    prior: Tensor | None
    margin: Tensor | None
    normalizer: str | Tensor
    numbers: tuple[int, float, float]  # ignore_index, label_smoothing, focal_gamma


def checked(input: Tensor, classes: int, options: Options) -> Checked:
    """Everything of `options` that does not depend on the positions."""
    options.reduction = given_reduction(options.reduction)
    check_bool("inplace_backward", options.inplace_backward)
    ignore_index = check_integer("ignore_index", options.ignore_index)
    smoothing = check_number("label_smoothing", options.label_smoothing, 0.0, 1.0)
    gamma = check_number("focal_gamma", options.focal_gamma, 0.0)
    dtype = reference.accumulate_dtype(input.dtype)
    return Checked(
        class_vector("weight", options.weight, classes, input, dtype, exact=True),
        class_vector("prior", options.prior, classes, input, dtype),
        class_vector("margin", options.margin, classes, input, dtype),
        given_denominator(options.normalizer, input),
        (ignore_index, smoothing, gamma),
    )


def output(input: Tensor, loss: Tensor, shape: torch.Size | None) -> Tensor:
    """The loss in the dtype that F.cross_entropy has, of the positions' shape unless None."""
    wanted = input.dtype
    if loss.dtype != wanted:  # half logits, whose loss is float32; or a float64 denominator
        if wanted in (torch.bfloat16, torch.float16):
            # Under autocast F.cross_entropy yields float32; the half logits are not copied.
            device = input.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                wanted = torch.float32
        loss = loss.to(wanted)
    return loss if shape is None else loss.reshape(shape)


def loss(
    input: Tensor,
    target: Tensor,
    calibration: tuple[Tensor, ...] | None,
    options: Options,
    extension: _layouts.Extension = _layouts.WHOLE,
) -> Tensor:
    """Of logits; calibration: as from `calibration_vectors`, or, with their extension, as from
    `given_calibration`.
    """
    if _composed.is_tracing():
        return _recorded_loss(input, target, calibration, options, extension)
    classes = check_input(input)
    shape = positions_shape(input)
    check_target(input, target, shape)
    given = checked(input, classes, options)
    dtype = reference.accumulate_dtype(input.dtype)
    sample_weight = row_vector("sample_weight", options.sample_weight, input, shape, dtype)
    a, b, c = calibration or (None, None, None)
    probabilities = target.is_floating_point()
    backend = "reference" if probabilities else serving_backend(input)
    if backend == "reference" and a is not None and b is not None:
        a, b = extension.vectors(a, b)
    stem, flat_logits, copied = _layouts.flatten(input)
    in_place = options.inplace_backward and _layouts.check_in_place(input, flat_logits, copied)
    if backend != "reference":
        if backend == "triton":
            check_classes(target, classes, given.numbers[0])
        loss = _autograd.loss(
            operators_of(stem, backend),
            (
                flat_logits, target.contiguous(), given.weight, a, b, c, given.prior, given.margin,
                sample_weight,
            ),
            given.numbers,
            options.reduction,
            given.normalizer,
            in_place,
            extension,
        )[0]  # fmt: skip
    else:
        vectors: dict[str, Any] = {
            "weight": given.weight, "scale": a, "bias": b, "confidence": c, "prior": given.prior,
        }  # fmt: skip
        if probabilities:
            loss = _soft_loss(_layouts.rows(input), target, vectors, given, options)
        else:
            check_classes(target, classes, given.numbers[0])
            vectors |= {"sample_weight": sample_weight, **reference_options(given, options)}
            if composes(backend):
                loss = _composed.cross_entropy(flat_logits, target, **vectors)
            else:
                loss = reference.cross_entropy(_layouts.rows(input), target, **vectors)
    return output(input, loss, shape if options.reduction == "none" else None)


def _recorded(value: Any, input: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A vector of classes or positions that was checked, flat, in the graph of torch.jit.trace."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else value.reshape(-1).to(dtype)
    return torch.full((1,), float(value), dtype=dtype, device=input.device)


def _recorded_loss(
    input: Tensor,
    target: Tensor,
    calibration: tuple[Tensor, ...] | None,
    options: Options,
    extension: _layouts.Extension,
) -> Tensor:
    """`loss` for torch.jit.trace: for any number of positions; the checks are not recorded."""
    with _composed.unrecorded():
        loss(input, target, calibration, options, extension)
    dtype = reference.accumulate_dtype(input.dtype)
    flat = input.flatten(2) if input.dim() > 2 else input.reshape(-1, input.shape[-1])
    a, b, c = calibration or (None, None, None)
    if a is not None and b is not None:
        a, b = _composed.extended(a, b, *extension)
    weight, prior, margin, sample_weight = (
        _recorded(v, input, dtype)
        for v in (options.weight, options.prior, options.margin, options.sample_weight)
    )
    normalizer = given_denominator(options.normalizer, input)
    divided = options.reduction == "mean" and isinstance(normalizer, Tensor)
    if target.is_floating_point():
        u = flat.to(dtype)
        if a is not None and b is not None and c is not None:
            u = reference.calibrate(flat, a, b, c)
        if prior is not None:
            u = u + (prior[:, None] if u.dim() == 3 else prior)
        found = _composed.torch_cross_entropy(
            u, target.reshape(u.shape).to(dtype), weight, label_smoothing=options.label_smoothing,
            reduction="sum" if divided else options.reduction,
        )  # fmt: skip
        if isinstance(normalizer, Tensor) and divided:
            found = (found / normalizer).to(dtype)
    else:
        if margin is not None:
            margin = margin.expand(flat.shape[1])
        found = _composed.cross_entropy(
            flat, target, weight=weight, scale=a, bias=b, confidence=c, prior=prior, margin=margin,
            sample_weight=sample_weight, ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing, focal_gamma=options.focal_gamma,
            reduction=options.reduction, normalizer=normalizer,
        )  # fmt: skip
    found = output(input, found, None)
    if options.reduction != "none":
        return found
    if target.is_floating_point():
        return found.reshape(input.select(min(1, input.dim() - 1), 0).shape)
    return found.reshape(target.shape)


def reference_options(given: Checked, options: Options) -> dict[str, Any]:
    """What every loss of reference.py takes beside vectors of classes and positions."""
    ignore_index, smoothing, gamma = given.numbers
    return {
        "margin": given.margin,
        "ignore_index": ignore_index,
        "label_smoothing": smoothing,
        "focal_gamma": gamma,
        "reduction": options.reduction,
        "normalizer": given.normalizer,
    }


def _soft_loss(
    rows: Tensor,
    target: Tensor,
    vectors: dict[str, Any],
    given: Checked,
    options: Options,
) -> Tensor:
    """Class probabilities: what has no meaning with them is refused; the reference computes."""
    for name in ("sample_weight", "margin"):
        if getattr(options, name) is not None:
            raise ArgumentError(f"{name} is given, and target holds class probabilities: needed "
                                "are class indices")  # fmt: skip
    ignore_index, smoothing, gamma = given.numbers
    if gamma:
        raise ArgumentError("focal_gamma is given, and target holds class probabilities: needed "
                            "are class indices")  # fmt: skip
    if ignore_index >= 0:
        raise ArgumentError(
            f"ignore_index is {ignore_index}, and target holds class probabilities: no "
            "position can be ignored"
        )
    return reference.soft_cross_entropy(
        rows,
        _layouts.rows(target),
        **vectors,
        reduction=options.reduction,
        normalizer=given.normalizer,
        label_smoothing=smoothing,
    )


def check_classes(
    target: Tensor, classes: int, ignore_index: int, *, asserted: bool = True
) -> None:
    """IndexError for a target that is no class, on the CPU. Other devices assert: in the kernel if
    it is `asserted` there, or else here.
    """
    on_cpu = target.device.type == "cpu"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if not on_cpu and asserted:
        return
    flat = target.reshape(-1)
    bad = reference.no_class(flat, classes, ignore_index)
    if not on_cpu:
        torch._assert_async(~bad.any(), f"target is no class of {classes}")
        return
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        message = (
            f"Target {int(flat[at])} is out of bounds: target[{at}], the logits have {classes} "
            f"classes and ignore_index is {ignore_index}"
        )
        raise IndexError(_autograd.name_position(message, target.shape))
