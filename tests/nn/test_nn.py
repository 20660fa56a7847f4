"""The layers and losses: released formulas, checkpoints, options."""

from __future__ import annotations

import copy
import pickle
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
from support.nn_cases import COUNTS, F64, FORMS, LAYERS, C, D, N, equal_states, trained
from support.places import TESTS

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
        "network.linear.calibration_form": (2,),
    }
    cosine = {k: tuple(v.shape) for k, v in DisAlignCosineLinear(D, C).state_dict().items()}
    assert cosine == {
        "weight": (C, D),
        "scale": (1,),
        "logit_scale": (1, C),
        "logit_bias": (1, C),
        "confidence_layer.weight": (1, D),
        "confidence_layer.bias": (1,),
        "calibration_form": (2,),
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
    own = source.state_dict()
    del own["calibration_form"]
    released = {prefix + names.get(k, k): v for k, v in own.items()}
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


def test_the_form_is_in_the_state_dict() -> None:
    saved = Parent(trained(DisAlignLinear(D, C, form="residual", background="first"))).state_dict()
    before = {name: value.clone() for name, value in saved.items()}
    # Metadata is lost where names are changed, or tensors alone are kept.
    plain = {f"ema.{name}": value for name, value in saved.items()}
    for state in (saved, {name.removeprefix("ema."): value for name, value in plain.items()}):
        message = r"network\.linear\.form must be 'interpolated', as in this layer, got 'residual'"
        with pytest.raises(RuntimeError, match=message):
            Parent(DisAlignLinear(D, C, background="first")).load_state_dict(state)
        message = r"network\.linear\.background must be 'last', as in this layer, got 'first'"
        with pytest.raises(RuntimeError, match=message):
            Parent(DisAlignLinear(D, C, form="residual", background="last")).load_state_dict(state)
        Parent(DisAlignLinear(D, C, form="residual", background="first")).load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in saved.items())
    for code in ([7, 0], [0, -1], [0]):
        unknown = saved | {"network.linear.calibration_form": torch.tensor(code)}
        with pytest.raises(RuntimeError, match=r"got 'code \[.*\]' in the state_dict"):
            Parent(DisAlignLinear(D, C)).load_state_dict(unknown)


def test_no_forward_reads_the_forms_buffer_and_no_file_is_wrong_for_it() -> None:
    layer = trained(DisAlignLinear(D, C, form="residual"))
    x = torch.randn(N, D)
    expected = layer(x)
    code = layer.state_dict()["calibration_form"].clone()
    layer.calibration_form.fill_(100)  # as averaging or to_empty might
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.state_dict()["calibration_form"], code)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert torch.equal(layer.calibration_form, code)
    assert layer.half().state_dict()["calibration_form"].dtype == torch.int8
    averaged = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(layer)
    DisAlignLinear(D, C, form="residual").load_state_dict(averaged.module.state_dict())
    with torch.device("meta"):
        empty = DisAlignLinear(D, C, form="residual")
    state = layer.float().state_dict()
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), layer(x))
    assert not empty.calibration_form.is_meta
    assert torch.equal(empty.to("cpu", torch.float64)(x.double()), layer.double()(x.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_file_of_which_every_tensor_was_cast_keeps_its_form(dtype: torch.dtype) -> None:
    layer = DisAlignLinear(D, C, form="residual", background="last")
    state = {name: value.to(dtype) for name, value in layer.state_dict().items()}
    DisAlignLinear(D, C, form="residual", background="last").load_state_dict(state)
    with pytest.raises(RuntimeError, match="form must be 'interpolated'"):
        DisAlignLinear(D, C, background="last").load_state_dict(state)


@pytest.mark.parametrize("cls", [DisAlignLinear, DisAlignCosineLinear, DisAlignSegHead])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_version_0_1_0_pickled_whole(cls: Any, form: str) -> None:
    layer = trained(cls(D, C, form=form))
    x = torch.randn(N, D, 2, 2) if cls is DisAlignSegHead else torch.randn(N, D)
    expected = layer(x)
    old = copy.deepcopy(layer)
    for name in ("_watch", "start"):
        del old.__dict__[name]
    del old._buffers["calibration_form"]
    if cls is DisAlignSegHead:
        del old.__dict__["background"]  # the class had it
    old = pickle.loads(pickle.dumps(old))
    old.train()
    assert torch.equal(old(x), expected)
    assert "start='released'" in repr(old)
    cls(D, C, form=form).load_state_dict(old.state_dict())


@pytest.mark.parametrize("kind", ["linear", "cosine", "segmentation"])
@pytest.mark.parametrize("form", FORMS)
def test_files_of_version_0_1_0_load_as_before(kind: str, form: str) -> None:
    file = TESTS / "data" / "version_0_1_0.pth"
    saved = torch.load(file, weights_only=True)[f"{kind} {form}"]
    state = saved["state_dict"]
    assert not any("calibration_form" in name for name in state)

    def model(form: str) -> nn.Module:
        options: dict[str, Any] = {"form": form}
        if state["1.logit_scale"].numel() == 2:
            options["background"] = "last"
        cls = {"linear": DisAlignLinear, "cosine": DisAlignCosineLinear}.get(kind, DisAlignSegHead)
        return nn.Sequential(nn.Identity(), cls(4, 3, **options)).eval()

    loaded = model(form)
    loaded.load_state_dict(state)
    torch.testing.assert_close(loaded(saved["x"]), saved["out"])
    assert loaded.state_dict()["1.calibration_form"].tolist()[0] == FORMS.index(form) ^ 1
    other = FORMS[FORMS.index(form) ^ 1]
    with pytest.raises(RuntimeError, match=f"1.form must be '{other}', as in this layer, got"):
        model(other).load_state_dict(state)  # 0.1.0 kept it in the metadata
    model(other).load_state_dict(dict(state.items()))  # which is lost here: for the caller to know


def test_a_checkpoint_of_stage_1_says_what_it_is() -> None:
    stage1 = nn.Sequential(nn.Linear(D, C)).state_dict()
    model = nn.Sequential(DisAlignLinear(D, C))
    with pytest.warns(
        UserWarning, match=r"must have 0\.logit_scale .* got a checkpoint of stage 1"
    ):
        found = model.load_state_dict(stage1, strict=False)
    assert "0.logit_scale" in found.missing_keys
    assert torch.equal(model[0].weight, stage1["0.weight"])
    with pytest.warns(UserWarning, match="before convert_to_disalign, or with strict=False"):  # noqa: SIM117
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(stage1)


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
