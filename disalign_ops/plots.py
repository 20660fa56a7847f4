"""Figures of a long-tailed classifier; each function returns a matplotlib Figure of its own.

Needs matplotlib, the extra disalign_ops[plots]. Nothing is shown or saved: `figure.savefig(path)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import class_stats
from ._call.arguments import check_class_indices, check_integer
from ._figures import style
from ._ops.dispatch import check_classes
from ._ops.reference import class_indices
from .class_stats import Counts
from .errors import ArgumentError
from .nn.calibration import Calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW, _MANY = 20, 100  # the groups of metrics.py


Drawing = TypeVar("Drawing", bound=Callable[..., object])


def _styled(draw: Drawing) -> Drawing:
    """In the common style, which leaves matplotlib's own settings alone."""

    @functools.wraps(draw)
    def styled(*arguments: Any, **options: Any) -> object:
        with style.applied():
            return draw(*arguments, **options)

    return cast(Drawing, styled)


def _counts(counts: Counts, classes: int, what: str) -> Tensor:
    n = class_stats._as_counts(counts, num_classes=classes)
    if len(n) != classes:
        raise ArgumentError(f"counts must have {classes} entries, {what}, got {len(n)}")
    return n


def _groups(axes: Any, n: Tensor) -> None:
    """Logarithmic counts, with lines between few, medium and many."""
    if float(n.min()) > 0:
        axes.set_xscale("log")
    else:  # classes without samples have a place too
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=-0.3)
    style.plain_numbers(axes.xaxis)
    axes.set_xlabel("training samples of the class")
    for limit in (_FEW, _MANY):
        if float(n.min()) < limit < float(n.max()):
            axes.axvline(limit, color=style.LINE, linewidth=1, zorder=0)


@_styled
def accuracy_by_count(accuracy: Tensor, counts: Counts, label: str | None = None) -> Figure:
    """Every class's accuracy against its training samples, with the mean of each tenth of them.

    Args:
        accuracy: (C,) in [0, 1], as metrics' per-class accuracy; NaN: a class without test samples.
        counts: (C,) training samples.
        label: of the method, for the legend.
    """
    a = accuracy.detach().cpu().double().flatten()
    n = _counts(counts, len(a), "as accuracy has")
    figure, axes = style.figure()
    axes.scatter(n.numpy(), a.numpy(), s=8, alpha=0.4, linewidths=0, label=label)
    order = n.argsort()
    tenths = [part[~a[part].isnan()] for part in order.tensor_split(10)]
    tenths = [part for part in tenths if len(part)]
    axes.plot([float(n[p].mean()) for p in tenths], [float(a[p].mean()) for p in tenths],
              color=style.RED, label="mean of a tenth of the classes")  # fmt: skip
    _groups(axes, n)
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
    style.title(figure, "Accuracy of every class by its training samples")
    return figure


@_styled
def calibration_by_count(layer: nn.Module, counts: Counts) -> Figure:
    """A DisAlign layer's learned scale and bias against the classes' training samples.

    Args:
        layer: DisAlignLinear, DisAlignCosineLinear or DisAlignSegHead.
        counts: training samples of each calibrated class, a background not among them.
    """
    if not isinstance(layer, Calibration):
        raise ArgumentError(f"layer must be a DisAlign layer, got a {type(layer).__name__}")
    learned = (layer.logit_scale, layer.logit_bias)
    scale, bias = (t.detach().cpu().double().flatten() for t in learned)
    n = _counts(counts, len(scale), "the classes that the layer calibrates")
    figure, both = style.figure(2, 1, height=5.2)
    for axes, values, name in zip(both, (scale, bias), ("logit_scale", "logit_bias"), strict=True):
        axes.scatter(n.numpy(), values.numpy(), s=8, alpha=0.5, linewidths=0)
        unchanged = float(name == "logit_scale" and layer.form == "interpolated")
        axes.axhline(unchanged, color=style.LINE, linewidth=1, zorder=0)  # the logits of stage 1
        _groups(axes, n)
        axes.set_ylabel(f"{name} ({layer.form})")
    style.title(figure, "What stage 2 learned of every class; a line: unchanged")
    return figure


