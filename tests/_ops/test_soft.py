"""Class probabilities as targets: every backend's kernels against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import disalign_ops
from support import cases, dense_cases
from support.cases import Rows, rows
from support.dense_cases import Dense, dense
from support.tolerances import assert_close, assert_no_worse

NAMES = ("input", "confidence", "scale", "bias")


def probabilities(logits: Tensor) -> Tensor:
    """Of the logits' shape: mixtures of two classes, some of sum below 1, with zeros; one row of
    nothing.
    """
    n, c = logits.shape[:2]
    positions = (n, *logits.shape[2:])
    mixed = torch.zeros((*positions, c), dtype=torch.float64)
    for share in (0.7, 0.25):
        at = torch.randint(0, c, (*positions, 1))
        mixed.scatter_add_(-1, at, torch.full_like(at, 1, dtype=torch.float64) * share)
    mixed[..., ::3] += torch.rand(mixed[..., ::3].shape, dtype=torch.float64) / max(c, 1)
    if n > 1:
        mixed[0] = 0
    return mixed.movedim(-1, 1).contiguous()


def run(
    p: Rows | Dense, target: Tensor, calibrated: bool, upstream: Tensor | None = None
) -> list[Tensor]:
    """Loss, then the gradients of what is learned."""
    if calibrated:
        loss = disalign_ops.disalign_cross_entropy(
            p.logits, target, p.confidence, p.scale, p.bias, form="residual", **p.options
        )
    else:
        loss = disalign_ops.cross_entropy(p.logits, target, **p.options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    learned = p.learned if calibrated else [p.logits]
    return [loss.detach(), *torch.autograd.grad(loss, learned, upstream)]


def compare(
    p: Any, target: Tensor, calibrated: bool, upstream: Tensor | None = None, factor: float = 1.0
) -> None:
    """In the case's dtype against the reference in float64."""
    dtype = p.logits.dtype
    with disalign_ops.set_backend("native"):
        actual = run(p, target.to(dtype), calibrated, upstream)
    with disalign_ops.set_backend("reference"):
        exact = p.to(torch.float64)
        expected = run(exact, target.to(dtype).double(), calibrated, upstream)
    for what, a, e in zip(("loss", *NAMES), actual, expected, strict=False):
        assert_close(a, e, dtype, what, factor)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_rows(shape: tuple[int, int], dtype: torch.dtype, reduction: str, calibrated: bool) -> None:
    r = rows(*shape, dtype, reduction=reduction, weight=torch.rand(shape[1], dtype=dtype) + 0.1)
    upstream = torch.randn(shape[0] if reduction == "none" else ())
    compare(r, probabilities(r.logits), calibrated, upstream)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", dense_cases.SHAPES, ids=str)
def test_planes(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: str, calibrated: bool
) -> None:
    d = dense(shape, dtype=dtype, reduction=reduction, weight=torch.rand(shape[1]).to(dtype) + 0.1)
    upstream = torch.randn(d.target.shape if reduction == "none" else ())
    compare(d, probabilities(d.logits), calibrated, upstream)


ROW_CONTENTS = ("plain", "strided", "expanded", "transposed", "masked", "offset", "dominating")
PLANE_CONTENTS = ("plain", "sliced", "cropped", "channels_last", "expanded", "masked", "offset")


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("content", ROW_CONTENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_contents_of_rows(content: str, dtype: torch.dtype, calibrated: bool) -> None:
    r = cases.CONTENTS[content][0](rows(11, 67, dtype))
    target = probabilities(r.logits)
    target[r.logits.detach() == float("-inf")] = 0.0
    factor = 500.0 if content == "offset" and dtype == torch.float32 else 1.0
    compare(r, target, calibrated, torch.randn(()), factor)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("content", PLANE_CONTENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_contents_of_planes(content: str, dtype: torch.dtype, calibrated: bool) -> None:
    d = dense_cases.CONTENTS[content][0](dense((3, 18, 7, 11), dtype=dtype))
    target = probabilities(d.logits)
    target[d.logits.detach() == float("-inf")] = 0.0
    factor = 500.0 if content == "offset" and dtype == torch.float32 else 1.0
    compare(d, target, calibrated, torch.randn(()), factor)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("planes", [False, True])
def test_every_combination_of_options(planes: bool, reduction: str, calibrated: bool) -> None:
    shape = (3, 18, 2, 5) if planes else (6, 37)
    for weighted, smoothing, sampled, normalizer, prior in itertools.product(
        (False, True), (0.0, 0.1, 1.0), (False, True), ("weights", "valid", "count", 7.5),
        (False, True),
    ):  # fmt: skip
        p: Any = dense(shape) if planes else rows(*shape)
        c = shape[1]
        p.options = {
            "weight": torch.rand(c, dtype=torch.float64) + 0.1 if weighted else None,
            "label_smoothing": smoothing,
            "sample_weight": torch.rand(p.target.shape, dtype=torch.float64) if sampled else None,
            "normalizer": normalizer,
            "prior": torch.linspace(-3, 3, c, dtype=torch.float64) if prior else None,
            "reduction": reduction,
        }
        upstream = torch.randn(p.target.shape if reduction == "none" else (), dtype=torch.float64)
        compare(p, probabilities(p.logits), calibrated, upstream)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 1203), (64, 1000), (2, 21, 5, 7)], ids=str)
