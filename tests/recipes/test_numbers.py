"""What a recipe's model, optimizers, schedules, transforms and loss really hold."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from disalign_ops import nn as dnn
from disalign_ops.class_stats import grw_weights
from recipes import classification, images
from recipes.common import checkpoint
from recipes.common.config import from_options
from recipes.common.order import TrainingOrder
from recipes.common.ranks import Ranks
from recipes.imagenet_lt import ImageNetLT
from recipes.inaturalist2018 import INaturalist2018
from recipes.places_lt import PlacesLT
from support import with_torchvision

RECIPES = (ImageNetLT, INaturalist2018, PlacesLT)
ALONE = Ranks(0, 1, torch.device("cpu"))
COUNTS = torch.arange(1000) % 96 + 5


def rates(schedule: Any, epochs: int) -> list[list[float]]:
    """Learning rates of the groups in every epoch."""
    found = []
    for _ in range(epochs):
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return found


def cosine(lr: float, epochs: int) -> list[float]:
    """The released schedule: WarmupCosineLR by the epoch, without a warm-up."""
    return [lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)]


def held(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    names = ("lr", "momentum", "weight_decay", "nesterov", "dampening")
    return [{name: group[name] for name in names} for group in optimizer.param_groups]


def sgd(lr: float, weight_decay: float) -> dict[str, Any]:
    return {"lr": lr, "momentum": 0.9, "weight_decay": weight_decay, "nesterov": False,
            "dampening": 0}  # fmt: skip


def check_stage2(
    model: nn.Module, recipe: classification.Classification, lr: float, weight_decay: float
) -> Any:
    """Residual form, released start; the calibration alone learns; BatchNorm as in training."""
    optimizer = classification.stage2_optimizer(model, recipe)
    (layer,) = [m for m in model.modules() if isinstance(m, dnn.DisAlignLinear)]
    assert layer.form == "residual"
    assert layer.logit_scale.eq(1).all()
    assert layer.logit_bias.eq(0).all()
    assert layer.confidence_layer.weight.eq(0.1).all()
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    calibration = [layer.logit_scale, layer.logit_bias, *layer.confidence_layer.parameters()]
    assert {id(p) for p in learned} == {id(p) for p in calibration}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in learned}
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training for norm in norms)
    assert held(optimizer) == [sgd(lr, weight_decay)]
    schedule = classification.schedule_of(optimizer, recipe.stage2_epochs)
    found = rates(schedule, 10)
    assert [rate for (rate,) in found] == pytest.approx(cosine(lr, 10))
    assert recipe.stage2_epochs == 10
    return layer


def imagenet_lt() -> None:
    """The released configurations, their numbers written out a second time."""
    from torchvision import transforms as T

    recipe = ImageNetLT()
    model: Any = classification.build_model(recipe)
    assert sum(p.numel() for p in model.parameters()) == 25_028_904  # torchvision's, 1000 classes
    blocks = [block for k in (1, 2, 3, 4) for block in getattr(model, f"layer{k}")]
    assert [len(getattr(model, f"layer{k}")) for k in (1, 2, 3, 4)] == [3, 4, 6, 3]
    assert all(block.conv2.groups == 32 for block in blocks)
    assert blocks[0].conv2.out_channels == 32 * 4
    assert all(block.bn3.weight.eq(0).all() for block in blocks)
    assert all(block.conv1.stride == (1, 1) for block in blocks)
    assert model.fc.weight.shape == (1000, 2048)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)

    optimizer = classification.stage1_optimizer(model, recipe)
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(in_groups) == len({id(p) for p in in_groups}) == len(list(model.parameters()))
    assert held(optimizer) == 2 * [sgd(0.1, 5e-4)]
    schedule = classification.schedule_of(optimizer, recipe.epochs, recipe.lr_steps)
    found = rates(schedule, 90)
    assert [a for a, b in found if a == b] == pytest.approx(cosine(0.1, 90))
    assert recipe.epochs == 90
    order = TrainingOrder(recipe.train_images, recipe.batch, ALONE, recipe.seed)
    assert order.batch == 256
    assert len(order) == 453  # ceil(115846 / 256), as cvpods counts an epoch

    layer = check_stage2(model, recipe, 0.1, 5e-4)
    assert layer.logit_scale.shape == (1, 1000)
    assert recipe.rho == 1.2
    weight = grw_weights(COUNTS, recipe.rho)
    assert weight.sum().item() == pytest.approx(1000)
    assert (weight[0] / weight[95]).item() == pytest.approx(20**1.2, rel=1e-5)

    crop, flip, jitter, _, normalize = images.training_transform(recipe).transforms  # type: ignore[attr-defined]
    assert isinstance(crop, T.RandomResizedCrop)
    assert crop.size == (224, 224)
    assert (tuple(crop.scale), tuple(crop.ratio)) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert isinstance(flip, T.RandomHorizontalFlip)
    assert flip.p == 0.5
    assert isinstance(jitter, T.ColorJitter)
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4)
    assert jitter.hue is None
    resize, centre, _, normalize_test = images.test_transform(recipe).transforms  # type: ignore[attr-defined]
    assert (resize.size, centre.size) == (256, (224, 224))
    for one in (normalize, normalize_test):
        assert isinstance(one, T.Normalize)
        assert (one.mean, one.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def others() -> None:
    """iNaturalist and Places-LT: stage 1 of classifier-balancing and of OLTR."""
    recipe = INaturalist2018()
    with torch.device("meta"):
        model: Any = classification.build_model(recipe)
    assert model.fc.weight.shape == (8142, 2048)
    optimizer = classification.stage1_optimizer(model, recipe)
    assert held(optimizer) == 2 * [sgd(0.2, 1e-4)]
    found = rates(classification.schedule_of(optimizer, recipe.epochs, recipe.lr_steps), 90)
    assert [a for a, b in found if a == b] == pytest.approx(cosine(0.2, 90))
    names = [type(t).__name__ for t in images.training_transform(recipe).transforms]  # type: ignore[attr-defined]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"]

    places = PlacesLT()
    with torch.device("meta"):  # 60 million weights
        model = classification.build_model(dataclasses.replace(places, pretrained=""))
    assert [len(getattr(model, f"layer{k}")) for k in (1, 2, 3, 4)] == [3, 8, 36, 3]
    assert model.fc.weight.shape == (365, 2048)
    optimizer = classification.stage1_optimizer(model, places)
    assert held(optimizer) == [sgd(0.001, 5e-4), sgd(0.1, 5e-4)]
    schedule = classification.schedule_of(optimizer, places.epochs, places.lr_steps)
    found = rates(schedule, 30)
    expected = [[0.001 * f, 0.1 * f] for f in (1, 0.1, 0.01) for _ in range(10)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    assert classification.schedule_of(optimizer, 10).T_max == 10  # type: ignore[attr-defined]


def released_checkpoint() -> None:
    """Names and shapes as in cvpods' modeling/backbone/resnet.py; no released file was at hand."""
    from torchvision.models import resnext50_32x4d

    state: dict[str, torch.Tensor] = {}

    def convolution(name: str, out: int, into: int, size: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, size, size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.norm.{part}"] = torch.rand(out)
        state[f"{name}.norm.num_batches_tracked"] = torch.tensor(7)

    convolution("network.stem.conv1", 64, 3, 7)
    into = 64
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        width, out = 128 * 2 ** (stage - 2), 256 * 2 ** (stage - 2)
        for block in range(blocks):
            name = f"network.res{stage}.{block}"
            convolution(f"{name}.conv1", width, into, 1)
            convolution(f"{name}.conv2", width, width // 32, 3)
            convolution(f"{name}.conv3", out, width, 1)
            if block == 0:
                convolution(f"{name}.shortcut", out, into, 1)
            into = out
    state["network.linear.weight"] = torch.randn(1000, into)
    state["network.linear.bias"] = torch.rand(1000)
    model = resnext50_32x4d()
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": state}, Path(folder) / "model_final_plain.pth")
        checkpoint.load_weights(
            model, Path(folder) / "model_final_plain.pth", classification.torchvision_name
        )
    loaded = model.state_dict()
    for ours, theirs in {
        "conv1.weight": "stem.conv1.weight", "bn1.bias": "stem.conv1.norm.bias",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer4.2.bn3.running_var": "res5.2.conv3.norm.running_var", "fc.bias": "linear.bias",
    }.items():  # fmt: skip
        assert torch.equal(loaded[ours], state[f"network.{theirs}"])


def all_three() -> None:
    imagenet_lt()
    others()
    released_checkpoint()


def test_models_optimizers_schedules_and_transforms_hold_the_numbers() -> None:
    with_torchvision.run(all_three)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_has_a_source(recipe: type[classification.Classification]) -> None:
    declared = {f.name for f in dataclasses.fields(classification.Classification)}
    assert {f.name for f in dataclasses.fields(recipe)} == declared
    assert all(recipe().sources().values())
    assert "changed by the user" not in recipe().sources().values()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_is_an_option(recipe: type[classification.Classification]) -> None:
    parser = classification.command_line(recipe)
    given = ["--data=d", "--out=o"]
    assert from_options(recipe, parser.parse_args(given)) == recipe()
    given += ["--lr-steps", "3", "5", "--mean", "0", "0", "1"]
    given += ["--rho=0.7", "--no-bf16", "--batch=64"]
    changed = from_options(recipe, parser.parse_args(given))
    assert changed.changed() == {
        "lr_steps": (3, 5), "rho": 0.7, "bf16": False, "mean": (0.0, 0.0, 1.0), "batch": 64,
    }  # fmt: skip
    sources = changed.sources()
    assert {name for name, source in sources.items() if "changed" in source} == {*changed.changed()}


@pytest.mark.parametrize(
    ("mean_images", "ignored"), [(4, []), (8, []), (4, [0, 5]), (4, [4, 5, 6, 7])]
)
def test_the_loss_is_the_mean_of_the_devices_losses(mean_images: int, ignored: list[int]) -> None:
    """PyTorch's weighted mean on each device, averaged as DistributedDataParallel does; a device
    whose targets are all ignored adds 0, and no NaN.
    """
    logits, target = torch.randn(8, 9, requires_grad=True), torch.randint(0, 9, (8,))
    target[ignored] = -100
    weight = torch.rand(9) + 0.1
    loss = classification.loss_of(logits, target, weight, mean_images)
    parts = zip(logits.split(mean_images), target.split(mean_images), strict=True)
    losses = [F.cross_entropy(z, t, weight) for z, t in parts if t.ge(0).any()]
    expected = torch.stack(losses).sum() / (8 // mean_images)
    torch.testing.assert_close(loss, expected)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0])


@pytest.mark.slow
def test_predicted_costs_are_those_on_the_page() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    done = with_torchvision.start("recipes.cost")
    assert done.returncode == 0, done.stderr
    assert done.stdout in page.read_text()
