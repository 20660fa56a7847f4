"""Losses over a drawn share of the classes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import disalign_ops
from disalign_ops._sharded.sampling import Sample
from support.linear_cases import CALIBRATION, LINEAR, D, Problem
from support.tolerances import assert_close


def test_every_target_is_kept_and_the_rest_has_no_gradient() -> None:
    torch.manual_seed(11)
    p = Problem.of(torch.float64, 10, D, 200)
    x, w, b = (p.tensors[name] for name in LINEAR)
    loss = p.loss(True, sample_rate=0.2, generator=torch.Generator().manual_seed(3))
    grads = dict(zip((*LINEAR, *CALIBRATION), torch.autograd.grad(loss, p.learned(True)),
                     strict=True))  # fmt: skip
    taken = grads["linear_weight"].abs().sum(1) > 0
    assert int(taken.sum()) == 40
    kept = p.target[p.target >= 0]
    assert bool(taken[kept].all())
    for name in ("linear_bias", "scale", "bias"):
        assert not grads[name][~taken].any()

    # What it is: the loss over these classes.
    chosen = taken.nonzero()[:, 0]
    place = torch.full((200,), -1).scatter(0, chosen, torch.arange(40))
    target = torch.where(p.target < 0, -100, place[p.target.clamp(min=0)])
    expected = disalign_ops.disalign_cross_entropy(
        F.linear(x, w[chosen], b[chosen]), target, p.tensors["confidence"],
        p.tensors["scale"][chosen], p.tensors["bias"][chosen],
    )  # fmt: skip
    assert_close(loss, expected, torch.float64, "loss")
    for name, exact in zip(
        (*LINEAR, *CALIBRATION), torch.autograd.grad(expected, p.learned(True)), strict=True
    ):
        assert_close(grads[name], exact, torch.float64, name, 4.0)


def test_the_same_generator_gives_the_same_classes() -> None:
    torch.manual_seed(12)
    p = Problem.of(torch.float64, 10, D, 200)
    losses = [
        p.loss(False, sample_rate=0.2, generator=torch.Generator().manual_seed(seed)).item()
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_others_are_drawn_uniformly() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([7, 7, 3, -100])
    times = torch.zeros(50)
    for _ in range(2000):
        times[Sample.draw(target, 0, 50, -100, 0.3, generator).chosen] += 1
    assert times[7] == times[3] == 2000
    others = torch.cat([times[:3], times[4:7], times[8:]])
    expected = 2000 * 13 / 48  # 15 classes, two of them the targets
    deviation = (2000 * 13 / 48 * 35 / 48) ** 0.5
    assert float((others - expected).abs().max()) < 5 * deviation


def test_all_classes_are_the_loss_itself() -> None:
    torch.manual_seed(13)
    p = Problem.of(torch.float64)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1}
        whole = p.unfused(True, **options)
        assert_close(p.loss(True, sample_rate=1.0, **options), whole, torch.float64, "loss")


def test_more_targets_than_the_rate_has_room_for() -> None:
    torch.manual_seed(14)
    p = Problem.of(torch.float64, 40, D, 60)
    p.target[:] = torch.randperm(60)[:40]
    loss = p.loss(False, sample_rate=0.01)
    grad = torch.autograd.grad(loss, p.tensors["linear_weight"])[0]
    assert int((grad.abs().sum(1) > 0).sum()) == 40
