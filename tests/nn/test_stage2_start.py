"""Where stage 2 starts, that it moves from there, and that it says so where it cannot."""

from __future__ import annotations

import argparse
import copy
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import disalign_ops
from disalign_ops import metrics, sweep
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentError
from support.nn_cases import FORMS, LAYERS, C, D, N, trained
from support.places import EXAMPLES, ROOT

sys.path.append(str(EXAMPLES))

import characters
import characters_data
import pages
import pages_data


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # many small steps: a second thread costs more than it gives


# --- the start


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("width", [1, 64, 768])
def test_the_start_is_stage_1_whatever_the_features_are(
    backend: str, cls: Any, form: str, scale: float, width: int
) -> None:
    layer = cls(width, C, form=form)
    x = scale * torch.randn(N, width).relu()
    assert torch.equal(layer(x), layer.raw_logits(x))
    c = layer.confidence_layer(x).sigmoid()
    assert torch.equal(c, torch.full((N, 1), 0.5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-2, 1e3])
@pytest.mark.parametrize("width", [4, 512])
def test_the_start_of_a_segmentation_head(
    backend: str, form: str, scale: float, width: int
) -> None:
    head = dnn.DisAlignSegHead(width, 5, form=form)
    x = scale * torch.randn(4, width, 8, 8).relu()
    torch.testing.assert_close(head(x), head.raw_logits(x))
    assert 0.53 < float(head.confidence_layer(x).detach().sigmoid().mean()) < 0.63


def test_layers_and_functions_have_the_same_default() -> None:
    layer = trained(dnn.DisAlignLinear(D, C))
    head = trained(dnn.DisAlignSegHead(D, C))
    x, target = torch.randn(N, D), torch.randint(0, C, (N,))
    raw, confidence = layer.raw_logits(x), layer.confidence_layer(x)
    calibration = (confidence, layer.logit_scale, layer.logit_bias)
    found = disalign_ops.disalign_cross_entropy(raw, target, *calibration)
    torch.testing.assert_close(layer.loss(x, target), found)
    torch.testing.assert_close(layer(x), disalign_ops.calibrate(raw, *calibration))
    for module in (layer, head, dnn.convert_to_disalign(nn.Linear(D, C)),
                   dnn.DisAlignCosineLinear(D, C)):  # fmt: skip
        assert module.form == "interpolated"


@pytest.mark.parametrize("width", [16, 256, 768])
def test_the_released_start_is_there_when_asked_for(width: int) -> None:
    residual = dnn.DisAlignLinear(width, C, form="residual", start="released")
    assert torch.equal(residual.confidence_layer.weight, torch.full((1, width), 0.1))
    assert torch.equal(residual.logit_scale, torch.ones(1, C))
    x = torch.randn(N, width)
    z, c = residual.raw_logits(x), residual.confidence_layer(x).sigmoid()
    torch.testing.assert_close(residual(x), (1 + c) * z)
    interpolated = dnn.DisAlignCosineLinear(width, C, start="released")
    assert torch.equal(interpolated.confidence_layer.bias, torch.zeros(1))
    assert 0 < float(interpolated.confidence_layer.weight.detach().abs().max()) < 0.05  # N(0, 0.01)
    assert torch.equal(interpolated(x), interpolated.raw_logits(x))
    head = dnn.DisAlignSegHead(4, C, form="residual", start="released")
    assert torch.equal(head.logit_scale, torch.ones(1, C, 1, 1))
    with pytest.raises(ArgumentError, match=r"start must be .*, got 'paper'"):
        dnn.DisAlignLinear(D, C, start="paper")  # type: ignore[arg-type]


# --- stage 2 moves from there

COUNTS = torch.tensor([400, 300, 200, 120, 80, 50, 30, 20, 12, 10, 8, 6])
Data = tuple[Tensor, Tensor]


def backbone(kind: str, width: int) -> list[nn.Module]:
    if kind == "ReLU":
        return [nn.Linear(24, width), nn.BatchNorm1d(width), nn.ReLU()]
    return [nn.Linear(24, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width)]


