"""The modules: released formulas and checkpoints, stage 2, conversions, and every error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disalign_ops
from disalign_ops.class_stats import grw_weights, ldam_margins, log_prior
from disalign_ops.errors import ArgumentError, ArgumentTypeError
from disalign_ops.nn import (
    CrossEntropyLoss,
    DisAlignCosineLinear,
    DisAlignLinear,
    GRWCrossEntropyLoss,
    convert_form,
    convert_to_disalign,
    freeze_for_stage2,
)

F64 = torch.float64
N, D, C = 7, 5, 9
COUNTS = [100, 60, 40, 30, 20, 10, 5, 3, 1]
LAYERS = [DisAlignLinear, DisAlignCosineLinear]
FORMS = ["residual", "interpolated"]


def trained(layer: nn.Module) -> Any:
    """The layer with parameters away from their start."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# --- the released formulas, transcribed


def released_classification(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, DisAlignCosineLinear):
        x = F.normalize(x, dim=1)
        before = layer.scale * x.mm(F.normalize(layer.weight, dim=1).t())
    else:
        before = F.linear(x, layer.weight, layer.bias)
    confidence = layer.confidence_layer(x).sigmoid()
    return (1 + confidence * layer.logit_scale) * before + confidence * layer.logit_bias


def released_detection(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, DisAlignCosineLinear):
        scores = layer.scale * F.normalize(x, dim=1).mm(F.normalize(layer.weight, dim=1).t())
    else:
        scores = F.linear(x, layer.weight, layer.bias)
    scale, bias = layer.logit_scale.flatten(), layer.logit_bias.flatten()
    confidence = layer.confidence_layer(x).sigmoid()
    foreground = confidence * (scores[:, :-1] * scale + bias)
    foreground = foreground + (1 - confidence) * scores[:, :-1]
    return torch.cat([foreground, scores[:, -1].view(-1, 1)], dim=1)


RELEASED: list[tuple[str, str | None, Callable[[Any, Tensor], Tensor]]] = [
    ("residual", None, released_classification),
    ("interpolated", "last", released_detection),
]


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


@pytest.mark.parametrize("cls", LAYERS)
def test_the_start(backend: str, cls: Any) -> None:
    x = torch.randn(N, D)
    residual, interpolated = cls(D, C), cls(D, C, form="interpolated")
    for layer in (residual, interpolated):
        assert torch.equal(layer.logit_scale, torch.ones(1, C))
        assert torch.equal(layer.logit_bias, torch.zeros(1, C))
    assert torch.equal(residual.confidence_layer.weight, torch.full((1, D), 0.1))
    assert torch.equal(interpolated.confidence_layer.bias, torch.zeros(1))
    assert interpolated.confidence_layer.weight.std() < 0.03  # N(0, 0.01)

    z = residual.raw_logits(x)
    features = F.normalize(x, dim=1) if cls is DisAlignCosineLinear else x
    c = residual.confidence_layer(features).sigmoid()
    torch.testing.assert_close(residual(x), (1 + c) * z)
    assert torch.equal(residual(x).argmax(1), z.argmax(1))
    assert torch.equal(interpolated(x), interpolated.raw_logits(x))


def test_the_cosine_layer_is_initialised() -> None:
    # The deterministic fill of conftest.py leaves NaN in memory that nothing wrote.
    layer = DisAlignCosineLinear(D, C)
    assert all(torch.isfinite(p).all() for p in layer.parameters())
    assert torch.equal(layer.scale, torch.tensor([20.0]))
    assert layer.weight.abs().max() <= D**-0.5  # nn.Linear's range


def test_the_cosine_layers_options() -> None:
    x = 50 * torch.randn(N, D)
    layer = trained(DisAlignCosineLinear(D, C, scale_init=3, learn_scale=False))
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


# --- checkpoints


