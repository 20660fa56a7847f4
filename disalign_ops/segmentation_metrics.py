"""IoU of long-tailed semantic segmentation: per class, its mean, and split head / body / tail.

`SegmentationIoU` accumulates over batches and, under torch.distributed, over ranks. It keeps one
int64 C x C tensor, whatever the number of pixels: how often the class of the column was predicted
where the class of the row is the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist

from ._call.arguments import check_integer
from .class_stats import Counts, _as_counts, _classes, _number
from .metrics import _sum_over_ranks

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["ADE20K_SPLIT", "SegmentationIoU", "split_pixels"]

Group: TypeAlias = "torch.Tensor | npt.NDArray[Any] | Iterable[int] | Iterable[bool]"
Split: TypeAlias = "Sequence[Group] | torch.Tensor | npt.NDArray[Any]"

_GROUPS = ("head", "body", "tail")

# Source: the evaluation of the released DisAlign code (Megvii-BaseDetection/DisAlign,
# semantic_seg/disalign/datasets/ade_lt.py, commit a2fc350), which averages the IoU of the classes
# 0-19, 20-74 and 75-149. Classes are in the order of objectInfo150.txt (CSAILVision/sceneparsing,
# Idx less one: 0 is wall), which descends in the share of pixels. Its column Ratio, printed with
# four decimals, falls below 1 % between the classes 19 (0.0103) and 20 (0.0098), and below 0.1 %
# between 75 (0.0010) and 76 (0.0009): as printed, class 75 is on the bound, and the released code
# has it in the tail.
ADE20K_SPLIT: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = (
    tuple(range(20)),
    tuple(range(20, 75)),
    tuple(range(75, 150)),
)


def split_pixels(
    counts: Counts, head: float = 0.01, tail: float = 0.001, *, num_classes: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits classes by their share of all labelled pixels of the training set.

    Head: a share of at least `head`; tail: below `tail`; body: between, `tail` included. The
    defaults, 1 % and 0.1 %, are where the groups of `ADE20K_SPLIT` part. A class without pixels is
    a tail class.

    The share is of the sum of `counts`. The 150 ratios of ADE20K's objectInfo150.txt sum to
    0.9275 only, so for them the classes next to the bounds (20 and 75) get another group here than
    in the released split: that one is `ADE20K_SPLIT`.

    Args:
        counts: (C,) pixels of each class, as in `class_stats`.
        head, tail: thresholds, 0 <= tail <= head <= 1.
        num_classes: C, where `counts` is a dict, a Series or a data set that lacks some classes:
            these have no pixels.

    Returns:
        Three boolean masks of shape (C,), (head, body, tail), on the CPU.

    Raises:
        ValueError, TypeError: `counts` as in `class_stats`; every count is zero; thresholds that
            are not in that order.
    """
    if not 0 <= _number("tail", tail) <= _number("head", head) <= 1:
        raise ValueError(
            "head and tail must have 0 <= tail <= head <= 1 (shares, not percent), got "
            f"tail = {tail} and head = {head}"
        )
    head, tail = float(head), float(tail)
    n = _as_counts(counts, num_classes=num_classes)
    if not n.any():
        raise ValueError(f"counts must have a class with pixels, got 0 for all {n.numel()} classes")
    share = n / n.sum()
    return share >= head, (share >= tail) & (share < head), share < tail


