"""Small long-tailed image data sets in the official layouts, and the options that fit them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COUNTS = (101, 20, 8, 5, 3, 2)  # many, medium and few; the thresholds are 100 and 20
VAL, TEST = 2, 3  # of each class
SIZE = 32
_SYNSETS = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331")
_PLACES = ("airfield", "airplane_cabin", "airport_terminal", "alcove", "alley", "amphitheater")

# A small network, batches as of two devices, and the numbers of the lists below.
OPTIONS = {
    "classes": len(COUNTS), "train-images": sum(COUNTS), "val-images": VAL * len(COUNTS),
    "test-images": TEST * len(COUNTS), "model": "mobilenet_v3_small", "pretrained": "",
    "image-size": SIZE, "resize": 36, "batch": 16, "mean-images": 8, "epochs": 2,
    "stage2-epochs": 2,
}  # fmt: skip


def arguments(data: Path, out: Path, bf16: bool = False, **others: Any) -> list[str]:
    """Of a recipe's command line, for one of these data sets."""
    options = {"data": data, "out": out, "workers": 0, "save-every": 4, **OPTIONS}
    options |= {name.replace("_", "-"): value for name, value in others.items()}
    return [
        "--bf16" if bf16 else "--no-bf16",
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def _image(path: Path, label: int, number: int) -> None:
    """Noise around a colour of the class."""
    generator = np.random.default_rng(1000 * label + number)
    colour = np.array([(label & 1), (label >> 1) & 1, (label >> 2) & 1]) * 120 + 60
    pixels = np.clip(colour + generator.normal(0, 40, (SIZE + 4, SIZE + 8, 3)), 0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, "JPEG")


def _write_lists(folder: Path, prefix: str, names: dict[str, list[str]]) -> None:
    """names: of every split and class, a path with a place for the number."""
    for split, counts in (("train", COUNTS), ("val", [VAL] * 6), ("test", [TEST] * 6)):
        lines = []
        for label, (name, count) in enumerate(zip(names[split], counts, strict=True)):
            for number in range(count):
                # Train and val of the official lists are both from the folder train.
                path = name.format(number + 1000 * (split == "val"))
                _image(folder / path, label, number + 500 * ["train", "val", "test"].index(split))
                lines.append(f"{path} {label}\n")
        (folder / f"{prefix}_{split}.txt").write_text("".join(lines))


def imagenet_lt(folder: Path) -> None:
    train = [f"train/{synset}/{synset}_{{}}.JPEG" for synset in _SYNSETS]
    test = [f"val/{synset}/ILSVRC2012_val_{{:08}}.JPEG" for synset in _SYNSETS]
    _write_lists(folder, "ImageNet_LT", {"train": train, "val": train, "test": test})


def places_lt(folder: Path) -> None:
    train = [f"train/{place}/{{:08}}.jpg" for place in _PLACES]
    test = [f"val/{place}/Places365_val_{{:08}}.jpg" for place in _PLACES]
    _write_lists(folder, "Places_LT", {"train": train, "val": train, "test": test})


def inaturalist2018(folder: Path) -> None:
    """The annotations' images are in no order of their classes."""
    categories = [
        {"id": label, "name": str(label), "supercategory": "Plantae"} for label in range(6)
    ]
    start = 0
    for split, counts in (("train", COUNTS), ("val", [TEST] * 6)):
        images, annotations = [], []
        for label, count in enumerate(counts):
            for number in range(count):
                name = hashlib.md5(f"{split} {label} {number}".encode()).hexdigest()
                path = f"train_val2018/Plantae/{label}/{name}.jpg"
                _image(folder / path, label, number + 500 * (split == "val"))
                one = start + len(images)
                images.append({
                    "license": 3, "file_name": path, "rights_holder": "", "height": SIZE + 4,
                    "width": SIZE + 8, "id": one,
                })  # fmt: skip
                annotations.append({"image_id": one, "category_id": label, "id": one})
        start += len(images)
        images.sort(key=lambda image: image["file_name"])
        content = {"info": {"year": 2018}, "images": images, "licenses": [],
                   "annotations": annotations, "categories": categories}  # fmt: skip
        (folder / f"{split}2018.json").write_text(json.dumps(content))
