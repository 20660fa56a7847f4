"""The loss where no kernel serves: F.cross_entropy's composition, with the reference's values."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_row import EXTRAS, NORMALIZERS, run
from torch import Tensor
from torch.nn import functional as F

import disalign_ops
from disalign_ops._ops import backends, composed, dispatch, reference
from support.cases import CONTENTS, SHAPES, Rows, rows
from support.comparison import memory_allocated
from support.dense_cases import Dense, dense
from support.tolerances import assert_close, assert_no_worse


def pretend(monkeypatch: pytest.MonkeyPatch, why: str, warned: bool = False) -> None:
    monkeypatch.setattr(backends._state, "why_not_native", why)
    monkeypatch.setattr(backends._state, "unserved", ())
    monkeypatch.setattr(backends._state, "warned", warned)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing was compiled, and the user has been told."""
    pretend(monkeypatch, "not compiled", warned=True)
    assert dispatch.composes(dispatch.serving_backend(torch.zeros(1)))


def compare(r: Rows, calibrated: bool, upstream: Tensor | None = None, factor: float = 1.0) -> None:
    """With the reference in float64."""
    dtype = r.logits.dtype
    actual = run(r, calibrated, upstream)
    with disalign_ops.set_backend("reference"):
        expected = run(r.to(torch.float64) if dtype == torch.float32 else r, calibrated, upstream)
    for what, a, e in zip(("loss", "input", "confidence", "scale", "bias"), actual, expected,
                          strict=False):  # fmt: skip
        assert_close(a, e, dtype, what, factor)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shapes(dtype: torch.dtype, reduction: str, calibrated: bool) -> None:
    for n, c in SHAPES:
        weight = torch.rand(c, dtype=torch.float64) + 0.1  # of another dtype where that is float32
        r = rows(n, c, dtype, reduction=reduction, weight=weight)
        compare(r, calibrated, torch.randn(n if reduction == "none" else ()))


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("content", CONTENTS)
def test_contents(content: str, reduction: str) -> None:
    for dtype, calibrated in itertools.product((torch.float64, torch.float32), (False, True)):
        r = CONTENTS[content][0](rows(11, 67, dtype, reduction=reduction))
        factor = 500.0 if content == "offset" and dtype == torch.float32 else 1.0
        if content == "dominating":  # logits of 60, in a gradient of which next to nothing is left
            factor = 6.0
        compare(r, calibrated, torch.randn(11 if reduction == "none" else ()), factor)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_combination_of_options(extra: str) -> None:
    combinations = itertools.product((False, True), (0.0, 0.1, 1.0), (False, True), NORMALIZERS)
    for i, (weighted, smoothing, sampled, normalizer) in enumerate(combinations):
        reduction, calibrated = ("mean", "none", "mean", "sum", "mean")[i % 5], i % 2 == 1
        r = rows(
            6, 37, label_smoothing=smoothing, normalizer=normalizer, reduction=reduction,
            weight=torch.rand(37, dtype=torch.float64) + 0.1 if weighted else None,
            sample_weight=torch.rand(6, dtype=torch.float64) if sampled else None,
            **EXTRAS[extra],
        )  # fmt: skip
        r.target[2] = -100
        compare(r, calibrated, torch.randn(6 if reduction == "none" else ()).double())


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("extra", EXTRAS)
def test_class_planes(extra: str) -> None:
    """Contiguous, and channels-last, which are rows."""

    def losses(d: Dense, z: Tensor, **options: Any) -> list[Tensor]:
        loss = disalign_ops.cross_entropy(z, d.target, **options)
        calibrated = disalign_ops.disalign_cross_entropy(
            z, d.target, d.confidence, d.scale, d.bias, **options
        )
        learned = (d.logits, d.confidence, d.scale, d.bias)
        both = loss.sum() + calibrated.sum()
        return [loss, calibrated, *torch.autograd.grad(both, learned)]

    d = dense((2, 37, 3, 5))
    d.target[0, 1] = -100
    options = {"weight": torch.rand(37, dtype=torch.float64), **EXTRAS[extra]}
    for reduction, memory in itertools.product(
        ("mean", "none"), (torch.contiguous_format, torch.channels_last)
    ):
        z = d.logits.contiguous(memory_format=memory)
        actual = losses(d, z, label_smoothing=0.1, reduction=reduction, **options)
        with disalign_ops.set_backend("reference"):
            expected = losses(d, z, label_smoothing=0.1, reduction=reduction, **options)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, torch.float64, f"{reduction} {memory}")


