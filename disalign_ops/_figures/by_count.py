"""What every class has, against its number of training samples: points, and a running mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import style

Values = np.ndarray[Any, np.dtype[Any]]


def running_mean(counts: Values, values: Values) -> tuple[Values, Values]:
    """Mean count and mean value of a window that slides over the classes, rarest first.

    A class has few test samples, so its own value is one of a handful: only the mean of many
    classes of about the same count shows the trend. NaN, a class without test samples, is left out.
    """
    known = ~np.isnan(values)
    counts, values = counts[known], values[known]
    order = np.argsort(counts, kind="stable")
    window = max(1, len(counts) // 12)
    mean = np.ones(window) / window
    log_count = np.convolve(np.log(np.maximum(counts[order], 0.5)), mean, mode="valid")
    means = np.convolve(values[order], mean, mode="valid")
    # Windows of classes that all have the same count are one point, the mean of them.
    places, of_place = np.unique(log_count.round(9), return_inverse=True)
    return np.exp(places), np.bincount(of_place, means) / np.bincount(of_place)


def count_axis(axes: Any, label: str, thresholds: Sequence[float] = ()) -> None:
    """A logarithmic axis of counts, with lines at the thresholds."""
    axes.set_xscale("log")
    style.plain_numbers(axes.xaxis)
    axes.set_xlabel(label)
    for threshold in thresholds:
        axes.axvline(threshold, color=style.LINE, linewidth=1, zorder=0)


def by_count(
    counts: Values,
    series: dict[str, Values],
    title: str,
    label: str,
    count_label: str,
    thresholds: Sequence[float] = (),
) -> Any:
    """A figure of percentages: each of `series` is a method's value of every class."""
    with style.applied():
        figure, axes = style.figure(height=3.6)
        colours = (style.RED, style.BLUE, style.AMBER, style.GREEN)
        for (name, values), colour in zip(series.items(), colours, strict=False):
            axes.scatter(counts, values, s=10, alpha=0.3, color=colour, linewidths=0)
            axes.plot(*running_mean(counts, values), color=colour, linewidth=2.5, label=name)
        count_axis(axes, count_label, thresholds)
        axes.set_ylabel(label)
        axes.set_ylim(-3, 103)
        axes.grid(axis="y", color=style.LINE, linewidth=0.6)
        figure.legend(loc="outside lower left", ncols=2, handlelength=1.4, columnspacing=1.2)
        style.title(figure, title)
    return figure
