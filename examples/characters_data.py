"""Data of the characters demo: long-tailed training images and a balanced test set.

- `CharacterData`: classes are Chinese characters, training counts follow the frequencies in
  jieba's dict.txt, images are rendered; the test set uses a font that training never sees.
- `ImageFolderData`: a user's own folder, one directory per class.
- `augment`: a fresh distortion of a whole batch on every call, so that no epoch repeats another.

Both data classes carry uint8 images (N, 32, 32) and int64 targets (N,).
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

IMAGE_SIZE = 32
# The first 3,500 ranks: the size of China's level-1 list of characters in common use.
COMMON_RANKS = 3500
MOST_IMAGES = 1660
FEWEST_IMAGES = 2
TEST_IMAGES = 20
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
# Debian's fonts-arphic-* and fonts-wqy-zenhei. Never wqy-microhei: that design is held out.
SYSTEM_FONTS = ("arphic/*.tt[cf]", "wqy/wqy-zenhei.ttc")
SYSTEM_FONT_ROOT = Path("/usr/share/fonts/truetype")

Progress = Callable[[int], None]


@dataclass
class LongTailImages:
    """Training images with a long tail of classes, and a test set with equal classes."""

    class_names: list[str]
    train_images: Tensor
    train_targets: Tensor
    test_images: Tensor
    test_targets: Tensor
    source: list[str] = field(default_factory=list)

    @property
    def counts(self) -> Tensor:
        """Training images per class, (C,) int64."""
        return torch.bincount(self.train_targets, minlength=len(self.class_names))


# --- characters: counts, classes, fonts -----------------------------------------------------


def package_file(package: str, name: str) -> Path:
    """A data file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the characters demo needs the package that provides '{package}': `make setup` "
            "installs it (or give your own images with --data DIR)"
        )
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise FileNotFoundError(f"package '{package}' has no file {name}")
    return path


def character_counts(path: Path) -> dict[str, int]:
    """Occurrences of each Chinese character, summed over the words of a jieba dict.txt.

    A line is "word frequency [part-of-speech]"; a character that a word holds twice counts twice.
    """
    counts: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            parts = line.split()
            if not parts:
                continue
            if len(parts) < 2 or not parts[1].isdecimal():
                raise ValueError(
                    f"{path}, line {number}: must be 'word frequency [tag]', got {line.rstrip()!r}"
                )
            frequency = int(parts[1])
            for character in parts[0]:
                if "\u4e00" <= character <= "\u9fff":
                    counts[character] = counts.get(character, 0) + frequency
    return counts


