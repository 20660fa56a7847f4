"""What ADE20K and LVIS need, predicted: python -m recipes.vision_cost

None of it was measured here.

ADE20K: hours are images / (images a second), and images a second those that NVIDIA measured for
ResNet-50 on one A100 in TF32, as this recipe trains there (938; DeepLearningExamples,
PyTorch/Classification/ConvNets/resnet50v1.5), times the ratio of the forward FLOPs. Stage 2 runs
forward alone: a third. A step's memory is float32 weights, gradients and momentum, 12 bytes a
weight, and what forward keeps for backward of one GPU's images.

LVIS: hours are iterations * seconds. An iteration of 16 images took 0.292 s on eight V100
(detectron2's MODEL_ZOO.md, v0.5, 7.1 GB a GPU) and 0.500 s on eight GPUs that are not named (the
released README, cosine heads, 5.26 GB). Stage 2 is counted as if it ran backward too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import ade20k
from .cost import GIB, RESNET, gflops, saved_bytes
from .lvis import RECIPES

TF32_IMAGES = 938.0  # a second
SECONDS = (0.292, 0.500)  # an iteration of LVIS


class Logits(nn.Module):
    """What both heads of the FCN compute at low resolution."""

    def __init__(self, model: ade20k.FCN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found = self.model.backbone(images)
        logits: Tensor = self.model.decode_head(self.model.features(found["out"]))
        logits += self.model.auxiliary_head(found["aux"])
        return logits


def ade20k_row() -> str:
    from torchvision.models.resnet import Bottleneck, ResNet

    recipe = ade20k.ADE20KRecipe()
    with FakeTensorMode():
        model = Logits(ade20k.FCN(ade20k.ADE20KRecipe(backbone_weights="none")))
        own = gflops(model, recipe.crop)
        rate = TF32_IMAGES * gflops(ResNet(Bottleneck, list(RESNET.layers)), 224) / own
        weights = 12 * sum(p.numel() for p in model.parameters())
        images = torch.empty(recipe.batch // 4, 3, recipe.crop, recipe.crop)
        memory = (weights + saved_bytes(model, images, bf16=False)) / GIB
    hours = [
        recipe.iterations * recipe.batch / rate / 3600,
        recipe.stage2_iterations * recipe.stage2_batch / rate / 3600 / 3,
    ]
    return f"| `recipes.ade20k` | {hours[0]:.1f} | {hours[1]:.1f} | {memory:.1f} GiB of 4 images |"


def lvis_row(version: str) -> str:
    recipe = RECIPES[version]()
    cells = [
        " to ".join(f"{8 * seconds * number / 3600:.0f}" for seconds in SECONDS)
        for number in (recipe.iterations, recipe.stage2_iterations)
    ]
    return (
        f"| `recipes.lvis --version {version}` | {' | '.join(cells)} | 5.3 to 7.1 GB of 2 images |"
    )


def table() -> str:
    return "\n".join([
        "| recipe | GPU-hours, stage 1 | stage 2 | memory of a GPU |", "|---|---|---|---|",
        ade20k_row(), *map(lvis_row, RECIPES),
    ])  # fmt: skip


if __name__ == "__main__":
    print(table())
