"""Data-parallel training with two gloo processes."""

from __future__ import annotations

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


def test_a_detectors_loss_over_all_ranks() -> None:
    with_torchvision.run(_detector, 2)
