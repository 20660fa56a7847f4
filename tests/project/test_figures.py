"""The committed figures: small, complete, and made by the commands that docs/figures.md names."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from benchmarks import figures
from disalign_ops._figures import style
from support.places import ROOT

FOLDER = ROOT / "docs" / "figures"
LIST = ROOT / "docs" / "figures.md"
COMMITTED = sorted(path for path in FOLDER.iterdir() if path.suffix in (".svg", ".png"))


def test_ticks_are_written_as_people_write_numbers() -> None:
    assert [style.plain(v) for v in (4200.0, 0.05, 1.0, 0.0, 1e6)] == [
        "4,200", "0.05", "1", "0", "1,000,000",
    ]  # fmt: skip


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_a_figure_is_small_and_has_its_command(path: Path) -> None:
    assert path.stat().st_size < 200_000
    row = next(line for line in LIST.read_text().splitlines() if f"figures/{path.name}" in line)
    assert re.search(r"`(make|python)[^`]+`", row), row
    if path.suffix == ".png":
        width, _ = struct.unpack(">II", path.read_bytes()[16:24])
        assert width == round(style.WIDTH * 150)


def test_the_benchmarks_figures_are_those_of_the_recorded_rows(tmp_path: Path) -> None:
    figures.main(["--out", str(tmp_path)])
    for name in ("benchmark.svg", "memory.svg"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), name


def test_every_bar_has_the_number_that_is_recorded() -> None:
    rows = figures.recorded()
    made = figures.time_figure(rows)
    texts = {text.get_text() for text in made.axes[0].texts}
    for case in figures.SHOWN:
        for column in ("eager", "compile"):
            assert f"{style.plain(float(rows[case][column]))} x" in texts
    assert "torch.compile" in [text.get_text() for text in made.legends[0].get_texts()]
    assert made.get_suptitle()


def test_nothing_is_drawn_outside_the_figure() -> None:
    """Long names are not cut."""
    rows = figures.recorded()
    for made in (figures.time_figure(rows), figures.memory_figure(rows)):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(made).draw()
        box = made.get_tightbbox()
        assert box.x0 >= -0.01
        assert box.x1 <= style.WIDTH + 0.01
