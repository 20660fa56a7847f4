"""Gradients under whatever surrounds them: upstream factors, graphs kept, scalers, checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import disalign_ops
from support.cases import Rows, rows
from support.tolerances import assert_close


def loss_of(z: Tensor, *calibration: Tensor, reduction: str = "mean", **options: object) -> Tensor:
    target = torch.arange(z.shape[0]) % z.shape[1]
    options = {"label_smoothing": 0.1, "reduction": reduction, **options}
    if not calibration:
        return disalign_ops.cross_entropy(z, target, **options)  # type: ignore[arg-type]
    return disalign_ops.disalign_cross_entropy(
        z, target, *calibration, form="residual", **options  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", [{}, {"focal_gamma": 2.0}, {"margin": 0.5}])
def test_gradcheck_and_gradgradcheck(backend: str, reduction: str, extra: dict[str, float]) -> None:
    r = rows(4, 7)

    def loss(*learned: Tensor) -> Tensor:
        return loss_of(*learned, reduction=reduction, **extra)

    assert torch.autograd.gradcheck(loss, r.learned)
    assert torch.autograd.gradgradcheck(loss, r.learned)


@pytest.mark.parametrize("background", [None, "first", "last"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_the_interpolated_form(
    backend: str, reduction: str, background: str | None
) -> None:
    r = rows(4, 7)
    calibrated = 7 if background is None else 6
    learned = [
        *r.learned[:2],
        *(t.detach()[:calibrated].clone().requires_grad_() for t in (r.scale, r.bias)),
    ]

    def loss(*learned: Tensor) -> Tensor:
        return disalign_ops.disalign_cross_entropy(
            learned[0], r.target, *learned[1:], reduction=reduction, background=background
        )

    assert torch.autograd.gradcheck(loss, learned)
    assert torch.autograd.gradgradcheck(loss, learned)


def test_gradcheck_of_calibrate(backend: str) -> None:
    r = rows(4, 7)
    for form in ("interpolated", "residual"):

        def calibrated(*learned: Tensor, form: str = form) -> Tensor:
            return disalign_ops.calibrate(*learned, form=form)

        assert torch.autograd.gradcheck(calibrated, r.learned)
        assert torch.autograd.gradgradcheck(calibrated, r.learned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upstream_gradient_that_is_not_one(dtype: torch.dtype) -> None:
    r = rows(5, 33, torch.float32).to(dtype)
    once, scaled = (
        torch.autograd.grad(loss_of(*r.learned, gradient="backward") * factor, r.learned)
        for factor in (1, -8)  # 8: exact in every dtype
    )
    for a, b in zip(once, scaled, strict=True):
        assert torch.equal(a * -8, b)
    in_forward = torch.autograd.grad(loss_of(*r.learned) * -8, r.learned)
    for a, b in zip(in_forward, scaled, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5 if dtype == torch.float32 else 2.0**-7, atol=1e-6
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retain_graph_yields_the_same_gradients_again(reduction: str) -> None:
    r = rows(5, 33, torch.float32)
    loss = loss_of(*r.learned, reduction=reduction).sum()
    first = torch.autograd.grad(loss, r.learned, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # what a caller does with its gradients must not show in the next backward
    second = torch.autograd.grad(loss, r.learned, retain_graph=True)
    third = torch.autograd.grad(loss * 3, r.learned)
    for what, k, s, t in zip(("input", "c", "a", "b"), kept, second, third, strict=True):
        assert_close(s, k, torch.float32, what)
        assert_close(t, 3 * k, torch.float32, what)


def test_backward_twice_without_retain_graph_raises() -> None:
    z = torch.randn(3, 5, requires_grad=True)
    loss = loss_of(z)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_accumulate_in_a_leaf() -> None:
    z = torch.randn(3, 5, requires_grad=True)
    loss_of(z).backward()
    assert z.grad is not None
    once = z.grad.clone()
    loss_of(z).backward()
    assert_close(z.grad, 2 * once, torch.float32, "accumulated")


def test_two_losses_share_one_logits_tensor() -> None:
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    z = x * 1.5
    t = torch.tensor([0, 1, 2, 3])
    (ours,) = torch.autograd.grad(
        disalign_ops.cross_entropy(z, t) + 2 * disalign_ops.cross_entropy(z, t + 1), x
    )
    z = x * 1.5
    (expected,) = torch.autograd.grad(F.cross_entropy(z, t) + 2 * F.cross_entropy(z, t + 1), x)
    assert_close(ours, expected, torch.float64, "two losses")


def test_logits_changed_between_forward_and_backward_raise() -> None:
    x = torch.randn(4, 9, requires_grad=True)
    z = x * 1.0
    loss = disalign_ops.cross_entropy(z, torch.tensor([0, 1, 2, 3]))
    z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_backward_gave_away_may_be_changed() -> None:
    r = rows(9, 67, torch.float32)
    loss = disalign_ops.disalign_cross_entropy(
        r.logits, r.target, r.confidence, r.scale, r.bias, form="residual"
    )
    first = torch.autograd.grad(loss, r.learned, retain_graph=True)
    expected = [g.clone() for g in first]
    for grad in first:
        grad.fill_(float("nan"))
    for k, tensor in enumerate(r.learned):  # one alone, then all again
        (alone,) = torch.autograd.grad(loss, tensor, retain_graph=True)
        assert_close(alone, expected[k], torch.float32, f"gradient {k}")
    for again, once in zip(torch.autograd.grad(loss, r.learned), expected, strict=True):
        assert_close(again, once, torch.float32, "again")


def test_a_backward_that_failed_may_be_repeated() -> None:
    r = rows(9, 67, torch.float32)

    def calibrated() -> Tensor:
        return disalign_ops.disalign_cross_entropy(
            r.logits, r.target, r.confidence, r.scale, r.bias, form="residual"
        )

    def plain() -> Tensor:
        return disalign_ops.cross_entropy(r.logits, r.target)

    for make, learned in ((calibrated, r.learned), (plain, [r.logits])):
        expected = torch.autograd.grad(make(), learned)
        failures = [MemoryError("once")]

        def fail(*_: object, failures: list[MemoryError] = failures) -> None:
            if failures:
                raise failures.pop()

        loss = make()
        assert loss.grad_fn is not None
        loss.grad_fn.register_hook(fail)
        with pytest.raises(MemoryError, match="once"):
            torch.autograd.grad(loss, learned, torch.tensor(4.0))
        again = torch.autograd.grad(loss, learned, torch.tensor(4.0))
        for grad, e in zip(again, expected, strict=True):
            assert_close(grad, 4 * e, torch.float32, "after a failure")


@pytest.mark.parametrize("surroundings", ["vmap", "make_fx", "fake tensors"])
@pytest.mark.parametrize("what", ["plain", "calibrated", "frozen logits"])
def test_an_upstream_gradient_without_a_value(what: str, surroundings: str) -> None:
    r = rows(9, 67, torch.float32)
    if what == "frozen logits":
        r.logits = r.logits.detach()

    def grads(r: Rows, factor: Tensor | None = None) -> tuple[Tensor, ...]:
        learned = [t for t in r.learned if t.requires_grad]
        if what == "plain":
            loss, learned = disalign_ops.cross_entropy(r.logits, r.target), [r.logits]
        else:
            loss = disalign_ops.disalign_cross_entropy(
                r.logits, r.target, r.confidence, r.scale, r.bias, form="residual"
            )
        if factor is None:
            return torch.autograd.grad(loss, learned)
        return torch.vmap(lambda f: torch.autograd.grad(loss, learned, f))(factor)

    expected = grads(r)
    if surroundings == "vmap":
        factors = torch.tensor([1.0, -2.0, 3.0])
        for batch, e in zip(grads(r, factors), expected, strict=True):
            for one, factor in zip(batch, factors, strict=True):
                assert_close(one, factor * e, torch.float32, surroundings)
    elif surroundings == "make_fx":
        for a, e in zip(make_fx(lambda: grads(r))()(), expected, strict=True):
            assert_close(a, e, torch.float32, surroundings)
    else:
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(t) for t in r.learned]
            found = grads(Rows(fake[0], mode.from_tensor(r.target), *fake[1:]))
        assert [g.shape for g in found] == [e.shape for e in expected]


def test_one_gradient_after_another() -> None:
    r = rows(9, 67, torch.float32)
    loss = disalign_ops.disalign_cross_entropy(
        r.logits, r.target, r.confidence, r.scale, r.bias, form="residual"
    )
    alone = [torch.autograd.grad(2 * loss, t, retain_graph=True)[0] for t in r.learned]
    for a, e in zip(alone, torch.autograd.grad(loss, r.learned), strict=True):
        assert_close(a, 2 * e, torch.float32, "one after another")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradients_are_the_callers_to_change(reduction: str) -> None:
    r = rows(9, 67, torch.float32)
    scale, bias = (t.detach()[1:].clone().requires_grad_() for t in (r.scale, r.bias))
    loss = disalign_ops.disalign_cross_entropy(
        r.logits, r.target, r.confidence, scale, bias, background="first", reduction=reduction
    )
    for grad in torch.autograd.grad(loss.sum(), [r.logits, r.confidence, scale, bias]):
        grad.mul_(torch.ones((), requires_grad=True))
        grad.detach_()


@pytest.mark.parametrize("form", ["interpolated", "residual"])
def test_a_scale_changed_between_forward_and_backward_raises(form: str) -> None:
    z, confidence, bias = torch.randn(4, 9), torch.randn(4), torch.zeros(9)
    scale = torch.ones(9, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])
    loss = disalign_ops.disalign_cross_entropy(z, target, confidence, scale, bias, form=form)
    with torch.no_grad():
        scale.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_made_with_the_grad_scalers_factor_known(dtype: torch.dtype) -> None:
    # At 2^-24 / N of the loss an fp16 gradient flushes to zero; times 2^16 it does not.
    x = (torch.randn(256, 512) * 0.01).requires_grad_()
    model = torch.nn.Linear(512, 1024, bias=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    z = (x @ model.weight.t()).to(dtype)
    target = torch.randint(0, 1024, (256,))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the loss in float32: an fp16 one overflows
        loss = disalign_ops.cross_entropy(z, target)
    scaler.scale(loss).backward()
    assert model.weight.grad is not None
    ours = model.weight.grad.double() / 2.0**16
    x64, w64 = x.detach().double(), model.weight.detach().double().requires_grad_()
    F.cross_entropy(x64 @ w64.t(), target).backward()
    assert w64.grad is not None
    error = (ours - w64.grad).norm() / w64.grad.norm()
    assert error < 2.0 ** (-8 if dtype == torch.bfloat16 else -10)


def test_a_step_with_grad_scaler_changes_the_parameters() -> None:
    model = torch.nn.Linear(8, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = disalign_ops.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 2, 3]))
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_heads(use_reentrant: bool) -> None:
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def head(x: Tensor) -> Tensor:
        return loss_of(x @ weight.t())

    expected = torch.autograd.grad(head(x), [x, weight])
    checkpoint(head, x, use_reentrant=use_reentrant).backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert_close(x.grad, expected[0], torch.float64, "x")
    assert_close(weight.grad, expected[1], torch.float64, "weight")


def test_a_checkpoint_keeps_no_gradient_of_the_logits_alive() -> None:
    z = torch.randn(64, 50, requires_grad=True)
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of(z)
    # The gradient made in forward goes through save_for_backward, where hooks can take it away.
    assert alive.count(z.numel()) == 2


def test_what_is_kept_in_memory_for_backward() -> None:
    z, t = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 1, 2, 3])
    kept = {  # beside logits and target: the gradient of the logits, or what makes it
        "forward": [(4, 9), (4,), (4, 9)],
        "backward": [(4, 9), (4,), (2, 4), ()],
    }
    for gradient, shapes in kept.items():
        node = disalign_ops.cross_entropy(z, t, gradient=gradient).grad_fn
        assert [tuple(s.shape) for s in node.saved_tensors if s is not None] == shapes  # type: ignore[union-attr]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_is_made_where_none_is_wanted(reduction: str) -> None:
    r = rows(4, 7)
    with torch.no_grad():
        assert loss_of(*r.learned, reduction=reduction).grad_fn is None
    assert loss_of(r.logits.detach(), reduction=reduction).grad_fn is None


def test_func_transforms_go_through_the_reference() -> None:
    z, t = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    by_transform = torch.func.grad(lambda z: disalign_ops.cross_entropy(z, t))(z)
    leaf = z.clone().requires_grad_()
    disalign_ops.cross_entropy(leaf, t).backward()
    assert leaf.grad is not None
    assert_close(by_transform, leaf.grad, torch.float64, "torch.func.grad")
    per_row = torch.func.vmap(lambda z, t: disalign_ops.cross_entropy(z, t))(z, t)
    assert_close(per_row, F.cross_entropy(z, t, reduction="none"), torch.float64, "torch.func.vmap")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradients_by_vmap(reduction: str) -> None:
    z, t = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 1, 2, 3])
    factors = torch.randn(3, *([4] if reduction == "none" else []))
    found, expected = (
        torch.vmap(lambda g: torch.autograd.grad(loss, z, g, retain_graph=True)[0])(factors)  # noqa: B023
        for loss in (
            function(z, t, reduction=reduction)
            for function in (disalign_ops.cross_entropy, F.cross_entropy)
        )
    )
    assert_close(found, expected, torch.float32, "vmap")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_upstream_gradients(reduction: str) -> None:
    z, t = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    by_batch, one_by_one = (
        torch.autograd.functional.jacobian(
            lambda z: disalign_ops.cross_entropy(z, t, reduction=reduction), z, vectorize=vectorize
        )
        for vectorize in (True, False)
    )
    assert_close(by_batch, one_by_one, torch.float64, "jacobian")


def test_forward_mode_keeps_its_tangent() -> None:
    z, t = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    direction = torch.randn_like(z)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, direction)
        ours = torch.autograd.forward_ad.unpack_dual(disalign_ops.cross_entropy(dual, t)).tangent
        theirs = torch.autograd.forward_ad.unpack_dual(F.cross_entropy(dual, t)).tangent
    assert_close(ours, theirs, torch.float64, "tangent")


def test_one_tensor_as_scale_and_bias() -> None:
    torch.manual_seed(0)
    z, t, c = torch.randn(5, 7), torch.arange(5), torch.randn(5)
    a = torch.randn(7, requires_grad=True)
    loss = disalign_ops.disalign_cross_entropy(z, t, c, a, a)
    (plain,) = torch.autograd.grad(loss, a, retain_graph=True)
    (differentiable,) = torch.autograd.grad(loss, a, create_graph=True)
    torch.testing.assert_close(differentiable, plain)
    assert differentiable.requires_grad
