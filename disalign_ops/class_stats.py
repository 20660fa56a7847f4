"""Class counts -> class weights, log priors and margins for long-tailed training.

Every function takes the number of training samples of each class, `counts`, C non-negative finite
numbers (fractions are allowed, such as the pixel ratios of ADE20K):
  - a 1-D tensor, numpy array or list, in class order;
  - a dict or Counter {class: count}, or a pandas Series whose index holds the classes, in any
    order; classes are 0 to C - 1, or 1 to C where `background="first"` takes class 0;
  - a data set with `targets`, as torchvision's: its labels are counted, and where it has `classes`,
    those without a sample count 0. A list of labels alone would be taken for counts.
Arithmetic is float64, the result a new CPU tensor of shape (C,), float32 unless
`dtype` says otherwise. `read_counts` gets the counts out of the files that data sets ship.

A class without samples has no finite weight, prior or margin. Each function raises ValueError
naming such classes unless its `empty` argument says what they are to get.

All functions raise TypeError where `counts` is not numbers or `dtype` is not a floating dtype, and
ValueError where `counts` is empty, not 1-D, negative, NaN or infinite, where every count is zero,
and where an option is outside the range its docstring gives.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch

from ._call.arguments import python_number
from ._call.types import Background
from .count_files import read_counts

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "class_balanced_weights",
    "grw_weights",
    "ldam_margins",
    "log_prior",
    "read_counts",
]


class _Series(Protocol):
    """What is used of a pandas Series, which need not be installed."""

    @property
    def index(self) -> Any: ...

    def to_numpy(self) -> npt.NDArray[Any]: ...


class _Labelled(Protocol):
    """A data set as torchvision's."""

    targets: Any


Counts: TypeAlias = (
    "torch.Tensor | npt.NDArray[Any] | Sequence[int] | Sequence[float] "
    "| Mapping[int, int] | Mapping[int, float] | _Series | _Labelled"
)

_NAMED_CLASSES = 5  # an error names this many classes, then says how many there are