@_styled
def confidence_histogram(confidence: Tensor, bins: int = 40) -> Figure:
    """How many inputs have which confidence.

    Args:
        confidence: of any shape, after the sigmoid.
    """
    c = confidence.detach().cpu().double().flatten()
    if not len(c) or not (float(c.min()) >= 0 and float(c.max()) <= 1):  # nor NaN
        raise ArgumentError(
            "confidence must be from 0 to 1, got entries outside, or none: apply the sigmoid"
        )
    figure, axes = style.figure()
    axes.hist(c.numpy(), bins=bins, range=(0.0, 1.0))
    axes.set_xlabel("confidence c")
    axes.set_ylabel("inputs")
    axes.set_xlim(0, 1)
    style.plain_numbers(axes.yaxis)
    style.title(figure, "How many inputs have which confidence")
    return figure


@_styled
def reliability(
    probabilities: Tensor, target: Tensor, bins: int = 15, ignore_index: int = -100
) -> Figure:
    """Accuracy against the probability of the predicted class, in equal bins, and the expected
    calibration error in the title. Arguments and errors as in `calibration_error`.
    """
    share, confidence, accuracy = _binned(probabilities, target, bins, ignore_index)
    error = float((share * (accuracy - confidence).abs()).sum())
    figure, axes = style.figure()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device="cpu")
    some = share > 0
    left, height = edges[:-1][some].numpy(), accuracy[some].numpy()
    axes.bar(left, height, width=1 / bins, align="edge", alpha=0.7, edgecolor="white",
             label="accuracy")  # fmt: skip
    axes.plot([0, 1], [0, 1], color=style.GREY, linestyle="--", label="calibrated")
    axes.plot(confidence[some].numpy(), accuracy[some].numpy(), "o", color=style.RED, markersize=4,
              label="mean probability")  # fmt: skip
    axes.set_xlabel("probability of the predicted class")
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_title(f"expected calibration error {error:.3f}", loc="center")
    axes.legend()
    return figure


def calibration_error(
    probabilities: Tensor, target: Tensor, bins: int = 15, ignore_index: int = -100
) -> float:
    """Expected calibration error: sum over equal bins of their share |accuracy - mean probability|.

    Args:
        probabilities: (N, C), rows that sum to 1.
        target: (N,) classes, or ignore_index, whose rows are left out.
    Raises ArgumentError: other shapes, no row that counts, values that are no probabilities.
    IndexError: a target that is no class.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
    """
    share, confidence, accuracy = _binned(probabilities, target, bins, ignore_index)
    return float((share * (accuracy - confidence).abs()).sum())


def _binned(
    probabilities: Tensor, target: Tensor, bins: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every bin: its share of the rows, their mean probability and accuracy; 0 where empty."""
    if probabilities.dim() != 2 or target.shape != probabilities.shape[:1] or not len(target):
        raise ArgumentError(
            f"probabilities and target must have shapes (N, C) and (N,), N above 0, got "
            f"{tuple(probabilities.shape)} and {tuple(target.shape)}"
        )
    bins = check_integer("bins", bins)
    if bins < 1:
        raise ArgumentError(f"bins must be 1 or more, got {bins}")
    check_class_indices(target)
    check_classes(target.cpu(), probabilities.shape[1], check_integer("ignore_index", ignore_index))
    target, valid = class_indices(target.cpu(), ignore_index)
    if not valid.any():
        raise ArgumentError(
            f"target must have a row that is not ignored, got ignore_index {ignore_index} in all"
        )
    target = target[valid]
    p, predicted = probabilities.detach().cpu()[valid].double().max(1)
    if not (float(p.min()) >= 0 and float(p.max()) <= 1 + 1e-6):  # nor NaN
        raise ArgumentError(
            "probabilities must be from 0 to 1, got entries outside: apply the softmax"
        )
    right = (predicted == target).double()
    # The upper edge belongs to a bin, as in the paper: (m - 1) / M < p <= m / M.
    index = ((p * bins).ceil().long() - 1).clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins).double()
    some = count.clamp(min=1)
    confidence = p.new_zeros(bins).index_add_(0, index, p) / some
    accuracy = p.new_zeros(bins).index_add_(0, index, right) / some
    return count / len(p), confidence, accuracy
