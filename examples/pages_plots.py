"""The picture of the pages demo: pages, what covers their pixels, and what was predicted."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from pages_data import VOID, Pages
from PIL import Image
from torch import Tensor

ENLARGED = 2
GAP = 8


def class_colours(classes: int) -> np.ndarray:
    """(256, 3) uint8: hues a golden angle apart, so that neighbours in rank differ; VOID white."""
    colours = np.full((256, 3), 255, dtype=np.uint8)
    for label in range(classes):
        bright = (1.0, 0.75, 0.5)[label % 3]
        rgb = colorsys.hsv_to_rgb(label * 0.381966 % 1, 0.85, bright)
        colours[label] = [round(255 * v) for v in rgb]
    return colours


def plot_pages(
    path: Path, pages: Pages, shown: list[int], predictions: list[Tensor], classes: int
) -> None:
    """A row a page: the page, its classes, and every prediction where the page has a class."""
    colours = class_colours(classes)
    rows = []
    for page in shown:
        ink = 255 - pages.images[page].numpy()
        truth = pages.masks[page].numpy()
        maps = [truth]
        maps += [
            np.where(truth == VOID, VOID, p[page].numpy()).astype(np.uint8) for p in predictions
        ]
        rows.append([np.repeat(ink[..., None], 3, axis=2), *(colours[m] for m in maps)])
    size = rows[0][0].shape[0]
    step = size + GAP
    sheet = np.full((step * len(rows) + GAP, step * len(rows[0]) + GAP, 3), 200, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = i * step + GAP, j * step + GAP
            sheet[top : top + size, left : left + size] = tile
    image = Image.fromarray(sheet)
    image = image.resize(
        (image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST
    )
    image.save(path)
