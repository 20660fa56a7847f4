"""Data of the pages demo: pages of rendered text, and for every pixel the character it belongs to.

The text is random: characters are drawn one by one, without language. On the training pages each
has the share of its real frequency (jieba's dict.txt), so its pixels have a long tail of their
own accord; the test pages hold all characters equally often, in a font that training never sees.

A pixel's class is that of the character whose square covers it: at 1/4 of the page's resolution
strokes of one or two pixels cannot be told apart, squares can. The paper between squares and their
rims are 255, which neither loss nor metric counts. With a class of its own the paper, two fifths
of all pixels, became the answer to every doubt: judged on the squares alone and among characters
alone, stage 1 then had a mean IoU of 15.2 % instead of 18.2 % (240 pages, 8 epochs, one thread).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from characters_data import (
    Face,
    Progress,
    character_counts,
    choose_classes,
    held_out_face,
    package_file,
    training_faces,
)
from PIL import Image, ImageDraw
from torch import Tensor

RENDERED = 160  # a page as rendered: a distorted copy is cut out of its middle
PAGE = 128
MARGIN = 4
GLYPH_SIZES = (16, 22)
BASELINE = 0.38  # below the middle of a Chinese glyph's square, in sizes
FEWEST_GLYPHS = 3
VOID = 255
RIM = 1
# With these the most frequent of 60 characters would fill 47 % of all squares, without them 27 %.
SKIPPED_RANKS = 20


@dataclass(frozen=True)
class Slot:
    """Where a character goes: its page, the middle of its square, its size, how dark it is."""

    page: int
    x: float
    y: float
    size: int
    ink: int


@dataclass
class Pages:
    """Pages (N, S, S) uint8, ink bright on black, and their classes (N, S, S) uint8."""

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)


def lay_out(pages: int, rng: random.Random) -> list[Slot]:
    """Lines of squares: size and contrast vary by line, position and spacing by character."""
    slots: list[Slot] = []
    for page in range(pages):
        top = MARGIN + rng.uniform(0, 8)
        while True:
            line = rng.randint(*GLYPH_SIZES)
            if top + line > RENDERED - MARGIN:
                break
            ink = rng.randint(140, 255)
            left = MARGIN + rng.uniform(0, 16)
            while True:
                size = max(GLYPH_SIZES[0], line - rng.randint(0, 2))
                if left + size > RENDERED - MARGIN:
                    break
                y = top + line / 2 + rng.uniform(-1, 1)
                slots.append(Slot(page, left + size / 2, y, size, ink))
                # A space now and then, as between paragraphs' ends and words.
                left += size * (2 if rng.random() < 0.05 else 1)
                left += rng.uniform(0, 2)
            top += line + rng.uniform(0, 4)
    return slots


def frequent_characters(characters: int, faces: list[Face]) -> list[tuple[str, int]]:
    """Classes with counts in their real proportions, without the most frequent characters."""
    frequencies = character_counts(package_file("jieba", "dict.txt"))
    for character in sorted(frequencies, key=lambda c: (-frequencies[c], c))[:SKIPPED_RANKS]:
        del frequencies[character]
    return choose_classes(frequencies, characters, lambda c: all(face.draws(c) for face in faces))


def share_out(slots: int, frequencies: list[int]) -> list[int]:
    """How often each character occurs in `slots` slots: proportional, FEWEST_GLYPHS at least."""
    total = sum(frequencies)
    shares = [max(FEWEST_GLYPHS, slots * n // total) for n in frequencies]
    shares[shares.index(max(shares))] += slots - sum(shares)
    if min(shares) < FEWEST_GLYPHS:
        raise ValueError(
            f"{slots} characters fit on the pages, too few for {len(frequencies)} classes of "
            f"{FEWEST_GLYPHS} at least: give more pages or fewer classes"
        )
    return shares


def render_pages(
    slots: list[Slot],
    labels: list[int],
    characters: list[str],
    faces: list[Face],
    rng: random.Random,
    progress: Progress,
) -> Pages:
    """Draws character `labels[i]` into slot i; a page's font is one of `faces`."""
    count = slots[-1].page + 1
    images = np.zeros((count, RENDERED, RENDERED), dtype=np.uint8)
    masks = np.full(images.shape, VOID, dtype=np.uint8)
    starts = [
        *accumulate(np.bincount([s.page for s in slots], minlength=count).tolist(), initial=0)
    ]
    for page in range(count):
        face = rng.choice(faces)
        canvas = Image.new("L", (RENDERED, RENDERED))
        draw = ImageDraw.Draw(canvas)
        for i in range(starts[page], starts[page + 1]):
            slot = slots[i]
            # By the baseline: the middle of ascent and descent is not the fonts' glyphs' middle.
            draw.text(
                (slot.x, slot.y + BASELINE * slot.size), characters[labels[i]], fill=slot.ink,
                font=face.sized(slot.size), anchor="ms",
            )  # fmt: skip
            label_square(masks[page], slot, labels[i])
        images[page] = np.asarray(canvas)
        progress(1)
    return Pages(torch.from_numpy(images), torch.from_numpy(masks))