class Parent(nn.Module):
    """A model as the released one: `network.linear`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.linear = layer


def test_parameters_have_the_released_names_and_shapes() -> None:
    shapes = {k: tuple(v.shape) for k, v in Parent(DisAlignLinear(D, C)).state_dict().items()}
    assert shapes == {
        "network.linear.weight": (C, D),
        "network.linear.bias": (C,),
        "network.linear.logit_scale": (1, C),
        "network.linear.logit_bias": (1, C),
        "network.linear.confidence_layer.weight": (1, D),
        "network.linear.confidence_layer.bias": (1,),
    }
    cosine = {k: tuple(v.shape) for k, v in DisAlignCosineLinear(D, C).state_dict().items()}
    assert cosine == {
        "weight": (C, D),
        "scale": (1,),
        "logit_scale": (1, C),
        "logit_bias": (1, C),
        "confidence_layer.weight": (1, D),
        "confidence_layer.bias": (1,),
    }
    assert "bias" not in DisAlignLinear(D, C, bias=False).state_dict()
    assert DisAlignLinear(D, C, background="last").logit_scale.shape == (1, C - 1)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(("form", "background", "_formula"), RELEASED, ids=FORMS)
def test_round_trip_through_a_file(
    cls: Any, form: str, background: str | None, _formula: Any, tmp_path: Any
) -> None:
    saved = Parent(trained(cls(D, C, form=form, background=background)))
    torch.save(saved.state_dict(), tmp_path / "checkpoint.pth")
    loaded = Parent(cls(D, C, form=form, background=background))
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    loaded.load_state_dict(state)
    assert equal_states(saved, loaded)
    x = torch.randn(N, D)
    assert torch.equal(saved.network.linear(x), loaded.network.linear(x))


@pytest.mark.parametrize("cls", LAYERS)
def test_a_released_detectors_checkpoint(backend: str, cls: Any) -> None:
    source = trained(cls(D, C, form="interpolated", background="last"))
    names = {"weight": "cls_score.weight", "bias": "cls_score.bias", "scale": "cls_score.scale"}
    prefix = "roi_heads.box_predictor."
    released = {prefix + names.get(k, k): v for k, v in source.state_dict().items()}
    for vector in ("logit_scale", "logit_bias"):
        released[prefix + vector] = released[prefix + vector].reshape(C - 1)
    before = dict(released)

    model = nn.Module()
    model.roi_heads = nn.Module()
    model.roi_heads.box_predictor = cls(D, C, form="interpolated", background="last")
    model.load_state_dict(released)  # strict: no key missing, none left over
    assert released.keys() == before.keys()
    assert all(released[k] is before[k] for k in released)
    assert equal_states(model.roi_heads.box_predictor, source)
    x = torch.randn(N, D)
    torch.testing.assert_close(model.roi_heads.box_predictor(x), released_detection(source, x))

    # The layer itself as the root, and a segmentation head's (1, C, 1, 1).
    state = {k.removeprefix(prefix): v for k, v in released.items()}
    state["logit_scale"] = state["logit_scale"].reshape(1, C - 1, 1, 1)
    root = cls(D, C, form="interpolated", background="last")
    root.load_state_dict(state)
    assert equal_states(root, source)


def test_a_checkpoint_of_other_sizes_is_refused() -> None:
    state = DisAlignLinear(D, C).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for logit_scale.*\[1, 9\].*\[1, 8\]"):
        DisAlignLinear(D, C, background="last").load_state_dict(state)


def test_a_checkpoint_of_another_form_is_refused() -> None:
    saved = Parent(DisAlignLinear(D, C, form="interpolated", background="first")).state_dict()
    message = r"network\.linear\.form was 'interpolated' when saved, is 'residual' here"
    with pytest.raises(RuntimeError, match=message):
        Parent(DisAlignLinear(D, C, background="first")).load_state_dict(saved)
    message = r"network\.linear\.background was 'first' when saved, is 'last' here"
    with pytest.raises(RuntimeError, match=message):
        Parent(DisAlignLinear(D, C, form="interpolated", background="last")).load_state_dict(saved)
    # A released checkpoint is tensors alone: what it holds is for the caller to know.
    plain = {k: v for k, v in saved.items()}  # noqa: C416 - dict() would keep the metadata too
    Parent(DisAlignLinear(D, C, background="first")).load_state_dict(plain)


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
    with pytest.raises(ArgumentError, match="input is a leaf"):
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
    assert repr(loss) == "GRWCrossEntropyLoss(classes=9, rho=1.2)"

    detector = GRWCrossEntropyLoss(COUNTS[1:], 0.8, background="last")
    assert torch.equal(detector.weight, grw_weights(COUNTS[1:], 0.8, background="last"))
    assert detector(logits, target).isfinite()
    zero = GRWCrossEntropyLoss([3, 0, 1], empty="zero", normalize="sum_to_one")
    torch.testing.assert_close(zero.weight, torch.tensor([0.25, 0, 0.75]))


def test_grw_cross_entropy_loss_errors() -> None:
    with pytest.raises(ValueError, match="counts is zero for class 1"):
        GRWCrossEntropyLoss([3, 0, 1])
    with pytest.raises(ValueError, match=r"rho is -1\.0"):
        GRWCrossEntropyLoss(COUNTS, -1)
    with pytest.raises(TypeError, match="weight"):
        GRWCrossEntropyLoss(COUNTS, weight=torch.ones(C))
    with pytest.raises(ArgumentError, match="weight has 3 entries, the logits have 9 classes"):
        GRWCrossEntropyLoss([3, 2, 1])(torch.randn(N, C), torch.zeros(N, dtype=torch.int64))


# --- stage 2


class Net(nn.Module):
    """A small CNN with every kind of normalisation, whose classifier is not its last child."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.neck = nn.Linear(8, D)
        self.norm = nn.BatchNorm1d(D)
        self.fc = nn.Linear(D, C)
        self.layer_norm = nn.LayerNorm(D)

    def features(self, x: Tensor) -> Tensor:
        return self.layer_norm(self.norm(self.neck(self.body(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3, 8, 8), torch.randint(0, C, (N,))


LEARNED = {
    "fc.logit_scale",
    "fc.logit_bias",
    "fc.confidence_layer.weight",
    "fc.confidence_layer.bias",
}


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_stage_2_trains_the_calibration_and_nothing_else(backend: str, bn: str) -> None:
    model = convert_to_disalign(Net())
    parameters = freeze_for_stage2(model, bn)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == LEARNED
    assert {id(p) for p in parameters} == {id(dict(model.named_parameters())[n]) for n in LEARNED}

    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)
    criterion = GRWCrossEntropyLoss(COUNTS, rho=1.2)
    for epoch in range(2):
        model.train()
        for _ in range(2):
            x, target = batch()
            optimizer.zero_grad()
            if epoch == 0:
                criterion(model(x), target).backward()
            else:
                model.fc.loss(model.features(x), target, weight=criterion.weight).backward()
            optimizer.step()
        model.eval()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {
        f"{layer}.{name}"
        for layer in ("body.1", "norm")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert changed == LEARNED | (statistics if bn == "train" else set())


def test_stage_2_keeps_batch_norm_and_nothing_else_in_eval() -> None:
    model = convert_to_disalign(Net()).train()
    freeze_for_stage2(model)
    batch_norms = {"body.1", "norm"}

    def in_eval(model: nn.Module) -> set[str]:
        return {n for n, m in model.named_modules() if not m.training}

    assert in_eval(model) == batch_norms
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for m in (model, copied, pickled):
        assert m.eval() is m
        assert m.train() is m
        assert in_eval(m) == batch_norms
    # Each holds on to its own module, not to the original's.
    for m in (copied, pickled):
        assert m.norm.train() is m.norm
        assert equal_states(m, model)
    assert model.state_dict().keys() == convert_to_disalign(Net()).state_dict().keys()

    freeze_for_stage2(model, "train")  # lets go again, for model.train() to decide
    assert in_eval(model) == batch_norms
    assert in_eval(model.train()) == set()


def test_stage_2_of_a_cosine_head_and_of_two_heads() -> None:
    model = nn.Sequential(DisAlignCosineLinear(D, C), DisAlignLinear(C, C, bias=False))
    assert len(freeze_for_stage2(model)) == 8
    assert not model[0].scale.requires_grad
    assert not model[0].weight.requires_grad
    layer = DisAlignLinear(D, C)
    assert len(freeze_for_stage2(layer)) == 4
    # With frozen features the raw logits need no gradient: the loss's backward reads none of them.
    assert not layer.raw_logits(torch.randn(N, D)).requires_grad


# --- conversions


@pytest.mark.parametrize("form", FORMS)
def test_convert_keeps_the_classifier(backend: str, form: str) -> None:
    model = Net().eval()
    x, _ = batch()
    before, old, features = model(x), model.fc, model.features(x)
    assert convert_to_disalign(model, form=form) is model
    assert isinstance(model.fc, DisAlignLinear)
    assert isinstance(model.neck, nn.Linear)
    assert model.fc.weight is old.weight
    assert model.fc.bias is old.bias
    assert not model.fc.training
    assert torch.equal(model.fc.raw_logits(features), before)
    after = model(x)
    assert torch.equal(after.argmax(1), before.argmax(1))
    if form == "interpolated":
        torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    else:
        assert not torch.allclose(after, before)


def test_convert_by_name_dtype_device_and_bare_layer() -> None:
    model = nn.Sequential(nn.Linear(D, C), nn.ReLU(), nn.Linear(C, D, bias=False)).bfloat16()
    convert_to_disalign(model, name="0", background="last")
    assert isinstance(model[0], DisAlignLinear)
    assert model[0].background == "last"
    assert model[0].logit_scale.shape == (1, C - 1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    convert_to_disalign(model, name="2")  # a second one, by name
    assert isinstance(model[2], DisAlignLinear)
    assert model[2].bias is None

    alone = nn.Linear(D, C, device="meta")
    new = convert_to_disalign(alone)
    assert isinstance(new, DisAlignLinear)
    assert {p.device.type for p in new.parameters()} == {"meta"}


def test_convert_keeps_a_tied_weight_tied() -> None:
    model = nn.Sequential(nn.Embedding(C, D), nn.Linear(D, C, bias=False))
    model[1].weight = model[0].weight
    convert_to_disalign(model)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(("form", "other"), [FORMS, FORMS[::-1]])
def test_convert_form_keeps_the_calibrated_logits(
    backend: str, cls: Any, form: str, other: str
) -> None:
    model = nn.Sequential(nn.Linear(D, D), trained(cls(D, C, form=form, background="first")))
    model.double()
    x, target = torch.randn(N, D, dtype=F64), torch.randint(0, C, (N,))
    before = model(x)
    gradients = torch.autograd.grad(model[1].loss(x, target), list(model[1].parameters()))
    scale = model[1].logit_scale
    assert convert_form(model, other) is model
    assert model[1].form == other
    assert model[1].logit_scale is scale  # the optimizer's
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(model[1].loss(x, target), list(model[1].parameters()))
    for a, b in zip(again, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert convert_form(model[1], other) is model[1]  # no change
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    convert_form(model, form)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DisAlignLinear(D, C, form="interpolated", background="last"),
        lambda: DisAlignCosineLinear(D, C, scale_init=7, normalize_confidence=False),
        lambda: CrossEntropyLoss(torch.rand(C), prior=log_prior(COUNTS), margin=0.1),
        lambda: GRWCrossEntropyLoss(COUNTS, 0.8),
    ],
    ids=["linear", "cosine", "loss", "grw"],
)
def test_deepcopy_and_pickle(make: Callable[[], nn.Module]) -> None:
    module = trained(make())
    arguments: tuple[Tensor, ...] = (torch.randn(N, D),)
    if isinstance(module, CrossEntropyLoss):
        arguments = (torch.randn(N, C), torch.randint(0, C, (N,)))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert equal_states(module, other)
        assert repr(module) == repr(other)
        assert torch.equal(module(*arguments), other(*arguments))


def test_repr() -> None:
    text = repr(DisAlignLinear(D, C, form="interpolated", background="last"))
    assert "in_features=5, out_features=9, form='interpolated', background='last'" in text


def test_compiled_without_a_graph_break() -> None:
    layer = trained(DisAlignCosineLinear(D, C))
    x, target = torch.randn(N, D), torch.randint(0, C, (N,))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    loss = torch.compile(layer.loss, backend="aot_eager", fullgraph=True)(x, target)
    torch.testing.assert_close(loss, layer.loss(x, target))


# --- errors


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def shared() -> nn.Module:
    layer = nn.Linear(D, D)
    return nn.Sequential(layer, nn.ReLU(), layer)


def hooked() -> nn.Module:
    layer = nn.Linear(D, C)
    layer.register_forward_hook(lambda *_: None)
    return layer


def convert(model: nn.Module, **options: Any) -> Callable[[], object]:
    return lambda: convert_to_disalign(model, **options)


PLAIN = "is lazy, parametrized, or has hooks or a forward of its own, needed is a plain nn.Linear"
TWO = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C))
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "form": (
        lambda: DisAlignLinear(D, C, form="paper"),
        "form is 'paper', needed is one of 'interpolated', 'residual'",
    ),
    "background": (
        lambda: DisAlignCosineLinear(D, C, background="middle"),
        "background is 'middle', needed is one of None, 'first', 'last'",
    ),
    "no class": (
        lambda: DisAlignLinear(D, 1, background="last"),
        "in_features is 5, out_features 1, background 'last': needed is at least one feature and "
        "one calibrated class",
    ),
    "no feature": (lambda: DisAlignLinear(0, C), "in_features is 0, out_features 9"),
    "scale_init": (
        lambda: DisAlignCosineLinear(D, C, scale_init=0.0),
        "scale_init is 0.0, needed is a finite number > 0",
    ),
    "infinite": (
        lambda: DisAlignCosineLinear(D, C, scale_init=float("inf")),
        "scale_init is inf, needed is a finite number > 0",
    ),
    "negative": (
        lambda: DisAlignCosineLinear(D, C, scale_init=-1.0),
        "scale_init is -1.0, needed is a number >= 0.0",
    ),
    "features": (
        lambda: DisAlignLinear(D, C)(torch.randn(N, D + 1)),
        "x has shape (7, 6), needed is (..., 5)",
    ),
    "features of raw_logits": (
        lambda: DisAlignCosineLinear(D, C).raw_logits(torch.tensor(1.0)),
        "x has shape (), needed is (..., 5)",
    ),
    "loss of three dimensions": (
        lambda: DisAlignLinear(D, C).loss(torch.randn(2, 3, D), torch.zeros(2, 3).long()),
        "x has shape (2, 3, 5), needed is (N, 5): flatten x and target to rows",
    ),
    "loss's own": (
        lambda: DisAlignLinear(D, C).loss(torch.randn(N, D), torch.zeros(3).long()),
        "target has shape (3,), needed is (7,)",
    ),
    "reduction": (
        lambda: CrossEntropyLoss(reduction="avg")(torch.randn(N, C), torch.zeros(N).long()),
        "reduction is 'avg', needed is one of 'mean', 'sum', 'none'",
    ),
    "bn": (
        lambda: freeze_for_stage2(DisAlignLinear(D, C), "frozen"),
        "bn is 'frozen', needed is one of 'eval', 'train'",
    ),
    "stage 2 without a layer": (
        lambda: freeze_for_stage2(TWO),
        "model is a Sequential without a DisAlign layer, needed is one: see convert_to_disalign",
    ),
    "form to convert": (
        lambda: convert_form(DisAlignLinear(D, C), "paper"),
        "form is 'paper', needed is one of 'interpolated', 'residual'",
    ),
    "convert form without a layer": (
        lambda: convert_form(nn.ReLU(), "residual"),
        "model is a ReLU without a DisAlign layer, needed is one: see convert_to_disalign",
    ),
    "no linear": (
        convert(nn.Sequential(nn.ReLU())),
        "model is a Sequential without an nn.Linear, needed is one",
    ),
    "name": (convert(TWO, name="1"), "name is '1', needed is an nn.Linear's: 0, 2"),
    "no such name": (convert(TWO, name="x"), "name is 'x', needed is an nn.Linear's: 0, 2"),
    "shared": (convert(shared()), "the layer '2' is shared (0, 2), needed is its own"),
    "lazy": (convert(nn.Sequential(nn.LazyLinear(C))), f"the layer '0' {PLAIN}"),
    "parametrized": (
        convert(nn.utils.parametrizations.weight_norm(nn.Linear(D, C))),
        f"the layer '' {PLAIN}",
    ),
    "hooks": (convert(hooked()), f"the layer '' {PLAIN}"),
    "a forward of its own": (convert(nn.Sequential(Odd(D, C))), f"the layer '0' {PLAIN}"),
    "converted already": (
        convert(nn.Sequential(nn.Linear(D, D), DisAlignLinear(D, C))),
        "model is a Sequential with a DisAlign layer already: needed is a name",
    ),
    "form of convert": (convert(TWO, form="paper"), "form is 'paper', needed is one of"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    before = copy.deepcopy(TWO.state_dict())
    with pytest.raises(ArgumentError) as caught:
        call()
    assert message in str(caught.value)
    # What failed left the model as it was.
    assert [type(m) for m in TWO] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(p.requires_grad for p in TWO.parameters())
    assert all(torch.equal(v, before[k]) for k, v in TWO.state_dict().items())


def test_scale_init_that_is_no_number() -> None:
    with pytest.raises(ArgumentTypeError, match="scale_init is a str, needed is a number"):
        DisAlignCosineLinear(D, C, scale_init="20")
