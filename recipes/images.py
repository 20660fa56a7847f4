"""Long-tailed image data sets in their official layouts: lists, annotations, images, transforms."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from disalign_ops.class_stats import read_counts

from .common.order import Key, seeded

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Split:
    """Images and labels; counts (C,): how many of each class."""

    listed: Path  # the file that names them
    paths: list[Path]
    labels: list[int]
    counts: Tensor


@dataclass(frozen=True)
class Splits:
    train: Split
    val: Split
    test: Split


def _expect(listed: Path, found: int, expected: int, option: str) -> None:
    if found != expected:
        raise ValueError(
            f"{listed}: it lists {found} images; expected {expected} (is the file whole? "
            f"{option} N for a list of N)"
        )


def read_list(listed: Path, classes: int, images: int, option: str) -> Split:
    """Lines "train/n01440764/x.JPEG 0", paths relative to the list's folder.

    Raises FileNotFoundError; ValueError naming the line that is none, or the number of images.
    """
    if not listed.is_file():
        raise FileNotFoundError(f'{listed}: no such file; expected lines "path label"')
    counts = read_counts(listed, num_classes=classes, format="samples")
    lines = [line for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    _expect(listed, len(lines), images, option)
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    paths = [listed.parent / path.strip() for path, _ in pairs]
    return Split(listed, paths, [int(label) for _, label in pairs], counts)


def read_inaturalist(listed: Path, classes: int, images: int, option: str) -> Split:
    """train2018.json: one annotation an image, file names relative to the file's folder.

    Classes are the categories in the order of their ids. Raises as `read_list`.
    """
    if not listed.is_file():
        raise FileNotFoundError(f"{listed}: no such file; expected iNaturalist's annotations")
    counts = read_counts(listed, num_classes=classes)
    content = json.loads(listed.read_text(encoding="utf-8-sig"))
    try:
        ids = sorted(category["id"] for category in content["categories"])
        class_of = {category: index for index, category in enumerate(ids)}
        label_of = {a["image_id"]: class_of[a["category_id"]] for a in content["annotations"]}
        names = [image["file_name"] for image in content["images"]]
        labels = [label_of[image["id"]] for image in content["images"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{listed}: no {error}; expected images with id and file_name, and annotations with "
            "image_id and category_id, one for each image"
        ) from error
    _expect(listed, len(names), images, option)
    return Split(listed, [listed.parent / name for name in names], labels, counts)


class Images(Dataset[tuple[Tensor, int]]):
    """A split's images under a transform.

    The key is an index, or (epoch, index): then what the transform draws depends on seed and key.
    """

    def __init__(self, split: Split, transform: Transform, seed: int = 0) -> None:
        self.split, self.transform, self.seed = split, transform, seed
        self._open(0)  # a wrong folder shows before training

    def __len__(self) -> int:
        return len(self.split.paths)

    def _open(self, index: int) -> Image.Image:
        path = self.split.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: no such file; expected image {index + 1} of {self.split.listed}"
            ) from None
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's plugins raise
            raise ValueError(f"{path}: damaged ({error}); expected a whole image") from error

    def __getitem__(self, key: int | Key) -> tuple[Tensor, int]:
        index = key[1] if isinstance(key, tuple) else key
        with seeded(self.seed, key) if isinstance(key, tuple) else contextlib.nullcontext():
            return self.transform(self._open(index)), self.split.labels[index]


def training_transform(recipe: Any) -> Transform:
    """A random crop, a flip, and a jitter of brightness, contrast and saturation."""
    from torchvision import transforms as T

    jitter = [T.ColorJitter(*3 * [recipe.color_jitter])] if recipe.color_jitter else []
    transform: Transform = T.Compose([
        T.RandomResizedCrop(recipe.image_size), T.RandomHorizontalFlip(), *jitter,
        T.ToTensor(), T.Normalize(recipe.mean, recipe.std),
    ])  # fmt: skip
    return transform


def test_transform(recipe: Any) -> Transform:
    """The middle of the image."""
    from torchvision import transforms as T

    transform: Transform = T.Compose([
        T.Resize(recipe.resize), T.CenterCrop(recipe.image_size),
        T.ToTensor(), T.Normalize(recipe.mean, recipe.std),
    ])  # fmt: skip
    return transform