@pytest.mark.usefixtures("no_kernels")
def test_nothing_left_to_divide_by_has_gradient_zero() -> None:
    for ignored, smoothing in itertools.product((False, True), (0.0, 0.1)):
        r = rows(4, 3, weight=torch.tensor([1.0, 0.0, 1.0]), label_smoothing=smoothing)
        r.target[:] = -100 if ignored else 1
        for planes in (False, True):
            z = r.logits.T[None] if planes else r.logits
            t = r.target[None] if planes else r.target
            loss = disalign_ops.cross_entropy(z, t, **r.options)
            assert loss.isnan()
            assert not torch.autograd.grad(loss, r.logits)[0].any()


@pytest.mark.usefixtures("no_kernels")
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38]),
    st.integers(0, 4),
    st.sampled_from(["mean", "sum", "none"]),
    st.booleans(),
    st.booleans(),
)
def test_an_ignored_row_may_hold_anything(
    value: float, row: int, reduction: str, calibrated: bool, weighted: bool
) -> None:
    r = rows(5, 7, torch.float32, reduction=reduction)
    if weighted:
        r.options["weight"] = torch.arange(7.0)
    with torch.no_grad():
        r.logits[row, 2:] = value
    r.target[row] = -100
    r.target[(row + 1) % 5] = 3
    for found in run(r, calibrated):
        assert found.isfinite().all()
    assert not run(r, calibrated)[1][row].any()


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_as_accurate_as_the_reference(dtype: torch.dtype) -> None:
    half = rows(9, 1203, torch.float32, label_smoothing=0.1).to(dtype)
    actual = run(half, False)
    with disalign_ops.set_backend("reference"):
        reference_of_half, exact = run(half, False), run(half.to(torch.float64), False)
    for a, c, e in zip(actual, reference_of_half, exact, strict=True):
        assert a.dtype == dtype
        assert_no_worse(a, c, e, dtype, "half")


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_of_every_integer_type(dtype: torch.dtype) -> None:
    z, target = torch.randn(200, 200), torch.arange(200)
    for ignore_index in (-100, 156):
        expected = F.cross_entropy(z, target, ignore_index=ignore_index)
        found = disalign_ops.cross_entropy(z, target.to(dtype), ignore_index=ignore_index)
        assert_close(found, expected, torch.float32, f"ignore_index {ignore_index}")


@pytest.mark.usefixtures("no_kernels")
def test_a_target_that_is_no_class_is_named() -> None:
    for options in ({}, {"margin": 1.0}, {"reduction": "sum"}, {"weight": torch.ones(5)}):
        for bad in (5, -3):
            with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds: target\[1\]"):
                disalign_ops.cross_entropy(torch.randn(2, 5), torch.tensor([0, bad]), **options)


@pytest.mark.usefixtures("no_kernels")
def test_derivatives_of_higher_order() -> None:
    r = rows(3, 5, weight=torch.rand(5, dtype=torch.float64), label_smoothing=0.1)
    r.target[1] = -100
    options = {"prior": torch.rand(5, dtype=torch.float64), "margin": 0.3, "focal_gamma": 2.0}
    for more in ({}, options):
        assert torch.autograd.gradgradcheck(
            lambda z, more=more: disalign_ops.cross_entropy(z, r.target, **r.options, **more),
            (r.logits,),
        )


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("weighted", [False, True])
def test_the_plain_call_takes_the_memory_of_torchs(weighted: bool) -> None:
    z, target = torch.randn(64, 1000, requires_grad=True), torch.randint(0, 1000, (64,))
    target[3] = -100
    weight = torch.rand(1000) if weighted else None

    def step(function: Any) -> int:
        return memory_allocated(lambda: function(z, target, weight).backward())

    step(F.cross_entropy)
    assert step(disalign_ops.cross_entropy) <= step(F.cross_entropy) + 64 * 1000  # a quarter copy


