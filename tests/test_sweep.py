"""Stage 2 for several rho over cached features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disalign_ops import nn as dnn
from disalign_ops import sweep
from disalign_ops.errors import ArgumentError

COUNTS = [400, 90, 40, 12, 5]
C, D = len(COUNTS), 6


def model_of(cls: Any = dnn.DisAlignLinear, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, D), nn.ReLU())
    return nn.Sequential(body, cls(D, C, **options)).eval()


def data(batches: int = 3, rows: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 4, generator=generator),
         torch.randint(0, C, (rows,), generator=generator))
        for _ in range(batches)
    ]  # fmt: skip


def test_the_cache_has_what_the_layer_is_given() -> None:
    model, batches = model_of(), data()
    features, target = sweep.cache_features(model, batches)
    assert torch.equal(features, torch.cat([model[0](x) for x, _ in batches]))
    assert torch.equal(target, torch.cat([t for _, t in batches]))
    assert not features.requires_grad
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize("cls", [dnn.DisAlignLinear, dnn.DisAlignCosineLinear])
@pytest.mark.parametrize("form", ["residual", "interpolated"])
@pytest.mark.parametrize("recipe", [{}, {"weight_decay": 0.05, "step": "batch"}], ids=str)
def test_each_rho_is_a_stage_2_of_its_own(cls: Any, form: str, recipe: dict[str, Any]) -> None:
    model = model_of(cls, form=form)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    features, target = sweep.cache_features(model, data())
    rhos = (0.5, 1.2)
    given: dict[str, Any] = {"epochs": 3, "batch_size": 16, "label_smoothing": 0.05, **recipe}
    found = sweep.sweep_rho(model, features, target, COUNTS, rhos,
                            generator=torch.Generator().manual_seed(4), **given)  # fmt: skip
    assert list(found) == list(rhos)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name

    for rho, layer in found.items():
        # The recipe of the README, on the same order of rows.
        alone = model_of(cls, form=form)
        learned = dnn.freeze_for_stage2(alone)
        decay = recipe.get("weight_decay", 0.0)
        optimizer = torch.optim.SGD(learned, lr=0.1, momentum=0.9, weight_decay=decay)
        criterion = dnn.GRWCrossEntropyLoss(COUNTS, rho, label_smoothing=0.05)
        generator = torch.Generator().manual_seed(4)
        for epoch in range(3):
            for batch, rows in enumerate(torch.randperm(60, generator=generator).split(16)):
                # By epoch: cvpods' WarmupCosineLR with EPOCH_WISE and no warm-up.
                part = (4 * epoch + batch) / 12 if recipe else epoch / 3
                optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * part))
                optimizer.zero_grad()
                criterion(alone[1](features[rows]), target[rows]).backward()
                optimizer.step()
        for name, value in alone[1].state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    scales = [layer.get_parameter("logit_scale") for layer in found.values()]
    assert not torch.equal(*scales)


def test_the_raw_logits_are_made_once_for_every_rho(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    features, target = sweep.cache_features(model, data())
    calls = []
    raw = dnn.DisAlignLinear._raw
    monkeypatch.setattr(
        dnn.DisAlignLinear, "_raw", lambda self, x: calls.append(len(x)) or raw(self, x)
    )
    rhos = [k / 10 for k in range(1, 11)]
    sweep.sweep_rho(model, features, target, COUNTS, rhos, epochs=1, batch_size=25)
    assert calls == [25, 25, 10]


def test_rhos_are_any_sequence_of_numbers() -> None:
    model = model_of()
    features, target = sweep.cache_features(model, data())
    for rhos in ((0.5, 1), np.array([0.5, 1.0], np.float32), torch.tensor([0.5, 1.0]),
                 [np.float64(0.5), torch.tensor(1)]):  # fmt: skip
        found = sweep.sweep_rho(model, features, target, COUNTS, rhos, epochs=1)  # type: ignore[arg-type]
        assert list(found) == [0.5, 1.0]
        assert all(type(rho) is float for rho in found)
    with pytest.raises(TypeError, match="rhos"):
        sweep.sweep_rho(model, features, target, COUNTS, ["1"], epochs=1)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"rhos must be a sequence of numbers, got 0\.5"):
        sweep.sweep_rho(model, features, target, COUNTS, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "start"), [("residual", "released"), ("interpolated", "identity")]
)
def test_decay_pulls_the_scale_to_0(form: str, start: str) -> None:
    """In the residual form that is to stage 1's logits, in the interpolated one away from them."""
    model = model_of(form=form, start=start)
    features, target = sweep.cache_features(model, data())
    layers = [
        sweep.sweep_rho(model, features, target, COUNTS, [0.0], epochs=200, batch_size=60,
                        weight_decay=decay)[0.0]
        for decay in (0.0, 0.5)
    ]  # fmt: skip
    free, decayed = (layer.get_parameter("logit_scale").abs().max() for layer in layers)
    assert decayed < 0.2 < free
    layer: Any = layers[1]
    for vector in (layer.logit_scale, layer.logit_bias):
        vector.zero_()
    raw, c = layer.raw_logits(features), torch.sigmoid(layer.confidence_layer(features))
    assert c.max() > 0.1
    expected = raw if form == "residual" else (1 - c) * raw
    torch.testing.assert_close(layer(features), expected)


def test_a_background_has_no_count() -> None:
    model = model_of(background="first")
    features, target = sweep.cache_features(model, data())
    found = sweep.sweep_rho(model[1], features, target, COUNTS[1:], [1.0], epochs=1)
    assert found[1.0].get_parameter("logit_scale").shape == (1, C - 1)


def test_errors() -> None:
    model, batches = model_of(), data()
    features, target = sweep.cache_features(model, batches)
    for rhos in ([], [1.0, 1.0]):
        with pytest.raises(ArgumentError, match="rhos must be"):
            sweep.sweep_rho(model, features, target, COUNTS, rhos)
    with pytest.raises(
        ArgumentError, match=r"target must have as many rows as features \(60\), got 59"
    ):
        sweep.sweep_rho(model, features, target[:-1], COUNTS, [1.0])
    with pytest.raises(ArgumentError, match="epochs and batch_size must be 1 or more, got 0"):
        sweep.sweep_rho(model, features, target, COUNTS, [1.0], epochs=0)
    with pytest.raises(ArgumentError, match="weight_decay must be a number >= 0"):
        sweep.sweep_rho(model, features, target, COUNTS, [1.0], weight_decay=-1)
    with pytest.raises(ArgumentError, match=r"step must be .*, got 'row'"):
        sweep.sweep_rho(model, features, target, COUNTS, [1.0], step="row")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"model must have one DisAlignLinear .*, got 0"):
        sweep.cache_features(nn.Linear(4, 3), batches)
    with pytest.raises(ArgumentError, match=r"batches must have at least one .*, got none"):
        sweep.cache_features(model, [])
    with pytest.raises(ArgumentError, match="once a batch, got 2 calls in 1 batches"):
        sweep.cache_features(nn.Sequential(Twice(model)), batches)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) + self.inner(x))
