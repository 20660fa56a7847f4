"""ADE20K (ADEChallengeData2016) in its official layout, with mmsegmentation's augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .common.order import Key, seeded

IGNORED = 255
Pixels = npt.NDArray[np.uint8]


def read_split(folder: Path, split: str, number: int) -> list[tuple[Path, Path]]:
    """Images and annotations of "training" or "validation", in the order of their names.

    Raises FileNotFoundError and ValueError: what is missing, and what is expected.
    """
    images = folder / "images" / split
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder; expected {number} .jpg images")
    files = sorted(images.glob("*.jpg"))
    if len(files) != number:
        raise ValueError(f"{images}: it holds {len(files)} .jpg images; expected {number}")
    annotations = folder / "annotations" / split
    there = {file.name for file in annotations.iterdir()} if annotations.is_dir() else set()
    pairs = [(file, annotations / f"{file.stem}.png") for file in files]
    for file, annotation in pairs:
        if annotation.name not in there:
            raise FileNotFoundError(
                f"{annotation}: no such file; expected the annotation of {file.name}"
            )
    return pairs


class ADE20K(Dataset[Any]):
    """Normalised images and masks, 0 to classes - 1 or 255.

    Args:
        augment: if True, images and masks are resized at random, cropped and flipped, the colours
            are changed, and an index is a `Key`. If False, images are resized as for evaluation,
            and masks keep their size.
        recipe: of recipes.ade20k.
    """

    def __init__(self, pairs: list[tuple[Path, Path]], recipe: Any, augment: bool) -> None:
        self.pairs, self.recipe, self.augment = pairs, recipe, augment

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, Tensor]:
        index = key if isinstance(key, int) else key[1]
        image, mask = self._read(*self.pairs[index])
        if isinstance(key, tuple):
            with seeded(self.recipe.seed, key):
                image, mask = augmented(image, mask, self.recipe)
        else:
            image = resized(image, self.recipe.scale, 1.0, "bilinear")
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.recipe.mean, self.recipe.std))
        pixels, labels = (pixels - mean) / std, torch.from_numpy(mask.copy())
        if isinstance(key, tuple):  # padded after it was normalised: with the mean colour
            down, right = (max(0, self.recipe.crop - n) for n in labels.shape)
            pixels = torch.nn.functional.pad(pixels, (0, right, 0, down))
            labels = torch.nn.functional.pad(labels, (0, right, 0, down), value=IGNORED)
        return pixels, labels

    def _read(self, file: Path, annotation: Path) -> tuple[Pixels, Pixels]:
        """RGB, and classes from 0: annotations have 1 to `classes`, and 0 for what is ignored."""
        found = []
        for path, mode in ((file, "RGB"), (annotation, "L")):
            try:
                found.append(np.asarray(Image.open(path).convert(mode)))
            except (OSError, SyntaxError) as error:
                raise ValueError(f"{path}: not a whole image ({error})") from error
        image, mask = found
        if image.shape[:2] != mask.shape:
            raise ValueError(
                f"{annotation}: it is {mask.shape[1]} x {mask.shape[0]} pixels; expected "
                f"{image.shape[1]} x {image.shape[0]}, the size of {file.name}"
            )
        if mask.max() > self.recipe.classes:
            raise ValueError(
                f"{annotation}: it holds class {mask.max()}; expected 0 to {self.recipe.classes}"
            )
        return image, mask - np.uint8(1)  # 0 wraps to 255


def resized(pixels: Pixels, scale: tuple[int, ...], ratio: float, mode: str) -> Pixels:
    """As large as fits into scale * ratio, whose larger number is the longer side's.

    By torch's interpolation, which is OpenCV's; Pillow would smooth what it makes smaller.
    """
    height, width = pixels.shape[:2]
    longer, shorter = (int(n * ratio) for n in (max(scale), min(scale)))
    factor = min(longer / max(height, width), shorter / min(height, width))
    size = (int(height * factor + 0.5), int(width * factor + 0.5))
    planes = torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1)[None].astype(np.float32))
    found = torch.nn.functional.interpolate(planes, size, mode=mode)[0].round().byte()
    made: Pixels = found.permute(1, 2, 0).numpy().reshape(*size, *pixels.shape[2:])
    return made


def augmented(image: Pixels, mask: Pixels, recipe: Any) -> tuple[Pixels, Pixels]:
    """mmsegmentation's pipeline: RandomResize, RandomCrop, RandomFlip, PhotoMetricDistortion."""
    low, high = recipe.ratios
    ratio = low + (high - low) * torch.rand(()).item()
    image = resized(image, recipe.scale, ratio, "bilinear")
    mask = resized(mask, recipe.scale, ratio, "nearest")
    top, left = _corner(mask, recipe.crop)
    for _ in range(10):
        shown = mask[top : top + recipe.crop, left : left + recipe.crop]
        counts = np.bincount(shown[shown != IGNORED], minlength=1)
        if (counts > 0).sum() > 1 and counts.max() < recipe.most_of_a_crop * counts.sum():
            break
        top, left = _corner(mask, recipe.crop)
    image = image[top : top + recipe.crop, left : left + recipe.crop]
    mask = mask[top : top + recipe.crop, left : left + recipe.crop]
    if torch.rand(()) < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    return distorted(image), mask


def _corner(mask: Pixels, crop: int) -> tuple[int, int]:
    margins = [max(0, n - crop) + 1 for n in mask.shape]
    top, left = (int(torch.randint(n, ())) for n in margins)
    return top, left


def distorted(image: Pixels) -> Pixels:
    """Each with probability 1/2: brightness by up to 32, contrast by 0.5 to 1.5 before or after the
    colours, saturation by 0.5 to 1.5, hue by up to a tenth of the circle.
    """

    def draw(low: float, high: float) -> float | None:
        number, taken = torch.rand(2).tolist()
        return low + (high - low) * number if taken < 0.5 else None

    def changed(pixels: npt.NDArray[Any], factor: float = 1, offset: float = 0) -> Pixels:
        new: Pixels = np.clip(pixels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
        return new

    brightness, contrast = draw(-32, 32), draw(0.5, 1.5)
    saturation, hue = draw(0.5, 1.5), draw(-18 / 180, 18 / 180)
    contrast_first = torch.rand(()) < 0.5
    if brightness is not None:
        image = changed(image, offset=brightness)
    if contrast is not None and contrast_first:
        image = changed(image, contrast)
    if saturation is not None or hue is not None:
        hsv = np.asarray(Image.fromarray(image).convert("HSV")).copy()
        if saturation is not None:
            hsv[..., 1] = changed(hsv[..., 1], saturation)
        if hue is not None:
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(256 * hue)) % 256
        image = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    if contrast is not None and not contrast_first:
        image = changed(image, contrast)
    return image
