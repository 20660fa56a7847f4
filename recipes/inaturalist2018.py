"""iNaturalist 2018: python -m recipes.inaturalist2018 --data DIR --out DIR --rho RHO

DIR has the folder train_val2018/ and the annotations train2018.json and val2018.json of the
competition (visipedia/inat_comp, 2018). Results are on val, as everywhere: test has no labels.

DisAlign's configuration and its rho for iNaturalist were never released. From the paper is
ResNet-50, by the public tables that quote it; stage 1 is that of Kang et al., "Decoupling
Representation and Classifier", ICLR 2020 (facebookresearch/classifier-balancing), a common choice
of the field; stage 2 is ImageNet-LT's. --sweep-rho chooses rho on val, which is also what the
results are on: an upper bound, not a result.

Aims at 70.6 % (69.0 / 71.1 / 70.2), which public tables attribute to the paper. Not run by us: no
data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import classification
from .common.config import sourced
from .images import Splits, read_inaturalist

COMPETITION = "visipedia/inat_comp, 2018/README.md"
DECOUPLING = "classifier-balancing, config/iNaturalist18/feat_unifrom.yaml"
AS_IMAGENET_LT = "ours: as in the released config of ImageNet-LT"
NEVER = "never published"


@dataclass(frozen=True, kw_only=True)
class INaturalist2018(classification.Classification):
    """DisAlign on iNaturalist 2018: ResNet-50 from scratch, then the calibration."""

    classes: int = sourced(8142, COMPETITION)
    train_images: int = sourced(437_513, COMPETITION)
    val_images: int = sourced(24_426, f"{COMPETITION}: 3 of each class")
    test_images: int = sourced(24_426, "val: test has no labels")
    model: str = sourced("resnet50", "paper, by public tables; classifier-balancing has it too")
    pretrained: str = sourced("", f"{DECOUPLING}: from scratch")
    zero_init_residual: bool = sourced(True, AS_IMAGENET_LT)
    head_std: float = sourced(0.01, AS_IMAGENET_LT)
    image_size: int = sourced(224, "classifier-balancing, data/dataloader.py")
    resize: int = sourced(256, "classifier-balancing, data/dataloader.py")
    color_jitter: float = sourced(0.0, "classifier-balancing, data/dataloader.py: none")
    mean: tuple[float, ...] = sourced((0.466, 0.471, 0.380), "classifier-balancing, dataloader.py")
    std: tuple[float, ...] = sourced((0.195, 0.194, 0.192), "classifier-balancing, dataloader.py")
    batch: int = sourced(512, f"{DECOUPLING}: batch_size")
    mean_images: int = sourced(32, AS_IMAGENET_LT)
    epochs: int = sourced(90, f"{DECOUPLING}: num_epochs; 200 is common too")
    lr: float = sourced(0.2, f"{DECOUPLING}: lr")
    backbone_lr: float = sourced(0.2, f"{DECOUPLING}: lr")
    lr_steps: tuple[int, ...] = sourced((), f"{DECOUPLING}: coslr, a step an epoch, to 0")
    momentum: float = sourced(0.9, f"{DECOUPLING}: momentum")
    weight_decay: float = sourced(1e-4, f"{DECOUPLING}: weight_decay")
    stage2_epochs: int = sourced(10, AS_IMAGENET_LT)
    stage2_lr: float = sourced(0.2, "ours: ImageNet-LT's, 0.1 for batches of 256, by the batch")
    stage2_weight_decay: float = sourced(1e-4, "ours: stage 1's, as in ImageNet-LT")
    rho: float | None = sourced(None, NEVER)
    form: str = sourced("residual", AS_IMAGENET_LT)
    start: str = sourced("released", AS_IMAGENET_LT)
    batch_norm: str = sourced("train", AS_IMAGENET_LT)


def read(folder: Path, recipe: classification.Classification) -> Splits:
    train, val = (
        read_inaturalist(folder / f"{name}2018.json", recipe.classes, size, f"--{name}-images")
        for name, size in (("train", recipe.train_images), ("val", recipe.val_images))
    )
    return Splits(train, val, val)


if __name__ == "__main__":
    classification.run(INaturalist2018, read)
