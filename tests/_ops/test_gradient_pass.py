"""`gradient=`: which pass makes the gradient of the logits, and that it is the same by either."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import disalign_ops
from disalign_ops._ops import in_forward, schemas
from disalign_ops._ops.codes import BIAS, CALIBRATION, LOGITS, NORMALIZERS, REDUCTIONS, STATISTICS
from disalign_ops._ops.problem import Inputs, Problem
from disalign_ops.errors import ArgumentError
from support.cases import Rows, rows
from support.tolerances import assert_close, assert_no_worse

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, C = 9, 67


@pytest.fixture(params=["by the host", "by the operator"])
def finished(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Who makes the gradient for the real upstream gradient: as on the CPU, or as on a GPU;
    whether it is the operator.
    """
    by_operator = request.param == "by the operator"
    kernels = in_forward.NATIVE["cpu"]._replace(dtypes=DTYPES[:3], finished_by_operator=by_operator)
    monkeypatch.setitem(in_forward.NATIVE, "cpu", kernels)
    return by_operator


def loss_of(r: Rows, calibrated: bool = True, **options: Any) -> Tensor:
    options = r.options | options
    if not calibrated:
        return disalign_ops.cross_entropy(r.logits, r.target, **options)
    return disalign_ops.disalign_cross_entropy(
        r.logits, r.target, r.confidence, r.scale, r.bias, form="residual", **options
    )


def rows_of(dtype: torch.dtype, n: int = N, **options: Any) -> Rows:
    r = rows(n, C, torch.float32, weight=torch.rand(C) + 0.1, **options).to(dtype)
    r.target[::4] = -100
    return r


def made(loss: Any, z: Tensor) -> bool:
    """Whether forward made the gradient of the logits; beside them it is what has their size."""
    node = loss.grad_fn
    while not hasattr(node, "saved_tensors"):  # what casts the loss of half logits
        node = node.next_functions[0][0]
    saved = [t for t in node.saved_tensors if t is not None and t.numel() == z.numel()]
    assert 1 <= len(saved) <= 2
    return len(saved) == 2


def in_float64(r: Rows, upstream: float, calibrated: bool, **options: Any) -> list[Tensor]:
    exact = r.to(torch.float64)
    with disalign_ops.set_backend("reference"):
        loss = loss_of(exact, calibrated, **options)
        learned = exact.learned if calibrated else [exact.logits]
        return list(torch.autograd.grad(loss, learned, torch.tensor(upstream, dtype=torch.float64)))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 65536.0, 0.0])
