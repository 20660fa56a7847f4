"""One style for every figure, no wider than a phone can show with its text legible.

with style.applied():
    figure, axes = style.figure(height=3.0)
    ...
    style.title(figure, "What is shown")
    style.save(figure, path)
"""

from __future__ import annotations

import textwrap
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 5.6  # inches: 403 points, so that a phone's 340 pixels leave 11 points legible
BLUE, RED, AMBER, GREEN, GREY = "#2a6f97", "#c44e52", "#d98e04", "#4f8a5b", "#8a949c"
CYCLE = (BLUE, RED, AMBER, GREEN, GREY)
LINE = "#c9ced2"  # of thresholds and of what is compared with
_CHARACTERS = 54  # of a title, a line
_PIXELS = 150  # an inch, of PNG

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same widths everywhere
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5c666d",
    "axes.axisbelow": True,
    "figure.facecolor": "white",  # also where a page is dark
    "svg.hashsalt": "disalign_ops",  # the same figure is the same file
}


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install disalign_ops[plots]") from error
    return matplotlib


def applied() -> AbstractContextManager[None]:
    """The style, for what is drawn inside the block; matplotlib's own settings are left alone."""
    matplotlib = _matplotlib()
    settings = _RC | {"axes.prop_cycle": matplotlib.cycler(color=CYCLE)}
    context: AbstractContextManager[None] = matplotlib.rc_context(settings)
    return context


def figure(
    rows: int = 1, columns: int = 1, height: float = 3.4, **options: Any
) -> tuple[Figure, Any]:
    """A figure of the common width, and its axes: one, or an array of them.

    No pyplot: nothing global, no window, and the figure is freed with its last reference.
    """
    _matplotlib()
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height), layout="constrained")
    return made, made.subplots(rows, columns, **options)


def title(of: Figure, text: str) -> None:
    """Above the figure, in as many lines as it needs."""
    of.suptitle(textwrap.fill(text, _CHARACTERS), x=0.01, ha="left", fontsize=12, weight="bold")


def bare(axes: Any) -> None:
    """Axes of a picture: no ticks, no lines."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def plain(value: float) -> str:
    """A tick's number: 4,200 and 0.05, never 4.2e+03."""
    text = f"{value:,.6f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text


def plain_numbers(axis: Any) -> None:
    """Ticks of an axis as people write numbers, on logarithmic axes too."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_formatter(NullFormatter())


def save(of: Figure, path: Path) -> Path:
    """As SVG or PNG, by the name; the same figure makes the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with applied():  # the salt of SVG's names is read when it is written
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        of.savefig(path, dpi=_PIXELS, metadata=metadata)
    return path