def grw_weights(
    counts: Counts,
    rho: float = 1.0,
    *,
    normalize: Literal["sum_to_classes", "sum_to_one"] = "sum_to_classes",
    empty: Literal["error", "zero", "max"] = "error",
    background: Background | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Generalised re-weighting of DisAlign: w_j = r_j^-rho / sum_k r_k^-rho, r_j = n_j / sum n.

    Source: Zhang et al., "Distribution Alignment", CVPR 2021 (arXiv 2103.16370), the generalised
    re-weight strategy. The paper prints weights that sum to one; its released code multiplies them
    by C, so that they average one, and that is the default here.

    Args:
        counts: (C,) samples of each class.
        rho: strength, >= 0; 0 gives equal weights, 1 inverse frequency.
        normalize: "sum_to_classes" (the released code) or "sum_to_one" (the paper's print).
        empty: what a class without samples gets. "error": ValueError. "zero": weight 0, and the
            others get exactly the weights they would have without it, so "sum_to_classes" is then
            the number of classes that have samples. "max": the weight of the rarest class that has
            samples, and the sum runs over all C classes.
        background: "first" or "last" inserts the weight 1 of a detector's background class there;
            the K foreground weights still sum to K. Not together with normalize="sum_to_one",
            where a background weight of 1 would outweigh all foreground classes.

    Returns:
        (C,) weights, (C + 1,) with a background.
    """
    rho = _non_negative("rho", rho)
    _choice("normalize", normalize, ("sum_to_classes", "sum_to_one"))
    _choice("empty", empty, ("error", "zero", "max"))
    _check_background(background)
    if background is not None and normalize == "sum_to_one":
        raise ValueError(
            f"normalize must be 'sum_to_classes' with background={background!r}, whose weight is 1,"
            " got 'sum_to_one'"
        )
    n = _as_counts(counts, background=background)
    log_weights = -rho * torch.log(_fill_empty(n, empty))  # sum n cancels in the normalisation
    if empty == "zero":
        log_weights = torch.where(n > 0, log_weights, -math.inf)
    weights = torch.softmax(log_weights, dim=0)
    if normalize == "sum_to_classes":
        weights = weights * _weighted_classes(n, empty)
    return _cast(_with_background(weights, background), dtype)


def class_balanced_weights(
    counts: Counts,
    beta: float = 0.9999,
    *,
    empty: Literal["error", "zero", "max"] = "error",
    background: Background | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Class-balanced weights, w_j = (1 - beta) / (1 - beta^n_j), scaled to sum to C.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    eq. 2, with the scaling of its released code. beta^n is evaluated as exp(n log beta), and
    1 - beta^n without cancellation, so beta may be as close to 1 as float64 allows.

    Args:
        counts: (C,) samples of each class.
        beta: 0 <= beta < 1; 0 gives equal weights, towards 1 inverse frequency.
        empty: as in `grw_weights`.
        background: as in `grw_weights`.

    Returns:
        (C,) weights, (C + 1,) with a background.
    """
    beta = _number("beta", beta)
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    _choice("empty", empty, ("error", "zero", "max"))
    _check_background(background)
    n = _as_counts(counts, background=background)
    log_beta = math.log(beta) if beta > 0.0 else -math.inf
    # 1 - beta cancels in the normalisation
    weights = 1.0 / -torch.expm1(_fill_empty(n, empty) * log_beta)
    if empty == "zero":
        weights = torch.where(n > 0, weights, 0.0)
    weights = weights / weights.sum() * _weighted_classes(n, empty)
    return _cast(_with_background(weights, background), dtype)


def log_prior(
    counts: Counts,
    tau: float = 1.0,
    *,
    empty: Literal["error", "min"] = "error",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Scaled log class prior, tau * log(n_j / sum n).

    Added to the logits in training it is balanced softmax (tau = 1; Ren et al., NeurIPS 2020) or
    logit adjustment (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10);
    subtracted from the logits of a trained model it is logit adjustment post hoc (eq. 9).

    Args:
        counts: (C,) samples of each class.
        tau: finite factor.
        empty: what a class without samples gets, whose log prior would be -inf (and +inf, always
            predicted, post hoc). "error": ValueError. "min": the value of the rarest class that
            has samples; the prior of the others does not change.

    Returns:
        (C,) log priors; exp of them sums to one for tau = 1 and no class without samples.
    """
    tau = _number("tau", tau)
    if not math.isfinite(tau):
        raise ValueError(f"tau must be a finite number, got {tau}")
    _choice("empty", empty, ("error", "min"))
    n = _as_counts(counts)
    return _cast(tau * torch.log(_fill_empty(n, empty) / n.sum()), dtype)


def ldam_margins(
    counts: Counts,
    max_margin: float = 0.5,
    *,
    empty: Literal["error", "max"] = "error",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Label-distribution-aware margins, m_j = max_margin * n_j^-1/4 / max_k n_k^-1/4.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019, eq. 13, scaled so that the rarest class has `max_margin`, as its released code.

    Args:
        counts: (C,) samples of each class.
        max_margin: margin of the rarest class, finite and >= 0.
        empty: what a class without samples gets. "error": ValueError. "max": `max_margin`.

    Returns:
        (C,) margins in (0, max_margin].
    """
    max_margin = _non_negative("max_margin", max_margin)
    _choice("empty", empty, ("error", "max"))
    n = _fill_empty(_as_counts(counts), empty)
    return _cast(max_margin * (n.min() / n) ** 0.25, dtype)


def _as_counts(
    counts: Counts, name: str = "counts", *, num_classes: int | None = None,
    background: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Counts as a 1-D float64 CPU tensor; raises where they are not counts.

    num_classes: classes that a mapping or a data set lacks count 0. background: "first" lets the
    classes of a mapping begin at 1.
    """
    given: Any = counts
    if not isinstance(given, torch.Tensor):
        if hasattr(given, "to_numpy") and hasattr(given, "index"):
            values = given.to_numpy()
            if values.ndim != 1:
                raise ValueError(f"{name} must be one column, got shape {values.shape}")
            pairs = list(zip(given.index, values.tolist(), strict=True))
            given = _by_class(pairs, name, num_classes, background)
        elif isinstance(given, Mapping):
            given = _by_class(list(given.items()), name, num_classes, background)
        elif hasattr(given, "targets"):
            given = _of_targets(given, name, num_classes)
    if isinstance(given, torch.Tensor):
        if given.dtype == torch.bool or given.is_complex():
            raise TypeError(
                f"{name} must have a dtype of integers or real numbers, got {given.dtype}"
            )
        n = given.detach().cpu().to(torch.float64)
    else:
        import numpy as np

        try:
            array = np.asarray(given)
        except ValueError as error:  # a ragged list
            raise ValueError(f"{name} must have one number per class, got a ragged list") from error
        if array.size and array.dtype.kind not in "iuf":
            raise TypeError(
                f"{name} must be a 1-D tensor, array or list of numbers, got "
                f"{type(counts).__name__} of {array.dtype}"
            )
        n = torch.from_numpy(array.astype(np.float64))
    if n.dim() != 1:
        raise ValueError(f"{name} must have one number per class (1-D), got shape {tuple(n.shape)}")
    if n.numel() == 0:
        raise ValueError(f"{name} must have one number per class, got no entries")
    for bad, what in ((~torch.isfinite(n), "not finite"), (n < 0, "negative")):
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} must be finite numbers >= 0, got {what} for {_classes(bad)} "
                f"({name}[{first}] = {n[first].item()})"
            )
    return n


def _by_class(
    pairs: list[tuple[Any, Any]], name: str, num_classes: int | None, background: str | None
) -> list[Any]:
    """The counts of (class, count) pairs in class order."""
    found: dict[int, Any] = {}
    for key, count in pairs:
        try:
            index = operator.index(key)
        except TypeError:
            index = -1
        if index < 0 or type(key).__name__ in ("bool", "bool_"):  # numpy's too
            hint = "; pass a list of counts in class order" if isinstance(key, str) else ""
            raise ValueError(f"{name} must have the class indices 0 to C - 1, got {key!r}{hint}")
        if index in found:
            raise ValueError(f"{name} must have every class once, got class {index} twice")
        found[index] = count
    if not found:
        return []
    first = int(background == "first" and 0 not in found)
    size = max(found) + 1 - first if num_classes is None else num_classes
    if max(found) >= size + first:
        raise ValueError(f"{name} must have the classes 0 to {size - 1}, got class {max(found)}")
    # No list of all classes before this check: a key may be an id of many digits.
    absent = size - len(found)
    if absent and num_classes is None:
        lacking = (i for i in range(first, size + first) if i not in found)
        few = ", ".join(str(next(lacking)) for _ in range(min(absent, _NAMED_CLASSES)))
        raise ValueError(
            f"{name} must have every class from {first} to {max(found)}, got none for class "
            f"{few}{', ...' * (absent > _NAMED_CLASSES)} ({absent} missing)"
        )
    return [found.get(i, 0) for i in range(first, size + first)]


def _of_targets(dataset: Any, name: str, num_classes: int | None) -> list[int]:
    """How often a data set has each label."""
    import numpy as np

    labels = dataset.targets
    labels = np.asarray(labels.detach().cpu() if isinstance(labels, torch.Tensor) else labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
        raise TypeError(
            f"{name} must have one integer label per sample, got a {type(dataset).__name__} whose "
            f"targets are {labels.dtype} of shape {labels.shape}"
        )
    found = Counter(labels.tolist())
    if num_classes is None:
        classes = getattr(dataset, "classes", None)
        num_classes = len(classes) if isinstance(classes, list | tuple) else max(found) + 1
    outside = [label for label in found if not 0 <= label < num_classes]
    if outside:
        raise ValueError(
            f"{name} must have labels from 0 to {num_classes - 1}, got {outside[0]} in the targets "
            f"of a {type(dataset).__name__}"
        )
    return [found[i] for i in range(num_classes)]


def _fill_empty(n: torch.Tensor, empty: str) -> torch.Tensor:
    """Counts where a class without samples has the count of the rarest class that has some.

    That class has the largest weight and margin and the smallest prior: what "max" and "min" ask
    for. The caller of "zero" overwrites it.
    """
    missing = n == 0
    if missing.all():
        raise ValueError(
            f"counts must have a class with samples, got 0 for all {n.numel()} classes"
        )
    if not missing.any():
        return n
    if empty == "error":
        raise ValueError(
            "counts must have a sample of every class (or pass another value of empty), got 0 for "
            f"{_classes(missing)}"
        )
    return torch.where(missing, n[~missing].min(), n)


def _weighted_classes(n: torch.Tensor, empty: str) -> int:
    return int((n > 0).sum()) if empty == "zero" else n.numel()


def _with_background(weights: torch.Tensor, background: str | None) -> torch.Tensor:
    if background is None:
        return weights
    one = weights.new_ones(1)
    return torch.cat([one, weights] if background == "first" else [weights, one])


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch dtype, got {dtype!r}")
    return values.to(dtype)


def _classes(mask: torch.Tensor) -> str:
    """The classes of a mask for an error: 'class 3', 'classes 0, 1, 2, 3, 4, ... (60 classes)'."""
    indices: list[int] = mask.nonzero().flatten().tolist()
    listed = ", ".join(map(str, indices[:_NAMED_CLASSES]))
    if len(indices) == 1:
        return f"class {listed}"
    return f"classes {listed}{', ...' * (len(indices) > _NAMED_CLASSES)} ({len(indices)} classes)"


def _number(name: str, value: float) -> float:
    return float(python_number(name, value, "a number"))


def _non_negative(name: str, value: float) -> float:
    number = _number(name, value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {number}")
    return number


def _check_background(background: str | None) -> None:
    if background is not None:
        _choice("background", background, ("first", "last"))


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