class SegmentationIoU:
    """Intersection over union, its mean, and its means over head / body / tail classes.

    The means are those of mmsegmentation, which the released DisAlign code evaluates with, less
    its rounding of every class to 0.01 %: a class that occurs neither in targets nor predictions
    has no IoU and is left out, a class that is only predicted has IoU 0 and counts.

    Examples:
        >>> metric = SegmentationIoU(3, split=([0], [1], [2]))
        >>> metric.update(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [1, 255]]))
        >>> metric.compute()["mean"]
        tensor(0.5000, dtype=torch.float64)

    Args:
        num_classes: C.
        counts: (C,) pixels of each class in the training set, as in `class_stats`: the split is
            `split_pixels(counts)`.
        split: the groups (head, body, tail), each a collection of class ids or a boolean mask
            (C,); or "ade20k", `ADE20K_SPLIT`, for C = 150. No class may be in two groups; one may
            be in none, and a group may be empty. At most one of `counts` and `split`.
        ignore_index: target value whose positions are not counted. It is compared as a number: -1
            is no value of a uint8 mask. If it is a class (255 is one for C > 255), that class is
            never a target.

    Raises:
        ValueError, TypeError: an argument is not of that form; the message says which.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        counts: Counts | None = None,
        split: Split | Literal["ade20k"] | None = None,
        ignore_index: int = 255,
    ) -> None:
        num_classes = check_integer("num_classes", num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
        self._num_classes = num_classes
        self._ignore_index = check_integer("ignore_index", ignore_index)
        self._splits = _splits(num_classes, counts, split)
        size = (num_classes, num_classes)
        self._confusion: torch.Tensor = torch.zeros(size, dtype=torch.int64, device="cpu")

    @torch.no_grad()
    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            prediction: predicted classes, any shape, any integer dtype. What it has where the
                target is `ignore_index` does not matter.
            target: classes, 0 to C-1 or `ignore_index`, of the same shape and on the same device;
                any integer dtype.

        Raises:
            IndexError: a class outside 0..C-1; the message has the first one and its indices.
            ValueError: shapes or devices that differ.
            TypeError: no tensor, or not of an integer dtype.
        """
        self._check(prediction, target)
        # int64 before comparing: -1 wraps to class 255 in uint8.
        wide = target.long()
        keep = wide != self._ignore_index
        if target.dtype == torch.uint64:
            keep |= wide < 0  # 2**64 - 1 wraps to -1, here the other way round
        self._check_range("target", target, wide, keep)
        predicted = prediction.long()
        self._check_range("prediction", prediction, predicted, keep)
        c = self._num_classes
        cells = wide[keep] * c + predicted[keep]
        batch = torch.bincount(cells, minlength=c * c).view(c, c)
        # Not in place: after reset() under inference_mode that would be refused outside it.
        self._confusion = self._confusion + batch.cpu()

    def _check(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        for name, value in (("prediction", prediction), ("target", target)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
                raise TypeError(
                    f"{name} must have class indices (integers; of logits the argmax over the "
                    f"classes), got dtype {value.dtype}"
                )
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction must have the target's shape {tuple(target.shape)}, got "
                f"{tuple(prediction.shape)}"
            )
        if prediction.device != target.device:
            raise ValueError(
                f"prediction must be on the target's device, {target.device}, got "
                f"{prediction.device}"
            )

    def _check_range(
        self, name: str, given: torch.Tensor, wide: torch.Tensor, keep: torch.Tensor
    ) -> None:
        outside = ((wide < 0) | (wide >= self._num_classes)) & keep
        if outside.any():
            where = tuple(outside.nonzero()[0].tolist())
            ignored = f" or ignore_index = {self._ignore_index}" if name == "target" else ""
            raise IndexError(
                f"{name} must have classes from 0 to {self._num_classes - 1}{ignored}, got "
                f"{given[where].item()} at {where}"
            )

    def compute(self, *, group: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor]:
        """Scores of everything since the last reset, as fractions 0 to 1.

        Where torch.distributed is initialised, the confusion matrices of all ranks of `group` are
        added (every rank must call it, and all get the same scores); the own matrix stays as it
        is, so it may be called between updates.

        Returns:
            dict: float64 CPU tensors, () unless said otherwise.

              - "iou": (C,) true positives / (targets + predictions - true positives), NaN for
                classes that occur neither in targets nor in predictions;
              - "mean": mean over the classes that have an IoU;
              - "accuracy": (C,) share of the class's target pixels that are predicted as it, NaN
                for classes that occur in no target;
              - "pixel_accuracy": correct pixels over all pixels;
              - "head", "body", "tail", where there is a split: means over the group's classes that
                have an IoU, NaN if none has.
        """
        confusion = _sum_over_ranks(self._confusion, group).cpu()
        hits, targets = confusion.diagonal().double(), confusion.sum(dim=1)
        iou = hits / (targets + confusion.sum(dim=0) - confusion.diagonal())  # 0 / 0 is NaN
        scores = {
            "iou": iou,
            "mean": iou.nanmean(),
            "accuracy": hits / targets,
            "pixel_accuracy": hits.sum() / targets.sum(),
        }
        return scores | {name: iou[mask].nanmean() for name, mask in self._splits.items()}

    def reset(self) -> None:
        """Forgets every batch."""
        self._confusion = torch.zeros_like(self._confusion)


def _splits(
    num_classes: int, counts: Counts | None, split: Split | str | None
) -> dict[str, torch.Tensor]:
    """The masks of the groups by name; none without a split."""
    if counts is not None and split is not None:
        raise ValueError("counts or split must be None, got both")
    if counts is not None:
        masks = split_pixels(counts, num_classes=num_classes)
        if len(masks[0]) != num_classes:
            raise ValueError(
                f"counts must have num_classes = {num_classes} entries, got {len(masks[0])}"
            )
        return dict(zip(_GROUPS, masks, strict=True))
    if split is None:
        return {}
    allowed = "three collections of class ids or masks (head, body, tail), or 'ade20k'"
    groups: tuple[Group, ...]
    if isinstance(split, str):
        if split != "ade20k":
            raise ValueError(f"split must be {allowed}, got {split!r}")
        if num_classes != 150:
            raise ValueError(f"num_classes must be 150 with split 'ade20k', got {num_classes}")
        groups = ADE20K_SPLIT
    else:
        # A set has no order, a dict would lose its values.
        if isinstance(split, (set, frozenset, dict)) or not isinstance(split, Iterable):
            raise TypeError(f"split must be {allowed}, got {type(split).__name__}")
        groups = tuple(split)
        if len(groups) != 3:
            raise ValueError(f"split must be {allowed}, got {len(groups)} groups")
    named = zip(_GROUPS, groups, strict=True)
    found = {name: _mask(f"split's {name}", group, num_classes) for name, group in named}
    twice = torch.stack(list(found.values())).sum(dim=0) > 1
    if twice.any():
        raise ValueError(
            f"split must have each class in at most one group, got {_classes(twice)} in more"
        )
    return found


def _mask(name: str, group: Group, num_classes: int) -> torch.Tensor:
    """One group of a split, class ids or a mask, as a mask."""
    allowed = f"class ids or a boolean mask ({num_classes},)"
    if isinstance(group, torch.Tensor):
        values = group.detach().cpu()
    elif isinstance(group, str) or not isinstance(group, Iterable):
        raise TypeError(f"{name} must be {allowed}, got {type(group).__name__}")
    else:
        import numpy as np

        try:
            array = np.asarray(group if isinstance(group, np.ndarray) else list(group))
        except ValueError as error:
            raise ValueError(f"{name} must be {allowed}, got a ragged list") from error
        if array.size and array.dtype.kind not in "biu":
            raise TypeError(
                f"{name} must be {allowed}, got {type(group).__name__} of {array.dtype}"
            )
        values = torch.from_numpy(array.astype(bool if array.dtype.kind == "b" else np.int64))
    if values.numel() and (values.is_floating_point() or values.is_complex()):
        raise TypeError(f"{name} must be {allowed}, got dtype {values.dtype}")
    if values.dim() != 1 or (values.dtype == torch.bool and len(values) != num_classes):
        kind = "a mask of" if values.dtype == torch.bool else "of"
        raise ValueError(f"{name} must be {allowed}, got {kind} shape {tuple(values.shape)}")
    if values.dtype == torch.bool:
        return values.clone()
    ids = values.long()
    outside = (ids < 0) | (ids >= num_classes)
    if outside.any():
        raise ValueError(
            f"{name} must have classes from 0 to {num_classes - 1} (num_classes - 1), got "
            f"{ids[outside][0].item()}"
        )
    if len(ids.unique()) < len(ids):
        repeated = ids.bincount() > 1
        raise ValueError(f"{name} must have each class once, got {_classes(repeated)} again")
    mask = torch.zeros(num_classes, dtype=torch.bool, device="cpu")
    mask[ids] = True
    return mask
