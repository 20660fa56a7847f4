"""Places-LT: python -m recipes.places_lt --data DIR --out DIR --rho RHO

DIR has train/ and val/ of Places365-Standard (256 x 256, a folder a class) and the lists
Places_LT_train.txt, Places_LT_val.txt and Places_LT_test.txt of OLTR (Liu et al., CVPR 2019).

DisAlign's configuration and its rho for Places-LT were never released. From the paper is ResNet-152
pretrained on ImageNet, by the public tables that quote it; stage 1 is OLTR's, which the field
started from (its weights were Caffe's, these are torchvision's, which it downloads unless
--pretrained names a file); stage 2 is ImageNet-LT's.

Aims at 39.3 % (40.4 / 42.4 / 30.1), which public tables attribute to the paper. Not run by us: no
data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import classification
from .common.config import sourced
from .images import Splits, read_list
from .inaturalist2018 import AS_IMAGENET_LT, NEVER

LISTS = "the lists of OLTR, counted as classifier-balancing, data/Places_LT, has them"
OLTR = "OpenLongTailRecognition-OLTR, config/Places_LT/stage_1.py"


@dataclass(frozen=True, kw_only=True)
class PlacesLT(classification.Classification):
    """DisAlign on Places-LT: ResNet-152 pretrained on ImageNet, then the calibration."""

    classes: int = sourced(365, LISTS)
    train_images: int = sourced(62_500, f"{LISTS}; 5 to 4980 of a class")
    val_images: int = sourced(7_300, f"{LISTS}: 20 of each class, from train")
    test_images: int = sourced(36_500, f"{LISTS}: 100 of each class, Places365's val")
    model: str = sourced("resnet152", "paper, by public tables; OLTR has it too")
    pretrained: str = sourced("IMAGENET1K_V1", "ours: torchvision's; OLTR has Caffe's")
    zero_init_residual: bool = sourced(False, "pretrained")
    head_std: float = sourced(0.01, AS_IMAGENET_LT)
    image_size: int = sourced(224, "OLTR, data/dataloader.py")
    resize: int = sourced(256, "OLTR, data/dataloader.py")
    color_jitter: float = sourced(0.4, "OLTR, data/dataloader.py: no hue")
    mean: tuple[float, ...] = sourced((0.485, 0.456, 0.406), "OLTR, data/dataloader.py")
    std: tuple[float, ...] = sourced((0.229, 0.224, 0.225), "OLTR, data/dataloader.py")
    batch: int = sourced(128, f"{OLTR}: batch_size")
    mean_images: int = sourced(32, AS_IMAGENET_LT)
    epochs: int = sourced(30, f"{OLTR}: num_epochs")
    lr: float = sourced(0.1, f"{OLTR}: lr of the classifier")
    backbone_lr: float = sourced(0.001, f"{OLTR}: lr of the features")
    lr_steps: tuple[int, ...] = sourced((10, 20), f"{OLTR}: step_size 10, gamma 0.1")
    momentum: float = sourced(0.9, f"{OLTR}: momentum")
    weight_decay: float = sourced(5e-4, f"{OLTR}: weight_decay")
    stage2_epochs: int = sourced(10, AS_IMAGENET_LT)
    stage2_lr: float = sourced(0.05, "ours: ImageNet-LT's, 0.1 for batches of 256, by the batch")
    stage2_weight_decay: float = sourced(5e-4, AS_IMAGENET_LT)
    rho: float | None = sourced(None, NEVER)
    form: str = sourced("residual", AS_IMAGENET_LT)
    start: str = sourced("released", AS_IMAGENET_LT)
    batch_norm: str = sourced("train", AS_IMAGENET_LT)


def read(folder: Path, recipe: classification.Classification) -> Splits:
    sizes = {"train": recipe.train_images, "val": recipe.val_images, "test": recipe.test_images}
    return Splits(*(
        read_list(folder / f"Places_LT_{name}.txt", recipe.classes, size, f"--{name}-images")
        for name, size in sizes.items()
    ))  # fmt: skip


if __name__ == "__main__":
    classification.run(PlacesLT, read)
