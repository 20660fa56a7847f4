"""ADE20K: FCN-R50-D8 in two stages, and mIoU by head, body and tail.

    python -m recipes.ade20k --data DIR --out OUT
    torchrun --nproc-per-node 8 -m recipes.ade20k --data DIR --out OUT

DIR is the folder ADEChallengeData2016 of the official archive: images/ and annotations/, each with
training/ and validation/, and objectInfo150.txt. A killed run goes on from OUT.

Not run by us: no data. The released baseline, mmsegmentation's checkpoint, has 36.1 % mIoU; the row
of DisAlign says TODO. The released code is a configuration of mmsegmentation, as
recipes/configs/mmseg_ade20k_fcn_r50.py is. This is the same model on torchvision's ResNet-50, whose
stem is one convolution (there three, ResNetV1c): mmsegmentation's checkpoint does not fit, so
stage 1 is trained. Predictions are interpolated once, to the annotation's size (there twice).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset, default_collate

from disalign_ops import class_stats, upsample_cross_entropy
from disalign_ops import nn as dnn
from disalign_ops.segmentation_metrics import SegmentationIoU

from .ade20k_data import ADE20K, IGNORED, read_split
from .common import config, iterations
from .common.checkpoint import Checkpoint, backbone_weights
from .common.config import Recipe, sourced
from .common.log import Log
from .common.ranks import Ranks, process_group

RELEASED = "released disalign_fcn_r50-d8_512x512_160k_ade20k.py"
MMSEG = "mmseg fcn_r50-d8_512x512_160k_ade20k.py, which the released config changes"


@dataclass(frozen=True)
class ADE20KRecipe(Recipe):
    """The released configuration (Megvii-BaseDetection/DisAlign, commit a2fc350)."""

    classes: int = sourced(150, f"{MMSEG}: num_classes")
    train_images: int = sourced(20_210, "README of CSAILVision/sceneparsing")
    val_images: int = sourced(2000, "README of CSAILVision/sceneparsing")
    backbone: str = sourced("resnet50", f"{MMSEG}: depth=50")
    dilation: bool = sourced(True, f"{MMSEG}: strides (1, 2, 1, 1), dilations (1, 1, 2, 4)")
    backbone_weights: str = sourced(
        "IMAGENET1K_V1", "torchvision's for mmseg's resnet50_v1c; a file of a state_dict, or none"
    )
    dropout: float = sourced(0.1, f"{MMSEG}: dropout_ratio")
    aux_weight: float = sourced(0.4, f"{MMSEG}: auxiliary_head's loss_weight, of stage 1")
    stage2_aux_weight: float = sourced(0.0, f"{RELEASED}: auxiliary_head's loss_weight")
    batch: int = sourced(16, f"{MMSEG}: samples_per_gpu 4 on 4 GPUs")
    stage2_batch: int = sourced(32, f"{RELEASED[:-3]}.sh: 4 on GPU_NUM=8")
    lr: float = sourced(0.01, f"{MMSEG}: SGD, of both stages")
    momentum: float = sourced(0.9, f"{MMSEG}: SGD")
    weight_decay: float = sourced(5e-4, f"{MMSEG}: SGD")
    power: float = sourced(0.9, f"{MMSEG}: poly")
    min_lr: float = sourced(1e-4, f"{MMSEG}: poly, min_lr")
    iterations: int = sourced(160_000, f"{MMSEG}: max_iters")
    stage2_iterations: int = sourced(4000, f"{RELEASED}: max_iters")
    rho: float = sourced(0.2, f"{RELEASED}: exp_scale, of objectInfo150.txt's column Ratio")
    normalizer: str = sourced("count", f"{RELEASED}: mmseg's mean, over all pixels; both stages")
    batch_norm: str = sourced("train", "released tools/train.py: it stays in train mode; or eval")
    scale: tuple[int, ...] = sourced((2048, 512), f"{MMSEG}: img_scale")
    ratios: tuple[float, ...] = sourced((0.5, 2.0), f"{MMSEG}: ratio_range")
    crop: int = sourced(512, f"{MMSEG}: crop_size")
    most_of_a_crop: float = sourced(0.75, f"{MMSEG}: cat_max_ratio, of one class")
    mean: tuple[float, ...] = sourced((0.485, 0.456, 0.406), f"{MMSEG}: img_norm_cfg, of 1")
    std: tuple[float, ...] = sourced((0.229, 0.224, 0.225), f"{MMSEG}: img_norm_cfg, of 1")
    stage1: str = sourced("", "none: stage 1 is trained. A file of its weights: it is skipped")
    seed: int = sourced(0, "ours: the released one is random")


def conv_bn_relu(channels_in: int, channels: int) -> nn.Sequential:
    """mmcv's ConvModule."""
    convolution = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu", mode="fan_out")
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