@pytest.mark.usefixtures("no_kernels")
def test_compiled_and_under_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    r = rows(5, 7, weight=torch.rand(7, dtype=torch.float64))
    r.target[1] = -100
    expected = run(r, False)

    def loss(z: Tensor) -> Tensor:
        return disalign_ops.cross_entropy(z, r.target, **r.options)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for function in (compiled, loss):
        (grad,) = torch.autograd.grad(function(r.logits), r.logits)
        assert_close(grad, expected[1], torch.float64, "compiled")
    grad = torch.func.grad(loss)(r.logits.detach())
    assert_close(grad, expected[1], torch.float64, "torch.func.grad")


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_masked_class_that_probabilities_do_not_ask_for(calibrated: bool, planes: bool) -> None:
    shape = (4, 7, 3) if planes else (4, 7)
    p: Any = dense(shape) if planes else rows(*shape)
    weight = torch.rand(7, dtype=torch.float64) + 0.1
    with torch.no_grad():
        p.logits[:, 2] = float("-inf")
        p.scale.abs_()
    y = torch.rand(shape, dtype=torch.float64)
    y[:, 2] = 0
    results = []
    for backend in ("auto", "reference"):
        with disalign_ops.set_backend(backend):
            if calibrated:
                loss = disalign_ops.disalign_cross_entropy(
                    p.logits, y, p.confidence, p.scale, p.bias, weight, form="residual"
                )
            else:
                loss = disalign_ops.cross_entropy(p.logits, y, weight)
        learned = p.learned if calibrated else [p.logits]
        results.append((loss.detach(), *torch.autograd.grad(loss, learned)))
    for found, expected in zip(*results, strict=True):
        assert expected.isfinite().all()
        assert_close(found, expected, torch.float64, "loss or gradient")


@pytest.mark.usefixtures("no_kernels")
def test_who_asks_for_the_reference_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(composed, "cross_entropy", never)
    monkeypatch.setattr(composed, "plain_mean", never)
    z, t = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with disalign_ops.set_backend("reference"):
        found = disalign_ops.cross_entropy(z, t)
    assert torch.equal(found, reference.cross_entropy(z, t))


def told(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in record if "has no kernels" in str(w.message)]


def test_missing_kernels_are_told_once_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "no C++ compiler (c++) was found")
    z, t = torch.randn(3, 5), torch.tensor([0, 1, 2])
    criterion = disalign_ops.nn.CrossEntropyLoss(label_smoothing=0.1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        with disalign_ops.set_backend("reference"):
            disalign_ops.cross_entropy(z, t)
        disalign_ops.cross_entropy(z.to("meta"), t.to("meta"))
        torch.func.grad(lambda z: disalign_ops.cross_entropy(z, t))(z)
        assert told(record) == []
        criterion(z, t)
        disalign_ops.cross_entropy(z, t)
        disalign_ops.calibrate(z, torch.zeros(3), torch.ones(5), torch.zeros(5))
    (message,) = told(record)
    assert "no kernels for cpu" in message
    assert "no C++ compiler (c++) was found" in message
    assert "Install a C++ compiler" in message
    (warning,) = [w for w in record if "has no kernels" in str(w.message)]
    assert warning.category is UserWarning
    assert warning.filename == __file__  # the caller's line, through torch's and ours


def test_a_replaced_loop_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "not compiled")
    with disalign_ops.replace_cross_entropy(), pytest.warns(UserWarning, match="not compiled"):
        F.cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]))


def test_with_kernels_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends._state, "warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disalign_ops.cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]))
