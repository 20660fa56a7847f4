"""The presets against direct transcriptions of the published formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from disalign_ops import losses
from support.tolerances import assert_close

COUNTS = [500, 3, 120, 41, 3, 77, 1000]
N, C = 12, len(COUNTS)
n = torch.tensor(COUNTS, dtype=torch.float64)
Formula = Callable[[Tensor, Tensor], Tensor]


def mean_of(terms: Callable[[Tensor, int], Tensor]) -> Formula:
    """The mean of a formula of one row of logits and its target."""

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return torch.stack([terms(row, int(t)) for row, t in zip(z, target, strict=True)]).mean()

    return loss


def _softmax_of(u: Tensor, t: int) -> Tensor:
    return u[t].exp() / u.exp().sum()


def _balanced_softmax(z: Tensor, t: int) -> Tensor:
    return -torch.log(n[t] * z[t].exp() / (n * z.exp()).sum())


def _logit_adjusted(z: Tensor, t: int) -> Tensor:
    pi = n / n.sum()
    return torch.log(1 + sum(
        (pi[j] / pi[t]) ** 1.5 * (z[j] - z[t]).exp() for j in range(C) if j != t
    ))  # fmt: skip


def _ldam(z: Tensor, t: int) -> Tensor:
    constant = 0.5 / max(k**-0.25 for k in COUNTS)
    delta = torch.zeros(C, dtype=z.dtype)
    delta[t] = constant * COUNTS[t] ** -0.25
    return -torch.log(_softmax_of(30 * (z - delta), t))


def _cosface(z: Tensor, t: int) -> Tensor:
    top = (64 * (z[t] - 0.35)).exp()
    return -torch.log(top / (top + sum((64 * z[j]).exp() for j in range(C) if j != t)))


def _vs(z: Tensor, t: int) -> Tensor:
    delta = ((1 / n) ** 0.3) / ((1 / n) ** 0.3).min()
    return -torch.log(_softmax_of(z / delta + 0.8 * torch.log(n / n.sum()), t))


def _focal(z: Tensor, t: int) -> Tensor:
    p = _softmax_of(z, t)
    return -((1 - p) ** 2.0) * torch.log(p)


def _label_aware(shape: str) -> Callable[[Tensor, int], Tensor]:
    def loss(z: Tensor, t: int) -> Tensor:
        most, least, k = max(COUNTS), min(COUNTS), COUNTS[t]
        if shape == "concave":
            r = math.sin((k - least) * math.pi / (2 * (most - least)))
        elif shape == "linear":
            r = (k - least) / (most - least)
        else:
            r = 1 + math.sin(1.5 * math.pi + (k - least) * math.pi / (2 * (most - least)))
        e = 0.05 + (0.4 - 0.05) * r
        log_p = torch.log_softmax(z, 0)
        return (1 - e) * -log_p[t] + e * -log_p.mean()

    return loss


def _weighted(weight: Tensor, terms: Callable[[Tensor, int], Tensor]) -> Formula:
    def loss(z: Tensor, target: Tensor) -> Tensor:
        rows = [weight[t] * terms(row, int(t)) for row, t in zip(z, target, strict=True)]
        return torch.stack(rows).sum() / weight[target].sum()

    return loss


def _class_balanced_weight(beta: float) -> Tensor:
    weight = (1 - beta) / (1 - beta**n)
    return weight / weight.sum() * C


def _plain(z: Tensor, t: int) -> Tensor:
    return -torch.log(_softmax_of(z, t))


PRESETS: dict[str, tuple[Any, Formula]] = {
    "balanced_softmax": (losses.balanced_softmax(COUNTS), mean_of(_balanced_softmax)),
    "logit_adjusted": (losses.logit_adjusted(COUNTS, 1.5), mean_of(_logit_adjusted)),
    "ldam": (losses.ldam(COUNTS), mean_of(_ldam)),
    "cosface": (losses.cosface(), mean_of(_cosface)),
    "vs": (losses.vs(COUNTS, 0.3, 0.8), mean_of(_vs)),
    "focal": (losses.focal(2.0), mean_of(_focal)),
    "class_balanced": (
        losses.class_balanced(COUNTS, 0.99),
        _weighted(_class_balanced_weight(0.99), _plain),
    ),
    "class-balanced focal": (
        losses.class_balanced(COUNTS, 0.99, focal_gamma=2.0),
        _weighted(_class_balanced_weight(0.99), _focal),
    ),
    **{
        f"label_aware_smoothing {shape}": (
            losses.label_aware_smoothing(COUNTS, 0.4, 0.05, shape=shape),
            mean_of(_label_aware(shape)),
        )
        for shape in ("concave", "linear", "convex")
    },
}


def problem(cosines: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z = torch.randn(N, C, dtype=torch.float64) * 2
    z = F.normalize(z, dim=1) if cosines else z
    return z.requires_grad_(), torch.arange(N) % C


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_formula(name: str) -> None:
    criterion, formula = PRESETS[name]
    z, target = problem(cosines=name in ("ldam", "cosface"))
    actual, expected = criterion(z, target), formula(z, target)
    # The modules' own numbers (priors, margins, weights) are float32.
    torch.testing.assert_close(actual, expected, rtol=3e-6, atol=1e-7)
    grad = torch.autograd.grad(actual, z)[0]
    exact = torch.autograd.grad(expected, z)[0]
    torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", PRESETS)
def test_reduction_none_and_ignored_rows(name: str) -> None:
    given, formula = PRESETS[name]
    z, target = problem(cosines=name in ("ldam", "cosface"))
    target = target.clone()
    target[::3] = -100
    try:
        given.reduction = "none"
        each = given(z, target)
    finally:
        given.reduction = "mean"
    assert torch.equal(each[::3], torch.zeros(4, dtype=z.dtype))
    kept = target >= 0
    torch.testing.assert_close(given(z, target), formula(z[kept], target[kept]),
                               rtol=3e-6, atol=1e-7)  # fmt: skip


def test_ldam_defers_its_weights() -> None:
    z, target = problem(cosines=True)
    criterion = losses.ldam(COUNTS, beta=0.99, deferred_until=3)
    assert isinstance(criterion, losses.DeferredLoss)
    for epoch in range(5):
        criterion.set_epoch(epoch)
        weight = torch.ones(C, dtype=z.dtype) if epoch < 3 else _class_balanced_weight(0.99)
        expected = _weighted(weight, _ldam)(z, target)
        torch.testing.assert_close(criterion(z, target), expected, rtol=3e-6, atol=1e-7)


def _seesaw_of_the_released_code(
    z: Tensor, labels: Tensor, seen: Tensor, p: float, q: float, eps: float
) -> Tensor:
    one_hot = F.one_hot(labels, C)
    weights = torch.ones_like(z)
    ratio = seen[None, :].clamp(min=1) / seen[:, None].clamp(min=1)
    below = (ratio < 1.0).to(z.dtype)
    weights = weights * (ratio.pow(p) * below + (1 - below))[labels]
    scores = torch.softmax(z.detach(), 1)
    own = scores[torch.arange(len(scores)), labels]
    matrix = scores / own[:, None].clamp(min=eps)
    above = (matrix > 1.0).to(z.dtype)
    weights = weights * (matrix.pow(q) * above + (1 - above))
    return F.cross_entropy(z + weights.log() * (1 - one_hot), labels)


@pytest.mark.parametrize("eps", [1e-2, 0.0])
def test_seesaw_is_the_released_code(eps: float) -> None:
    criterion = losses.seesaw(C, 0.8, 2.0, eps=eps)
    seen = torch.zeros(C, dtype=torch.float64)
    for step in range(3):
        torch.manual_seed(step)
        z = (torch.randn(N, C, dtype=torch.float64) * 3).requires_grad_()
        target = torch.multinomial(n, N, replacement=True)
        seen += torch.bincount(target, minlength=C)
        actual = criterion(z, target)
        expected = _seesaw_of_the_released_code(z, target, seen, 0.8, 2.0, eps)
        assert_close(actual, expected, torch.float64, "loss", 4.0)
        grads = [torch.autograd.grad(loss, z)[0] for loss in (actual, expected)]
        assert_close(grads[0], grads[1], torch.float64, "gradient", 4.0)
    assert torch.equal(criterion.cumulative_samples, seen)
    criterion.eval()
    criterion(z, target)
    assert torch.equal(criterion.cumulative_samples, seen)
    assert "cumulative_samples" in criterion.state_dict()


def test_seesaw_does_not_count_ignored_rows() -> None:
    criterion = losses.seesaw(C)
    z, target = problem()
    target = target.clone()
    target[:5] = -100
    loss = criterion(z, target)
    other = losses.seesaw(C)
    assert_close(loss, other(z[5:], target[5:]), torch.float64, "loss")
    assert torch.equal(criterion.cumulative_samples, other.cumulative_samples)


def test_scaled_logits_are_not_copied() -> None:
    from support.comparison import memory_held

    z = torch.randn(256, 4096, requires_grad=True)
    target = torch.zeros(256, dtype=torch.int64)
    criterion = losses.cosface()
    criterion(z, target)
    held = memory_held(lambda: torch.autograd.grad(criterion(z, target), z))
    assert held < 1.2 * z.numel() * 4  # the gradient


def test_seesaw_takes_two_tensors_of_the_logits_size() -> None:
    from support.comparison import memory_held

    z = torch.randn(256, 4096, requires_grad=True)
    target = torch.zeros(256, dtype=torch.int64)
    criterion = losses.seesaw(4096)
    criterion(z, target)
    held = memory_held(lambda: torch.autograd.grad(criterion(z, target), z))
    assert held < 3.1 * z.numel() * 4  # and the gradient


def test_dense_logits() -> None:
    z = torch.randn(2, C, 3, 4, dtype=torch.float64)
    target = torch.randint(0, C, (2, 3, 4))
    rows = z.movedim(1, -1).reshape(-1, C)
    for name, (criterion, formula) in PRESETS.items():
        torch.testing.assert_close(
            criterion(z, target), formula(rows, target.reshape(-1)), rtol=3e-6, atol=1e-7, msg=name
        )


def test_wrong_arguments() -> None:
    for wrong, match in (
        (lambda: losses.cosface(scale=0.0), r"scale must be .* above 0, got 0\.0"),
        (lambda: losses.ldam(COUNTS, scale=-1), "scale must be a finite number above 0, got -1"),
        (lambda: losses.ScaledCrossEntropyLoss(math.inf), "gain must be a finite number"),
        (lambda: losses.cosface(margin=-1.0), "margin must be a number >= 0.0, got -1"),
        (lambda: losses.ldam([3, 0, 2]), "counts must have .*, got 0 for class 1"),
        (lambda: losses.seesaw(0), "classes must be 1 or more, got 0"),
        (
            lambda: losses.seesaw(C)(torch.randn(2, 3), torch.tensor([0, 1])),
            r"must have shape \(N, 7\)",
        ),
        (lambda: losses.label_aware_smoothing(COUNTS, 1.5), "smooth_head must be a number from"),
        (
            lambda: losses.label_aware_smoothing(COUNTS, shape="round"),
            "shape must be .*, got 'round'",
        ),  # type: ignore[arg-type]
        (
            lambda: losses.label_aware_smoothing(COUNTS, label_smoothing=0.1),
            "which this loss does not take",
        ),
        (lambda: losses.vs(COUNTS, gamma=-1.0), "gamma must be a number >= 0.0, got -1"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()


# --- label-aware smoothing


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sampled", [None, (N,), (N, 1)])
def test_label_aware_smoothing_divides_by_one_denominator(
    weighted: bool, sampled: tuple[int, ...] | None
) -> None:
    z, target = problem()
    target = target.clone()
    target[::5] = -100
    options: dict[str, Any] = {"weight": torch.rand(C)} if weighted else {}
    v = None if sampled is None else torch.rand(sampled, dtype=torch.float64)
    each = losses.label_aware_smoothing(COUNTS, reduction="none", **options)(
        z, target, sample_weight=v
    )
    criterion = losses.label_aware_smoothing(COUNTS, normalizer="weights", **options)
    share = torch.ones(N, dtype=torch.float64) if v is None else v.reshape(-1)
    kept = target >= 0
    if weighted:
        share = share * options["weight"][target.clamp(min=0)]
    expected = each.sum() / share[kept].sum()
    actual = criterion(z, target, sample_weight=v)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(torch.autograd.grad(actual, z), torch.autograd.grad(expected, z), strict=True):
        torch.testing.assert_close(a, e)


def test_label_aware_smoothing_with_one_smoothing_is_torchs() -> None:
    z, target = problem()
    weight = torch.rand(C, dtype=torch.float64)
    criterion = losses.label_aware_smoothing([5] * C, 0.2, normalizer="weights", weight=weight)
    expected = F.cross_entropy(z, target, weight, label_smoothing=0.2)
    torch.testing.assert_close(criterion(z, target), expected)


@pytest.mark.parametrize(("normalizer", "value"), [("weights", math.nan), ("valid", 0.0)])
def test_label_aware_smoothing_of_nothing(normalizer: str, value: float) -> None:
    z, _ = problem()
    criterion = losses.label_aware_smoothing(COUNTS, normalizer=normalizer)
    loss = criterion(z, torch.full((N,), -100))
    torch.testing.assert_close(loss.item(), value, equal_nan=True)
    assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


@pytest.mark.parametrize("normalizer", ["valid", "weights"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_label_aware_smoothing_in_half_precision(dtype: torch.dtype, normalizer: str) -> None:
    criterion = losses.label_aware_smoothing(COUNTS, normalizer=normalizer)
    z, target = problem()
    half = z.detach().to(dtype).requires_grad_()
    exact = criterion(half.detach().double(), target)
    loss = criterion.to(dtype)(half, target)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert torch.autograd.grad(loss, half)[0].isfinite().all()


@pytest.mark.parametrize("name", ["label_aware_smoothing concave", "vs", "ldam", "class_balanced"])
def test_export(name: str) -> None:
    criterion = PRESETS[name][0]
    z, target = problem()
    rows = torch.export.Dim("rows")
    program = torch.export.export(
        criterion, (z.detach(), target), dynamic_shapes=({0: rows}, {0: rows})
    )
    torch.testing.assert_close(program.module()(z[:5], target[:5]), criterion(z[:5], target[:5]))
