"""A tiny ADE20K in exactly the official layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .ade20k import ADE20K_RATIOS

SHOWN = (0, 1, 2, 25, 149)  # classes on the images: of the released head, body and tail
ALL_IGNORED = 5  # the training image of whose pixels none has a class


def ratios() -> list[float]:
    """Column Ratio of the official objectInfo150.txt."""
    return [ratio / 10_000 for ratio, times in ADE20K_RATIOS for _ in range(times)]


def write(folder: Path, train: int = 12, val: int = 3) -> Path:
    """folder/ADEChallengeData2016 with objectInfo150.txt, images and annotations."""
    root = folder / "ADEChallengeData2016"
    generator = np.random.default_rng(0)
    for split, prefix, number in (("training", "train", train), ("validation", "val", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(1, number + 1):
            image, annotation = scene(generator)
            if split == "training" and index == ALL_IGNORED:
                annotation[:] = 0
            name = f"ADE_{prefix}_{index:08}"
            Image.fromarray(image).save(root / "images" / split / f"{name}.jpg", quality=95)
            Image.fromarray(annotation).save(root / "annotations" / split / f"{name}.png")
    rows = [f"{i}\t{ratio:.4f}\t{20_000 // i}\t{2000 // i}\tthing {i}, object"
            for i, ratio in enumerate(ratios(), 1)]  # fmt: skip
    lines = ["Idx\tRatio\tTrain\tVal\tName", *rows]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return root


def scene(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) of coloured quarters; its annotation (H, W), class + 1, 0 in a strip."""
    height, width = generator.integers(48, 80, 2).tolist()
    image = generator.integers(0, 40, (height, width, 3)).astype(np.uint8)
    annotation = np.zeros((height, width), np.uint8)
    for place, label in enumerate(generator.permutation(len(SHOWN))[:4].tolist()):
        rows = slice(height // 2) if place < 2 else slice(height // 2, height)
        columns = slice(4, width // 2) if place % 2 else slice(width // 2, width)
        image[rows, columns, label % 3] += np.uint8(80 + 40 * label)
        annotation[rows, columns] = SHOWN[label] + 1
    return image, annotation
