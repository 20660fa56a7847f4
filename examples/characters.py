"""Long-tailed character recognition: plain cross-entropy, then DisAlign's second stage.

    python examples/characters.py              # rendered Chinese characters, real frequencies
    python examples/characters.py --data DIR   # your images, one directory per class

Stage 1 trains a small CNN with plain cross-entropy. Stage 2 freezes it and trains DisAlign's scale,
bias and confidence with generalised re-weighted cross-entropy. Beside it stand the neighbours that
cost next to nothing: logit adjustment post hoc, and the classifier retrained with balanced softmax.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from characters_data import CharacterData, ImageFolderData, LongTailImages, augment
from characters_plots import plot_accuracy, plot_calibration, plot_samples
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import disalign_ops
from disalign_ops._bench.measure import peak_extra_bytes

BATCH = 256
FEATURES = 256


class Net(nn.Module):
    """Four convolutions, a global mean, a linear classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (1, 16, 64, 128, FEATURES)
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            if i:
                layers.append(nn.MaxPool2d(2))
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier: nn.Module = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


def batches(data: LongTailImages, generator: torch.Generator) -> list[Tensor]:
    order = torch.randperm(len(data.train_images), generator=generator)
    return list(order.split(BATCH))


def fresh(data: LongTailImages, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images augmented anew, and their targets."""
    x = augment(data.train_images[index], generator)
    return x.contiguous(memory_format=torch.channels_last), data.train_targets[index]


Loss = Callable[[Tensor, Tensor], Tensor]


def train(
    data: LongTailImages,
    features: nn.Module,
    loss: Loss,
    parameters: list[nn.Parameter] | list[dict[str, Any]],
    epochs: int,
    rate: float | list[float],
    frozen: bool,
    progress: Progress,
    name: str,
) -> None:
    """Adam with a one-cycle rate, or one a group; `loss` takes features and targets."""
    generator = torch.Generator().manual_seed(1)
    steps = epochs * len(batches(data, generator))
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0 if frozen else 0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    task = progress.add_task(name, total=steps)
    features.train(not frozen)
    for _ in range(epochs):
        for index in batches(data, generator):
            x, target = fresh(data, index, generator)
            with torch.set_grad_enabled(not frozen):
                h = features(x)
            optimizer.zero_grad()
            loss(h, target).backward()
            optimizer.step()
            schedule.step()
            progress.advance(task)
    features.eval()


@torch.no_grad()
def extract(features: nn.Module, images: Tensor) -> Tensor:
    parts = [b.float().div(255).unsqueeze(1) for b in images.split(500)]
    return torch.cat([features(x.contiguous(memory_format=torch.channels_last)) for x in parts])


def accuracy(data: LongTailImages, logits: Tensor) -> dict[str, object]:
    metric = disalign_ops.metrics.LongTailAccuracy(data.counts)
    metric.update(logits, data.test_targets)
    return metric.compute()


def result_table(results: dict[str, dict[str, object]]) -> Table:
    table = Table(title="test accuracy in %, mean over the classes of a group")
    for column in ("method", "overall", "many > 100", "medium 20-100", "few < 20"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, scores in results.items():
        groups = ("overall", "many", "medium", "few")
        table.add_row(name, *(f"{100 * float(scores[g]):.1f}" for g in groups))  # type: ignore[arg-type]
    return table


def loss_costs(head: nn.Module, x: Tensor, target: Tensor, weight: Tensor) -> Table:
    """Time and memory of stage 2's loss on one batch's logits: ours and PyTorch's composition."""
    with torch.no_grad():
        z = F.linear(x, head.weight, head.bias)
        confidence = head.confidence_layer(x)
    learned = [
        t.detach().clone().requires_grad_() for t in (confidence, head.logit_scale, head.logit_bias)
    ]

    def ours() -> None:
        loss = disalign_ops.disalign_cross_entropy(z, target, *learned, weight, form=head.form)
        torch.autograd.grad(loss, learned)

    def eager() -> None:
        c = torch.sigmoid(learned[0])
        if head.form == "residual":
            u = (1 + c * learned[1]) * z + c * learned[2]
        else:
            u = c * (learned[1] * z + learned[2]) + (1 - c) * z
        torch.autograd.grad(F.cross_entropy(u, target, weight), learned)

    times: dict[str, list[float]] = {"disalign_ops": [], "PyTorch, eager": []}
    functions = {"disalign_ops": ours, "PyTorch, eager": eager}
    for _ in range(60):  # in turns, so that whatever else the machine does hits both
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    table = Table(title=f"stage 2's loss on logits {tuple(z.shape)}, forward and backward")
    for column in ("", "median ms", "peak extra memory, KiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, function in functions.items():
        median = 1e3 * statistics.median(times[name])
        table.add_row(
            name, f"{median:.2f}", f"{peak_extra_bytes(function, torch.device('cpu')) / 1024:.0f}"
        )
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder with one directory of images per class")
    parser.add_argument("--classes", type=int, default=400, help="number of characters")
    parser.add_argument("--epochs", type=int, default=7, help="of stage 1")
    parser.add_argument("--stage2-epochs", type=int, default=4)
    parser.add_argument("--rho", type=float, default=1.2, help="exponent of the class weights")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the plots")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def learn(
    data: LongTailImages, options: argparse.Namespace, progress: Progress
) -> tuple[Net, Tensor, dict[str, dict[str, object]]]:
    """Both stages and the neighbours: the model, stage 2's class weights, accuracies by method."""
    counts = data.counts
    model = Net(len(counts)).to(memory_format=torch.channels_last)
    linear = model.classifier
    train(data, model.features,
          lambda h, t: disalign_ops.cross_entropy(linear(h), t),
          list(model.parameters()), options.epochs, 1e-2, False, progress,
          "stage 1")  # fmt: skip
    test = extract(model.features, data.test_images)
    with torch.no_grad():
        logits = linear(test)
    results = {"stage 1, cross-entropy": accuracy(data, logits)}
    prior = disalign_ops.class_stats.log_prior(counts)
    for tau in (1.0, 1.5):
        name = f"logit adjustment post hoc, tau {tau:g}"
        results[name] = accuracy(data, logits - tau * prior)

    retrained = copy.deepcopy(linear)
    train(data, model.features,
          lambda h, t: disalign_ops.cross_entropy(retrained(h), t, prior=prior),
          list(retrained.parameters()), options.stage2_epochs, 5e-3, True, progress,
          "balanced softmax")  # fmt: skip
    with torch.no_grad():
        results["classifier retrained, balanced softmax"] = accuracy(data, retrained(test))

    disalign_ops.nn.convert_to_disalign(model)
    disalign_ops.nn.freeze_for_stage2(model, bn="eval")
    head = model.classifier
    weight = disalign_ops.class_stats.grw_weights(counts, options.rho)
    # Every weight of the confidence layer sees the same sign of these features, which are not
    # negative. At the rate of scale and bias all of them together soon drive the sigmoid to 1.
    groups = [
        {"params": [head.logit_scale, head.logit_bias]},
        {"params": list(head.confidence_layer.parameters())},
    ]
    train(data, model.features, lambda h, t: head.loss(h, t, weight=weight), groups,
          options.stage2_epochs, [3e-2, 1e-3], True, progress, "DisAlign")  # fmt: skip
    with torch.no_grad():
        results[f"DisAlign, rho {options.rho:g}"] = accuracy(data, head(test))
    return model, weight, results


def main() -> None:
    options = arguments()
    console = Console()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with Progress(console=console) as progress:
        task = progress.add_task("images", total=None)

        def advance(done: int) -> None:
            progress.advance(task, done)

        data: LongTailImages
        if options.data is None:
            data = CharacterData(options.classes, options.seed, advance)
        else:
            data = ImageFolderData(options.data, options.seed, advance)
        model, weight, results = learn(data, options, progress)
    seconds = time.perf_counter() - begin

    counts, head = data.counts, model.classifier
    for line in data.source:
        console.print(line)
    groups = disalign_ops.metrics.split_classes(counts)
    many, medium, few = (int(g.sum()) for g in groups)
    console.print(
        f"{len(counts)} classes, {int(counts.sum())} training images, most {int(counts.max())}, "
        f"fewest {int(counts.min())}; many / medium / few classes: {many} / {medium} / {few}; "
        f"{len(data.test_images)} test images, balanced"
    )
    console.print(result_table(results))
    best = max(results, key=lambda name: float(results[name]["overall"]))  # type: ignore[arg-type]
    console.print(f"best overall: {best}; everything took {seconds:.0f} s")
    console.print(f"mean confidence of stage 2's last batches: {head.mean_confidence():.2f}")
    batch = batches(data, torch.Generator().manual_seed(2))[0]
    x = extract(model.features, data.train_images[batch])
    console.print(loss_costs(head, x, data.train_targets[batch], weight))
    before, *_, after = (found["per_class"] for found in results.values())
    plot_accuracy(options.out, counts, before, after)  # type: ignore[arg-type]
    plot_calibration(options.out, counts, head)
    plot_samples(options.out, data, torch.Generator().manual_seed(options.seed))
    console.print(f"plots: {options.out}/*.png")


if __name__ == "__main__":
    main()
