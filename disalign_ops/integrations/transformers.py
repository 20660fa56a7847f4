"""transformers: the loss of Segformer and UPerNet for Trainer, without upsampled logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from ..denominator import loss_denominator
from ..errors import ArgumentError
from ..upsample import upsample_cross_entropy

Trainer = TypeVar("Trainer")

_NO_ITEM = -100  # what Trainer does not count, whatever ignore_index is


class _SegmentationLoss:
    """What `semantic_segmentation_loss` returns."""

    def __init__(self, weight: Tensor | None, ignore_index: int, options: dict[str, Any]) -> None:
        self.weight, self.ignore_index, self.options = weight, ignore_index, options
        self.denominator: Tensor | None = None  # of the step that `one_denominator` counted last

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        options, weight = dict(self.options), self.weight
        counted = num_items_in_batch is not None and num_items_in_batch is self.denominator
        if counted:  # else another count, as of a batch that is evaluated
            options["normalizer"] = num_items_in_batch
        mean = upsample_cross_entropy(
            logits, labels, None if weight is None else weight.to(logits.device),
            ignore_index=self.ignore_index, align_corners=False, **options,
        )  # fmt: skip
        assert isinstance(mean, Tensor)
        number = not isinstance(options.get("normalizer", "weights"), str)
        if num_items_in_batch is None or counted or number:
            return mean
        share: Tensor = (labels != _NO_ITEM).sum() / num_items_in_batch
        return mean * share


def semantic_segmentation_loss(
    weight: Tensor | None = None, ignore_index: int = 255, **options: Any
) -> Callable[..., Tensor]:
    """A `compute_loss_func` for transformers.Trainer.

    Takes the model's logits at whatever resolution they have (Segformer's at a quarter; UPerNet's
    after `keep_low_resolution`) and the labels (N, H, W) at full size.

    Args:
        weight: (C,) class weights. options: of `upsample_cross_entropy`.

    Trainer adds up the batches of a step (gradient_accumulation_steps, processes) without dividing,
    and says how many labels other than -100 all of them have: num_items_in_batch. It does not say
    their weights, or how many are ignore_index. So a batch's mean counts by its share of these
    labels, and a step is the mean of its batches; `one_denominator` makes it that of its positions.
    If normalizer is a number, each batch's summed loss is divided by that number alone.
    """
    return _SegmentationLoss(weight, ignore_index, options)


def one_denominator(trainer: Trainer) -> Trainer:
    """Makes the step of a Trainer with `semantic_segmentation_loss` the weighted mean of all its
    positions, however gradient accumulation and processes divide them. Changes the Trainer.

    Trainer reads the batches of a step before the first of them is computed (`get_batch_samples`,
    transformers 4.46 and later); their labels give the denominator, which is passed on as
    num_items_in_batch. Evaluation is unchanged. Returns the Trainer.

    Raises ArgumentError: another compute_loss_func, a normalizer that is a number, or ranks that
    have the same batches (tensor or sequence parallel) or share a process (DataParallel).
    """
    parts: Any = trainer
    loss = getattr(trainer, "compute_loss_func", None)
    if not isinstance(loss, _SegmentationLoss):
        raise ArgumentError(
            "trainer must have the compute_loss_func that semantic_segmentation_loss() returns, "
            f"got a {type(loss).__name__}"
        )
    normalizer: Any = loss.options.get("normalizer", "weights")
    if not isinstance(normalizer, str):
        raise ArgumentError(f"normalizer must be a name, got a {type(normalizer).__name__}")
    named: Any = normalizer
    for name in ("tp", "cp", "sp"):
        size = getattr(parts, f"get_{name}_size", lambda: 1)()
        if size > 1:
            raise ArgumentError(
                f"trainer must have batches of its own on every rank, got {name} {size}"
            )
    if parts.args.n_gpu > 1:
        raise ArgumentError(f"trainer must have one GPU a process, got {parts.args.n_gpu}")
    plain = parts.get_batch_samples

    def get_batch_samples(*arguments: Any) -> Any:
        batches, count = plain(*arguments)
        if count is None:  # no labels
            return batches, None
        device = parts.args.device
        # Where Trainer adds up the counts of all processes, it multiplies the loss by their number.
        adds_up = getattr(parts.args, "average_tokens_across_devices", False)
        loss.denominator = loss_denominator(
            [batch["labels"].to(device) for batch in batches],
            None if loss.weight is None else loss.weight.to(device),
            ignore_index=loss.ignore_index, normalizer=named,
            ranks="sum" if adds_up else "mean",
        )  # fmt: skip
        return batches, loss.denominator

    parts.get_batch_samples = get_batch_samples
    return trainer


def keep_low_resolution(model: nn.Module) -> nn.Module:
    """Makes a UperNetForSemanticSegmentation give its logits before it upsamples them, in place.

    Then it computes no loss of its own: labels are `semantic_segmentation_loss`'s. At test time
    `upsample_predict(logits, size)` gives the classes at any size. Returns the model.
    """
    from transformers.modeling_outputs import SemanticSegmenterOutput

    parts: Any = model
    if not hasattr(model, "decode_head") or not hasattr(model, "backbone"):
        raise ArgumentError(
            f"model must be a UperNetForSemanticSegmentation, got a {type(model).__name__}"
        )

    def forward(pixel_values: Tensor, **_: Any) -> Any:
        features = parts.backbone(pixel_values).feature_maps
        return SemanticSegmenterOutput(logits=parts.decode_head(features))

    parts.forward = forward
    return model
