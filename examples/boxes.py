"""Long-tailed detection and instance segmentation: the characters of a page, box, mask and class.

    make demo-detection    # in the environment of make test-integrations, which has torchvision

Stage 1 trains a small torchvision Mask R-CNN (--boxes-only: Faster R-CNN) from scratch with plain
cross-entropy. Stage 2 freezes it, keeps the box features of the training pages' regions, and trains
DisAlign's scale, bias and confidence of the box classifier on these with generalised re-weighted
cross-entropy. Beside it stand two neighbours: logit adjustment post hoc, and the box classifier
retrained on the same features with balanced softmax.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from boxes_data import BoxData, Page, augmented
from boxes_plots import plot_ap, plot_boxes
from pages import FEATURES, Backbone
from pages_data import RENDERED
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from disalign_ops import cross_entropy
from disalign_ops.class_stats import grw_weights, log_prior
from disalign_ops.integrations.torchvision import DisAlignFastRCNNPredictor
from disalign_ops.nn import freeze_for_stage2

BATCH = 8
REGIONS = 64  # of a page, that a step of training sees
BOX_SIZE = 7  # cells of a region, for its class
BOX_FEATURES = 256
SHOWN_PAGES = 2
GROUPS = ("rare", "common", "frequent")


class GreyBackbone(Backbone):
    """The pages demo's, under torchvision's name for its channels."""

    out_channels = FEATURES


def detector(classes: int, masks: bool) -> Any:
    """Small: one feature map at 1/4, one anchor a cell, few regions."""
    cells = {"featmap_names": ["0"], "sampling_ratio": 1}
    box_head = TwoMLPHead(FEATURES * BOX_SIZE**2, BOX_FEATURES)
    options: dict[str, Any] = {
        "min_size": RENDERED, "max_size": RENDERED, "image_mean": [0.2], "image_std": [0.3],
        "rpn_anchor_generator": AnchorGenerator(((18,),), ((1.0,),)),
        "rpn_pre_nms_top_n_train": 300, "rpn_post_nms_top_n_train": 150,
        "rpn_pre_nms_top_n_test": 300, "rpn_post_nms_top_n_test": 100,
        "rpn_batch_size_per_image": 64,
        "box_roi_pool": MultiScaleRoIAlign(output_size=BOX_SIZE, **cells),
        "box_head": box_head, "box_predictor": FastRCNNPredictor(BOX_FEATURES, classes + 1),
        "box_batch_size_per_image": REGIONS, "box_detections_per_img": 100,
    }  # fmt: skip
    if not masks:
        return FasterRCNN(GreyBackbone(), **options)
    return MaskRCNN(
        GreyBackbone(), **options,
        mask_roi_pool=MultiScaleRoIAlign(output_size=2 * BOX_SIZE, **cells),
        mask_head=MaskRCNNHeads(FEATURES, (64, 64), 1),
        mask_predictor=MaskRCNNPredictor(64, 64, classes + 1),
    )  # fmt: skip


Step = Callable[[int], None]


def train(model: Any, pages: list[Page], epochs: int, rate: float, step: Step) -> None:
    """Stage 1: all of the detector's losses, AdamW with a one-cycle rate."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    total = epochs * -(-len(pages) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(pages), generator=generator).split(BATCH):
            images, targets = zip(*(augmented(pages[i], generator) for i in index), strict=True)
            optimizer.zero_grad()
            sum(model(list(images), list(targets)).values()).backward()
            optimizer.step()
            schedule.step()
            step(1)


@torch.no_grad()
def cached_regions(model: Any, pages: list[Page], epochs: int, step: Step) -> tuple[Tensor, Tensor]:
    """Box features (R, D) and classes (R,) of the regions that training would sample.

    The pages are distorted anew `epochs` times: stage 2 sees what stage 1 has not learned by heart.
    """
    generator = torch.Generator().manual_seed(2)
    model.train()  # so that the regions are sampled; freeze_for_stage2 keeps BatchNorm as it is
    heads, found, classes = model.roi_heads, [], []
    for _ in range(epochs):
        for index in torch.arange(len(pages)).split(BATCH):
            pairs = [augmented(pages[i], generator) for i in index]
            images, targets = model.transform(*map(list, zip(*pairs, strict=True)))
            maps = {"0": model.backbone(images.tensors)}
            regions, _ = model.rpn(images, maps, targets)
            regions, _, labels, _ = heads.select_training_samples(regions, targets)
            found.append(heads.box_head(heads.box_roi_pool(maps, regions, images.image_sizes)))
            classes += labels
            step(1)
    model.eval()
    return torch.cat(found), torch.cat(classes)


