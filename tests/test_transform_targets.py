"""Losses against what the transforms of mixup and CutMix hand out: class probabilities (N, C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disalign_ops import class_stats, loss_denominator, losses
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentError
from disalign_ops.integrations.timm import GRWLoss
from support import with_torchvision
from support.tolerances import assert_close

COUNTS = torch.tensor([400, 60, 9, 30])
N, C = 6, len(COUNTS)


def of_timm(target: Tensor, lam: float, smoothing: float = 0.1) -> Tensor:
    """What timm.data.Mixup hands out beside the images: float32, smoothed by itself."""
    off = smoothing / C
    one_hot = torch.full((len(target), C), off).scatter_(1, target[:, None], 1.0 - smoothing + off)
    return one_hot * lam + one_hot.flip(0) * (1.0 - lam)


def of_torchvision(target: Tensor, lam: float) -> Tensor:
    """What v2.MixUp hands out, and v2.CutMix, whose lam is the share of the area."""
    one_hot = F.one_hot(target, C).float()
    return one_hot.roll(1, 0).mul_(1.0 - lam).add_(one_hot.mul(lam))


LAMS = {"a mixture": 0.3, "one image": 1.0}
TRANSFORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "timm": of_timm, "torchvision": of_torchvision,
}  # fmt: skip
LOG_PRIOR = class_stats.log_prior(COUNTS, 1.0)
GAIN = (COUNTS / COUNTS.max()) ** 0.3
# The loss, and what F.cross_entropy takes for it: gain and prior of the logits, class weights.
LOSSES: dict[str, tuple[nn.Module, Any, Any, Tensor | None]] = {
    "GRWLoss": (GRWLoss(COUNTS, 1.0), 1.0, 0.0, class_stats.grw_weights(COUNTS, 1.0)),
    "CrossEntropyLoss": (dnn.CrossEntropyLoss(), 1.0, 0.0, None),
    "balanced_softmax": (losses.balanced_softmax(COUNTS), 1.0, COUNTS.log(), None),
    "logit_adjusted": (losses.logit_adjusted(COUNTS), 1.0, LOG_PRIOR, None),
    "class_balanced": (
        losses.class_balanced(COUNTS, 0.99), 1.0, 0.0,
        class_stats.class_balanced_weights(COUNTS, 0.99),
    ),
    "vs": (losses.vs(COUNTS), GAIN, LOG_PRIOR, None),
}  # fmt: skip


def check(name: str, logits: Tensor, target: Tensor) -> None:
    criterion, gain, prior, weight = LOSSES[name]
    z, expected_z = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = (
        criterion(z, target),
        F.cross_entropy(expected_z * gain + prior, target, weight),
    )
    assert_close(found, expected, torch.float32, name)
    found.backward()
    expected.backward()
    assert z.grad is not None
    assert expected_z.grad is not None
    assert_close(z.grad, expected_z.grad, torch.float32, f"gradient of {name}")


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_mixed_targets(name: str, transform: str, lam: str) -> None:
    check(name, torch.randn(N, C), TRANSFORMS[transform](torch.randint(0, C, (N,)), LAMS[lam]))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_accumulated_step(transform: str) -> None:
    """Micro-batches of 4 and 2 samples, of which the mean of means is another loss."""
    target = TRANSFORMS[transform](torch.randint(0, C, (N,)), 0.3)
    logits, criterion = torch.randn(N, C), GRWLoss(COUNTS, 1.0)
    expected = criterion(logits, target)
    parts = target.split(4)
    criterion.normalizer = loss_denominator(parts, criterion.weight)
    assert criterion.normalizer == N
    found = sum(criterion(z, t) for z, t in zip(logits.split(4), parts, strict=True))
    assert_close(found, expected, torch.float32, "loss")


@pytest.mark.parametrize(
    "criterion",
    [losses.focal(), losses.ldam(COUNTS), losses.cosface(), losses.label_aware_smoothing(COUNTS),
     losses.seesaw(C)],
    ids=lambda criterion: type(criterion).__name__,
)  # fmt: skip
def test_a_loss_of_one_class_says_so(criterion: nn.Module) -> None:
    target = of_torchvision(torch.randint(0, C, (N,)), 0.3)
    with pytest.raises(ArgumentError, match="target must hold class indices, got class prob"):
        criterion(torch.randn(N, C), target)


def _transforms_of_torchvision() -> None:
    from torchvision.transforms import v2

    torch.manual_seed(0)
    for transform in (v2.MixUp(num_classes=C), v2.CutMix(num_classes=C)):
        labels = torch.randint(0, C, (N,))
        images, target = transform(torch.rand(N, 3, 8, 8), labels)
        assert images.shape == (N, 3, 8, 8)
        lam = float(target[0, labels[0]]) if labels[0] != labels[-1] else None
        if lam is not None:  # the stand-in is what the transform does
            torch.testing.assert_close(of_torchvision(labels, lam), target)
        for name in LOSSES:
            check(name, images.flatten(1)[:, :C].contiguous(), target)


@pytest.mark.skipif(not with_torchvision.FOUND, reason="no torchvision: make setup")
def test_the_transforms_of_torchvision() -> None:
    with_torchvision.run(_transforms_of_torchvision)
