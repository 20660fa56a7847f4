"""Long-tailed dense prediction: which character covers each pixel of a page.

    python examples/pages.py     # rendered pages, the characters' real frequencies

Stage 1 trains a small fully convolutional network with plain cross-entropy, from logits at 1/4 of
the page's resolution. Stage 2 freezes it and trains DisAlign's scale, bias and confidence with
generalised re-weighted cross-entropy. Beside it stand two neighbours: logit adjustment post hoc,
which is free, and the classifier retrained with balanced softmax, which costs as much as stage 2.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pages_data import PAGE, VOID, PageData, Pages, distort
from pages_plots import plot_iou, plot_pages
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from disalign_ops import upsample_cross_entropy, upsample_predict
from disalign_ops._bench.measure import peak_extra_bytes
from disalign_ops.class_stats import grw_weights, log_prior
from disalign_ops.nn import DisAlignSegHead, freeze_for_stage2
from disalign_ops.segmentation_metrics import SegmentationIoU

BATCH = 8
TEST_PAGES = 60
SHOWN_PAGES = 2
ROUNDS = 15  # of timing
FEATURES = 128
GROUPS = ("head", "body", "tail")


def block(before: int, after: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


class Backbone(nn.Module):
    """Features at 1/4 of the resolution; those of 1/8, which see a whole character, added in."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(block(1, 16, 2, 5), block(16, 48, 2), block(48, 96))
        self.coarse = nn.Sequential(
            nn.MaxPool2d(2),
            block(96, 192),
            block(192, 192),
            nn.Conv2d(192, FEATURES, 1, bias=False),
        )
        self.side = nn.Conv2d(96, FEATURES, 1, bias=False)
        self.mix = nn.Sequential(
            nn.BatchNorm2d(FEATURES), nn.ReLU(), block(FEATURES, FEATURES, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = F.interpolate(self.coarse(fine), scale_factor=2.0, mode="bilinear")
        mixed: Tensor = self.mix(self.side(fine) + coarse)
        return mixed


class Net(nn.Module):
    """A small fully convolutional network with DisAlign's head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = DisAlignSegHead(FEATURES, classes)


Loss = Callable[[Tensor, Tensor], Any]  # a tensor; the losses can return more


def train(
    data: PageData,
    backbone: nn.Module,
    loss: Loss,
    parameters: list[nn.Parameter],
    epochs: int,
    rate: float,
    frozen: bool,
    progress: Progress,
    name: str,
) -> None:
    """Adam with a one-cycle rate; `loss` takes features and classes."""
    generator = torch.Generator().manual_seed(1)
    steps = epochs * -(-len(data.train) // BATCH)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0 if frozen else 0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    task = progress.add_task(name, total=steps)
    backbone.train(not frozen)
    for _ in range(epochs):
        for index in torch.randperm(len(data.train), generator=generator).split(BATCH):
            x, target = distort(data.train, index, generator)
            with torch.set_grad_enabled(not frozen):
                features = backbone(x.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            loss(features, target).backward()
            optimizer.step()
            schedule.step()
            progress.advance(task)
    backbone.eval()


@torch.no_grad()
def extract(backbone: nn.Module, pages: Pages) -> Tensor:
    parts = [b.float().div(255).unsqueeze(1) for b in pages.images.split(BATCH)]
    return torch.cat([backbone(x.contiguous(memory_format=torch.channels_last)) for x in parts])


@torch.no_grad()
def predict(logits: Tensor, prior: Tensor | None = None) -> Tensor:
    return upsample_predict(logits, (PAGE, PAGE), prior=prior)


def thirds(counts: Tensor) -> list[list[int]]:
    """Head, body and tail: the classes in thirds, from most to fewest pixels."""
    ranked = counts.argsort(descending=True, stable=True)
    return [third.tolist() for third in torch.tensor_split(ranked, len(GROUPS))]


def scores(data: PageData, prediction: Tensor) -> dict[str, Tensor]:
    metric = SegmentationIoU(len(data.characters), split=thirds(data.counts), ignore_index=VOID)
    metric.update(prediction, data.test.masks)
    return metric.compute()


def result_table(results: Mapping[str, dict[str, Tensor]], split: list[list[int]]) -> Table:
    table = Table(title="test IoU in %, mean over the classes of a group; right pixels in %")
    table.add_column("method")
    sizes = [f"{name} ({len(group)})" for name, group in zip(GROUPS, split, strict=True)]
    for column in ("mean", *sizes, "pixels"):
        table.add_column(column, justify="right")
    for name, found in results.items():
        columns = ("mean", *GROUPS, "pixel_accuracy")
        table.add_row(name, *(f"{100 * float(found[c]):.1f}" for c in columns))
    return table


def data_lines(data: PageData, split: list[list[int]]) -> list[str]:
    head, _, tail = (data.counts[group] for group in split)
    most, fewest = (int(f(data.counts)) for f in (torch.argmax, torch.argmin))
    return [
        *data.source,
        f"{len(data.train)} training pages, {len(data.test)} test pages of {PAGE} x {PAGE} pixels, "
        f"{len(data.characters)} classes; most pixels {int(data.counts[most]):,} "
        f"({int(data.glyphs[most]):,} characters), fewest {int(data.counts[fewest]):,} "
        f"({int(data.glyphs[fewest])})",
        "head / body / tail are thirds of the classes by training pixels: the head has "
        f"{100 * float(head.sum() / data.counts.sum()):.1f} % of them, the tail "
        f"{100 * float(tail.sum() / data.counts.sum()):.1f} %",
    ]


def loss_costs(head: DisAlignSegHead, features: Tensor, target: Tensor, weight: Tensor) -> Table:
    """Time and memory of stage 2's step from the backbone's features on, ours and PyTorch's."""
    head.train()
    learned = [p for p in head.parameters() if p.requires_grad]
    long = target.long()

    def ours() -> None:
        torch.autograd.grad(head.loss(features, target, weight=weight), learned)

    def eager() -> None:
        logits = head.conv_seg(features)
        c = torch.sigmoid(head.confidence_layer(features))
        u = c * (head.logit_scale * logits + head.logit_bias) + (1 - c) * logits
        u = F.interpolate(u, target.shape[1:], mode="bilinear", align_corners=head.align_corners)
        torch.autograd.grad(F.cross_entropy(u, long, weight, ignore_index=VOID), learned)

    functions = {"disalign_ops": ours, "PyTorch, eager": eager}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):  # in turns, so that whatever else the machine does hits both
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    shape = (len(target), head.num_classes, *target.shape[1:])
    table = Table(title=f"stage 2's step after the backbone; full-size logits: {shape}")
    for column in ("", "median ms", "peak extra memory, MiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, function in functions.items():
        peak = peak_extra_bytes(function, torch.device("cpu")) / 2**20
        table.add_row(name, f"{1e3 * statistics.median(times[name]):.1f}", f"{peak:.1f}")
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=60, help="number of characters")
    parser.add_argument("--pages", type=int, default=480, help="training pages to render")
    parser.add_argument("--epochs", type=int, default=8, help="of stage 1")
    parser.add_argument("--stage2-epochs", type=int, default=2)
    parser.add_argument("--rho", type=float, default=1.0, help="exponent of the class weights")
    parser.add_argument("--out", type=Path, default=Path("out/demo-dense"), help="of the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


@dataclass
class Learned:
    """The model after both stages, stage 2's class weights, IoU by method, class maps by stage."""

    model: Net
    weight: Tensor
    results: dict[str, dict[str, Tensor]]
    predictions: list[Tensor]


def learn(data: PageData, options: argparse.Namespace, progress: Progress) -> Learned:
    """Both stages and the neighbours."""
    model = Net(len(data.characters)).to(memory_format=torch.channels_last)
    backbone, head = model.backbone, model.head
    conv_seg = head.conv_seg
    train(data, backbone, lambda h, t: upsample_cross_entropy(conv_seg(h), t),
          [*backbone.parameters(), *conv_seg.parameters()], options.epochs, 1e-2, False,
          progress, "stage 1")  # fmt: skip
    test = extract(backbone, data.test)
    with torch.no_grad():
        logits = conv_seg(test)
    before = predict(logits)
    prior = log_prior(data.counts)
    results = {
        "stage 1, cross-entropy": scores(data, before),
        "logit adjustment, tau 1": scores(data, predict(logits, -prior)),
    }

    retrained = copy.deepcopy(conv_seg)
    train(data, backbone, lambda h, t: upsample_cross_entropy(retrained(h), t, prior=prior),
          list(retrained.parameters()), options.stage2_epochs, 5e-3, True, progress,
          "balanced softmax")  # fmt: skip
    with torch.no_grad():
        again = retrained(test)
    results["balanced softmax"] = scores(data, predict(again))

    learned = freeze_for_stage2(model, bn="eval")
    weight = grw_weights(data.counts, options.rho)
    head.train()
    train(data, backbone, lambda h, t: head.loss(h, t, weight=weight), learned,
          options.stage2_epochs, 3e-2, True, progress, "DisAlign")  # fmt: skip
    head.eval()
    after = head.predict(test, (PAGE, PAGE))
    results[f"stage 2, DisAlign, rho {options.rho:g}"] = scores(data, after)
    return Learned(model, weight, results, [before, after])


def main() -> None:
    options = arguments()
    console = Console()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with Progress(console=console) as progress:
        task = progress.add_task("pages", total=options.pages + TEST_PAGES)

        def advance(done: int) -> None:
            progress.advance(task, done)

        data = PageData(options.classes, options.pages, TEST_PAGES, options.seed, advance)
        split = thirds(data.counts)
        for line in data_lines(data, split):
            progress.console.print(line)
        learned = learn(data, options, progress)
        results, head = learned.results, learned.model.head
    seconds = time.perf_counter() - begin

    console.print(result_table(results, split))
    best = {
        group: max(results, key=lambda n: float(results[n][group])) for group in ("mean", "tail")
    }
    console.print(f"best mean: {best['mean']}; best tail: {best['tail']}")
    console.print(f"everything took {seconds:.0f} s")
    console.print(f"mean confidence of stage 2's last batches: {head.mean_confidence():.2f}")
    x, target = distort(data.train, torch.arange(min(BATCH, len(data.train))),
                        torch.Generator().manual_seed(2))  # fmt: skip
    with torch.no_grad():
        features = learned.model.backbone(x.contiguous(memory_format=torch.channels_last))
    console.print(loss_costs(head, features, target, learned.weight))
    first, *_, last = (found["iou"] for found in results.values())
    plot_pages(options.out / "pages.png", data.test, list(range(SHOWN_PAGES)),
               *learned.predictions, len(data.characters))  # fmt: skip
    plot_iou(options.out / "iou_by_pixels.png", data.counts, first, last)
    console.print(f"pictures: {options.out}/*.png")


if __name__ == "__main__":
    main()
