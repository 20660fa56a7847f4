"""Lightning: DisAlign's second stage, and the mean of a whole step, as callbacks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import nn as dnn
from .._call.arguments import is_dtensor
from .._call.types import BatchNormMode, Target
from ..class_stats import Counts
from ..denominator import loss_denominator
from ..errors import ArgumentError
from ..metrics import LongTailAccuracy
from ..nn.stage2 import _layers

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback


class DisAlignStage2(Callback):  # type: ignore[misc]
    """Freezes all but the DisAlign layers' calibration, and logs many / medium / few accuracy.

    Args:
        counts: training samples of each class.
        bn: see `disalign_ops.nn.freeze_for_stage2`.

    The model is frozen in `setup`, before optimizers are made; configure_optimizers may take all
    parameters that require a gradient. validation_step returns a dictionary with "logits" (N, C)
    and "target" (N,); logged are val/overall, val/many, val/medium and val/few, over all ranks, and
    confidence, the DisAlign layers' `mean_confidence()` on rank 0.
    """

    def __init__(self, counts: Counts, bn: BatchNormMode = "eval") -> None:
        self._bn = bn
        self._metric = LongTailAccuracy(counts)

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        if stage == "fit":
            dnn.freeze_for_stage2(pl_module, bn=self._bn)

    def on_validation_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._metric.reset()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if not isinstance(outputs, dict) or not {"logits", "target"} <= set(outputs):
            raise ArgumentError(
                "validation_step must return a dictionary with 'logits' and 'target', got "
                f"{type(outputs).__name__}"
            )
        self._metric.update(outputs["logits"].detach(), outputs["target"])

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for name, value in self._metric.compute().items():
            if name in ("overall", "many", "medium", "few") and _is_number(value):
                pl_module.log(f"val/{name}", float(value), rank_zero_only=True)
        means = [layer.mean_confidence() for layer in _layers(pl_module)]
        known = [mean for mean in means if mean is not None]
        if known:
            pl_module.log("confidence", sum(known) / len(known), rank_zero_only=True)


class WholeStepMean(Callback):  # type: ignore[misc]
    """The mean over all batches and ranks of an optimizer step.

    Lightning averages the losses of accumulate_grad_batches batches and of the ranks. It reads the
    batches of a step one after the other, so that the denominator of all is not known when the
    first loss is computed. With this callback training_step returns the summed loss, and before the
    optimizer's step, and before gradients are clipped, these are divided by what the whole step
    counts:

        def training_step(self, batch, _):
            images, target = batch
            self.mean.add(target)
            return cross_entropy(self(images), target, weight, reduction="sum")

    Args:
        weight, ignore_index, normalizer: as in `disalign_ops.loss_denominator`.

    For automatic optimization with one optimizer, and strategies that average gradients over ranks
    (DDP, FSDP). The loss that Lightning logs is the sum. With several ranks and no accumulation no
    callback is needed: pass `normalizer=loss_denominator(target, weight)` to the loss.
    """

    def __init__(
        self, weight: Tensor | None = None, *, ignore_index: int = -100,
        normalizer: Literal["weights", "valid", "count"] = "weights",
    ) -> None:  # fmt: skip
        self._weight = weight
        self._options: dict[str, Any] = {"ignore_index": ignore_index, "normalizer": normalizer}
        self._total: Tensor | None = None

    def add(self, target: Target, *, sample_weight: Tensor | None = None) -> None:
        """Counts a batch, whose target is as given to the loss; called in each training_step."""
        device = (target[0] if isinstance(target, tuple) else target).device
        weight = None if self._weight is None else self._weight.to(device)
        counted = loss_denominator(
            target, weight, sample_weight=sample_weight, ranks="same", **self._options
        )
        self._total = counted if self._total is None else self._total + counted

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._total = None

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._total is None:
            raise ArgumentError("training_step must call WholeStepMean.add, got no call in a step")
        total, self._total = self._total, None
        factor = trainer.accumulate_grad_batches / _over_ranks(total)
        factor = torch.where(factor.isinf(), 0.0, factor)  # nothing counts
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (grad := parameter.grad) is not None:
                    local = grad.to_local() if is_dtensor(grad) else grad
                    local.mul_(factor.to(local.device))


def _over_ranks(total: Tensor) -> Tensor:
    """The denominator of ranks whose gradients are averaged: one position that weighs `total`."""
    return loss_denominator(total.new_ones(1, dtype=torch.int64), sample_weight=total.reshape(1))


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) or (isinstance(value, Tensor) and value.numel() == 1)
