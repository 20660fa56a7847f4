"""What the recipes need, predicted: python -m recipes.cost

None of it was measured here. Hours are images / (images a second), and images a second those that
NVIDIA measured on one A100 with automatic mixed precision and DALI as the loader
(DeepLearningExamples, PyTorch/Classification/ConvNets: ResNet-50 v1.5 2470, ResNeXt-101 32x4d 908),
times the ratio of the forward FLOPs of that network and the recipe's. Training counts as three
forward passes, so stage 2, which only runs forward through the backbone, is three times as fast.
A step's memory is float32 weights, gradients and momentum, and what forward keeps for backward
under autocast, for the images of one process; workspaces and the allocator's rest come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .classification import Classification, build_model
from .imagenet_lt import ImageNetLT
from .inaturalist2018 import INaturalist2018
from .places_lt import PlacesLT

RECIPES: tuple[Callable[[], Classification], ...] = (ImageNetLT, INaturalist2018, PlacesLT)
GIB = 2**30


class Measured(NamedTuple):
    """Images a second in training, and the blocks and groups of the network."""

    images: float
    layers: tuple[int, int, int, int]
    groups: int
    width: int


RESNET = Measured(2470.0, (3, 4, 6, 3), 1, 64)
RESNEXT = Measured(908.4, (3, 4, 23, 3), 32, 4)


class Cost(NamedTuple):
    """GFLOPs of an image's forward pass, hours of one A100 for both stages, GiB of a process."""

    gflops: float
    stage1_hours: float
    stage2_hours: float
    gib: float


def gflops(model: nn.Module, size: int) -> float:
    """Of one image's forward pass, a multiplication and an addition each counted."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size))
    return float(counter.get_total_flops()) / 1e9


def saved_bytes(model: nn.Module, inputs: torch.Tensor, bf16: bool) -> int:
    """What forward keeps for backward, without the weights, each storage once."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.train()(inputs).sum()
    return sum(storage.nbytes() for storage in kept.values())


def predict(recipe: Classification, images: int) -> Cost:
    """images: of one process."""
    from torchvision.models.resnet import Bottleneck, ResNet

    with FakeTensorMode():
        model = build_model(replace(recipe, pretrained=""))
        grouped = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())
        known = RESNEXT if grouped else RESNET
        other = ResNet(
            Bottleneck, list(known.layers), groups=known.groups, width_per_group=known.width
        )
        own = gflops(model, recipe.image_size)
        rate = known.images * gflops(other, 224) / own
        weights = 3 * 4 * sum(p.numel() for p in model.parameters())
        inputs = torch.empty(images, 3, recipe.image_size, recipe.image_size)
        kept = saved_bytes(model, inputs, bf16=True)
    hours = recipe.train_images / rate / 3600
    stage1, stage2 = hours * recipe.epochs, hours * recipe.stage2_epochs / 3
    return Cost(own, stage1, stage2, (weights + kept) / GIB)


def table() -> str:
    rows = [
        "| recipe | GFLOPs an image, forward | hours of an A100, stage 1 | stage 2 "
        "| GiB, 32 images a process | the whole batch |",
        "|---|---|---|---|---|---|",
    ]
    for recipe_class in RECIPES:
        recipe = recipe_class()
        cost, alone = (predict(recipe, images) for images in (32, recipe.batch))
        rows.append(
            f"| `{recipe.__module__}` | {cost.gflops:.1f} | {cost.stage1_hours:.1f} | "
            f"{cost.stage2_hours:.1f} | {cost.gib:.1f} | {alone.gib:.1f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
