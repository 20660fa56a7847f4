"""return_details of (a, b, lam): what is known of positions with two classes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops import LossDetails
from support import ranks
from support.linear_cases import C, N, Problem
from support.sharded_cases import SHARDS, Whole, options_of, shard_of
from support.tolerances import assert_close

IGNORED = -100


def two(positions: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """With each class alone ignored somewhere, and both, and classes that are the same."""
    a, b = (torch.randint(0, classes, positions) for _ in range(2))
    a.view(-1)[::5] = IGNORED
    b.view(-1)[::4] = IGNORED
    b.view(-1)[1] = a.view(-1)[1]
    return a, b, torch.rand(positions).double()


def check(details: LossDetails, loss: Tensor, each: Tensor, u: Tensor, target: Any) -> None:
    """Against losses without details, and u (positions, C)."""
    a, b, _ = target
    valid = ((a != IGNORED) | (b != IGNORED)).reshape(-1)
    log_p = u.log_softmax(1)
    expected = {
        "loss": loss,
        "position_loss": each,
        "log_sum_exp": torch.where(valid, u.logsumexp(1), 0.0),
        "entropy": torch.where(valid, -(log_p.exp() * log_p).sum(1), 0.0),
    }
    for name, value in expected.items():
        given = getattr(details, name).detach()
        assert name == "loss" or given.shape == a.shape
        assert_close(given.reshape(value.shape), value.detach(), torch.float64, name)
    assert torch.equal(details.prediction.reshape(-1), u.argmax(1))
    assert details.probability is None
    assert details.correct is None


# Of one read, and of two.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weight": True, "sample_weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"weight": True, "label_smoothing": 0.1, "sample_weight": True},
    "margin": {"margin": 0.7, "weight": True},
    "focal": {"focal_gamma": 2.0, "prior": True},
}


def options_for(name: str, classes: int, positions: tuple[int, ...]) -> dict[str, Any]:
    vectors = {
        "weight": torch.rand(classes).double() + 0.1,
        "prior": torch.linspace(-2, 2, classes).double(),
        "sample_weight": torch.rand(positions).double(),
    }
    return {k: vectors[k] if v is True else v for k, v in OPTIONS[name].items()}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("shape", [(23, 41), (2, 7, 3, 5)], ids=str)
def test_of_logits(shape: tuple[int, ...], backend: str, name: str) -> None:
    z = torch.randn(shape).double().requires_grad_()
    classes, positions = shape[1], (shape[0], *shape[2:])
    target = two(positions, classes)
    options = options_for(name, classes, positions)
    u = z.detach().movedim(1, -1).reshape(-1, classes) + options.get("prior", 0.0)
    for reduction in ("mean", "sum", "none"):
        with disalign_ops.set_backend(backend):
            details = disalign_ops.cross_entropy(
                z, target, **options, reduction=reduction, return_details="entropy"
            )
            loss, each = (
                disalign_ops.cross_entropy(z, target, **options, reduction=r)
                for r in (reduction, "none")
            )
        check(details, loss, each.reshape(-1), u, target)
        found, expected = (torch.autograd.grad(value.sum(), z)[0] for value in (details.loss, loss))
        assert torch.equal(found, expected)


def test_one_read_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The details are those of the loss's one operator."""
    from disalign_ops._ops import second_look

    monkeypatch.setattr(second_look, "look", None)
    z, target = torch.randn(9, 17).double(), two((9,), 17)
    details = disalign_ops.cross_entropy(z, target, return_details="entropy")
    assert torch.equal(details.prediction, z.argmax(1))


@pytest.mark.parametrize("chunk_bytes", [1 << 9, 1 << 26], ids=["chunks of classes", "one"])
@pytest.mark.parametrize("name", OPTIONS)
def test_of_a_linear_head(name: str, chunk_bytes: int) -> None:
    p = Problem.of(torch.float64)
    options = options_for(name, C, (N,))
    q = Problem(p.tensors, two((N,), C))  # type: ignore[arg-type]
    for calibrated, reduction in itertools.product((False, True), ("mean", "none")):
        given: Any = q.loss(
            calibrated, chunk_bytes=chunk_bytes, **options, reduction=reduction,
            return_details="entropy",
        )  # fmt: skip
        expected: Any = q.unfused(
            calibrated, **options, reduction=reduction, return_details="entropy"
        )
        for field, value in expected._asdict().items():
            found = getattr(given, field)
            if value is None or not value.is_floating_point():
                assert found is None if value is None else torch.equal(found, value), field
            else:
                assert_close(found.detach(), value.detach(), torch.float64, field)


def _over_ranks(rank: int, world: int) -> None:
    torch.manual_seed(0)
    for sizes in SHARDS[world]:
        for name in ("weights", "both", "margin"):
            given = {
                k: "class" if k in ("weight", "prior") else v for k, v in OPTIONS[name].items()
            }
            given.pop("sample_weight", None)
            whole = Whole(torch.float64, given)
            rows = len(whole.target)
            target = two((rows,), sum(sizes))
            found = disalign_ops.cross_entropy(
                shard_of(whole.logits, rank, sizes, 1), target, **options_of(whole, rank, sizes),
                shard=disalign_ops.Shard(), return_details="entropy",
            )  # fmt: skip
            loss, each = (
                disalign_ops.cross_entropy(whole.logits, target, **{**whole.options, **r})
                for r in ({}, {"reduction": "none"})
            )
            check(found, loss, each, whole.logits.detach(), target)


def test_over_processes() -> None:
    ranks.run(_over_ranks, 2)