def test_half(shape: tuple[int, ...], dtype: torch.dtype, wide: bool) -> None:
    # wide: float32 probabilities of half logits, as a mixed batch under autocast has them.
    z = (torch.randn(shape) * 3).to(dtype)
    y = probabilities(z).to(torch.float32 if wide else dtype)
    results = []
    for make, cast in ((disalign_ops.cross_entropy, dtype), (F.cross_entropy, dtype),
                       (F.cross_entropy, torch.float64)):  # fmt: skip
        input = z.to(cast).requires_grad_()
        loss = make(input, y.to(torch.float64) if cast == torch.float64 else y)
        results.append((loss.detach(), *torch.autograd.grad(loss, input)))
    for actual, composed, exact, what in zip(*results, ("loss", "input"), strict=True):
        assert_no_worse(actual, composed, exact, dtype, what)


@pytest.mark.parametrize("expanded", [False, True])
def test_targets_of_other_strides(expanded: bool) -> None:
    r = rows(11, 67, torch.float32)
    y = probabilities(r.logits)
    if expanded:  # a uniform row: stride 0
        compare(r, y[3:4].expand(y.shape), True)
    else:  # a part of wider rows; classes apart: one copy
        wide = torch.cat([y, y], 1)[:, 5 : 5 + 67]
        compare(r, wide, True)
        compare(r, y.t().contiguous().t(), True)


def test_rows_of_any_sum_are_the_formula() -> None:
    z = torch.randn(5, 7, dtype=torch.float64)
    y = torch.rand(5, 7, dtype=torch.float64) * 3
    w = torch.rand(7, dtype=torch.float64)
    expected = -(w * y * torch.log_softmax(z, 1)).sum(1)
    found = disalign_ops.cross_entropy(z, y, w, reduction="none")
    assert_close(found, expected, torch.float64, "loss")


UPSAMPLED = {
    ((2, 5, 3, 4), (9, 13)): "larger, no multiple",
    ((1, 18, 6, 7), (4, 5)): "smaller",
    ((2, 150, 4, 4), (32, 32)): "ADE20K",
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", UPSAMPLED, ids=str)
def test_upsampled(
    sizes: tuple[tuple[int, ...], tuple[int, int]],
    dtype: torch.dtype,
    reduction: str,
    calibrated: bool,
) -> None:
    shape, size = sizes
    d = dense(shape, dtype=dtype)
    positions = (shape[0], *size)
    y = probabilities(torch.zeros((*shape[:2], *size))).to(dtype)
    options: dict[str, Any] = {
        "weight": torch.rand(shape[1]).to(dtype) + 0.1, "label_smoothing": 0.1,
        "sample_weight": torch.rand(positions).to(dtype), "reduction": reduction,
    }  # fmt: skip
    upstream = torch.randn(positions if reduction == "none" else (), dtype=torch.float64)

    def gradients(p: Dense, y: Tensor) -> list[Tensor]:
        given = {k: v.to(y.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        if calibrated:
            given |= {"confidence": p.confidence, "scale": p.scale, "bias": p.bias}
        loss = disalign_ops.upsample_cross_entropy(p.logits, y, **given)
        learned = p.learned if calibrated else [p.logits]
        return [loss.detach(), *torch.autograd.grad(loss, learned, upstream.to(loss.dtype))]

    with disalign_ops.set_backend("native"):
        actual = gradients(d, y)
    with disalign_ops.set_backend("reference"):
        expected = gradients(d.to(torch.float64), y.double())
    for what, a, e in zip(("loss", *NAMES), actual, expected, strict=False):
        assert_close(a, e, dtype, what)


def test_transforms_go_through_the_reference() -> None:
    z, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(2, 3, 5, dtype=torch.float64)
    tangent = torch.randn(3, 5, dtype=torch.float64)
    each = torch.func.vmap(disalign_ops.cross_entropy)(z, y)
    assert_close(each, torch.func.vmap(F.cross_entropy)(z, y), torch.float64, "vmap")
    found = torch.func.grad(disalign_ops.cross_entropy)(z[0], y[0])
    assert_close(found, torch.func.grad(F.cross_entropy)(z[0], y[0]), torch.float64, "grad")
    found = torch.func.jvp(lambda x: disalign_ops.cross_entropy(x, y[0]), (z[0],), (tangent,))[1]
    expected = torch.func.jvp(lambda x: F.cross_entropy(x, y[0]), (z[0],), (tangent,))[1]
    assert_close(found, expected, torch.float64, "jvp")


def test_gradients_of_any_order() -> None:
    r = rows(3, 5)
    y = torch.rand(3, 5, dtype=torch.float64)

    def loss(z: Tensor, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return disalign_ops.disalign_cross_entropy(z, y, c, a, b, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, r.learned)
    assert torch.autograd.gradgradcheck(loss, r.learned)
    (twice,) = torch.autograd.grad(
        disalign_ops.cross_entropy(r.logits, y.requires_grad_()), y
    )  # through the reference, which gives the probabilities a gradient
    (expected,) = torch.autograd.grad(F.cross_entropy(r.logits, y), y)
    assert_close(twice, expected, torch.float64, "probabilities")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_on_every_run_and_a_second_backward(threads: int) -> None:
    r = rows(64, 1204, torch.float32)
    y = probabilities(r.logits).float()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        losses = [
            disalign_ops.disalign_cross_entropy(r.logits, y, r.confidence, r.scale, r.bias)
            for _ in range(2)
        ]
        first, second = (torch.autograd.grad(loss, r.learned, retain_graph=True) for loss in losses)
        again = torch.autograd.grad(losses[0], r.learned)
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert_close(c, a, torch.float32, "again")


def test_in_place() -> None:
    z = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    y = torch.rand(7, 11, dtype=torch.float64)
    made = z * 1
    disalign_ops.cross_entropy(made, y, inplace_backward=True).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    assert z.grad is not None
    assert torch.equal(made.detach(), z.grad)
    assert_close(z.grad, expected, torch.float64, "in place")
