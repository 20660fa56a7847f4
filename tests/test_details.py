"""return_details: what a loss knows of every position besides its value."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops import LossDetails
from disalign_ops._ops import reference
from disalign_ops.errors import ArgumentError
from support import ranks
from support.cases import rows
from support.dense_cases import dense
from support.linear_cases import C, N, Problem
from support.sharded_cases import SHARDS, Whole, options_of, shard_of
from support.tolerances import assert_close


def found(p: Any, calibrated: bool, which: Any = True, target: Any = None) -> LossDetails:
    target = p.target if target is None else target
    if calibrated:
        return disalign_ops.disalign_cross_entropy(
            p.logits, target, p.confidence, p.scale, p.bias, form="residual", **p.options,
            return_details=which,
        )  # fmt: skip
    return disalign_ops.cross_entropy(p.logits, target, **p.options, return_details=which)


def plain(p: Any, calibrated: bool, **others: Any) -> Tensor:
    options = {**p.options, **others}
    with disalign_ops.set_backend("reference"):
        if calibrated:
            return disalign_ops.disalign_cross_entropy(
                p.logits, p.target, p.confidence, p.scale, p.bias, form="residual", **options
            )
        return disalign_ops.cross_entropy(p.logits, p.target, **options)


@pytest.mark.parametrize("backend", ["native", "reference", "auto"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_field(dtype: torch.dtype, planes: bool, calibrated: bool, backend: str) -> None:
    shape = (3, 18, 2, 5) if planes else (9, 18)
    for reduction, margin, prior, sampled in itertools.product(
        ("mean", "none"), (None, 0.7), (False, True), (False, True)
    ):
        p: Any = dense(shape, dtype=dtype) if planes else rows(*shape, dtype)
        p.target.view(-1)[::4] = -100
        p.options = {
            "reduction": reduction, "margin": margin, "label_smoothing": 0.1,
            "weight": torch.rand(18).to(dtype) + 0.1,
            "prior": torch.linspace(-3, 3, 18).to(dtype) if prior else None,
            "sample_weight": torch.rand(p.target.shape).to(dtype) if sampled else None,
        }  # fmt: skip
        with disalign_ops.set_backend(backend):
            details = found(p, calibrated, "entropy")
        z = p.logits.detach().movedim(1, -1).reshape(-1, 18)
        a = (p.scale, p.bias, p.confidence.reshape(-1)) if calibrated else (None, None, None)
        u = reference.calibrated_logits(z, *a, p.options["prior"]).detach()
        target = p.target.reshape(-1)
        valid = target != -100
        log_p = u.log_softmax(1)
        t = torch.where(valid, target, 0)[:, None]
        expected = {
            "position_loss": plain(p, calibrated, reduction="none").detach().reshape(-1),
            "log_sum_exp": torch.where(valid, u.logsumexp(1), 0.0),
            "probability": torch.where(valid, log_p.gather(1, t)[:, 0].exp(), 0.0),
            "entropy": -(log_p.exp() * log_p).sum(1),
        }
        for name, value in expected.items():
            given = getattr(details, name)
            assert given.shape == p.target.shape
            assert not given.requires_grad
            assert_close(given.reshape(-1), value, dtype, name)
        assert torch.equal(details.prediction.reshape(-1), u.argmax(1))
        assert details.correct is not None
        assert torch.equal(details.correct.reshape(-1), (u.argmax(1) == target) & valid)
        assert_close(details.loss.detach(), plain(p, calibrated).detach(), dtype, "loss")


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_loss_keeps_its_gradients(calibrated: bool) -> None:
    r = rows(9, 67)
    learned = r.learned if calibrated else [r.logits]
    details = found(r, calibrated)
    assert details.entropy is None
    gradients = torch.autograd.grad(details.loss, learned)
    expected = torch.autograd.grad(plain(r, calibrated), learned)
    for a, e in zip(gradients, expected, strict=True):
        assert_close(a, e, torch.float64, "gradient")


def test_class_probabilities_have_no_one_target() -> None:
    z = torch.randn(4, 5, requires_grad=True)
    details = disalign_ops.cross_entropy(z, torch.rand(4, 5), return_details=True)
    assert details.probability is None
    assert details.correct is None
    assert torch.equal(details.prediction, z.argmax(1))
    assert_close(details.log_sum_exp, z.detach().logsumexp(1), torch.float32, "log_sum_exp")


def test_compiled() -> None:
    z, t = torch.randn(4, 5, requires_grad=True), torch.tensor([1, 2, 3, -100])

    def both(z: Tensor) -> Any:
        return disalign_ops.cross_entropy(z, t, return_details=True)

    eager = both(z)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(z)
    for name in ("loss", "position_loss", "log_sum_exp", "probability", "prediction", "correct"):
        assert torch.equal(getattr(compiled, name), getattr(eager, name)), name


@pytest.mark.parametrize("which", [True, "entropy"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 4), (2, 5, 0)], ids=str)
def test_an_empty_batch(shape: tuple[int, ...], which: Any) -> None:
    z = torch.empty(shape, dtype=torch.bfloat16)
    positions = (shape[0], *shape[2:])
    t, v = torch.empty(positions, dtype=torch.int64), torch.empty(positions)
    prior, vector = torch.zeros(5), torch.ones(5)
    for details in (
        disalign_ops.cross_entropy(z, t, reduction="sum", return_details=which),
        disalign_ops.cross_entropy(z, t, reduction="sum", prior=prior, return_details=which),
        disalign_ops.disalign_cross_entropy(
            z, t, v, vector, vector, reduction="sum", return_details=which
        ),
    ):
        assert details.loss == 0
        for value in details[1:]:
            assert value is None or value.shape == positions
        assert which is True or details.entropy.dtype is torch.float32  # as of other batches


@pytest.mark.parametrize("margin", [0.5, 30.0, 60.0, 100.0])
def test_a_margin_beyond_the_range_of_exp(margin: float) -> None:
    z, t = torch.randn(7, 11), torch.arange(7)
    margins = torch.full((11,), 0.5)
    margins[::2] = margin
    details = disalign_ops.cross_entropy(z, t, margin=margins, return_details=True)
    assert details.probability is not None
    assert_close(details.log_sum_exp, z.logsumexp(1), torch.float32, "log_sum_exp")
    expected = z.softmax(1).gather(1, t[:, None])[:, 0]
    assert_close(details.probability, expected, torch.float32, "probability")


@pytest.mark.parametrize("chunk_bytes", [1 << 9, 1 << 26], ids=["chunks of classes", "one"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_linear_head(calibrated: bool, chunk_bytes: int) -> None:
    p = Problem.of(torch.float64)
    for margin, soft, reduction in itertools.product((None, 0.7), (False, True), ("mean", "none")):
        if soft and margin:
            continue
        q = Problem(p.tensors, torch.rand(N, C, dtype=torch.float64) if soft else p.target)
        options: dict[str, Any] = {
            "margin": margin, "label_smoothing": 0.1, "reduction": reduction,
            "prior": torch.linspace(-3, 3, C, dtype=torch.float64),
            "sample_weight": torch.rand(N, dtype=torch.float64), "return_details": True,
        }  # fmt: skip
        given: Any = q.loss(calibrated, chunk_bytes=chunk_bytes, **options)
        expected: Any = q.unfused(calibrated, **options)
        compare_details(given, expected)
        (found,) = torch.autograd.grad(given.loss.sum(), p.tensors["features"], retain_graph=True)
        (wanted,) = torch.autograd.grad(expected.loss.sum(), p.tensors["features"])
        assert_close(found, wanted, torch.float64, "gradient")


def compare_details(found: Any, expected: LossDetails) -> None:
    for name, value in expected._asdict().items():
        given = getattr(found, name)
        if value is None or not value.is_floating_point():
            assert given is None if value is None else torch.equal(given, value), name
        else:
            assert_close(given.detach(), value.detach(), torch.float64, name)


def _over_ranks(rank: int, world: int) -> None:
    torch.manual_seed(0)
    for sizes in SHARDS[world]:
        for soft in (False, True):
            whole = Whole(torch.float64, {"weight": "class", "prior": "class"})
            target = torch.rand(len(whole.target), sum(sizes)).double() if soft else whole.target
            a, b = (shard_of(t, rank, sizes) for t in (whole.scale, whole.bias))
            found = disalign_ops.disalign_cross_entropy(
                shard_of(whole.logits, rank, sizes, 1),
                target.split(sizes, 1)[rank] if soft else target,
                whole.confidence, a, b, **options_of(whole, rank, sizes),
                shard=disalign_ops.Shard(), return_details=True,
            )  # fmt: skip
            expected = disalign_ops.disalign_cross_entropy(
                whole.logits, target, whole.confidence, whole.scale, whole.bias, **whole.options,
                return_details=True,
            )  # fmt: skip
            compare_details(found, expected)


def test_over_processes() -> None:
    ranks.run(_over_ranks, 2)


def test_a_sample_of_the_classes_has_none() -> None:
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ArgumentError, match=r"^return_details must be False where sample_rate"):
        disalign_ops.linear_cross_entropy(x, w, TARGET, sample_rate=0.5, return_details=True)


TARGET = torch.zeros(4, dtype=torch.int64)
REFUSED: dict[str, dict[str, Any]] = {
    "a word": {"return_details": "all"},
    "a number": {"return_details": 2},
    "two classes": {"return_details": True, "target": (TARGET, TARGET, 0.5)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    given = {"target": TARGET, **REFUSED[case]}
    with pytest.raises(ArgumentError, match=r"^return_details must be False"):
        disalign_ops.cross_entropy(torch.randn(4, 5), **given)
