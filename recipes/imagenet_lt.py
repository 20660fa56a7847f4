"""ImageNet-LT: python -m recipes.imagenet_lt --data DIR --out DIR

DIR has ImageNet's train/ and val/ (a folder a class) and the lists ImageNet_LT_train.txt,
ImageNet_LT_val.txt and ImageNet_LT_test.txt of OLTR (Liu et al., CVPR 2019).

Aims at the released 46.918 % after stage 1 and 52.438 % after stage 2. Not run by us: no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import classification
from .common.config import sourced
from .images import Splits, read_list

LISTS = "OLTR's lists; TensorFlow Datasets' imagenet_lt has the same counts"
RELEASED = "released config resx50.scratch.imagenet_lt.224size.90e"
RELEASED2 = RELEASED + ".disalign.10e"
CVPODS = "default of the cvpods release that the released code runs in"


@dataclass(frozen=True, kw_only=True)
class ImageNetLT(classification.Classification):
    """DisAlign on ImageNet-LT: ResNeXt-50 from scratch, then the calibration."""

    classes: int = sourced(1000, LISTS)
    train_images: int = sourced(115_846, LISTS)
    val_images: int = sourced(20_000, f"{LISTS}: 20 of each class, from ImageNet's train")
    test_images: int = sourced(50_000, f"{LISTS}: ImageNet's val")
    model: str = sourced("resnext50_32x4d", f"{RELEASED}: DEPTH, NUM_GROUPS, WIDTH_PER_GROUP")
    pretrained: str = sourced("", f"{RELEASED}: WEIGHTS")
    zero_init_residual: bool = sourced(True, f"{RELEASED}: ZERO_INIT_RESIDUAL")
    head_std: float = sourced(0.01, f"{CVPODS}: the linear layer of its ResNet")
    image_size: int = sourced(224, f"{RELEASED}: RandomResizedCrop, CenterCrop")
    resize: int = sourced(256, f"{RELEASED}: TEST_PIPELINES, Resize")
    color_jitter: float = sourced(0.4, f"{RELEASED}, {RELEASED2}: ColorJitter, no hue")
    mean: tuple[float, ...] = sourced((0.485, 0.456, 0.406), f"{CVPODS}: PIXEL_MEAN")
    std: tuple[float, ...] = sourced((0.229, 0.224, 0.225), f"{CVPODS}: PIXEL_STD")
    batch: int = sourced(256, f"{RELEASED}, {RELEASED2}: IMS_PER_BATCH")
    mean_images: int = sourced(32, f"{CVPODS}: IMS_PER_DEVICE, 8 GPUs with a mean each")
    epochs: int = sourced(90, f"{RELEASED}: MAX_EPOCH")
    lr: float = sourced(0.1, f"{RELEASED}: BASE_LR")
    backbone_lr: float = sourced(0.1, f"{RELEASED}: BASE_LR, of all layers")
    lr_steps: tuple[int, ...] = sourced((), f"{RELEASED}: none; a cosine, EPOCH_WISE")
    momentum: float = sourced(0.9, f"{CVPODS}: MOMENTUM")
    weight_decay: float = sourced(5e-4, f"{RELEASED}: WEIGHT_DECAY, WEIGHT_DECAY_NORM")
    stage2_epochs: int = sourced(10, f"{RELEASED2}: MAX_EPOCH")
    stage2_lr: float = sourced(0.1, f"{RELEASED2}: BASE_LR")
    stage2_weight_decay: float = sourced(5e-4, f"{RELEASED2}: WEIGHT_DECAY")
    rho: float | None = sourced(1.2, f"{RELEASED2}: GRW_SCALE")
    form: str = sourced("residual", "released code: cvpods.layers.DisAlignLinear")
    start: str = sourced("released", "released code: cvpods.layers.DisAlignLinear")
    batch_norm: str = sourced("train", f"{RELEASED2}, net.py: it stays in train mode")


def read(folder: Path, recipe: classification.Classification) -> Splits:
    sizes = {"train": recipe.train_images, "val": recipe.val_images, "test": recipe.test_images}
    return Splits(*(
        read_list(folder / f"ImageNet_LT_{name}.txt", recipe.classes, size, f"--{name}-images")
        for name, size in sizes.items()
    ))  # fmt: skip


if __name__ == "__main__":
    classification.run(ImageNetLT, read)