class FCN(nn.Module):
    """mmsegmentation's FCN: two convolutions, concatenated with their input, and a third.

    forward(images (N, 3, H, W), masks (N, H, W)) is the loss; the weights of the classes and of the
    auxiliary head are attributes that the stages set.
    """

    weight: Tensor | None

    def __init__(self, recipe: ADE20KRecipe) -> None:
        super().__init__()
        from torchvision import models
        from torchvision.models._utils import IntermediateLayerGetter

        named, state = backbone_weights(recipe.backbone_weights)
        dilated = {"replace_stride_with_dilation": [False, True, True]} if recipe.dilation else {}
        resnet = models.get_model(recipe.backbone, weights=named, **dilated)
        if state is not None:
            resnet.load_state_dict(state)
        features = resnet.fc.in_features
        self.backbone = IntermediateLayerGetter(resnet, {"layer3": "aux", "layer4": "out"})
        channels, aux = features // 4, features // 8
        self.convs = nn.Sequential(
            conv_bn_relu(features, channels), conv_bn_relu(channels, channels)
        )
        self.conv_cat = conv_bn_relu(features + channels, channels)
        self.decode_head = dnn.DisAlignSegHead(channels, recipe.classes, dropout=recipe.dropout)
        self.auxiliary_head = nn.Sequential(
            conv_bn_relu(features // 2, aux), nn.Dropout2d(recipe.dropout),
            classifier := nn.Conv2d(aux, recipe.classes, 1),
        )  # fmt: skip
        nn.init.normal_(classifier.weight, std=0.01)
        if classifier.bias is not None:
            nn.init.zeros_(classifier.bias)
        self.options: Any = {"ignore_index": IGNORED, "normalizer": recipe.normalizer}
        self.aux_weight = 0.0
        self.register_buffer("weight", None, persistent=False)

    def features(self, out: Tensor) -> Tensor:
        """(N, channels, h, w): what decode_head takes."""
        features: Tensor = self.conv_cat(torch.cat([out, self.convs(out)], dim=1))
        return features

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        found = self.backbone(images)
        features = self.features(found["out"])
        loss: Tensor = self.decode_head.loss(features, masks, self.weight, **self.options)
        if self.aux_weight:
            logits = self.auxiliary_head(found["aux"])
            loss = loss + self.aux_weight * upsample_cross_entropy(logits, masks, **self.options)
        return loss

    def predict(self, images: Tensor, size: tuple[int, ...]) -> Tensor:
        """(N, *size) classes."""
        return self.decode_head.predict(self.features(self.backbone(images)["out"]), size)


def class_weights(recipe: ADE20KRecipe, folder: Path) -> Tensor:
    """(classes,), of the share of pixels that objectInfo150.txt has in its column Ratio."""
    file = folder / "objectInfo150.txt"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; expected a table of {recipe.classes} classes with the columns "
            "Idx, Ratio, Train, Val, Name"
        )
    shares = class_stats.read_counts(file, num_classes=recipe.classes, count="pixel")
    return class_stats.grw_weights(shares, recipe.rho)


