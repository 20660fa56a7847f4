"""Accuracy of long-tailed recognition: many / medium / few, per class, top-k, macro F1.

`LongTailAccuracy` accumulates over batches and, under torch.distributed, over ranks.
`LongTailAccuracyMetric` is the same as a `torchmetrics.Metric`; it is made when first asked for, so
that nothing here needs torchmetrics.

Both keep one int64 tensor of (number of k + 2) x C counters, whatever the number of samples:
per class the hits within the first k, the samples, and how often the class was predicted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ._call.arguments import check_integer
from ._ops.reference import class_indices
from .class_stats import Counts, _as_counts

__all__ = ["LongTailAccuracy", "split_classes"]  # LongTailAccuracyMetric would need torchmetrics


def split_classes(
    counts: Counts, many: float = 100, few: float = 20
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits classes by their number of training samples.

    Many: more than `many` samples; few: fewer than `few`; medium: `few` to `many`, both included
    (Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019). A class
    without training samples is a few-shot class.

    Args:
        counts: (C,) training samples of each class, as in `class_stats`.
        many, few: thresholds, few <= many.

    Returns:
        Three boolean masks of shape (C,), (many, medium, few), on the CPU.

    Raises:
        ValueError, TypeError: `counts` as in `class_stats`; few > many.
    """
    return _split(_as_counts(counts), many, few)


