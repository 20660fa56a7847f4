"""The pictures of the boxes demo: what is found on test pages, and AP by training boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from boxes_data import Page
from torch import Tensor

from disalign_ops._figures import style
from disalign_ops._figures.by_count import by_count

GROUP_COLOURS = {"rare": "#7b4ea3", "common": style.AMBER, "frequent": style.BLUE}
OUTCOMES = {"right": style.GREEN, "wrong class": style.RED, "missed": style.GREY}
OVERLAP = 0.5  # of a detection that counts as one of a box


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) intersection over union of boxes x0, y0, x1, y1."""
    corner, end = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    common = (end - corner).clamp(min=0).prod(2)
    area = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return common / (area[0][:, None] + area[1] - common)


def outcomes(page: Page, found: dict[str, Tensor]) -> list[str]:
    """Of every box of a page: whether the most confident detection there has its class.

    Missed: none is there. By rank and not by a threshold of the scores, as AP.
    """
    near = overlaps(page.boxes, found["boxes"]) > OVERLAP
    names = []
    for label, there in zip(page.labels.tolist(), near, strict=True):
        if not there.any():
            names.append("missed")
            continue
        best = int(found["scores"].where(there, torch.tensor(-1.0)).argmax())
        names.append("right" if int(found["labels"][best]) == label else "wrong class")
    return names


def _show(axes: Any, page: Page, colours: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(255 - page.image[0], cmap="gray", vmin=0, vmax=255)
    for (x0, y0, x1, y1), colour in zip(page.boxes.tolist(), colours, strict=True):
        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False,
                                 edgecolor=colour, linewidth=1.6))  # fmt: skip
    style.bare(axes)


def plot_boxes(
    path: Path, pages: list[Page], group_of: list[str],
    found: dict[str, list[dict[str, Tensor]]],
) -> Path:  # fmt: skip
    """A row a page: its boxes by their class's group, then what each method makes of them."""
    from matplotlib.lines import Line2D

    with style.applied():
        columns = 1 + len(found)
        figure, grid = style.figure(
            len(pages), columns, height=1.3 + 1.95 * len(pages), squeeze=False
        )
        for axes, head in zip(grid[0], ("truth", *found), strict=True):
            axes.set_title(head, loc="center")
        for i, page in enumerate(pages):
            _show(grid[i][0], page, [GROUP_COLOURS[group_of[k - 1]] for k in page.labels.tolist()])
            for axes, detections in zip(grid[i][1:], found.values(), strict=True):
                _show(axes, page, [OUTCOMES[o] for o in outcomes(page, detections[i])])
        lines = [
            Line2D([], [], color=colour, linewidth=2.5, label=label)
            for label, colour in [
                *((f"truth: {name}", colour) for name, colour in GROUP_COLOURS.items()),
                *OUTCOMES.items(),
            ]
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=2, handlelength=1.4)
        style.title(figure, "Boxes of test pages: how frequent their class is in training, and "
                            "what each stage makes of them")  # fmt: skip
    return style.save(figure, path)


def plot_ap(path: Path, counts: Tensor, before: Tensor, after: Tensor) -> Path:
    """Every class's box AP against its training boxes, before and after stage 2."""
    series = {"stage 1, cross-entropy": before, "stage 2, DisAlign": after}
    figure = by_count(
        counts.numpy(), {name: 100 * ap.numpy() for name, ap in series.items()},
        "Box AP of each class (points), running mean (lines)", "test AP, %",
        "training boxes of the class",
    )  # fmt: skip
    return style.save(figure, path)
