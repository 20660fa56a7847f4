"""The dense demo as a user runs it, small; its pages, their classes, and the picture's colours."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.places import EXAMPLES

sys.path.append(str(EXAMPLES))

import characters_data
import pages_data as data
import pages_plots

from disalign_ops._figures import style

CHARACTERS = ["永", "国", "酬", "我"]


def rendered(labels: list[int] | None = None) -> tuple[list[data.Slot], list[int], data.Pages]:
    rng = random.Random(0)
    slots = data.lay_out(4, rng)
    labels = labels or [rng.randrange(len(CHARACTERS)) for _ in slots]
    faces = [*characters_data.training_faces()[:2], characters_data.held_out_face()]
    return (
        slots,
        labels,
        data.render_pages(slots, labels, CHARACTERS, faces, rng, lambda done: None),
    )


def test_a_run_prints_the_tables_and_writes_the_picture(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "pages.py"), "--threads", "1", "--epochs", "1",
         "--stage2-epochs", "1", "--pages", "10", "--classes", "9", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env={"COLUMNS": "140", "PATH": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for text in (
        "pages are rendered", "10 training pages, 60 test pages of 128 x 128 pixels, 9 classes",
        "head (3)", "body (3)", "tail (3)", "stage 1, cross-entropy", "logit adjustment, tau 1",
        "balanced softmax", "stage 2, DisAlign, rho 1", "best mean:", "peak extra memory",
        "(8, 9, 128, 128)",
    ):  # fmt: skip
        assert text in run.stdout, text
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["iou_by_pixels.png", "pages.png"]
    with Image.open(tmp_path / "out" / "pages.png") as image:
        assert image.width == round(style.WIDTH * 150)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 9  # pages, classes, errors


def test_the_map_of_errors_tells_what_stage_2_changed() -> None:
    truth = np.array([[0, 1, 2, 3, data.VOID]], dtype=np.uint8)
    before = np.array([[0, 0, 0, 3, data.VOID]], dtype=np.uint8)
    after = np.array([[0, 1, 0, 0, data.VOID]], dtype=np.uint8)
    names = ("RIGHT", "MENDED", "WRONG", "BROKEN")
    expected = [pages_plots.rgb(getattr(pages_plots, name)) for name in names] + [(255, 255, 255)]
    found = pages_plots.error_map(truth, before, after)
    assert [tuple(pixel) for pixel in found[0].tolist()] == expected
    first = pages_plots.error_map(truth, before)
    wrong = pages_plots.rgb(pages_plots.WRONG)
    assert [tuple(pixel) == wrong for pixel in first[0].tolist()] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_square_has_its_characters_class_and_its_ink() -> None:
    slots, labels, pages = rendered()
    assert len(pages) == 4
    ink = pages.images.float() / 255
    for slot, label in zip(slots, labels, strict=True):
        middle, half = (round(slot.y), round(slot.x)), slot.size // 2 - 3
        square = (
            slot.page,
            slice(middle[0] - half, middle[0] + half),
            slice(middle[1] - half, middle[1] + half),
        )
        assert (pages.masks[square] == label).all()
        assert float(ink[square].mean()) > 0.05
    squares = pages.masks != data.VOID
    # A rim of a pixel is not labelled; what little ink is beyond that is a stroke's blurred edge.
    near = torch.nn.functional.max_pool2d(squares.float(), 3, 1, 1) > 0
    assert float(ink[near].sum() / ink.sum()) > 0.98
    assert float(ink[squares].sum() / ink.sum()) > 0.9
    elsewhere = torch.roll(squares, (6, 6), (1, 2))
    assert float(ink[elsewhere].sum() / ink.sum()) < 0.8


def test_a_distorted_page_takes_its_classes_along() -> None:
    _, _, pages = rendered()
    index = torch.tensor([2, 0, 2])
    x, y = data.distort(pages, index, torch.Generator().manual_seed(0))
    assert x.shape == (3, 1, data.PAGE, data.PAGE)
    assert y.shape == (3, data.PAGE, data.PAGE)
    assert y.dtype == torch.uint8
    assert not torch.equal(x[0], x[2])
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert set(y.unique().tolist()) == {*range(len(CHARACTERS)), data.VOID}
    for page, classes in zip(x[:, 0], y, strict=True):
        covered = classes != data.VOID
        inside, outside = float(page[covered].mean()), float(page[~covered].mean())
        assert inside > outside + 0.05
        assert 0.3 < float(covered.float().mean()) < 0.9
    again = data.distort(pages, index, torch.Generator().manual_seed(0))
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])


def test_squares_stay_on_the_page_and_apart() -> None:
    slots = data.lay_out(30, random.Random(1))
    assert {slot.page for slot in slots} == set(range(30))
    for slot in slots:
        half = slot.size / 2
        assert half <= min(slot.x, slot.y)
        assert max(slot.x, slot.y) + half <= data.RENDERED
    for before, after in itertools.pairwise(slots):
        if after.page == before.page and after.x > before.x:  # the same line
            assert after.x - before.x >= (before.size + after.size) / 2 - 1e-9


def test_training_pages_have_a_long_tail_and_test_pages_none() -> None:
    made: list[int] = []
    pages = data.PageData(30, 60, 10, seed=0, progress=made.append)
    assert sum(made) == 60 + 10
    assert len(pages.characters) == len(set(pages.characters)) == 30
    ranked = pages.glyphs.sort(descending=True).values
    assert torch.equal(ranked, pages.glyphs)  # from frequent to rare
    assert int(ranked[-1]) >= data.FEWEST_GLYPHS
    assert int(ranked[0]) > 100 * int(ranked[-1])
    flat = pages.train.masks.flatten().long()
    assert torch.equal(pages.counts, torch.bincount(flat[flat != data.VOID], minlength=30))
    area = pages.counts / pages.glyphs
    low, high = ((size - 2 * data.RIM) ** 2 for size in data.GLYPH_SIZES)
    assert low * 0.8 < float(area.min()) <= float(area.max()) <= high
    test = torch.bincount(pages.test.masks.flatten().long(), minlength=256)[:30]
    assert int(test.min()) > 0
    assert int(test.max()) < 3 * int(test.min())  # a few characters each, some cut at the edge
    assert pages.test.images.shape == pages.test.masks.shape == (10, data.PAGE, data.PAGE)


def test_the_seed_decides_everything() -> None:
    one, same, other = (data.PageData(8, 3, 2, seed) for seed in (3, 3, 4))
    for pages, equal in ((same, True), (other, False)):
        assert torch.equal(one.train.images, pages.train.images) is equal
        assert torch.equal(one.train.masks, pages.train.masks) is equal
        assert torch.equal(one.test.images, pages.test.images) is equal
        assert torch.equal(one.test.masks, pages.test.masks) is equal


def test_squares_are_shared_out_by_frequency() -> None:
    assert data.share_out(100, [70, 25, 5, 0]) == [70 - 3, 25, 5, data.FEWEST_GLYPHS]
    with pytest.raises(ValueError, match="10 characters fit on the pages, too few for 4 classes"):
        data.share_out(10, [4, 3, 2, 1])


@pytest.mark.parametrize(("characters", "pages"), [(1, 3), (256, 3), (10, 0)])
def test_arguments_out_of_range_are_named(characters: int, pages: int) -> None:
    with pytest.raises(ValueError, match=f"{characters} classes, {pages} training pages"):
        data.PageData(characters, pages, 2, seed=0)


def test_every_class_has_a_colour_of_its_own() -> None:
    colours = pages_plots.class_colours(255)
    assert len(np.unique(colours, axis=0)) == 256
    assert colours[data.VOID].tolist() == [255, 255, 255]