def train_rows(
    loss: Callable[[Tensor, Tensor], Tensor], parameters: list[Any],
    rows: tuple[Tensor, Tensor], epochs: int, rate: float | list[float],
) -> None:  # fmt: skip
    """Adam with a one-cycle rate, or one a group, over the cached regions."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(parameters)
    total = epochs * -(-len(rows[0]) // 512)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
    for _ in range(epochs):
        for index in torch.randperm(len(rows[0]), generator=generator).split(512):
            optimizer.zero_grad()
            loss(rows[0][index], rows[1][index]).backward()
            optimizer.step()
            schedule.step()


def prior_of(counts: Tensor) -> Tensor:
    """(C + 1,) log prior; its mean over the classes is the background's 0, which is no class."""
    prior = log_prior(counts)
    return torch.cat([torch.zeros(1), prior - prior.mean()])


def with_bias(predictor: Any, change: Tensor) -> Any:
    """A copy of a box predictor whose class logits are `change` higher."""
    copied = copy.deepcopy(predictor)
    with torch.no_grad():
        copied.cls_score.bias += change
    return copied


@torch.no_grad()
def scores(model: Any, predictor: Any, pages: list[Page], masks: bool) -> dict[str, Tensor]:
    """COCO's AP and recall of each class, of boxes and masks, with this box predictor."""
    kinds = ("bbox", "segm") if masks else ("bbox",)
    metric = MeanAveragePrecision(
        iou_type=kinds, class_metrics=True, backend="faster_coco_eval",
        max_detection_thresholds=[1, 10, 100],
    )  # fmt: skip
    before, model.roi_heads.box_predictor = model.roi_heads.box_predictor, predictor
    model.eval()
    for start in range(0, len(pages), BATCH):
        part = pages[start : start + BATCH]
        found = model([page.image.float() / 255 for page in part])
        for one in found:
            if masks:
                one["masks"] = one["masks"].squeeze(1) > 0.5
        metric.update(found, [{**page.target(), "masks": page.masks.bool()} for page in part])
    model.roi_heads.box_predictor = before
    result = metric.compute()
    names = {kind: f"{kind}_" if masks else "" for kind in kinds}
    return {
        f"{kind} {name}": result[f"{prefix}{key}"]
        for kind, prefix in names.items()
        for name, key in (("AP", "map_per_class"), ("AR", "mar_100_per_class"))
    }


@torch.no_grad()
def detections(model: Any, predictor: Any, pages: list[Page]) -> list[dict[str, Tensor]]:
    """What the detector finds on each page with this box predictor."""
    before, model.roi_heads.box_predictor = model.roi_heads.box_predictor, predictor
    model.eval()
    found: list[dict[str, Tensor]] = model([page.image.float() / 255 for page in pages])
    model.roi_heads.box_predictor = before
    return found


def thirds(counts: Tensor) -> list[Tensor]:
    """Rare, common and frequent: the classes in thirds by training boxes."""
    return list(torch.tensor_split(counts.argsort(stable=True), len(GROUPS)))


