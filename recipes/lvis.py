"""LVIS v1 and v0.5: Mask R-CNN R50-FPN in two stages, and LVIS's AP of boxes and masks.

    python -m recipes.lvis --data DIR --out OUT --version v1 --head cosine
    torchrun --nproc-per-node 8 -m recipes.lvis --data DIR --out OUT ...

DIR has lvis/lvis_v1_train.json, lvis/lvis_v1_val.json (v0.5: lvis_v0.5_*.json), coco/train2017 and
coco/val2017, as detectron2 and the released code want them. A killed run goes on from OUT.

Not run by us: no data. It aims at box / mask AP 24.7 / 24.2 (v1, cosine) and 27.1 / 27.5 (v0.5,
cosine, repeat-factor sampling): docs/results.md. It differs from the released code, which is on
cvpods, where torchvision does: the backbone starts from torchvision's weights (MSRA's are of
another ResNet-50), boxes are regressed with smooth L1 of beta 1/9 (not L1), and batches are not
grouped by aspect ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from disalign_ops import class_stats
from disalign_ops import nn as dnn

from .common import config, iterations
from .common.checkpoint import Checkpoint, backbone_weights
from .common.config import Recipe, sourced
from .common.log import Log
from .common.ranks import Ranks, process_group

RELEASED = "released instance_seg/lvis1.0/mask_rcnn/res50"
CVPODS = "cvpods (2deea5d), which the released configs build on"


@dataclass(frozen=True)
class LVISv1(Recipe):
    """The released configurations for LVIS v1.0 (Megvii-BaseDetection/DisAlign, commit a2fc350)."""

    head: str = sourced("cosine", f"{RELEASED}: *.cos_norm.*, 24.7 / 24.2; or linear, 21.9 / 21.3")
    cosine_scale: float = sourced(20.0, f"{RELEASED}: COSINE_SCALE_INIT, COSINE_SCALE_MODE 'learn'")
    repeat_threshold: float = sourced(0.0, f"{RELEASED}: none; *.rfs.* REPEAT_THRESHOLD 0.001")
    classes: int = sourced(1203, f"{RELEASED}: NUM_CLASSES")
    train_images: tuple[int, ...] = sourced((100_170, 100_170), "lvis_v1_train.json; least, most")
    val_images: tuple[int, ...] = sourced((19_809, 19_809), "lvis_v1_val.json; least, most")
    batch: int = sourced(16, f"{RELEASED}: IMS_PER_BATCH")
    mean_images: int = sourced(2, f"{CVPODS}: IMS_PER_DEVICE, 8 GPUs with a mean each")
    lr: float = sourced(0.02, f"{RELEASED}: BASE_LR, of both stages")
    momentum: float = sourced(0.9, f"{CVPODS}: MOMENTUM")
    weight_decay: float = sourced(1e-4, f"{CVPODS}: WEIGHT_DECAY")
    gamma: float = sourced(0.1, f"{CVPODS}: GAMMA, at every step")
    warmup: int = sourced(1000, f"{CVPODS}: WARMUP_ITERS, of both stages")
    warmup_factor: float = sourced(1e-3, f"{CVPODS}: WARMUP_FACTOR")
    iterations: int = sourced(180_000, f"{RELEASED}: *.1x MAX_ITER")
    steps: tuple[int, ...] = sourced((120_000, 160_000), f"{RELEASED}: *.1x STEPS")
    stage2_iterations: int = sourced(9000, f"{RELEASED}: *.disalign.1x MAX_ITER")
    stage2_steps: tuple[int, ...] = sourced((8000,), f"{RELEASED}: *.disalign.1x STEPS")
    rho: float = sourced(0.8, f"{RELEASED}: GRW_SCALE")
    min_sizes: tuple[int, ...] = sourced(
        (640, 672, 704, 736, 768, 800), f"{RELEASED}: short_edge_length; the last one to test"
    )
    max_size: int = sourced(1333, f"{RELEASED}: max_size")
    score_threshold: float = sourced(1e-4, f"{RELEASED}: SCORE_THRESH_TEST")
    detections: int = sourced(300, f"{RELEASED}: DETECTIONS_PER_IMAGE")
    regions: int = sourced(512, f"{CVPODS}: ROI_HEADS.BATCH_SIZE_PER_IMAGE")
    proposals: int = sourced(1000, f"{CVPODS}: RPN.POST_NMS_TOPK_*; 2000 before NMS, to test 1000")
    backbone: str = sourced("resnet50", f"{RELEASED}: RESNETS.DEPTH; FREEZE_AT 2")
    backbone_weights: str = sourced(
        "IMAGENET1K_V1", "torchvision's for MSRA's R-50.pkl; a file of a state_dict, or none"
    )
    stage1: str = sourced("", "none: stage 1 is trained. A file of its weights: it is skipped")
    seed: int = sourced(0, "ours: the released one is random")


@dataclass(frozen=True)
class LVISv05(LVISv1):
    """The released configurations for LVIS v0.5: instance_seg/lvis0.5/mask_rcnn/res50."""

    repeat_threshold: float = sourced(1e-3, "released lvis0.5: *.rfs.cos_norm.1x REPEAT_THRESHOLD")
    classes: int = sourced(1230, "released lvis0.5: NUM_CLASSES")
    train_images: tuple[int, ...] = sourced((57_000, 57_999), "57k: what papers say; least, most")
    val_images: tuple[int, ...] = sourced((5000, 5000), "5k: what papers say; least, most")
    iterations: int = sourced(90_000, "released lvis0.5: *.1x MAX_ITER")
    steps: tuple[int, ...] = sourced((60_000, 80_000), "released lvis0.5: *.1x STEPS")
    stage2_iterations: int = sourced(4500, "released lvis0.5: *.disalign.1x MAX_ITER")
    stage2_steps: tuple[int, ...] = sourced((4000,), "released lvis0.5: *.disalign.1x STEPS")
    score_threshold: float = sourced(1e-4, "released lvis0.5: *.disalign.1x; 0 after stage 1")


RECIPES: dict[str, type[LVISv1]] = {"v1": LVISv1, "v0.5": LVISv05}


def build_model(recipe: LVISv1) -> Any:
    """torchvision's Mask R-CNN R50-FPN with a DisAlign box predictor, which starts at u = z."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    from disalign_ops.integrations.torchvision import DisAlignFastRCNNPredictor

    if recipe.head not in ("linear", "cosine"):
        raise ValueError(f"head must be 'linear' or 'cosine', got {recipe.head!r}")
    named, state = backbone_weights(recipe.backbone_weights)
    backbone = resnet_fpn_backbone(
        backbone_name=recipe.backbone, weights=named, trainable_layers=3
    )  # FREEZE_AT 2: the stem and the first stage; BatchNorm is FrozenBatchNorm2d
    if state is not None:
        missing = backbone.body.load_state_dict(state, strict=False).missing_keys  # fc is too much
        if missing:
            raise ValueError(
                f"{recipe.backbone_weights}: no {', '.join(missing[:5])}; expected a state_dict of "
                f"{recipe.backbone}"
            )
    model: Any = MaskRCNN(
        backbone, recipe.classes + 1, min_size=recipe.min_sizes, max_size=recipe.max_size,
        rpn_pre_nms_top_n_train=2000, rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_train=recipe.proposals, rpn_post_nms_top_n_test=recipe.proposals,
        box_batch_size_per_image=recipe.regions, box_score_thresh=recipe.score_threshold,
        box_detections_per_img=recipe.detections,
    )  # fmt: skip
    heads = model.roi_heads
    features = heads.box_predictor.cls_score.in_features
    scale = recipe.cosine_scale if recipe.head == "cosine" else None
    predictor = DisAlignFastRCNNPredictor(features, recipe.classes + 1, cosine_scale=scale)
    # As cvpods' FastRCNNOutputLayers.
    nn.init.normal_(predictor.cls_score.weight, std=0.01)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
    for bias in (predictor.cls_score.bias, predictor.bbox_pred.bias):
        if bias is not None:
            nn.init.zeros_(bias)
    heads.box_predictor = predictor
    return model


