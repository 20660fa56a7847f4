"""Lightning: DisAlign's second stage as a callback."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import nn as dnn
from .._call.types import BatchNormMode
from ..class_stats import Counts
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


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) or (isinstance(value, Tensor) and value.numel() == 1)
