"""The layers and losses: released formulas, options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disalign_ops
from disalign_ops.class_stats import grw_weights, ldam_margins, log_prior
from disalign_ops.errors import ArgumentError
from disalign_ops.nn import (
    CrossEntropyLoss,
    DisAlignCosineLinear,
    DisAlignLinear,
    DisAlignSegHead,
    GRWCrossEntropyLoss,
)
from support.nn_cases import COUNTS, F64, FORMS, LAYERS, RELEASED, C, D, N, trained

# --- the released formulas


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(("form", "background", "formula"), RELEASED, ids=FORMS)
def test_forward_and_gradients_are_the_released_formulas(
    backend: str, cls: Any, form: str, background: str | None, formula: Any
) -> None:
    layer = trained(cls(D, C, form=form, background=background, dtype=F64))
    x = torch.randn(N, D, dtype=F64, requires_grad=True)
    upstream = torch.randn(N, C, dtype=F64)
    inputs = [x, *layer.parameters()]
    expected = formula(layer, x)
    actual = layer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(("form", "background", "formula"), RELEASED, ids=FORMS)
def test_loss_is_that_of_the_released_formulas_logits(
    backend: str, cls: Any, form: str, background: str | None, formula: Any
) -> None:
    layer = trained(cls(D, C, form=form, background=background, dtype=F64))
    x = torch.randn(N, D, dtype=F64, requires_grad=True)
    target, weight = torch.randint(0, C, (N,)), torch.rand(C, dtype=F64)
    target[2] = 255
    inputs = [x, *layer.parameters()]
    options: dict[str, Any] = {"weight": weight, "ignore_index": 255, "label_smoothing": 0.1}
    expected = F.cross_entropy(formula(layer, x), target, **options)
    for loss in (
        layer.loss(x, target, **options),
        layer.loss(x, target, inplace_backward=True, **options),
        CrossEntropyLoss(**options)(layer(x), target),
    ):
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for a, e in zip(
            torch.autograd.grad(loss, inputs),
            torch.autograd.grad(expected, inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_the_cosine_layer_is_initialised() -> None:
    # The deterministic fill of conftest.py leaves NaN in memory that nothing wrote.
    layer = DisAlignCosineLinear(D, C)
    assert all(torch.isfinite(p).all() for p in layer.parameters())
    assert torch.equal(layer.scale, torch.tensor([20.0]))
    assert layer.weight.abs().max() <= D**-0.5  # nn.Linear's range


def test_the_cosine_layers_options() -> None:
    x = 50 * torch.randn(N, D)
    layer = trained(DisAlignCosineLinear(D, C, scale_init=3, learn_scale=False, form="residual"))
    assert not layer.scale.requires_grad
    assert layer.raw_logits(x).abs().max() <= layer.scale.item() * (1 + 1e-5)
    # The released classification layer's confidence knows no norm of x, the detection head's does.
    torch.testing.assert_close(layer(x), layer(2 * x))
    layer = trained(DisAlignCosineLinear(D, C, normalize_confidence=False))
    assert not torch.allclose(layer(x), layer(0.01 * x))
    layer = trained(DisAlignCosineLinear(D, C, form="interpolated", normalize_confidence=True))
    torch.testing.assert_close(layer(x), layer(2 * x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_feature_of_zeros_has_cosine_zero(dtype: torch.dtype) -> None:
    layer = DisAlignCosineLinear(D, C, dtype=dtype)
    assert torch.equal(
        layer.raw_logits(torch.zeros(2, D, dtype=dtype)), torch.zeros(2, C).to(dtype)
    )


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("background", [None, "first", "last"])
def test_features_of_any_leading_shape(backend: str, cls: Any, background: str | None) -> None:
    layer = trained(cls(D, C, background=background, dtype=F64))
    x = torch.randn(2, 3, D, dtype=F64)
    rows = layer(x.reshape(6, D))
    torch.testing.assert_close(layer(x), rows.reshape(2, 3, C))
    torch.testing.assert_close(layer(x[0, 0]), rows[0])
    assert layer(x[:0]).shape == (0, 3, C)
    assert layer(x[0, :0]).shape == (0, C)
    one = layer.loss(x[0, 0], torch.tensor(4))
    torch.testing.assert_close(one, F.cross_entropy(rows[0], torch.tensor(4)))


@pytest.mark.parametrize("cls", LAYERS)
def test_loss_takes_every_option(backend: str, cls: Any) -> None:
    layer = trained(cls(D, C, dtype=F64))
    x, target = torch.randn(N, D, dtype=F64), torch.randint(0, C, (N,))
    options: dict[str, Any] = {
        "weight": torch.rand(C, dtype=F64),
        "sample_weight": torch.rand(N, dtype=F64),
        "prior": log_prior(COUNTS, dtype=F64),
        "margin": ldam_margins(COUNTS, dtype=F64),
        "focal_gamma": 2.0,
        "normalizer": "valid",
    }
    expected = disalign_ops.cross_entropy(layer(x), target, **options)
    torch.testing.assert_close(layer.loss(x, target, **options), expected)
    soft = torch.rand(N, C, dtype=F64).softmax(1)
    torch.testing.assert_close(layer.loss(x, soft), F.cross_entropy(layer(x), soft))
    pair = (target, target.flip(0), 0.3)
    for chunk_bytes in (1, 1 << 20):  # both with the logits
        mixed = layer.loss(x, pair, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(mixed, disalign_ops.cross_entropy(layer(x), pair))


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(backend: str, cls: Any, form: str) -> None:
    layer = trained(cls(D, C, form=form))
    half = copy.deepcopy(layer).bfloat16()
    x, target = torch.randn(N, D).bfloat16(), torch.randint(0, C, (N,))
    assert half(x).dtype == torch.bfloat16
    exact = layer(x.float()).detach()
    scale = float(exact.abs().max())
    torch.testing.assert_close(half(x).detach().float(), exact, rtol=0, atol=0.03 * scale)
    loss = half.loss(x, target, reduction="sum")
    assert loss.dtype == torch.bfloat16
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in half.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.loss(x.float(), target).dtype == torch.float32
        assert layer(x.float()).dtype == torch.bfloat16


MADE: dict[str, Callable[[], nn.Module]] = {
    f"{name}, {form}, {start}": partial(cls, D, C, form=form, start=start)
    for name, cls in (
        ("linear", DisAlignLinear), ("cosine", DisAlignCosineLinear), ("head", DisAlignSegHead),
    )
    for form in FORMS
    for start in ("identity", "released")
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_initialised_on_the_meta_device(case: str) -> None:
    torch.manual_seed(0)
    made = MADE[case]()
    with torch.device("meta"):
        late = MADE[case]()
    late.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*late.parameters(), *late.buffers()):
            tensor.fill_(77)  # what the memory may have held
    # PyTorch's contract: every module knows the start of its own parameters, in any order.
    for module in reversed(list(late.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, value in made.state_dict().items():
        found = late.state_dict()[name]
        if value.is_floating_point() and value.numel() > 1 and float(value.std()) > 0:  # random
            assert 0.2 < float(found.std()) / float(value.std()) < 5, name
        elif name != "confidence_layer.bias":
            assert torch.equal(found, value), name
        assert (found != 77).all(), name


# --- the losses


def test_cross_entropy_loss_takes_the_place_of_torchs(backend: str) -> None:
    logits, target = torch.randn(N, C), torch.randint(0, C, (N,))
    weight = torch.rand(C)
    arguments = (weight, None, 3, None, "sum", 0.1)
    ours, theirs = CrossEntropyLoss(*arguments), nn.CrossEntropyLoss(*arguments)
    assert isinstance(ours, nn.CrossEntropyLoss)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    theirs.load_state_dict(ours.state_dict())
    other = weight + 1
    ours.load_state_dict(nn.CrossEntropyLoss(other).state_dict())
    assert torch.equal(ours.weight, other)
    assert CrossEntropyLoss(size_average=False).reduction == "sum"
    assert CrossEntropyLoss().state_dict() == nn.CrossEntropyLoss().state_dict()
    with_prior = CrossEntropyLoss(weight, prior=log_prior(COUNTS), margin=ldam_margins(COUNTS))
    with_prior.load_state_dict(nn.CrossEntropyLoss(weight).state_dict())


@pytest.mark.parametrize("margin", [0.35, ldam_margins(COUNTS)], ids=["number", "vector"])
def test_cross_entropy_loss_passes_its_options_on(backend: str, margin: Tensor | float) -> None:
    logits, target = torch.randn(N, C), torch.randint(0, C, (N,))
    options: dict[str, Any] = {
        "weight": torch.rand(C),
        "ignore_index": 2,
        "label_smoothing": 0.1,
        "normalizer": 5.0,
        "prior": log_prior(COUNTS),
        "margin": margin,
        "focal_gamma": 1.5,
    }
    sample_weight = torch.rand(N)
    expected = disalign_ops.cross_entropy(logits, target, sample_weight=sample_weight, **options)
    loss = CrossEntropyLoss(**options)(logits, target, sample_weight=sample_weight)
    assert torch.equal(loss, expected)


def test_cross_entropy_loss_in_place() -> None:
    leaf, target = torch.randn(N, C, requires_grad=True), torch.randint(0, C, (N,))
    logits = leaf * 1
    CrossEntropyLoss(inplace_backward=True)(logits, target).backward()
    expected = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected)
    with pytest.raises(ArgumentError, match="got a leaf"):
        CrossEntropyLoss(inplace_backward=True)(leaf, target)


def test_buffers_follow_to() -> None:
    loss = CrossEntropyLoss(torch.rand(C), prior=log_prior(COUNTS), margin=ldam_margins(COUNTS))
    assert dict(loss.named_buffers()).keys() == {"weight", "prior", "margin"}
    moved = loss.to("meta", torch.float64)
    for buffer in (moved.weight, moved.prior, moved.margin):
        assert buffer.device.type == "meta"
        assert buffer.dtype == F64
    grw = GRWCrossEntropyLoss(COUNTS).to("meta")
    assert grw.weight.device.type == "meta"
    late = CrossEntropyLoss()
    late.prior = log_prior(COUNTS)  # deferred: still a buffer
    assert late.to("meta").prior.device.type == "meta"


def test_grw_cross_entropy_loss(backend: str) -> None:
    logits, target = torch.randn(N, C), torch.randint(0, C, (N,))
    loss = GRWCrossEntropyLoss(COUNTS, rho=1.2, reduction="sum", label_smoothing=0.1)
    share = torch.tensor(COUNTS, dtype=F64) / sum(COUNTS)
    weight = share**-1.2
    weight = (weight / weight.sum() * C).float()  # the released formula
    torch.testing.assert_close(loss.weight, weight)
    expected = F.cross_entropy(logits, target, weight, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, target), expected)
    assert repr(loss) == (
        "GRWCrossEntropyLoss(counts=9 entries (min 1, max 100, sum 269), rho=1.2, "
        "reduction='sum', label_smoothing=0.1)"
    )

    detector = GRWCrossEntropyLoss(COUNTS[1:], 0.8, background="last")
    assert torch.equal(detector.weight, grw_weights(COUNTS[1:], 0.8, background="last"))
    assert detector(logits, target).isfinite()
    zero = GRWCrossEntropyLoss([3, 0, 1], empty="zero", normalize="sum_to_one")
    torch.testing.assert_close(zero.weight, torch.tensor([0.25, 0, 0.75]))


def test_grw_cross_entropy_loss_errors() -> None:
    with pytest.raises(
        ValueError, match=r"counts must have a sample of every class .*, got 0 for class 1"
    ):
        GRWCrossEntropyLoss([3, 0, 1])
    with pytest.raises(ValueError, match=r"rho must be .*, got -1\.0"):
        GRWCrossEntropyLoss(COUNTS, -1)
    with pytest.raises(TypeError, match="weight"):
        GRWCrossEntropyLoss(COUNTS, weight=torch.ones(C))
    with pytest.raises(ArgumentError, match=r"counts must have .* 9 classes, got 3"):
        GRWCrossEntropyLoss([3, 2, 1])(torch.randn(N, C), torch.zeros(N, dtype=torch.int64))
