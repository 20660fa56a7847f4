"""Plots of the characters demo, each written as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from characters_data import LongTailImages, augment
from torch import Tensor

import disalign_ops as da

matplotlib.use("Agg")  # no display is needed to write a file

from matplotlib import pyplot as plt

MANY, FEW = 100, 20
BEFORE, AFTER = "#c44e52", "#2a6f97"


def _count_axis(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("training images of the class")
    for edge in (FEW, MANY):
        axes.axvline(edge, color="0.8", linewidth=1, zorder=0)


def _smooth(counts: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean count and mean value of a window that slides over the classes, rarest first.

    A class has few test images, so its own accuracy takes a handful of values: only the mean of
    many classes of about the same count shows the trend.
    """
    order = np.argsort(counts, kind="stable")
    window = max(1, len(counts) // 12)
    mean = np.ones(window) / window
    log_count = np.convolve(np.log(counts[order]), mean, mode="valid")
    return np.exp(log_count), np.convolve(values[order], mean, mode="valid")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def plot_accuracy(out: Path, counts: Tensor, before: Tensor, after: Tensor) -> Path:
    """Per-class test accuracy against the class's training images, before and after stage 2."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    n = counts.numpy()
    stages = (("stage 1: plain cross-entropy", before, BEFORE), ("stage 2: DisAlign", after, AFTER))
    for label, accuracy, color in stages:
        percent = 100 * accuracy.numpy()
        axes.scatter(n, percent, s=9, alpha=0.25, color=color, linewidths=0)
        axes.plot(*_smooth(n, percent), color=color, linewidth=2.5, label=label)
    _count_axis(axes)
    axes.set_ylabel("test accuracy, percent")
    axes.set_title("Accuracy of every class (points) and its running mean over classes (lines)")
    axes.legend(loc="lower right")
    return _save(figure, out / "accuracy_by_count.png")


@torch.no_grad()
def plot_calibration(out: Path, counts: Tensor, layer: da.nn.DisAlignLinear) -> Path:
    """DisAlign's learned scale and bias of every class against its training images."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    n = counts.numpy()
    learned = (("scale", layer.logit_scale, 1.0), ("bias", layer.logit_bias, 0.0))
    for axes, (name, parameter, initial) in zip(both, learned, strict=True):
        values = parameter.flatten().numpy()
        axes.axhline(initial, color="0.6", linewidth=1, linestyle="--", label="before stage 2")
        axes.scatter(n, values, s=9, alpha=0.4, color=AFTER, linewidths=0)
        axes.plot(*_smooth(n, values), color=AFTER, linewidth=2.5, label="after, running mean")
        _count_axis(axes)
        axes.set_title(f"logit_{name}")
        axes.legend()
    figure.suptitle(f"What stage 2 learned ({layer.form} form)")
    return _save(figure, out / "scale_and_bias.png")


def plot_samples(out: Path, data: LongTailImages, generator: torch.Generator) -> Path:
    """Classes from frequent to rare: training images as a training step sees them, test images."""
    rows, in_training, in_test = min(10, len(data.class_names)), 8, 4
    ranked = data.counts.argsort(descending=True, stable=True)
    chosen = ranked[torch.linspace(0, len(ranked) - 1, rows).round().long()].tolist()
    figure, grid = plt.subplots(
        rows, 2, figsize=(9, 0.72 * rows + 0.8), layout="constrained", squeeze=False,
        width_ratios=(in_training, in_test),
    )  # fmt: skip
    for line, label in zip(grid, chosen, strict=True):
        own = data.train_images[data.train_targets == label]
        again = own[torch.arange(in_training) % len(own)]
        fresh = augment(again, generator).squeeze(1)
        test = data.test_images[data.test_targets == label][:in_test] / 255
        for axes, images in zip(line, (fresh, test), strict=True):
            axes.imshow(torch.cat(list(images), dim=1), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(f"n = {len(own)}", rotation=0, ha="right", va="center")
    grid[0][0].set_title("training, distorted afresh each time")
    grid[0][1].set_title("test")
    return _save(figure, out / "samples.png")