def class_weights(recipe: LVISv1, categories: list[dict[str, Any]]) -> Tensor:
    """(classes + 1,): of the classes' images in training; the background, 1, comes first."""
    counts = {category["id"]: category["image_count"] for category in categories}
    return class_stats.grw_weights(counts, recipe.rho, background="first")


def optimizer_of(
    recipe: LVISv1, parameters: list[nn.Parameter], stage: int
) -> tuple[torch.optim.SGD, LambdaLR]:
    optimizer = torch.optim.SGD(
        parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    factor = iterations.warmup_multistep(
        recipe.steps if stage == 1 else recipe.stage2_steps, recipe.gamma, recipe.warmup,
        recipe.warmup_factor,
    )  # fmt: skip
    return optimizer, LambdaLR(optimizer, factor)


@contextmanager
def released_loss(weight: Tensor | None, images: int) -> Iterator[None]:
    """Within it, torchvision's detectors train with the weights and the mean of the released code.

    The mean over every `images` images of their weighted means: each GPU has its own, and
    DistributedDataParallel averages them.
    """
    from torchvision.models.detection import roi_heads

    from disalign_ops.integrations.torchvision import replace_fastrcnn_loss

    with replace_fastrcnn_loss(weight):
        of_one = roi_heads.fastrcnn_loss

        def loss(
            logits: Tensor, boxes: Tensor, labels: list[Tensor], targets: list[Tensor]
        ) -> tuple[Tensor, Tensor]:
            sizes = [sum(map(len, labels[i : i + images])) for i in range(0, len(labels), images)]
            whole = zip(logits.split(sizes), boxes.split(sizes), strict=True)
            parts = [
                of_one(z, b, labels[i : i + images], targets[i : i + images])
                for i, (z, b) in zip(range(0, len(labels), images), whole, strict=True)
            ]
            classes, regression = (torch.stack(terms).mean() for terms in zip(*parts, strict=True))
            return classes, regression

        roi_heads.fastrcnn_loss = loss
        yield


def run_stage(
    stage: int, path: Path, recipe: LVISv1, model: Any, data: Any, weight: Tensor,
    options: argparse.Namespace, ranks: Ranks, log: Log,
) -> None:  # fmt: skip
    """Trains to the end, from the checkpoint in `path` on; data: `LVISImages` of training."""
    if stage == 1:
        parameters = dnn.freeze_for_stage1(model)
        threshold, total = recipe.repeat_threshold, recipe.iterations
    else:
        parameters = dnn.freeze_for_stage2(model)
        threshold, total = 0.0, recipe.stage2_iterations  # no released stage 2 repeats images
    optimizer, schedule = optimizer_of(recipe, parameters, stage)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    replicas = iterations.replicated(model, ranks)

    def step(batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
        images = [image.to(ranks.device, non_blocking=True) for image in batch[0]]
        targets = [{k: v.to(ranks.device, non_blocking=True) for k, v in t.items()}
                   for t in batch[1]]  # fmt: skip
        losses: dict[str, Tensor] = replicas(images, targets)
        return torch.stack(list(losses.values())).sum()

    factors = iterations.repeat_factors(data.classes, threshold)
    order = iterations.EndlessOrder(
        iterations.repeated(factors), recipe.batch, total, ranks, recipe.seed + stage
    )
    model.train()
    torch.manual_seed(recipe.seed + ranks.rank)  # which regions are sampled
    with released_loss(weight.to(ranks.device) if stage == 2 else None, recipe.mean_images):
        iterations.train(
            stage, step, data, order, Checkpoint(path, recipe, ranks, log, parts), log,
            collate=_collate, workers=options.workers, save_every=options.save_every,
        )  # fmt: skip


def _collate(samples: list[Any]) -> Any:
    return tuple(map(list, zip(*samples, strict=True)))


@torch.no_grad()
def evaluate(model: Any, data: Any, annotations: dict[str, Any], ranks: Ranks, log: Log,
             workers: int) -> dict[str, dict[str, float]]:  # fmt: skip
    """AP on the validation set, on the first rank; {} on the others."""
    from torch.utils.data import DataLoader, Subset

    from . import lvis_data

    judged = lvis_data.judged_classes(annotations)
    own = range(ranks.rank, len(data), ranks.world)
    loader = DataLoader(Subset(data, own), batch_size=1, num_workers=workers, collate_fn=_collate)
    found = []
    model.eval()
    with log.progress("evaluation", len(own)) as advance:
        for index, (images, _) in zip(own, loader, strict=True):
            (output,) = model([images[0].to(ranks.device)])
            image = data.images[index]
            found += lvis_data.detections(output, image, judged[image["id"]])
            advance(1, "")
    everything = [one for part in ranks.gather(found) for one in part]
    return lvis_data.average_precision(annotations, everything) if ranks.first else {}


def table(scores: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':6}" + "".join(f"{name:>7}" for name in scores["bbox"])]
    for kind, name in (("bbox", "boxes"), ("segm", "masks")):
        lines.append(f"{name:6}" + "".join(f"{value:7.1f}" for value in scores[kind].values()))
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> tuple[LVISv1, argparse.Namespace]:
    version = argparse.ArgumentParser(add_help=False)
    version.add_argument("--version", choices=sorted(RECIPES), default="v1")
    chosen = RECIPES[version.parse_known_args(arguments)[0].version]
    parser = config.command_line(chosen, "folder with lvis and coco", [version])
    options = parser.parse_args(arguments)
    return config.from_options(chosen, options), options


def main(arguments: list[str] | None = None) -> None:
    recipe, options = parse(arguments)
    from . import lvis_data

    with process_group() as ranks:
        log = Log(options.out, ranks)
        images_in = options.data / "coco"

        def read(split: str, number: tuple[int, ...]) -> dict[str, Any]:
            file = options.data / "lvis" / f"lvis_{options.version}_{split}.json"
            return lvis_data.read_annotations(file, recipe.classes, number, images_in)

        annotations = read("train", recipe.train_images)
        weight = class_weights(recipe, annotations["categories"])
        train = lvis_data.LVISImages(annotations, images_in, training=True, seed=recipe.seed)
        annotations = read("val", recipe.val_images)
        val = lvis_data.LVISImages(annotations, images_in, training=False)
        torch.manual_seed(recipe.seed)
        model = build_model(recipe).to(ranks.device)

        def run(stage: int, path: Path) -> None:
            run_stage(stage, path, recipe, model, train, weight, options, ranks, log)

        def scores() -> iterations.Scores:
            return evaluate(model, val, annotations, ranks, log, options.workers)

        iterations.two_stages(
            model, recipe, recipe.stage1, options.out, ranks, log, run, scores, table
        )


if __name__ == "__main__":
    main()