def label_square(mask: np.ndarray, slot: Slot, label: int) -> None:
    """Writes a square's class and its rim into a page's mask."""
    half = slot.size / 2
    top, left = round(slot.y - half), round(slot.x - half)
    bottom, right = top + slot.size, left + slot.size
    mask[top:bottom, left:right] = VOID
    mask[top + RIM : bottom - RIM, left + RIM : right - RIM] = label


class PageData:
    """Training and test pages; `progress` is called with the number of pages made.

    counts: (C,) int64, the pixels of each class on the training pages.
    glyphs: (C,) int64, how often each character is on the training pages.
    """

    def __init__(
        self,
        characters: int,
        pages: int,
        test_pages: int,
        seed: int,
        progress: Progress = lambda done: None,
    ) -> None:
        if not 2 <= characters <= VOID or pages < 1 or test_pages < 1:
            raise ValueError(
                f"there must be 2 to {VOID} classes and at least one page of both, got "
                f"{characters} classes, {pages} training pages, {test_pages} test pages"
            )
        faces, test_face = training_faces()[:2], held_out_face()
        chosen = frequent_characters(characters, [*faces, test_face])
        self.characters = [c for c, _ in chosen]
        rng = random.Random(seed)

        slots = lay_out(pages, rng)
        glyphs = share_out(len(slots), [n for _, n in chosen])
        labels = shuffled(glyphs, rng)
        self.glyphs = torch.tensor(glyphs)
        self.train = render_pages(slots, labels, self.characters, faces, rng, progress)

        slots = lay_out(test_pages, rng)
        equal = [len(slots[label::characters]) for label in range(characters)]
        labels = shuffled(equal, rng)
        test = render_pages(slots, labels, self.characters, [test_face], rng, progress)
        # Drawn once from the seed, so that every method is judged on the same pages.
        images, masks = distort(test, torch.arange(test_pages), torch.Generator().manual_seed(seed))
        self.test = Pages((images.squeeze(1) * 255).round().to(torch.uint8), masks)

        flat = self.train.masks.flatten().to(torch.int64)
        self.counts = torch.bincount(flat[flat != VOID], minlength=characters)
        self.source = [
            "pages are rendered: random characters, as often as in jieba's dict.txt, of which the "
            f"{SKIPPED_RANKS} most frequent are left out; fonts "
            f"{' and '.join(face.name for face in faces)}",
            f"test pages: {test_face.name}, held out of training, and every character equally "
            "often, so that each has an IoU",
        ]


def shuffled(glyphs: list[int], rng: random.Random) -> list[int]:
    """Labels, each as often as `glyphs` says, in random order."""
    labels = [label for label, count in enumerate(glyphs) for _ in range(count)]
    rng.shuffle(labels)
    return labels


def distort(pages: Pages, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A fresh distortion of some pages: float (B, 1, PAGE, PAGE) in 0 to 1, and uint8 classes.

    Rotation, scale and shift, the same for a page and its classes; thicker or thinner strokes;
    contrast; noise. All in whole-batch operations.
    """
    size = len(index)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(size, 1, 1, 1, generator=generator) * (high - low) + low

    x = pages.images[index].to(torch.float32).div_(255).unsqueeze(1)
    y = pages.masks[index].to(torch.float32).unsqueeze(1) - VOID  # beyond the page: 0, so VOID
    grid = _grid(size, uniform)
    x = F.grid_sample(x, grid, align_corners=False)
    y = F.grid_sample(y, grid, mode="nearest", align_corners=False) + VOID
    # Max-pooling dilates bright strokes, and of the negative erodes them.
    weight = uniform(-0.5, 1.0)
    thick = F.max_pool2d(x, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-x, 3, stride=1, padding=1)
    x = x + weight.clamp(min=0) * (thick - x) + (-weight).clamp(min=0) * (thin - x)
    x = x * uniform(0.5, 1.0) + uniform(0.0, 0.25)
    x.addcmul_(torch.randn(x.shape, generator=generator), uniform(0.0, 0.1))
    return x.clamp_(0, 1), y.squeeze(1).to(torch.uint8)


def _grid(size: int, uniform: Callable[[float, float], Tensor]) -> Tensor:
    """Where each pixel of a cut-out of PAGE x PAGE comes from on the rendered page."""
    angle = uniform(-math.pi / 30, math.pi / 30).flatten()
    shear = uniform(-0.15, 0.15).flatten()
    share = PAGE / RENDERED
    width, height = (uniform(0.87, 1.15).flatten() * share for _ in range(2))
    cos, sin = angle.cos(), angle.sin()
    shifts = (uniform(-0.08, 0.08).flatten() for _ in range(2))
    across = torch.stack([cos * width, (shear * cos - sin) * height, next(shifts)])
    down = torch.stack([sin * width, (shear * sin + cos) * height, next(shifts)])
    theta = torch.stack([across.T, down.T], dim=1)
    return F.affine_grid(theta, [size, 1, PAGE, PAGE], align_corners=False)
