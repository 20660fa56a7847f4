"""The pictures of the pages demo: pages with what was predicted, and IoU by training pixels."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from pages_data import VOID, Pages
from torch import Tensor

from disalign_ops._figures import style
from disalign_ops._figures.by_count import by_count

RIGHT, WRONG, MENDED, BROKEN = "#dfe3e6", style.RED, style.GREEN, style.AMBER


def class_colours(classes: int) -> np.ndarray:
    """(256, 3) uint8: hues a golden angle apart, so that neighbours in rank differ; VOID white."""
    colours = np.full((256, 3), 255, dtype=np.uint8)
    for label in range(classes):
        bright = (1.0, 0.75, 0.5)[label % 3]
        rgb = colorsys.hsv_to_rgb(label * 0.381966 % 1, 0.85, bright)
        colours[label] = [round(255 * v) for v in rgb]
    return colours


def rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue


def error_map(truth: np.ndarray, before: np.ndarray, after: np.ndarray | None = None) -> np.ndarray:
    """(S, S, 3) uint8: where a class map is right or wrong; of two, what changed as well."""
    colours = np.full((*truth.shape, 3), 255, dtype=np.uint8)
    shown, first = truth != VOID, before == truth
    second = first if after is None else after == truth
    colours[shown & first & second] = rgb(RIGHT)
    colours[shown & ~first & ~second] = rgb(WRONG)
    colours[shown & ~first & second] = rgb(MENDED)
    colours[shown & first & ~second] = rgb(BROKEN)
    return colours


def plot_pages(
    path: Path, pages: Pages, shown: list[int], before: Tensor, after: Tensor, classes: int
) -> Path:
    """Of each page two rows: the page and its classes; each stage's class map and its errors."""
    from matplotlib.patches import Patch

    colours = class_colours(classes)
    with style.applied():
        figure, grid = style.figure(2 * len(shown), 3, height=0.9 + 4.0 * len(shown), squeeze=False)
        for i, page in enumerate(shown):
            truth = pages.masks[page].numpy()
            maps = [np.where(truth == VOID, VOID, p[page].numpy()) for p in (before, after)]
            tiles = {
                "page": np.repeat(255 - pages.images[page].numpy()[..., None], 3, axis=2),
                "stage 1": colours[maps[0]],
                "stage 2": colours[maps[1]],
                "truth": colours[truth],
                "errors of stage 1": error_map(truth, maps[0]),
                "errors of stage 2": error_map(truth, maps[0], maps[1]),
            }
            for axes, (name, tile) in zip(grid[2 * i : 2 * i + 2].flat, tiles.items(), strict=True):
                axes.imshow(tile, interpolation="nearest")
                axes.set_title(name, loc="center")
                style.bare(axes)
        names = {RIGHT: "right", WRONG: "wrong", MENDED: "mended by stage 2",
                 BROKEN: "right in stage 1 only"}  # fmt: skip
        figure.legend(
            handles=[Patch(color=colour, label=name) for colour, name in names.items()],
            loc="outside lower center", ncols=2, handlelength=1.2,
        )  # fmt: skip
        style.title(figure, f"Test pages: the class of a pixel is its character, a colour each "
                            f"of {classes}")  # fmt: skip
    return style.save(figure, path)


def plot_iou(path: Path, counts: Tensor, before: Tensor, after: Tensor) -> Path:
    """Every class's IoU against its training pixels, before and after stage 2."""
    series = {"stage 1, cross-entropy": before, "stage 2, DisAlign": after}
    figure = by_count(
        counts.numpy(), {name: 100 * iou.numpy() for name, iou in series.items()},
        "IoU of each class (points), running mean (lines)", "test IoU, %",
        "training pixels of the class",
    )  # fmt: skip
    return style.save(figure, path)