def stage1(kind: str, width: int, seed: int) -> tuple[nn.Module, Data, Data]:
    """A model trained on a made-up long tail of twelve classes, and its data."""
    torch.manual_seed(seed)
    centres = 0.75 * torch.randn(len(COUNTS), 24)

    def drawn(counts: Tensor) -> Data:
        target = torch.repeat_interleave(torch.arange(len(COUNTS)), counts)
        return centres[target] + torch.randn(len(target), 24), target

    train, test = drawn(COUNTS), drawn(torch.full_like(COUNTS, 100))
    model = nn.Sequential(*backbone(kind, width), nn.Linear(width, len(COUNTS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(4):
        for x, target in loader(train):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
    return model, train, test


def loader(data: Data) -> list[Data]:
    return [(data[0][rows], data[1][rows]) for rows in torch.randperm(len(data[0])).split(64)]


@torch.no_grad()
def few(model: nn.Module, test: Data) -> float:
    was = model.training
    metric = metrics.LongTailAccuracy(COUNTS)
    metric.update(model.eval()(test[0]), test[1])
    model.train(was)
    return float(metric.compute()["few"])


def readme_lines() -> str:
    """The block of README.md's section about the second stage, as it is printed."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Classification: the second stage in ten lines") :]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


WIDTHS = [("ReLU", 64), ("ReLU", 768), ("LayerNorm", 64), ("LayerNorm", 384), ("LayerNorm", 768)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("kind", "width"), WIDTHS)
@pytest.mark.filterwarnings("default:the mean confidence")  # wide ReLU features reach 0.999
def test_the_lines_of_the_readme_beat_stage_1_on_few_shot_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, width: int, seed: int
) -> None:
    model, train, test = stage1(kind, width, seed)
    monkeypatch.chdir(tmp_path)
    Path("ImageNet_LT_train.txt").write_text(
        "".join(f"{k}/{i}.jpg {k}\n" for i, k in enumerate(train[1].tolist()))
    )
    before = few(model, test)
    names: dict[str, Any] = {"model": model, "loader": loader(train)}
    exec(readme_lines(), names)
    assert few(names["model"], test) > before + 0.02


def test_both_forms_take_the_same_way() -> None:
    model, train, _ = stage1("ReLU", 64, 0)
    models = []
    for form in FORMS:
        torch.manual_seed(1)
        copied = dnn.convert_to_disalign(copy.deepcopy(model), form=form)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(dnn.freeze_for_stage2(copied), lr=0.1, momentum=0.9)
        criterion = dnn.GRWCrossEntropyLoss(COUNTS, rho=1.2)
        for x, target in loader(train):
            optimizer.zero_grad()
            criterion(copied(x), target).backward()
            optimizer.step()
        models.append(dnn.convert_form(copied, "interpolated").state_dict())
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], rtol=1e-3, atol=1e-4)


# --- the demos


def made_up_images(seed: int) -> characters_data.LongTailImages:
    """Ten classes, each a pattern of squares under noise, 120 to 6 of them to train on."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([120, 60, 40, 30, 15, 12, 10, 8, 7, 6])
    squares = torch.randint(0, 2, (10, 1, 8, 8), generator=generator).float()
    patterns = 60 + 120 * F.interpolate(squares, (32, 32)).squeeze(1)

    def drawn(target: Tensor) -> Tensor:
        noise = torch.randn(len(target), 32, 32, generator=generator)
        return (patterns[target] + 30 * noise).clamp(0, 255).to(torch.uint8)

    train = torch.repeat_interleave(torch.arange(10), counts)
    test = torch.arange(10).repeat_interleave(20)
    names = [str(k) for k in range(10)]
    return characters_data.LongTailImages(names, drawn(train), train, drawn(test), test)


def test_the_demo_beats_its_stage_1_on_few_shot_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters, "BATCH", 32)
    options = argparse.Namespace(epochs=5, stage2_epochs=4, rho=1.2)
    with Progress(disable=True) as progress:
        model, _, results = characters.learn(made_up_images(0), options, progress)
    before, *_, after = (float(found["few"]) for found in results.values())  # type: ignore[arg-type]
    assert after > before
    assert 0.5 < model.classifier.mean_confidence() < 0.99  # type: ignore[operator]


def made_up_pages(seed: int) -> pages_data.PageData:
    """Eight classes, each a texture of 16 x 16 pixels, the first the most frequent by far."""
    generator = torch.Generator().manual_seed(seed)
    classes, cells = 8, -(-pages_data.RENDERED // 16)
    squares = torch.randint(0, 2, (classes, 1, 4, 4), generator=generator).float()
    textures = 50 + 150 * F.interpolate(squares, (16, 16)).squeeze(1)

    def drawn(number: int, shares: Tensor) -> pages_data.Pages:
        total = number * cells * cells
        target = torch.multinomial(shares, total, replacement=True, generator=generator)
        target = target.reshape(number, cells, cells)
        masks = target.repeat_interleave(16, 1).repeat_interleave(16, 2)
        images = textures[target].permute(0, 1, 3, 2, 4).reshape(masks.shape)
        kept = slice(0, pages_data.RENDERED)
        return pages_data.Pages(
            images[:, kept, kept].to(torch.uint8), masks[:, kept, kept].to(torch.uint8)
        )

    data: Any = object.__new__(pages_data.PageData)
    data.characters = [str(k) for k in range(classes)]
    data.train = drawn(32, torch.arange(1.0, 1 + classes) ** -1.5)
    images, masks = pages_data.distort(
        drawn(12, torch.ones(classes)), torch.arange(12), torch.Generator().manual_seed(seed)
    )
    data.test = pages_data.Pages((images.squeeze(1) * 255).round().to(torch.uint8), masks)
    data.counts = torch.bincount(data.train.masks.flatten().long(), minlength=classes)
    return data


def test_the_dense_demo_beats_its_stage_1_beyond_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pages, pages_data):
        monkeypatch.setattr(module, "PAGE", 64)
    options = argparse.Namespace(epochs=12, stage2_epochs=6, rho=1.0)
    with Progress(disable=True) as progress:
        learned = pages.learn(made_up_pages(0), options, progress)
    before, *_, after = learned.results.values()
    assert float(after["body"]) > float(before["body"]) + 0.02
    assert float(after["tail"]) >= float(before["tail"])
    assert 0.51 < learned.model.head.mean_confidence() < 0.99  # type: ignore[operator]


# --- the mean confidence


def step(layer: Any, x: Tensor) -> None:
    layer.loss(x, torch.zeros(len(x), dtype=torch.int64)).backward()


def test_the_mean_confidence_is_that_of_a_training_batch() -> None:
    layer = trained(dnn.DisAlignLinear(D, C)).train()
    x = torch.randn(N, D)
    assert layer.mean_confidence() is None
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert layer.mean_confidence() is None
    step(layer, x)
    mean = float(layer.confidence_layer(x).detach().sigmoid().mean())
    assert layer.mean_confidence() == pytest.approx(mean)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.mean_confidence() == pytest.approx(mean)
    for _ in range(15):  # not looked at
        layer(-x)
    assert layer.mean_confidence() == pytest.approx(mean)
    layer(-x)
    mean = float(layer.confidence_layer(-x).detach().sigmoid().mean())
    assert layer.mean_confidence() == pytest.approx(mean)
    frozen = dnn.DisAlignLinear(D, C).requires_grad_(False)
    frozen(x)
    assert frozen.mean_confidence() is None


def collapsed(make: Callable[[], Any], bias: float) -> Any:
    layer = make()
    with torch.no_grad():
        dict(layer.confidence_layer.named_parameters())[
            "bn.bias" if isinstance(layer, dnn.DisAlignSegHead) else "bias"
        ].fill_(bias)
    return layer


COLLAPSED: dict[str, tuple[Callable[[], Any], float, str]] = {
    "linear, 0": (lambda: dnn.DisAlignLinear(D, C), -9.0, "nearly no input is calibrated"),
    "linear, 1": (lambda: dnn.DisAlignLinear(D, C), 9.0, "all inputs are calibrated alike"),
    "cosine, 0": (lambda: dnn.DisAlignCosineLinear(D, C), -9.0, "nearly no input"),
    "head, 0.5": (lambda: dnn.DisAlignSegHead(D, C), -9.0, "nearly no input"),
}


@pytest.mark.parametrize("case", COLLAPSED)
def test_a_collapsed_confidence_warns_once(case: str) -> None:
    make, bias, message = COLLAPSED[case]
    layer = collapsed(make, bias)
    shape = (N, D, 2, 2) if isinstance(layer, dnn.DisAlignSegHead) else (N, D)
    x = torch.randn(shape)
    with pytest.warns(UserWarning, match=message):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            layer(x)
        layer.eval()


def test_elsewhere_than_on_the_cpu_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = collapsed(lambda: dnn.DisAlignLinear(D, C), -9.0)
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda self: False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(N, D))
    with pytest.warns(UserWarning, match="the mean confidence of a DisAlign layer"):
        layer.eval()


def test_where_values_do_not_exist_nothing_is_looked_at() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = dnn.DisAlignLinear(D, C)
        layer(torch.randn(N, D))
    assert layer.mean_confidence() is None
    layer = collapsed(lambda: dnn.DisAlignLinear(D, C), -9.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch's on Python 3.13.0 is another
        torch.func.vmap(layer)(torch.randn(2, N, D))
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(N, D))
    assert layer.mean_confidence() is None


def test_a_sweep_warns_too() -> None:
    model = nn.Sequential(collapsed(lambda: dnn.DisAlignLinear(D, C), -20.0))
    x, target = torch.randn(N, D), torch.randint(0, C, (N,))
    with pytest.warns(UserWarning, match="the mean confidence"):
        layers = sweep.sweep_rho(model, x, target, [3] * C, [1.0], epochs=1)
    assert layers[1.0].mean_confidence() < 0.01  # type: ignore[operator]