@pytest.mark.parametrize("normalizer", ["weights", "valid", "count", 7.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_either_pass_makes_the_same_gradient(
    dtype: torch.dtype, reduction: str, normalizer: Any, upstream: float, calibrated: bool,
    finished: bool,
) -> None:  # fmt: skip
    r = rows_of(dtype, reduction=reduction, normalizer=normalizer)
    learned = r.learned if calibrated else [r.logits]
    exact = in_float64(r, upstream, calibrated)
    loss = loss_of(r, calibrated)
    assert made(loss, r.logits)
    factor = torch.tensor(upstream, dtype=loss.dtype)
    first, second, third = (
        torch.autograd.grad(loss, learned, factor, retain_graph=True) for _ in range(3)
    )
    loss = loss_of(r, calibrated, gradient="backward")
    assert not made(loss, r.logits)
    other = torch.autograd.grad(loss, learned, factor)
    for what, g, again, by_other, e in zip(
        ("logits", "confidence", "scale", "bias"), first, second, other, exact, strict=False
    ):
        for found in (g, again, by_other):
            if dtype == torch.bfloat16:
                assert_no_worse(found, e.bfloat16(), e, dtype, what)
            else:
                assert_close(found, e, dtype, what)
    for a, b in zip(second, third, strict=True):
        assert torch.equal(a, b)
    if finished:
        assert torch.equal(first[0], second[0])
    if finished and upstream != 1:  # both made from the logits, by one kernel
        assert torch.equal(first[0], other[0])


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
@pytest.mark.parametrize("normalizer", ["weights", "valid", "count", 7.5])
@pytest.mark.parametrize("positions", [(8, 16), (5, 7)], ids=str)  # whole vectors, and none
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_either_pass_makes_the_same_gradient_of_class_planes(
    dtype: torch.dtype, positions: tuple[int, int], normalizer: Any, upstream: float,
    calibrated: bool, finished: bool,
) -> None:  # fmt: skip
    n = 2 * positions[0] * positions[1]
    if dtype == torch.bfloat16 and not finished:
        upstream = 1.0  # the host would round a second time, which is why it is not asked to
    r = rows_of(dtype, n, normalizer=normalizer)

    def gradients(rows: Rows, **options: Any) -> list[Tensor]:
        planes = rows.logits.detach().view(2, *positions, C).movedim(-1, 1).contiguous()
        images = dataclasses.replace(
            rows,
            logits=planes.requires_grad_(),
            target=rows.target.view(2, *positions),
            confidence=rows.confidence.detach().view(2, *positions).requires_grad_(),
            options={
                name: option.view(2, *positions) if name == "sample_weight" else option
                for name, option in rows.options.items()
            },
        )
        loss = loss_of(images, calibrated, **options)
        if rows is r:
            assert made(loss, planes) == (options.get("gradient") != "backward")
        learned = images.learned if calibrated else [planes]
        return list(torch.autograd.grad(loss, learned, torch.tensor(upstream, dtype=loss.dtype)))

    with disalign_ops.set_backend("reference"):
        exact = gradients(r.to(torch.float64))
    for found in (gradients(r), gradients(r, gradient="backward")):
        for what, g, e in zip(
            ("logits", "confidence", "scale", "bias"), found, exact, strict=False
        ):
            if dtype == torch.bfloat16:
                assert_no_worse(g, e.bfloat16(), e, dtype, what)
            else:
                assert_close(g, e, dtype, what)


def test_the_host_does_not_wait_for_an_operator(
    finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finished:
        return
    monkeypatch.setattr(Tensor, "item", lambda _: pytest.fail("the host waits for the device"))
    r = rows_of(torch.float32)
    torch.autograd.grad(3 * loss_of(r), r.learned)


def test_float16_is_made_in_forward_where_that_is_asked_for(finished: bool) -> None:
    r = rows_of(torch.float16)
    assert not made(loss_of(r), r.logits)
    loss = loss_of(r, gradient="forward")
    assert made(loss, r.logits)
    exact = in_float64(r, 2.0, True)
    for g, e in zip(torch.autograd.grad(2 * loss, r.learned), exact, strict=True):
        assert_no_worse(g, e.half(), e, torch.float16, "float16")


def test_two_losses_on_the_same_logits(finished: bool) -> None:
    r = rows_of(torch.float32)
    other = Rows(r.logits, r.target.roll(1), *r.learned[1:], r.options)
    alone = [torch.autograd.grad(loss_of(q), r.logits)[0] for q in (r, other)]
    (together,) = torch.autograd.grad(loss_of(r) + 3 * loss_of(other), r.logits)
    assert_close(together, alone[0] + 3 * alone[1], torch.float32, "two losses")


@pytest.mark.parametrize("gradient", ["auto", "forward", "backward"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool, gradient: str, finished: bool) -> None:
    r = rows_of(torch.float32)
    expected = torch.autograd.grad(3 * loss_of(r), r.learned)

    def head(*learned: Tensor) -> Tensor:
        return loss_of(Rows(learned[0] * 1, r.target, *learned[1:], r.options), gradient=gradient)

    (3 * checkpoint(head, *r.learned, use_reentrant=use_reentrant)).backward()
    for tensor, e in zip(r.learned, expected, strict=True):
        assert tensor.grad is not None
        assert_close(tensor.grad, e, torch.float32, "checkpoint")


def test_hooks_may_take_the_gradient_away(finished: bool) -> None:
    r = rows_of(torch.float32)
    expected = torch.autograd.grad(3 * loss_of(r), r.learned)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss = 3 * loss_of(r)
    for g, e in zip(torch.autograd.grad(loss, r.learned), expected, strict=True):
        assert_close(g, e, torch.float32, "hooks")


def test_differentiated_twice_after_a_gradient_was_handed_over(finished: bool) -> None:
    r = rows_of(torch.float64)
    found, expected = [], []
    for results, gradient in ((found, "auto"), (expected, "backward")):
        loss = loss_of(r, gradient=gradient)
        results += torch.autograd.grad(loss, r.learned, retain_graph=True)
        once = torch.autograd.grad(3 * loss, r.learned, create_graph=True)
        squares = torch.stack([(g**2).sum() for g in once]).sum()
        results += [*(g.detach() for g in once), *torch.autograd.grad(squares, r.learned)]
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e, torch.float64, "twice")


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_batch_of_upstream_gradients(dtype: torch.dtype, finished: bool) -> None:
    r = rows_of(dtype)
    loss = loss_of(r)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=loss.dtype)
    batch = torch.autograd.grad(
        loss, r.learned, (factors,), retain_graph=True, is_grads_batched=True
    )
    for k, factor in enumerate(factors):  # the first takes what forward made, the others do not
        alone = torch.autograd.grad(loss, r.learned, factor, retain_graph=True)
        for several, one in zip(batch, alone, strict=True):
            assert several.dtype == one.dtype == dtype
            torch.testing.assert_close(several[k], one, rtol=2.0**-7, atol=1e-6)


def test_nothing_is_made_for_frozen_logits(monkeypatch: pytest.MonkeyPatch, finished: bool) -> None:
    r = rows_of(torch.float32)
    r.logits = r.logits.detach()
    for gradient in ("auto", "forward"):
        loss = loss_of(r, gradient=gradient)
        assert not made(loss, r.logits)
        monkeypatch.setitem(schemas._OPERATORS, "row_backward_made", None)
        monkeypatch.setitem(schemas._OPERATORS, "row_backward", None)
        torch.autograd.grad(3 * loss, r.learned[1:])
    with torch.no_grad():
        loss_of(r, gradient="forward")


def test_the_gradient_of_an_empty_batch(finished: bool) -> None:
    r = rows_of(torch.float32, n=0, reduction="sum")
    for gradient in ("auto", "backward"):
        loss = loss_of(r, gradient=gradient)
        assert [g.shape for g in torch.autograd.grad(2 * loss, r.learned)] == [
            t.shape for t in r.learned
        ]


# --- what "auto" means


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


def wanted(device: str, layout: schemas.Layout, dtype: torch.dtype, **changes: Any) -> int:
    """Of logits and a bias that require a gradient."""
    logits = torch.empty(4, 5, device=device, dtype=dtype)
    compiling = changes.pop("compiling", False)
    problem = Problem(layout, (), REDUCTIONS["mean"], NORMALIZERS["weights"])
    problem = problem._replace(**changes)
    inputs = Inputs(logits, torch.empty(4, device=device))
    return in_forward.wanted(inputs, problem, LOGITS | BIAS, compiling)


TRITON = schemas.Layout("row", schemas.ROW.reference, prefix="triton_")
# (device, layout) -> the dtypes for which forward makes the gradient of the logits.
AUTO: dict[tuple[str, schemas.Layout], tuple[torch.dtype, ...]] = {
    ("cpu", schemas.ROW): (torch.float32, torch.float64),
    ("cpu", schemas.DENSE): (torch.float32, torch.float64),
    ("cpu", schemas.UPSAMPLE): (torch.float32, torch.float64),
    ("cuda", schemas.ROW): (torch.float32, torch.float64, torch.bfloat16),
    ("cuda", schemas.DENSE): (torch.float32, torch.float64, torch.bfloat16),
    ("cuda", schemas.UPSAMPLE): (),
    ("cuda", TRITON): (),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "layout"), AUTO, ids=lambda v: getattr(v, "name", v))
def test_what_auto_means(
    device: str, layout: schemas.Layout, dtype: torch.dtype, fake: FakeTensorMode
) -> None:
    upsampled = (device, layout) == ("cuda", schemas.UPSAMPLE)
    bias = 0 if upsampled else BIAS  # backward makes it there
    by_backward = bias | STATISTICS
    by_forward = LOGITS | bias | STATISTICS * (device == "cuda")  # which finishes it in backward
    by_default = by_forward if dtype in AUTO[device, layout] else by_backward
    assert wanted(device, layout, dtype) == by_default
    assert wanted(device, layout, dtype, gradient="backward") == by_backward
    can = by_forward if AUTO[device, layout] else by_backward
    assert wanted(device, layout, dtype, gradient="forward") == can
    for never in ({"compiling": True}, {"in_place": True}):
        assert wanted(device, layout, dtype, **never) == by_backward
    assert wanted(device, layout, dtype, reduction=REDUCTIONS["none"]) == STATISTICS
    assert in_forward.wanted(
        Inputs(torch.empty(4, 5), torch.empty(4)),
        Problem(schemas.ROW, (), REDUCTIONS["mean"], NORMALIZERS["weights"]), CALIBRATION, False,
    ) == CALIBRATION  # fmt: skip


def test_auto_means_backward_under_float16_autocast(fake: FakeTensorMode) -> None:
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        for dtype, expected in ((torch.float16, 0), (torch.bfloat16, LOGITS)):
            torch.set_autocast_dtype("cuda", dtype)
            assert wanted("cuda", schemas.ROW, torch.float32) & LOGITS == expected
            assert wanted("cuda", schemas.ROW, torch.float32, gradient="forward") & LOGITS
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


# --- refusals


def some(*shape: int, **options: Any) -> Tensor:
    z = torch.randn(shape, requires_grad=True)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    return disalign_ops.cross_entropy(z * 1, target, gradient="forward", **options)


def probabilities() -> Tensor:
    z = torch.randn(4, 5)
    y = z.softmax(1).requires_grad_()
    return disalign_ops.cross_entropy(z, y, gradient="forward")


def by_reference() -> Tensor:
    with disalign_ops.set_backend("reference"):
        return some(4, 5)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "none": (lambda: some(4, 5, reduction="none"), "where reduction is 'none'"),
    "in place": (lambda: some(4, 5, inplace_backward=True), "where inplace_backward is True"),
    "probabilities": (probabilities, "where target requires a gradient"),
    "shard": (lambda: some(4, 5, shard=disalign_ops.Shard()), "where shard is given"),
    "reference": (by_reference, "for row logits on cpu by the reference backend"),
    "upsample": (
        lambda: disalign_ops.upsample_cross_entropy(
            torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4).long(), reduction="none",
            gradient="forward",
        ),
        "where reduction is 'none'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_forward_is_refused_where_it_cannot_make_the_gradient(what: str) -> None:
    call, where = REFUSED[what]
    with pytest.raises(ArgumentError, match=f"^gradient must be 'auto' or 'backward' {where}, got"):
        call()


def test_layouts_that_a_gpus_forward_does_not_make_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(in_forward.NATIVE, "cpu", in_forward.NATIVE["cuda"])
    with pytest.raises(ArgumentError, match="for upsample logits on cpu by the native backend"):
        disalign_ops.upsample_cross_entropy(
            torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4).long(), gradient="forward"
        )