def choose_classes(
    counts: dict[str, int], num_classes: int, drawable: Callable[[str], bool]
) -> list[tuple[str, int]]:
    """`num_classes` characters at equal steps through the common ranks, with training counts.

    The counts keep the proportions of the real frequencies: the most frequent character gets
    MOST_IMAGES, and the end of the tail no less than FEWEST_IMAGES.
    """
    # Ties are broken by code point, so that the choice does not depend on the dictionary's order.
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    common = [item for item in ranked[:COMMON_RANKS] if drawable(item[0])]
    if not 2 <= num_classes <= len(common):
        raise ValueError(
            f"num_classes must be from 2 to {len(common)}, the common characters that can be drawn,"
            f" got {num_classes}"
        )
    chosen = [common[i * len(common) // num_classes] for i in range(num_classes)]
    per_occurrence = MOST_IMAGES / chosen[0][1]
    return [(c, max(FEWEST_IMAGES, round(n * per_occurrence))) for c, n in chosen]


@dataclass(frozen=True)
class Face:
    """One font file; of a collection (.ttc) its first face, which holds all Chinese glyphs."""

    path: Path

    @property
    def name(self) -> str:
        return ImageFont.truetype(self.path, IMAGE_SIZE).getname()[0] or self.path.stem

    @cache  # noqa: B019 - a handful of faces for the length of one run
    def codepoints(self) -> frozenset[int]:
        with TTFont(self.path, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap())

    def draws(self, character: str) -> bool:
        return ord(character) in self.codepoints()

    @cache  # noqa: B019
    def sized(self, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(self.path, size)


def training_faces(system_root: Path = SYSTEM_FONT_ROOT) -> list[Face]:
    """Noto Sans SC and Noto Serif SC, and Debian's further designs where they are installed."""
    noto = ("NotoSansSC-Regular.otf", "NotoSerifSC-Regular.otf")
    paths = [package_file("pylopdf_fonts_zh_cn", name) for name in noto]
    for pattern in SYSTEM_FONTS:
        paths += sorted(system_root.glob(pattern))
    return [Face(path) for path in paths]


def held_out_face() -> Face:
    """WenQuanYi Micro Hei: the test set's design, which training never sees."""
    return Face(package_file("paperang_p2_fonts_cjk", "fonts/wqy-microhei.ttc"))


# --- characters: images ---------------------------------------------------------------------


def render(character: str, face: Face, rng: random.Random) -> np.ndarray:
    """White on black, (32, 32) uint8, with a size and a position of its own."""
    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    middle = IMAGE_SIZE / 2
    at = (middle + rng.uniform(-1.5, 1.5), middle + rng.uniform(-1.5, 1.5))
    font = face.sized(rng.randint(22, 28))
    ImageDraw.Draw(image).text(at, character, fill=255, font=font, anchor="mm")
    return np.asarray(image)


class CharacterData(LongTailImages):
    """Rendered Chinese characters; `progress` is called with the number of images made."""

    def __init__(self, num_classes: int, seed: int, progress: Progress = lambda done: None) -> None:
        faces, test_face = training_faces(), held_out_face()
        # The two packaged designs and the test design must have a glyph; the system's fonts,
        # some of which hold traditional characters alone, join for the classes that they draw.
        required = [*faces[:2], test_face]
        frequencies = character_counts(package_file("jieba", "dict.txt"))
        classes = choose_classes(
            frequencies, num_classes, lambda c: all(face.draws(c) for face in required)
        )
        rng = random.Random(seed)
        total = sum(n for _, n in classes) + TEST_IMAGES * num_classes
        images = np.empty((total, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
        jobs: list[tuple[str, Face]] = []
        for character, count in classes:
            usable = [face for face in faces if face.draws(character)]
            first = rng.randrange(len(usable))
            jobs += [(character, usable[(first + i) % len(usable)]) for i in range(count)]
        num_train = len(jobs)
        jobs += [(character, test_face) for character, _ in classes for _ in range(TEST_IMAGES)]
        for i, (character, face) in enumerate(jobs):
            images[i] = render(character, face, rng)
            if i % 256 == 255 or i == total - 1:
                progress(i % 256 + 1)

        labels = torch.arange(num_classes)
        # The test font is a clean design: without distortion it would be easier than training.
        # Drawn once from the seed, so that every method is judged on the same images.
        generator = torch.Generator().manual_seed(seed)
        test = augment(torch.from_numpy(images[num_train:]), generator, erase=False)
        super().__init__(
            class_names=[c for c, _ in classes],
            train_images=torch.from_numpy(images[:num_train]),
            train_targets=labels.repeat_interleave(torch.tensor([n for _, n in classes])),
            test_images=(test.squeeze(1) * 255).round().to(torch.uint8),
            test_targets=labels.repeat_interleave(TEST_IMAGES),
            source=[
                "Chinese characters; training counts follow their frequencies in jieba's dict.txt",
                f"images are rendered: training with {', '.join(face.name for face in faces)}; "
                f"test with {test_face.name}, a design held out of training",
            ],
        )


# --- a user's own images --------------------------------------------------------------------


def class_files(root: Path) -> dict[str, list[Path]]:
    """The image files of each class directory of `root`, sorted."""
    expected = f"--data expects DIR/<class>/<image>, images ending in {_listed(IMAGE_SUFFIXES)}"
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing there"
        raise NotADirectoryError(f"{root} is not a folder ({found}); {expected}")
    entries = sorted(e for e in root.iterdir() if not e.name.startswith("."))
    directories = [e for e in entries if e.is_dir()]
    if len(directories) < 2:
        raise ValueError(
            f"{root} must hold at least 2 class directories, got {len(directories)} directories "
            f"and {len(entries) - len(directories)} files; {expected}"
        )
    files = {d.name: [f for f in sorted(d.iterdir()) if _is_image(f)] for d in directories}
    for directory in directories:
        images = files[directory.name]
        if not images and (inner := [e.name for e in sorted(directory.iterdir()) if e.is_dir()]):
            raise ValueError(
                f"{directory} must hold images, got {len(inner)} directories ({_listed(inner)}): "
                f"is that the folder to give? {expected}"
            )
        if len(images) < 2:
            raise ValueError(
                f"class directory {directory} must hold at least 2 images (1 to train, 1 to test), "
                f"got {len(images)}; {expected}"
            )
    return files


class ImageFolderData(LongTailImages):
    """One directory per class, made 32 x 32 greyscale; as many test images from every class."""

    def __init__(self, root: Path, seed: int, progress: Progress = lambda done: None) -> None:
        files = class_files(root)
        smallest = min(len(images) for images in files.values())
        held_out = min(TEST_IMAGES, smallest // 2)
        rng = random.Random(seed)
        train: list[tuple[Path, int]] = []
        test: list[tuple[Path, int]] = []
        for label, paths in enumerate(files.values()):
            shuffled = rng.sample(paths, len(paths))
            test += [(path, label) for path in shuffled[:held_out]]
            train += [(path, label) for path in shuffled[held_out:]]
        train_images, train_targets = _read(train, progress)
        test_images, test_targets = _read(test, progress)
        super().__init__(
            class_names=list(files),
            train_images=train_images,
            train_targets=train_targets,
            test_images=test_images,
            test_targets=test_targets,
            source=[
                f"images of {root}, one directory per class, made 32 x 32 greyscale",
                f"test: {held_out} held out of every class (half of the smallest class, "
                f"at most {TEST_IMAGES})",
            ],
        )


def _read(items: Sequence[tuple[Path, int]], progress: Progress) -> tuple[Tensor, Tensor]:
    images = np.empty((len(items), IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    for i, (path, _) in enumerate(items):
        try:
            with Image.open(path) as image:
                images[i] = image.convert("L").resize((IMAGE_SIZE, IMAGE_SIZE))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        progress(1)
    return torch.from_numpy(images), torch.tensor([label for _, label in items])


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES


def _listed(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (", ..." if len(ordered) > most else "")


# --- augmentation ---------------------------------------------------------------------------


def augment(images: Tensor, generator: torch.Generator, *, erase: bool = True) -> Tensor:
    """Distort a uint8 batch (B, 32, 32) afresh: float (B, 1, 32, 32) between 0 and 1.

    Rotation, scale, shear and shift; thicker or thinner strokes; contrast; noise; and, with
    `erase`, one square of an even grey. All in whole-batch operations: a loop over images would
    cost more than the network.
    """
    size = images.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(size, 1, 1, 1, generator=generator) * (high - low) + low

    x = images.to(torch.float32).div_(255).unsqueeze(1)
    x = _affine(x, uniform)
    # Max-pooling dilates bright strokes, and of the negative erodes them.
    weight = uniform(-0.5, 1.0)
    thick = F.max_pool2d(x, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-x, 3, stride=1, padding=1)
    x = x + weight.clamp(min=0) * (thick - x) + (-weight).clamp(min=0) * (thin - x)
    x = x * uniform(0.4, 1.0) + uniform(0.0, 0.3)
    noise = torch.randn(x.shape, generator=generator)
    x.addcmul_(noise, uniform(0.0, 0.12))
    if erase:
        _erase(x, uniform)
    return x.clamp_(0, 1)


def _affine(x: Tensor, uniform: Callable[[float, float], Tensor]) -> Tensor:
    angle = uniform(-math.pi / 15, math.pi / 15).flatten()
    shear = uniform(-0.2, 0.2).flatten()
    width, height = uniform(0.85, 1.2).flatten(), uniform(0.85, 1.2).flatten()
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([cos * width, (shear * cos - sin) * height, uniform(-0.1, 0.1).flatten()])
    down = torch.stack([sin * width, (shear * sin + cos) * height, uniform(-0.1, 0.1).flatten()])
    theta = torch.stack([across.T, down.T], dim=1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _erase(x: Tensor, uniform: Callable[[float, float], Tensor]) -> None:
    row = torch.arange(IMAGE_SIZE, dtype=torch.float32).view(1, 1, IMAGE_SIZE, 1)
    column = row.view(1, 1, 1, IMAGE_SIZE)
    half = uniform(2, 6)
    inside = (row - uniform(0, IMAGE_SIZE)).abs() < half
    inside = inside & ((column - uniform(0, IMAGE_SIZE)).abs() < half)
    torch.where(inside, uniform(0, 1), x, out=x)
