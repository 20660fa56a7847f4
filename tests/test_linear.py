"""Losses of a linear head without its logits, against the same loss of its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disalign_ops
from disalign_ops import nn as dnn
from disalign_ops._sharded import chunk_plan, chunks
from support.linear_cases import CALIBRATION, LINEAR, C, D, N, Problem
from support.tolerances import assert_close, assert_no_worse

# One row or class at a time, parts of both with a rest, all rows, everything at once.
PLANS = [(1, C), (1, 1), (5, 4), (N, 3), (8, C), (N, C)]


def in_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, classes: int) -> None:
    monkeypatch.setattr(chunk_plan, "plan", lambda *_: chunk_plan.Plan(rows, classes))


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weight": torch.linspace(0, 2, C, dtype=torch.float64)},
    "valid": {"normalizer": "valid", "ignore_index": 3},
    "number": {"normalizer": 17.0},
    "tensor": {"normalizer": torch.tensor(3.0)},
    "everything": {
        "weight": torch.linspace(0.5, 2, C, dtype=torch.float64), "label_smoothing": 0.2,
        "prior": torch.linspace(-1, 1, C, dtype=torch.float64), "margin": 0.4, "focal_gamma": 1.5,
        "sample_weight": torch.linspace(0, 1, N, dtype=torch.float64),
    },
}  # fmt: skip
OPTIONS["everything of each row"] = {**OPTIONS["everything"], "reduction": "none"}


def compare(p: Problem, calibrated: bool, what: str, **options: Any) -> None:
    dtype = p.tensors["features"].dtype
    p.target[p.target < 0] = options.get("ignore_index", -100)
    actual, expected = p.loss(calibrated, **options), p.unfused(calibrated, **options)
    assert_close(actual, expected, dtype, what, 2.0)
    upstream = torch.linspace(-1, 2, actual.numel(), dtype=dtype).reshape(actual.shape)
    learned = p.learned(calibrated)
    grads = torch.autograd.grad(actual, learned, upstream, retain_graph=True)
    for again in (grads, torch.autograd.grad(actual, learned, upstream)):
        exact = torch.autograd.grad(expected, learned, upstream, retain_graph=True)
        for k, (grad, e) in enumerate(zip(again, exact, strict=True)):
            assert_close(grad, e, dtype, f"{what}: gradient {k}", 4.0)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_options_in_chunks(
    plan: tuple[int, int], calibrated: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    in_chunks(monkeypatch, *plan)
    with disalign_ops.set_backend(backend):
        for name, options in OPTIONS.items():
            compare(Problem.of(torch.float64), calibrated, name, **options)


@pytest.mark.parametrize("plan", [(5, 4), (8, C), (N, C)], ids=str)
def test_float32(plan: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    in_chunks(monkeypatch, *plan)
    for name, options in OPTIONS.items():
        given = {
            k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()
        }  # fmt: skip
        compare(Problem.of(torch.float32), True, name, **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", [(5, 4), (3, C), (N, C)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 100], ids=["float32 sums", "half sums"])
def test_half_precision_is_no_worse_than_the_composition(
    plan: tuple[int, int], dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    in_chunks(monkeypatch, *plan)
    p = Problem.of(dtype)
    exact = p.to(torch.float64)
    found, composed, expected = (
        [loss.detach(), *torch.autograd.grad(loss, q.learned(True))]
        for q, loss in (
            (p, p.loss(True, chunk_bytes=chunk_bytes)), (p, p.unfused(True)),
            (exact, exact.unfused(True)),
        )
    )  # fmt: skip
    for k, (a, c, e) in enumerate(zip(found, composed, expected, strict=True)):
        # The gradient of the head is summed over 8 chunks of 3 rows: in its own dtype, 8 roundings.
        several = k == 2 and chunk_bytes == 100 and plan[0] < N
        if several:
            rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
            scale = float(e.abs().max())
            assert float((a.double() - e).abs().max()) <= 4 * rounding * scale
        else:
            assert_no_worse(a, c, e, dtype, f"tensor {k}")


@pytest.mark.parametrize("plan", [(N, C), (5, 4), (1, C)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(plan: tuple[int, int], reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    in_chunks(monkeypatch, *plan)
    p = Problem.of(torch.float64, 6, 3, 5)
    p.target[1] = 4

    def loss(*learned: Tensor) -> Tensor:
        return Problem(dict(zip(p.tensors, learned, strict=True)), p.target).loss(
            True, reduction=reduction, label_smoothing=0.1
        )

    learned = list(p.tensors.values())
    assert torch.autograd.gradcheck(loss, learned)
    assert torch.autograd.gradgradcheck(loss, learned)


@pytest.mark.parametrize("plan", [(N, C), (5, 4)], ids=str)
@pytest.mark.parametrize("learned_scale", [False, True])
def test_cosine(
    plan: tuple[int, int], learned_scale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    in_chunks(monkeypatch, *plan)
    t = Problem.of(torch.float64).tensors
    x, w = t["features"], t["linear_weight"]
    with torch.no_grad():
        x[3] = 0  # a row of zeros is no NaN
    scale = torch.tensor([8.0], dtype=torch.float64, requires_grad=learned_scale)
    target = torch.randint(0, C, (N,))
    learned = [x, w, *([scale] if learned_scale else [])]
    for reduction in ("mean", "none"):
        actual = disalign_ops.linear_cross_entropy(
            x, w, target, reduction=reduction, cosine_scale=scale if learned_scale else 8.0
        )
        logits = F.linear(scale * F.normalize(x), F.normalize(w))
        expected = disalign_ops.cross_entropy(logits, target, reduction=reduction)
        assert_close(actual, expected, torch.float64, "loss")
        upstream = torch.randn_like(actual)
        grads = torch.autograd.grad(actual, learned, upstream)
        for grad, exact in zip(
            grads, torch.autograd.grad(expected, learned, upstream), strict=True
        ):
            assert_close(grad, exact, torch.float64, "gradient", 4.0)


def test_one_row_and_an_empty_batch() -> None:
    p = Problem.of(torch.float64)
    x, w, b = (p.tensors[name] for name in LINEAR)
    alone = disalign_ops.linear_cross_entropy(x[0], w, torch.tensor(2), b)
    assert_close(alone, F.cross_entropy(F.linear(x[0], w, b), torch.tensor(2)), x.dtype, "one row")
    each = disalign_ops.linear_cross_entropy(x[0], w, torch.tensor(2), b, reduction="none")
    assert each.shape == ()
    empty = disalign_ops.linear_cross_entropy(x[:0], w, p.target[:0], b, reduction="sum")
    empty.backward()
    assert float(empty.detach()) == 0
    for t in (w, b):
        assert t.grad is not None
        assert torch.equal(t.grad, torch.zeros_like(t))


def test_each_gradient_alone() -> None:
    torch.manual_seed(3)
    p = Problem.of(torch.float64)
    expected = torch.autograd.grad(p.unfused(True), p.learned(True))
    for wanted, exact in zip((*LINEAR, *CALIBRATION), expected, strict=True):
        frozen = {k: t.detach().requires_grad_(k == wanted) for k, t in p.tensors.items()}
        loss = Problem(frozen, p.target).loss(True)
        loss.backward()
        for name, t in frozen.items():
            if name == wanted:
                assert t.grad is not None
                assert_close(t.grad, exact, torch.float64, wanted, 4.0)
            else:
                assert t.grad is None


def test_two_losses_share_the_features() -> None:
    torch.manual_seed(4)
    p = Problem.of(torch.float64)
    learned = p.learned(True)
    both = p.loss(True) * 2 + p.loss(False, reduction="sum")
    expected = p.unfused(True) * 2 + p.unfused(False, reduction="sum")
    grads = torch.autograd.grad(both, learned)
    for grad, exact in zip(grads, torch.autograd.grad(expected, learned), strict=True):
        assert_close(grad, exact, torch.float64, "gradient", 4.0)


def test_a_batch_of_upstream_gradients() -> None:
    torch.manual_seed(5)
    p = Problem.of(torch.float64)
    learned = p.learned(True)
    for reduction, shape in (("mean", ()), ("none", (N,))):
        upstream = torch.randn(3, *shape, dtype=torch.float64)
        loss, whole = (f(True, reduction=reduction) for f in (p.loss, p.unfused))
        batch = torch.autograd.grad(loss, learned, upstream, is_grads_batched=True)
        for k, one in enumerate(upstream):
            expected = torch.autograd.grad(whole, learned, one, retain_graph=True)
            for grads, exact in zip(batch, expected, strict=True):
                assert_close(grads[k], exact, torch.float64, "gradient", 4.0)


def test_grad_scaling_in_float16_does_not_flush() -> None:
    """A gradient of 1e-8 a row is nothing in float16, until it is scaled."""
    torch.manual_seed(6)
    p = Problem.of(torch.float16)
    scale = 2.0**14
    loss = p.loss(False, normalizer=1e8)
    grads = torch.autograd.grad(loss, p.learned(False), torch.tensor(scale).half())
    exact = p.to(torch.float64)
    expected = torch.autograd.grad(exact.unfused(False, normalizer=1e8), exact.learned(False))
    for grad, e in zip(grads, expected, strict=True):
        error = float((grad.double() / scale - e).abs().max())
        assert error < 0.02 * float(e.abs().max())


def test_autocast() -> None:
    torch.manual_seed(7)
    p = Problem.of(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = p.loss(True)
        expected = p.unfused(True)
    assert loss.dtype == expected.dtype == torch.float32
    grads = torch.autograd.grad(loss, p.learned(True))
    composed = torch.autograd.grad(expected, p.learned(True))
    exact = p.to(torch.float64)
    right = torch.autograd.grad(exact.unfused(True), exact.learned(True))
    for k, (grad, c, e) in enumerate(zip(grads, composed, right, strict=True)):
        assert grad.dtype == torch.float32
        assert_no_worse(grad, c, e, torch.bfloat16, f"gradient {k}")


def test_checkpointing() -> None:
    torch.manual_seed(8)
    p = Problem.of(torch.float64)

    def loss(*_: Tensor) -> Tensor:
        return p.loss(True)

    learned = p.learned(True)
    kept = torch.utils.checkpoint.checkpoint(loss, *learned, use_reentrant=False)
    grads = torch.autograd.grad(kept, learned)
    for grad, exact in zip(grads, torch.autograd.grad(p.loss(True), learned), strict=True):
        assert torch.equal(grad, exact)


def test_transforms_and_forward_mode_go_through_the_logits() -> None:
    torch.manual_seed(9)
    p = Problem.of(torch.float64)
    names = (*LINEAR, *CALIBRATION)

    def loss(*learned: Tensor) -> Tensor:
        return Problem(dict(zip(names, learned, strict=True)), p.target).loss(True)

    given = [p.tensors[name].detach() for name in names]
    grads = torch.func.grad(loss, tuple(range(6)))(*given)
    expected = torch.autograd.grad(p.unfused(True), p.learned(True))
    for grad, exact in zip(grads, expected, strict=True):
        assert_close(grad, exact, torch.float64, "torch.func.grad", 4.0)
    tangents = [torch.randn_like(t) for t in given]
    _, derivative = torch.func.jvp(loss, tuple(given), tuple(tangents))
    along = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    assert_close(derivative, torch.as_tensor(along), torch.float64, "jvp", 4.0)


def test_compile_breaks_the_graph_and_goes_on() -> None:
    torch.manual_seed(10)
    p = Problem.of(torch.float64)
    layer = torch.nn.Linear(D, D, dtype=torch.float64)

    def step(x: Tensor) -> Tensor:
        hidden = layer(x).relu()
        return disalign_ops.linear_cross_entropy(hidden, p.tensors["linear_weight"], p.target) * 2

    x = p.tensors["features"]
    actual = torch.compile(step, backend="eager")(x)
    assert_close(actual, step(x), torch.float64, "loss")
    grads = torch.autograd.grad(actual, [x, *layer.parameters()])
    for grad, e in zip(grads, torch.autograd.grad(step(x), [x, *layer.parameters()]), strict=True):
        assert torch.equal(grad, e)


def wrong(match: str, error: type[Exception] = ValueError, **changed: Any) -> None:
    given: dict[str, Any] = {
        "features": torch.randn(4, 3), "linear_weight": torch.randn(5, 3),
        "target": torch.tensor([0, 1, 2, 4]), **changed,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        disalign_ops.linear_cross_entropy(**given)


def test_wrong_arguments() -> None:
    wrong(
        r"features must have shape \(N, D\) or \(D,\), got \(4, 3, 1\)",
        features=torch.randn(4, 3, 1),
    )
    wrong(r"linear_weight must have shape \(C, 3\) for .*\(4, 3\), got \(5, 4\)",
          linear_weight=torch.ones(5, 4))  # fmt: skip
    wrong(r"linear_weight must have at least one class, got shape \(0, 3\)",
          linear_weight=torch.ones(0, 3))  # fmt: skip
    wrong("linear_weight must have the dtype of features, torch.float32, got torch.f", TypeError,
          linear_weight=torch.ones(5, 3, dtype=torch.float64))  # fmt: skip
    wrong("features must be a torch.Tensor, got a list", TypeError, features=[1.0])
    wrong("features must have dtype float32.*, got torch.int64", TypeError,
          features=torch.ones(4, 3, dtype=torch.int64),
          linear_weight=torch.ones(5, 3, dtype=torch.int64))  # fmt: skip
    wrong(r"linear_bias must have shape \(5,\), got \(4,\)", linear_bias=torch.ones(4))
    wrong("linear_bias must be None where cosine_scale is given, got a bias",
          linear_bias=torch.ones(5), cosine_scale=1.0)  # fmt: skip
    wrong(
        r"cosine_scale must be a number or a tensor of one entry, got shape \(2,\)",
        cosine_scale=torch.ones(2),
    )
    wrong("cosine_scale must be a number >= 0.0, got -1", cosine_scale=-1.0)
    wrong("chunk_bytes must be an integer above 0, got 0", chunk_bytes=0)
    wrong("chunk_bytes must be an integer, got 1000000.0", TypeError, chunk_bytes=1e6)
    wrong("sample_rate must be a number above 0, up to 1, got 0", sample_rate=0.0)
    wrong("sample_rate must be a number from 0.0 to 1.0, got 1.5", sample_rate=1.5)
    wrong(
        "generator must be None without a sample_rate, got a Generator", generator=torch.Generator()
    )
    wrong("target must have the input's shape", target=torch.rand(4, 4))
    wrong(r"target must have shape \(4,\) .*, got \(3,\)", target=torch.tensor([0, 1, 2]))
    wrong(r"weight must have one entry a class \(5\), got 4", weight=torch.ones(4))
    wrong("Target 5 is out of bounds", IndexError, target=torch.tensor([0, 1, 2, 5]))
    wrong("Target -1 is out of bounds", IndexError, target=torch.tensor([0, 1, 2, -1]))
    wrong("label_smoothing must be a number from 0.0 to 1.0, got 2", label_smoothing=2.0)
    wrong("weight must not require a gradient", weight=torch.ones(5, requires_grad=True))


@pytest.mark.parametrize("cls", [dnn.DisAlignLinear, dnn.DisAlignCosineLinear])
@pytest.mark.parametrize("form", ["residual", "interpolated"])
@pytest.mark.parametrize("background", [None, "first"])
def test_a_layers_loss_is_made_in_chunks_where_its_logits_are_large(
    cls: type[nn.Module], form: str, background: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(15)
    layer: Any = cls(D, C, form=form, background=background, dtype=torch.float64)
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, C, (N,))
    learned = [x, *layer.parameters()]
    called = []
    chunked = chunks.loss
    monkeypatch.setattr(chunks, "loss", lambda *a: called.append(1) or chunked(*a))
    losses = [
        layer.loss(x, target, chunk_bytes=n, label_smoothing=0.1, inplace_backward=True)
        for n in (N * C * 8, N * C * 8 - 1)
    ]
    assert len(called) == 1
    assert_close(losses[1], losses[0], torch.float64, "loss")
    in_parts, whole = (torch.autograd.grad(loss, learned) for loss in reversed(losses))
    for grad, exact in zip(in_parts, whole, strict=True):
        assert_close(grad, exact, torch.float64, "gradient", 4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # half the bytes
        layer.float().loss(x.float(), target, chunk_bytes=N * C * 2)
    assert len(called) == 1