def _split(
    n: torch.Tensor, many: float, few: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not few <= many:
        raise ValueError(f"few must be at most many, got few = {few} and many = {many}")
    return n > many, (n >= few) & (n <= many), n < few


@dataclass(frozen=True)
class _Tally:
    """What both metrics share: logits and targets -> counters -> scores. Holds no counters."""

    num_classes: int
    ks: tuple[int, ...]  # ascending, the first is 1
    splits: dict[str, torch.Tensor]
    ignore_index: int

    @classmethod
    def create(
        cls, train_counts: Counts, topk: int | Iterable[int], many: float, few: float,
        ignore_index: int,
    ) -> _Tally:  # fmt: skip
        n = _as_counts(train_counts, "train_counts")
        single = isinstance(topk, int) or getattr(topk, "ndim", 1) == 0
        several: Any = (topk,) if single else topk
        ks = tuple(check_integer("topk", k) for k in several)
        for k in ks:
            if not 1 <= k <= n.numel():
                raise ValueError(
                    f"topk must be from 1 to {n.numel()} (the number of classes), got {k}"
                )
        masks = dict(zip(("many", "medium", "few"), _split(n, many, few), strict=True))
        ignored = check_integer("ignore_index", ignore_index)
        return cls(n.numel(), tuple(sorted({1, *ks})), masks, ignored)

    def zeros(self) -> torch.Tensor:
        """Counters: a row of hits for every k, then samples, then predictions; (K + 2, C)."""
        return torch.zeros(len(self.ks) + 2, self.num_classes, dtype=torch.int64, device="cpu")

    @torch.no_grad()
    def count(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The counters of one batch, on the batch's device."""
        self._check(prediction, target)
        target, keep = class_indices(target, self.ignore_index)
        target = target[keep]
        self._check_range("target", target)
        prediction = prediction[keep]
        if prediction.is_floating_point():
            predicted, hits = self._rank(prediction, target)
        else:
            predicted = prediction.long()
            self._check_range("prediction", predicted)
            hits = [predicted == target]
        labels = [target[hit] for hit in hits] + [target, predicted]
        # minlength C + 1: rows with NaN predict the class C, which is cut off again.
        counts = [torch.bincount(c, minlength=self.num_classes + 1) for c in labels]
        return torch.stack(counts)[:, : self.num_classes]

    def _rank(
        self, logits: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The predicted classes, and for every k whether the target is among the first k.

        The place of the target is counted, equal logits in the order of their classes, as argmax
        has it: torch.topk leaves ties open, and counting larger logits alone would find the
        target of constant logits always first.
        """
        if logits.numel() == 0:  # argmax refuses it
            nothing = torch.zeros(0, dtype=torch.bool, device=logits.device)
            return target, [nothing for _ in self.ks]
        broken = logits.isnan().any(dim=1)
        predicted = logits.argmax(dim=1).masked_fill(broken, self.num_classes)
        hits = [predicted == target]
        if len(self.ks) > 1:
            own = logits.gather(1, target[:, None])
            before = torch.arange(self.num_classes, device=logits.device) < target[:, None]
            place = ((logits > own) | ((logits == own) & before)).sum(dim=1)
            hits += [(place < k) & ~broken for k in self.ks[1:]]
        return predicted, hits

    def _check(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        for name, value in (("prediction", prediction), ("target", target)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if value.dtype == torch.bool or value.is_complex():
                raise TypeError(f"{name} must have class indices, got dtype {value.dtype}")
        if target.is_floating_point():
            raise TypeError(f"target must have class indices (integers), got dtype {target.dtype}")
        if target.dim() != 1:
            raise ValueError(f"target must have shape (N,), got {tuple(target.shape)}")
        if prediction.device != target.device:
            raise ValueError(
                f"prediction must be on the target's device, {target.device}, got "
                f"{prediction.device}"
            )
        logits = prediction.is_floating_point()
        shape = (len(target), self.num_classes) if logits else (len(target),)
        if prediction.shape != shape:
            raise ValueError(
                f"prediction must have shape {shape} (floating logits are (N, C), predicted "
                f"classes (N,)), got {tuple(prediction.shape)} and dtype {prediction.dtype}"
            )
        if not logits and len(self.ks) > 1:
            raise ValueError(
                f"prediction must be floating logits (N, C) for topk = {self.ks}, got predicted "
                f"classes ({prediction.dtype})"
            )

    def _check_range(self, name: str, classes: torch.Tensor) -> None:
        outside = (classes < 0) | (classes >= self.num_classes)
        if outside.any():
            ignored = f" or ignore_index = {self.ignore_index}" if name == "target" else ""
            raise ValueError(
                f"{name} must have classes from 0 to {self.num_classes - 1}{ignored}, got "
                f"{classes[outside][0].item()}"
            )

    def scores(self, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """float64 CPU scores of accumulated counters; keys as in `LongTailAccuracy.compute`."""
        *hits, samples, predicted = counts.cpu().double()
        tested = samples > 0
        scores: dict[str, torch.Tensor] = {}
        for k, hit in zip(self.ks, hits, strict=True):
            prefix = "" if k == 1 else f"top{k}_"
            per_class = hit / samples  # 0 / 0: NaN where a class has no test sample
            scores[f"{prefix}overall"] = hit.sum() / samples.sum()
            for name, mask in self.splits.items():
                scores[f"{prefix}{name}"] = per_class[mask & tested].mean()
        top1 = hits[0]
        scores["per_class"] = top1 / samples
        # F1 = 2 tp / (2 tp + fp + fn); the denominator is samples + predictions of the class.
        scores["macro_f1"] = (2 * top1 / (samples + predicted))[tested].mean()
        return scores


class LongTailAccuracy:
    """Top-k accuracy, split many / medium / few by training count, over batches and ranks.

    Examples:
        >>> metric = LongTailAccuracy(torch.tensor([500, 60, 3]))
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> metric.compute()["medium"]
        0.5

    Args:
        train_counts: (C,) training samples of each class, as in `class_stats`; zero is allowed.
        topk: the k to report besides 1, each 1 to C.
        many, few: thresholds of `split_classes`.
        ignore_index: target value whose samples are not counted.

    Raises:
        ValueError, TypeError: an argument is not of that form; the message says which.
    """

    def __init__(
        self,
        train_counts: Counts,
        topk: int | Iterable[int] = (1,),
        many: float = 100,
        few: float = 20,
        *,
        ignore_index: int = -100,
    ) -> None:
        self._tally = _Tally.create(train_counts, topk, many, few, ignore_index)
        self._counts = self._tally.zeros()

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        """Adds a batch.

        Equal logits rank in the order of their classes, as in argmax. A row of logits that holds
        NaN is a miss for every k and predicts no class.

        Args:
            prediction: (N, C) floating logits or probabilities, or (N,) predicted classes of an
                integer dtype (top-1 only).
            target: (N,) class indices of an integer dtype, on the same device.

        Raises:
            ValueError: shapes that do not fit, a class outside 0..C-1, different devices.
            TypeError: a dtype that is not one of these.
        """
        batch = self._tally.count(prediction, target)
        # The counters live where the last batch was, so that adding does not copy it to the host.
        self._counts = self._counts.to(batch.device) + batch

    def compute(self, *, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
        """Scores of everything since the last reset, as fractions 0 to 1.

        Where torch.distributed is initialised, the counters of all ranks of `group` are added
        (every rank must call it, and all get the same scores); the own counters stay as they are,
        so it may be called between updates.

        Returns:
            dict: Floats, and one tensor.

              - "overall": correct samples over all samples;
              - "many", "medium", "few": the published split accuracies, the mean over the split's
                classes of the accuracy of each. On a balanced test set that is the share of
                correct samples in the split;
              - "top{k}_overall", "top{k}_many", ... for every k in `topk` besides 1;
              - "per_class": (C,) float64 CPU tensor of top-1 accuracies;
              - "macro_f1": mean over classes of 2 tp / (samples + predictions).

            Classes without test samples are NaN in "per_class" and left out of every mean. A
            split without tested classes is NaN.
        """
        scores = self._tally.scores(_sum_over_ranks(self._counts, group))
        return {k: v.item() if v.dim() == 0 else v for k, v in scores.items()}

    def reset(self) -> None:
        """Forgets every batch."""
        self._counts = self._tally.zeros()


def _sum_over_ranks(counts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return counts
    # A rank that has seen no batch still has its counters on the CPU, where NCCL cannot reduce.
    nccl = "nccl" in dist.get_backend(group)
    total = counts.to("cuda" if nccl and counts.device.type == "cpu" else counts.device, copy=True)
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total


def _torchmetrics_class() -> type:
    try:
        from torchmetrics import Metric
    except ImportError as error:
        raise ImportError(
            "LongTailAccuracyMetric needs torchmetrics, which cannot be imported "
            f"({error}); pip install torchmetrics, or use LongTailAccuracy, which needs nothing"
        ) from error

    class LongTailAccuracyMetric(Metric):
        """`LongTailAccuracy` as a `torchmetrics.Metric`: same arguments, updates and keys.

        compute() returns float32 tensors on the metric's device, as torchmetrics expects. Further
        keyword arguments go to `torchmetrics.Metric`.
        """

        is_differentiable = False
        higher_is_better = True
        full_state_update = False
        counts: torch.Tensor

        def __init__(
            self,
            train_counts: Counts,
            topk: int | Iterable[int] = (1,),
            many: float = 100,
            few: float = 20,
            *,
            ignore_index: int = -100,
            **kwargs: Any,
        ) -> None:
            super().__init__(**kwargs)
            self._tally = _Tally.create(train_counts, topk, many, few, ignore_index)
            self.add_state("counts", self._tally.zeros(), dist_reduce_fx="sum")

        def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
            self.counts = self.counts + self._tally.count(prediction, target)

        def compute(self) -> dict[str, torch.Tensor]:
            scores = self._tally.scores(self.counts)
            return {k: v.to(self.counts.device, torch.float32) for k, v in scores.items()}

    # Pickle looks the class up by name, in a process that may not have made it yet.
    LongTailAccuracyMetric.__qualname__ = "LongTailAccuracyMetric"
    return LongTailAccuracyMetric


def __getattr__(name: str) -> Any:
    if name != "LongTailAccuracyMetric":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _torchmetrics_class()
    return globals()[name]
