"""The README is short, and each measured number in it is one that benchmarks/results records."""

from __future__ import annotations

import re
import struct

from benchmarks import figures
from buildtools import readme_picture
from support.places import ROOT

README = (ROOT / "README.md").read_text()
ROWS = figures.recorded()
# Rows of the README -> the recorded case, whose name may refer to the row above it.
TABLE = {
    "DisAlign loss, all gradients, 4096 x 1204": "lvis-full",
    "DisAlign loss, frozen logits (stage 2), 2048 x 8142": "inat-stage2",
    "weighted cross-entropy, 4096 x 1204": "lvis-plain",
    "weighted cross-entropy, 2 x 150 x 256 x 256": "ade-dense-plain",
    "DisAlign loss, upsampled from 4 x 150 x 128 x 128 to 512 x 512": "ade-upsample-large",
    "frozen linear head with DisAlign loss (stage 2), 4096 x 512 to 8142 classes": (
        "inat-head-stage2"
    ),
}


def cells(text: str) -> dict[str, list[str]]:
    """Rows of tables by their first cell."""
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


def memory(row: dict[str, str]) -> str:
    return f"{row['memory_percent']} % ({row['eager_memory_percent']} %)"


def test_it_is_short_and_begins_with_four_sentences_and_a_picture() -> None:
    assert len(README.splitlines()) <= 200
    first, picture = re.split(r"\n\n", README)[1:3]
    assert len(re.findall(r"\.(?=\s|$)", first)) <= 4
    assert picture.startswith("![")


def test_the_table_has_recorded_numbers() -> None:
    found = cells(README)
    for name, case in TABLE.items():
        row = ROWS[case]
        assert found[name] == [f"{row['eager']} / {row['compile']}", memory(row)], name
    assert list(figures.SHOWN) == list(TABLE.values())  # the picture shows the same


def test_the_first_lines_have_the_range_of_the_table() -> None:
    rows = [ROWS[case] for case in TABLE.values()]
    text = " ".join(README.split())

    def ends(column: str) -> tuple[str, str]:
        values = sorted((row[column] for row in rows), key=float)
        return values[0], values[-1]

    low, high = ends("eager")
    assert f"PyTorch takes {low} to {high} times as long" in text
    low, high = ends("eager_memory_percent")
    assert f"with {low} to {high} % of the logits' bytes" in text
    low, high = ends("memory_percent")
    assert f"where this takes {low} to {high} %" in text


def test_the_questions_numbers_are_recorded() -> None:
    text = " ".join(README.split())
    small, many = ROWS["small-plain"], ROWS["60k-head-plain"]
    assert f"({small['eager']} times as fast as PyTorch)" in text
    assert f"60,000 classes takes torch.compile {many['compile']} times as long" in text


def test_the_benchmarks_page_has_every_recorded_row() -> None:
    found = cells((ROOT / "docs" / "benchmarks.md").read_text())
    for row in ROWS.values():
        times, copies, extra, second = found[row["work"]]
        assert times == f"{row['eager']} / {row['compile']}"
        assert copies == (row["copies"] or "-")
        assert extra == memory(row)
        expected = (
            f"{row['second_eager']} / {row['second_compile']}" if row["second_eager"] else "-"
        )
        copied = f"; {row['second_copies']}" if row["second_copies"] else ""
        assert second == expected + copied


def test_links_and_pictures_are_there() -> None:
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", README)
    assert len(targets) > 15
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_the_pictures_of_its_first_screen_are_small_and_have_their_command() -> None:
    listed = (ROOT / "docs" / "figures.md").read_text().splitlines()
    for name, size in readme_picture.SCREENS.items():
        path = ROOT / "docs" / "pictures" / f"readme_{name}.png"
        assert path.stat().st_size < 200_000
        assert struct.unpack(">II", path.read_bytes()[16:24]) == size
        (row,) = (line for line in listed if f"pictures/{path.name}" in line)
        assert "`make readme-picture`" in row