def result_table(results: dict[str, dict[str, Tensor]], kind: str, groups: list[Tensor]) -> Table:
    title = {"bbox": "boxes", "segm": "masks"}[kind]
    table = Table(title=f"{title}: AP (IoU 0.5 to 0.95) and recall of 100 detections, in %")
    table.add_column("method")
    for what in ("AP", "AR"):
        for name in (what, *GROUPS):
            table.add_column(name, justify="right")
    for method, found in results.items():
        cells = []
        for what in ("AP", "AR"):
            each = found[f"{kind} {what}"]
            cells += [f"{100 * float(v.mean()):.1f}" for v in (each, *(each[g] for g in groups))]
        table.add_row(method, *cells)
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=30, help="number of characters")
    parser.add_argument("--pages", type=int, default=240, help="training pages to render")
    parser.add_argument("--test-pages", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=10, help="of stage 1")
    parser.add_argument("--stage2-epochs", type=int, default=20, help="over the cached regions")
    parser.add_argument("--rho", type=float, default=0.8, help="exponent of the class weights")
    parser.add_argument("--boxes-only", action="store_true", help="Faster R-CNN, without masks")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo-detection"), help="of the pictures"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    console = Console()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    masks = not options.boxes_only
    seconds: dict[str, float] = {}
    begin = time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - begin - sum(seconds.values())

    with Progress(console=console) as progress:

        def task(name: str, total: int) -> Step:
            number = progress.add_task(name, total=total)
            return lambda done: progress.advance(number, done)

        data = BoxData(options.classes, options.pages, options.test_pages, options.seed,
                       task("pages", options.pages + options.test_pages))  # fmt: skip
        groups = thirds(data.counts)
        for line in data.source:
            progress.console.print(line)
        progress.console.print(
            f"{len(data.train)} training pages, {len(data.test)} test pages of {RENDERED} x "
            f"{RENDERED} pixels, {len(data.characters)} classes, {int(data.counts.sum()):,} "
            f"training boxes: {int(data.counts.max())} of the most frequent class, on "
            f"{int(data.pages_with.max())} pages, {int(data.counts.min())} of the rarest, on "
            f"{int(data.pages_with.min())}. Rare / common / frequent are thirds of the classes by "
            "boxes (LVIS's 10 and 100 images are made for more data)."
        )
        lap("data")
        steps = -(-len(data.train) // BATCH)
        model = detector(len(data.characters), masks)
        train(model, data.train, options.epochs, 2e-3, task("stage 1", options.epochs * steps))
        lap("stage 1")

        plain = model.roi_heads.box_predictor
        disalign = DisAlignFastRCNNPredictor.from_predictor(copy.deepcopy(plain))
        model.roi_heads.box_predictor = disalign
        freeze_for_stage2(model)
        passes = 2
        rows = cached_regions(model, data.train, passes, task("regions", passes * steps))
        lap("regions")
        weight = grw_weights(data.counts, options.rho, background="first")
        layer = disalign.cls_score
        # Features are never negative: a smaller rate for the confidence, see docs/two_stages.md.
        groups_of = [{"params": [layer.logit_scale, layer.logit_bias]},
                     {"params": list(layer.confidence_layer.parameters())}]  # fmt: skip
        layer.train()
        train_rows(lambda x, t: layer.loss(x, t, weight=weight), groups_of, rows,
                   options.stage2_epochs, [1e-2, 1e-3])  # fmt: skip
        lap("stage 2")
        prior = prior_of(data.counts)
        retrained = copy.deepcopy(plain).requires_grad_(True)
        classifier = retrained.cls_score
        train_rows(lambda x, t: cross_entropy(classifier(x), t, prior=prior),
                   list(classifier.parameters()), rows, options.stage2_epochs, 1e-3)  # fmt: skip
        lap("balanced softmax")
        methods = {
            "stage 1, cross-entropy": plain,
            "logit adjustment, tau 1": with_bias(plain, -prior),
            "balanced softmax": retrained,
            f"stage 2, DisAlign, rho {options.rho:g}": disalign,
        }
        step = task("evaluation", len(methods))
        results = {}
        for name, predictor in methods.items():
            results[name] = scores(model, predictor, data.test, masks)
            step(1)
        lap("evaluation")

    first, *_, last = results
    shown = {f"stage {k}": detections(model, methods[name], data.test[:SHOWN_PAGES])
             for k, name in ((1, first), (2, last))}  # fmt: skip
    group_of = [""] * len(data.characters)
    for name, group in zip(GROUPS, groups, strict=True):
        for label in group.tolist():
            group_of[label] = name
    plot_boxes(options.out / "boxes.png", data.test[:SHOWN_PAGES], group_of, shown)
    plot_ap(options.out / "ap_by_boxes.png", data.counts, results[first]["bbox AP"],
            results[last]["bbox AP"])  # fmt: skip

    for kind in ("bbox", "segm") if masks else ("bbox",):
        console.print(result_table(results, kind, groups))
        best = max(results, key=lambda n: float(results[n][f"{kind} AP"].mean()))
        rare = max(results, key=lambda n: float(results[n][f"{kind} AP"][groups[0]].mean()))
        console.print(f"best AP: {best}; best AP of rare classes: {rare}")
    console.print(f"mean confidence of stage 2's last batches: {layer.mean_confidence():.2f}")
    console.print(f"{len(rows[0]):,} regions cached, {rows[0].numel() * 4 / 2**20:.0f} MiB")
    laps = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(f"pictures: {options.out}/*.png")
    console.print(f"{laps}; everything {sum(seconds.values()):.0f} s")


if __name__ == "__main__":
    main()