def test_transforms_refuse_it_and_take_auto() -> None:
    z, t = torch.randn(4, 5), torch.arange(4)
    with pytest.raises(ArgumentError, match="by the reference backend"):
        torch.func.grad(lambda z: disalign_ops.cross_entropy(z, t, gradient="forward"))(z)
    torch.func.grad(lambda z: disalign_ops.cross_entropy(z, t, gradient="auto"))(z)


def test_torch_compile_refuses_it() -> None:
    def loss(z: Tensor, gradient: Any) -> Tensor:
        return disalign_ops.cross_entropy(z, torch.arange(4), gradient=gradient)

    z = torch.randn(4, 5, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="gradient must be 'auto' or 'backward' under torch"):
        compiled(z, "forward")
    expected = torch.autograd.grad(loss(z, "auto"), z)
    for gradient in ("auto", "backward"):
        assert_close(
            torch.autograd.grad(compiled(z, gradient), z)[0], expected[0], torch.float32, gradient
        )


@pytest.mark.parametrize("gradient", ["no", "", None, True, 0])
def test_another_value_is_refused(gradient: Any) -> None:
    z, t = torch.randn(4, 5), torch.arange(4)
    image, mask = torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4).long()
    zeros = torch.zeros(4), torch.zeros(5), torch.zeros(5)
    for call in (
        lambda: disalign_ops.cross_entropy(z, t, gradient=gradient),
        lambda: disalign_ops.disalign_cross_entropy(z, t, *zeros, gradient=gradient),
        lambda: disalign_ops.upsample_cross_entropy(image, mask, gradient=gradient),
        lambda: disalign_ops.nn.CrossEntropyLoss(gradient=gradient),
        lambda: disalign_ops.losses.balanced_softmax([5, 3], gradient=gradient),
    ):
        with pytest.raises(ArgumentError, match="gradient must be one of 'auto', 'forward', 'back"):
            call()
