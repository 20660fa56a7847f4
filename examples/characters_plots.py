"""Plots of the characters demo, each written as one PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from characters_data import LongTailImages, augment
from torch import Tensor

import disalign_ops as da
from disalign_ops._figures import style
from disalign_ops._figures.by_count import by_count, count_axis, running_mean

MANY, FEW = 100, 20
COUNT = "training images of the class"


def plot_accuracy(out: Path, counts: Tensor, before: Tensor, after: Tensor) -> Path:
    """Per-class test accuracy against the class's training images, before and after stage 2."""
    series = {"stage 1, cross-entropy": before, "stage 2, DisAlign": after}
    figure = by_count(
        counts.numpy(), {name: 100 * accuracy.numpy() for name, accuracy in series.items()},
        "Accuracy of each class (points), running mean (lines)", "test accuracy, %", COUNT,
        (FEW, MANY),
    )  # fmt: skip
    return style.save(figure, out / "accuracy_by_count.png")


@torch.no_grad()
def plot_calibration(out: Path, counts: Tensor, layer: da.nn.DisAlignLinear) -> Path:
    """DisAlign's learned scale and bias of every class against its training images."""
    n = counts.numpy()
    learned = (("scale", layer.logit_scale, 1.0), ("bias", layer.logit_bias, 0.0))
    with style.applied():
        figure, both = style.figure(2, 1, height=5.2, sharex=True)
        for axes, (name, parameter, initial) in zip(both, learned, strict=True):
            values = parameter.flatten().numpy()
            axes.axhline(initial, color=style.GREY, linestyle="--", label="before stage 2")
            axes.scatter(n, values, s=10, alpha=0.4, color=style.BLUE, linewidths=0)
            axes.plot(*running_mean(n, values), color=style.BLUE, linewidth=2.5,
                      label="after, running mean")  # fmt: skip
            axes.set_ylabel(f"logit_{name}")
        for axes in both:
            count_axis(axes, COUNT, (FEW, MANY))
        both[0].set_xlabel("")
        handles, labels = both[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2)
        style.title(figure, f"What stage 2 learned ({layer.form} form)")
    return style.save(figure, out / "scale_and_bias.png")


def plot_samples(out: Path, data: LongTailImages, generator: torch.Generator) -> Path:
    """Classes from frequent to rare: training images as a training step sees them, test images."""
    rows, in_training, in_test = min(10, len(data.class_names)), 8, 4
    ranked = data.counts.argsort(descending=True, stable=True)
    chosen = ranked[torch.linspace(0, len(ranked) - 1, rows).round().long()].tolist()
    with style.applied():
        figure, grid = style.figure(rows, 2, height=0.42 * rows + 0.9, squeeze=False,
                                    width_ratios=(in_training, in_test))  # fmt: skip
        for line, label in zip(grid, chosen, strict=True):
            own = data.train_images[data.train_targets == label]
            again = own[torch.arange(in_training) % len(own)]
            fresh = augment(again, generator).squeeze(1)
            test = data.test_images[data.test_targets == label][:in_test] / 255
            for axes, images in zip(line, (fresh, test), strict=True):
                axes.imshow(torch.cat(list(images), dim=1), cmap="gray", vmin=0, vmax=1)
                style.bare(axes)
            line[0].set_ylabel(f"{len(own):,}", rotation=0, ha="right", va="center")
        grid[0][0].set_title("training, distorted anew each time", loc="center")
        grid[0][1].set_title("test", loc="center")
        style.title(figure, "Classes from frequent to rare, with their number of training images")
    return style.save(figure, out / "samples.png")
