"""Data of the boxes demo: pages of rendered characters, and of each its box, mask and class.

Pages are laid out as those of the pages demo, with most places left free. On the training pages
each character has the share of its real frequency (jieba's dict.txt); the test pages hold all
characters equally often, in a font that training never sees. A mask is the silhouette of a glyph:
strokes of one or two pixels are thinner than a mask head can tell. A box encloses it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from characters_data import Face, Progress, held_out_face, training_faces
from pages_data import (
    BASELINE,
    RENDERED,
    SKIPPED_RANKS,
    Slot,
    frequent_characters,
    lay_out,
    share_out,
    shuffled,
)
from PIL import Image, ImageDraw
from torch import Tensor

TAKEN = 0.3  # of the places of a page
INK = 0.3  # of a glyph's full ink: what counts as a stroke


@dataclass
class Page:
    """image (1, S, S) uint8, ink bright on black; boxes (n, 4) x0, y0, x1, y1; labels (n,) int64
    from 1 on, as torchvision's detectors count (0 is the background); masks (n, S, S) uint8.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor

    def target(self) -> dict[str, Tensor]:
        return {"boxes": self.boxes, "labels": self.labels, "masks": self.masks}


def sparse(pages: int, rng: random.Random) -> list[Slot]:
    """Places of characters; every page has one at least."""
    kept: dict[int, list[Slot]] = {page: [] for page in range(pages)}
    for slot in lay_out(pages, rng):
        if not kept[slot.page] or rng.random() < TAKEN:
            kept[slot.page].append(slot)
    return [slot for slots in kept.values() for slot in slots]


def draw(slot: Slot, character: str, face: Face) -> np.ndarray:
    """A page with this character alone."""
    canvas = Image.new("L", (RENDERED, RENDERED))
    ImageDraw.Draw(canvas).text(
        (slot.x, slot.y + BASELINE * slot.size), character, fill=slot.ink,
        font=face.sized(slot.size), anchor="ms",
    )  # fmt: skip
    return np.asarray(canvas)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around what is set, its right and lower side behind the last pixel."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def silhouette(ink: np.ndarray) -> np.ndarray:
    """What lies between strokes both along its row and along its column, and the strokes."""
    between = np.ones_like(ink)
    for axis in (0, 1):
        before = np.maximum.accumulate(ink, axis)
        after = np.flip(np.maximum.accumulate(np.flip(ink, axis), axis), axis)
        between &= before & after
    return between


def render(
    slots: list[Slot], labels: list[int], characters: list[str], faces: list[Face],
    rng: random.Random, progress: Progress,
) -> list[Page]:  # fmt: skip
    """Draws character `labels[i]` into slot i; a page's font is one of `faces`."""
    pages = []
    for page in range(slots[-1].page + 1):
        face = rng.choice(faces)
        here = [(slot, labels[i]) for i, slot in enumerate(slots) if slot.page == page]
        alone = np.stack([draw(slot, characters[label], face) for slot, label in here])
        ink = np.array([slot.ink for slot, _ in here]).reshape(-1, 1, 1)
        masks = np.stack([silhouette(one) for one in alone > INK * ink])
        pages.append(
            Page(
                torch.from_numpy(alone.max(0))[None],
                torch.tensor([box_of(mask) for mask in masks], dtype=torch.float32),
                torch.tensor([label + 1 for _, label in here]),
                torch.from_numpy(masks.astype(np.uint8)),
            )
        )
        progress(1)
    return pages


class BoxData:
    """Training and test pages; `progress` is called with the number of pages made.

    counts: (C,) int64, the boxes of each class on the training pages. pages_with: on how many of
    them each is.
    """

    def __init__(
        self, characters: int, pages: int, test_pages: int, seed: int,
        progress: Progress = lambda done: None,
    ) -> None:  # fmt: skip
        if characters < 3 or pages < 1 or test_pages < 1:
            raise ValueError(
                "there must be at least 3 classes and one page of both, got "
                f"{characters} classes, {pages} training pages, {test_pages} test pages"
            )
        faces, test_face = training_faces()[:2], held_out_face()
        chosen = frequent_characters(characters, [*faces, test_face])
        self.characters = [c for c, _ in chosen]
        rng = random.Random(seed)

        slots = sparse(pages, rng)
        glyphs = share_out(len(slots), [n for _, n in chosen])
        self.train = render(slots, shuffled(glyphs, rng), self.characters, faces, rng, progress)
        self.counts = torch.tensor(glyphs)
        on = torch.stack(
            [torch.bincount(page.labels - 1, minlength=characters) > 0 for page in self.train]
        )
        self.pages_with = on.sum(0)

        slots = sparse(test_pages, rng)
        equal = [len(slots[label::characters]) for label in range(characters)]
        labels = shuffled(equal, rng)
        self.test = render(slots, labels, self.characters, [test_face], rng, progress)
        self.source = [
            "pages are rendered: random characters, as often as in jieba's dict.txt, of which the "
            f"{SKIPPED_RANKS} most frequent are left out; fonts "
            f"{' and '.join(face.name for face in faces)}",
            f"test pages: {test_face.name}, held out of training, and every character equally "
            "often",
        ]


def augmented(page: Page, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrast, paper and noise drawn anew; shifted by whole pixels, which moves boxes exactly."""
    x = page.image.float() / 255
    low, high, noise, *shift = torch.rand(5, generator=generator).tolist()
    x = x * (0.5 + 0.5 * high) + 0.25 * low
    x = x + 0.1 * noise * torch.randn(x.shape, generator=generator)
    # No farther than the outermost glyphs allow: from `right` to the right to `left` to the left.
    left, top = page.boxes[:, :2].amin(0).int().tolist()
    right, bottom = (RENDERED - page.boxes[:, 2:].amax(0)).int().tolist()
    across = int(shift[0] * (left + right + 1)) - right
    down = int(shift[1] * (top + bottom + 1)) - bottom
    target = page.target()
    target["boxes"] = page.boxes - torch.tensor([across, down, across, down])
    target["masks"] = page.masks.roll((-down, -across), (1, 2))
    return x.roll((-down, -across), (1, 2)).clamp(0, 1), target
