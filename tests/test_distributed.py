"""Data-parallel training with two gloo processes."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import disalign_ops
from support import ranks, with_torchvision
from support.tolerances import assert_close


def _model() -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(3)
    return nn.Linear(6, 17), nn.Linear(6, 1), torch.randn(8, 6), torch.randint(0, 17, (8,))


class _Calibrated(nn.Module):
    def __init__(self, classifier: nn.Linear, confidence: nn.Linear) -> None:
        super().__init__()
        self.classifier, self.confidence = classifier, confidence
        self.scale = nn.Parameter(torch.full((17,), 1.1))
        self.bias = nn.Parameter(torch.full((17,), 0.2))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return disalign_ops.disalign_cross_entropy(
            self.classifier(x), target, self.confidence(x), self.scale, self.bias
        )


def _ddp(rank: int, world: int) -> None:
    classifier, confidence, x, target = _model()
    module = nn.parallel.DistributedDataParallel(_Calibrated(classifier, confidence))
    half = slice(4 * rank, 4 * rank + 4)
    module(x[half], target[half]).backward()
    classifier, confidence, x, target = _model()
    whole = _Calibrated(classifier, confidence)
    whole(x, target).backward()
    parameters = zip(module.module.named_parameters(), whole.parameters(), strict=True)
    for (name, parameter), expected in parameters:
        assert parameter.grad is not None
        assert expected.grad is not None
        assert_close(parameter.grad, expected.grad, torch.float32, name)


def test_ddp_gives_the_gradients_of_the_whole_batch() -> None:
    ranks.run(_ddp, 2)


def _detector() -> None:
    """Rank 0 has boxes of the background alone, whose weights are another sum than rank 1's."""
    from torchvision.models.detection import roi_heads

    from disalign_ops.integrations.torchvision import replace_fastrcnn_loss

    torch.manual_seed(3)
    logits, boxes = torch.randn(6, 4), torch.randn(6, 16)
    labels, targets = torch.tensor([0, 0, 0, 1, 2, 3]), torch.randn(6, 4)
    weight = torch.tensor([1.0, 0.3, 2.0, 9.0])
    layer = nn.Linear(4, 4)
    module = nn.parallel.DistributedDataParallel(layer)
    mine = slice(3, 6) if torch.distributed.get_rank() else slice(0, 3)
    with replace_fastrcnn_loss(weight, all_ranks=True):
        loss, _ = roi_heads.fastrcnn_loss(
            module(logits[mine]), boxes[mine], [labels[mine]], [targets[mine]]
        )
    loss.backward()
    found = layer.weight.grad.clone()
    layer.zero_grad()
    disalign_ops.cross_entropy(layer(logits), labels, weight).backward()
    assert_close(found, layer.weight.grad, torch.float32, "gradient")


def _parts(rank: int) -> tuple[Tensor, Tensor, Tensor, list[int], slice]:
    """x, target, weight of 9 rows in micro-batches, and which of these are this rank's."""
    torch.manual_seed(3)
    target = torch.tensor([0, 1, 1, -100, -100, -100, 2, 0, 3])
    weight = torch.tensor([1.0, 0.3, 2.0, 9.0])
    return torch.randn(9, 4), target, weight, [4, 2, 2, 1], slice(3, 4) if rank else slice(3)


def _gradient_of_all(layer: nn.Linear, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    layer.zero_grad()
    disalign_ops.cross_entropy(layer(x), target, weight).backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


def _trainer(adds_up: bool) -> None:
    """What Trainer calls, in either of its ways to count (average_tokens_across_devices)."""
    from disalign_ops.integrations.transformers import one_denominator, semantic_segmentation_loss

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x, target, weight, cuts, mine = _parts(rank)
    layer = nn.Linear(4, 4)
    module = nn.parallel.DistributedDataParallel(layer)
    loss = semantic_segmentation_loss(weight, ignore_index=-100)
    arguments = {"n_gpu": 1, "device": x.device, "average_tokens_across_devices": adds_up}
    trainer: Any = SimpleNamespace(
        compute_loss_func=loss, args=SimpleNamespace(**arguments),
        get_batch_samples=lambda batches, *_: (batches, torch.tensor(6)),
    )  # fmt: skip
    parts = [
        {"x": z, "labels": t[:, None, None]}
        for z, t in list(zip(x.split(cuts), target.split(cuts), strict=True))[mine]
    ]
    batches, items = one_denominator(trainer).get_batch_samples(parts, len(parts), x.device)
    for k, batch in enumerate(batches):
        with nullcontext() if k == len(batches) - 1 else module.no_sync():
            logits = module(batch["x"])[:, :, None, None]
            value = loss({"logits": logits}, batch["labels"], num_items_in_batch=items)
            (value * world if adds_up else value).backward()
    found = layer.weight.grad.clone()
    assert_close(found, _gradient_of_all(layer, x, target, weight), torch.float32, f"{adds_up}")


def _whole_step_mean() -> None:
    """With a stand-in of Lightning's Callback; two batches a step on both ranks."""
    framework: Any = ModuleType("lightning.pytorch")
    framework.Callback = object
    sys.modules["lightning"], sys.modules["lightning.pytorch"] = ModuleType("lightning"), framework
    from disalign_ops.integrations.lightning import WholeStepMean

    x, target, weight, *_ = _parts(0)
    cuts = [4, 2, 2, 1]
    mine = slice(2, 4) if torch.distributed.get_rank() else slice(2)
    layer = nn.Linear(4, 4)
    module, mean = nn.parallel.DistributedDataParallel(layer), WholeStepMean(weight)
    parts = list(zip(x.split(cuts), target.split(cuts), strict=True))[mine]
    for k, (z, t) in enumerate(parts):
        with nullcontext() if k else module.no_sync():
            mean.add(t)
            loss = disalign_ops.cross_entropy(module(z), t, weight, reduction="sum")
            (loss / 2).backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mean.on_before_optimizer_step(SimpleNamespace(accumulate_grad_batches=2), module, optimizer)
    found = layer.weight.grad.clone()
    assert_close(found, _gradient_of_all(layer, x, target, weight), torch.float32, "gradient")


def _adapters() -> None:
    """One after the other, since processes take longer to start than these to run."""
    _detector()
    _trainer(adds_up=True)
    _trainer(adds_up=False)
    _whole_step_mean()


def test_adapters_divide_by_the_denominator_of_all_ranks() -> None:
    with_torchvision.run(_adapters, 2)