def start_stage(
    stage: int, recipe: ADE20KRecipe, model: FCN, weight: Tensor
) -> tuple[torch.optim.SGD, LambdaLR]:
    """Freezes, sets the loss, and makes the optimizer and the schedule."""
    batch_norm: Any = recipe.batch_norm
    if stage == 1:
        parameters = dnn.freeze_for_stage1(model)
        model.weight, model.aux_weight, total = None, recipe.aux_weight, recipe.iterations
    else:
        parameters = dnn.freeze_for_stage2(model, bn=batch_norm)
        model.weight, model.aux_weight = weight, recipe.stage2_aux_weight
        total = recipe.stage2_iterations
    optimizer = torch.optim.SGD(
        parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    factor = iterations.poly(total, recipe.power, recipe.min_lr / recipe.lr)
    return optimizer, LambdaLR(optimizer, factor)


def run_stage(
    stage: int, path: Path, recipe: ADE20KRecipe, model: FCN, data: ADE20K, weight: Tensor,
    options: argparse.Namespace, ranks: Ranks, log: Log,
) -> None:  # fmt: skip
    """Trains to the end, from the checkpoint in `path` on."""
    optimizer, schedule = start_stage(stage, recipe, model, weight.to(ranks.device))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    replicas = iterations.replicated(model, ranks)

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = replicas(*(part.to(ranks.device, non_blocking=True) for part in batch))
        return loss

    order = iterations.EndlessOrder(
        iterations.repeated(torch.ones(len(data))),
        recipe.batch if stage == 1 else recipe.stage2_batch,
        recipe.iterations if stage == 1 else recipe.stage2_iterations, ranks, recipe.seed + stage,
    )  # fmt: skip
    model.train()
    torch.manual_seed(recipe.seed + ranks.rank)  # dropout
    iterations.train(
        stage, step, data, order, Checkpoint(path, recipe, ranks, log, parts), log,
        collate=default_collate, workers=options.workers, save_every=options.save_every,
    )  # fmt: skip


@torch.no_grad()
def evaluate(
    model: FCN, data: ADE20K, recipe: ADE20KRecipe, ranks: Ranks, log: Log, workers: int
) -> iterations.Scores:
    """Mean IoU of all classes, and of the released head, body and tail ones, in %."""
    split: Any = {"split": "ade20k"} if recipe.classes == 150 else {}
    metric = SegmentationIoU(recipe.classes, ignore_index=IGNORED, **split)
    own = range(ranks.rank, len(data), ranks.world)
    model.eval()
    with log.progress("evaluation", len(own)) as advance:
        for image, mask in DataLoader(Subset(data, own), batch_size=1, num_workers=workers):
            mask = mask.to(ranks.device)
            metric.update(model.predict(image.to(ranks.device), mask.shape[1:]), mask)
            advance(1, "")
    scores = metric.compute()
    names = ("mean", "head", "body", "tail", "pixel_accuracy")
    return {name: 100 * scores[name].item() for name in names if name in scores}


def table(scores: iterations.Scores) -> str:
    return "IoU, %: " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def parse(arguments: list[str] | None = None) -> tuple[ADE20KRecipe, argparse.Namespace]:
    parser = config.command_line(ADE20KRecipe, "folder ADEChallengeData2016")
    options = parser.parse_args(arguments)
    return config.from_options(ADE20KRecipe, options), options


def main(arguments: list[str] | None = None) -> None:
    recipe, options = parse(arguments)
    with process_group() as ranks:
        log = Log(options.out, ranks)
        weight = class_weights(recipe, options.data)
        train = read_split(options.data, "training", recipe.train_images)
        val = read_split(options.data, "validation", recipe.val_images)
        torch.manual_seed(recipe.seed)
        model = FCN(recipe).to(ranks.device)
        if ranks.world > 1 and ranks.device.type == "cuda":  # as mmseg's norm_cfg
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

        def run(stage: int, path: Path) -> None:
            data = ADE20K(train, recipe, augment=True)
            run_stage(stage, path, recipe, model, data, weight, options, ranks, log)

        def scores() -> iterations.Scores:
            data = ADE20K(val, recipe, augment=False)
            return evaluate(model, data, recipe, ranks, log, options.workers)

        iterations.two_stages(
            model, recipe, recipe.stage1, options.out, ranks, log, run, scores, table
        )


if __name__ == "__main__":
    main()
