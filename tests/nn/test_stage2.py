"""Stage 2, conversions, copies of modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disalign_ops.class_stats import log_prior
from disalign_ops.nn import (
    CrossEntropyLoss,
    DisAlignCosineLinear,
    DisAlignLinear,
    DisAlignSegHead,
    GRWCrossEntropyLoss,
    convert_form,
    convert_to_disalign,
    freeze_for_stage2,
)
from support.nn_cases import COUNTS, F64, FORMS, LAYERS, C, D, N, equal_states, trained

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


def in_training(model: nn.Module) -> set[str]:
    norms = (nn.modules.batchnorm._BatchNorm,)
    return {n for n, m in model.train().named_modules() if isinstance(m, norms) and m.training}


def test_batch_norm_that_version_0_1_0_froze_and_pickled() -> None:
    norm = nn.BatchNorm1d(D).eval()
    freeze_for_stage2(nn.Sequential(norm, DisAlignLinear(D, C)))
    # The function's name is in the file; protocol 0 has it without its length.
    file = pickle.dumps(norm, protocol=0)
    assert b"_train_but_batch_norm\n" in file
    norm = pickle.loads(file.replace(b"_train_but_batch_norm\n", b"_stay_in_eval\n"))
    model = nn.Sequential(norm, DisAlignLinear(D, C)).train()
    assert not norm.training
    freeze_for_stage2(model, bn="train")
    assert model.train()[0].training


def test_frozen_batch_norm_stays_frozen_when_it_is_converted() -> None:
    model = convert_to_disalign(Net())
    freeze_for_stage2(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    copies = (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)))
    for other in copies:
        assert in_training(other) == set()
        assert all(not m.training for m in (other.norm, other.body[1]))
    # A submodule alone, as Lightning and mmengine set it, and a module around the model.
    assert in_training(converted.body) == set()
    assert in_training(nn.Sequential(converted)) == set()
    x, _ = batch()
    before = converted.norm.running_mean.clone()
    converted.train().eval().train()
    with torch.no_grad():
        converted.eval()(x)
    assert torch.equal(converted.norm.running_mean, before)
    freeze_for_stage2(converted, "train")
    assert in_training(converted) == {"norm", "body.1"}


def test_a_confidence_layers_own_batch_norm_goes_on_learning_when_it_is_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, D, 1), nn.BatchNorm2d(D), DisAlignSegHead(D, C))
    freeze_for_stage2(model)
    assert in_training(model) == {"2.confidence_layer.bn"}
    assert in_training(nn.SyncBatchNorm.convert_sync_batchnorm(model)) == {"2.confidence_layer.bn"}


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
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=0)


def test_convert_with_the_released_start(backend: str) -> None:
    model = Net().eval()
    x, _ = batch()
    before = model(x)
    convert_to_disalign(model, form="residual", start="released")
    after = model(x)
    assert torch.equal(after.argmax(1), before.argmax(1))
    assert (after.abs() > before.abs()).all()  # (1 + c) z


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
    assert "in_features=5, out_features=9, form='interpolated', background='last', start=" in text


def test_compiled_without_a_graph_break() -> None:
    layer = trained(DisAlignCosineLinear(D, C))
    x, target = torch.randn(N, D), torch.randint(0, C, (N,))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    loss = torch.compile(layer.loss, backend="aot_eager", fullgraph=True)(x, target)
    torch.testing.assert_close(loss, layer.loss(x, target))
