"""A tiny LVIS in exactly the official layout: JSON files, and images in COCO's folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 64
FREQUENCIES = "ffccr"
# Classes 1 to 5 of each training image; the rarest is on one.
TRAIN = [[1, 2], [1, 3], [1, 2], [2, 4], [1, 1, 3], [2, 1], [1, 4], [2, 5], [1, 2], [], [2, 2], [1]]
VAL = [[1, 2, 3], [2, 4], [1, 5], []]
COLOURS = [(230, 40, 40), (40, 220, 40), (50, 60, 240), (220, 220, 30), (200, 40, 220)]


def write(folder: Path, version: str = "v1") -> None:
    """folder/lvis/lvis_VERSION_{train,val}.json and folder/coco/{train2017,val2017}/*.jpg.

    As in the official files: ids of classes from 1, polygons, no iscrowd; v0.5 has file_name, with
    COCO's names of 2014, v1 has not; a part of the validation images lies in train2017.
    """
    generator = np.random.default_rng(0)
    folders = {"train": ["train2017"] * len(TRAIN), "val": ["val2017", "train2017"] * 2}
    first = 1
    for split, classes in (("train", TRAIN), ("val", VAL)):
        images, annotations = [], []
        for number, (shown, place) in enumerate(zip(classes, folders[split], strict=True), first):
            pixels, objects = page(shown, generator)
            file = folder / "coco" / place / f"{number:012}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file, quality=95)
            absent = sorted({1, 2, 3, 4, 5} - set(shown))
            image = {
                "id": number, "height": SIZE, "width": SIZE, "license": 1,
                "flickr_url": f"http://farm1.staticflickr.com/{number}.jpg",
                "coco_url": f"http://images.cocodataset.org/{place}/{number:012}.jpg",
                "date_captured": "2013-11-14 11:18:45",
                "neg_category_ids": absent[:2], "not_exhaustive_category_ids": shown[:1],
            }  # fmt: skip
            if version == "v0.5":
                image["file_name"] = f"COCO_{place[:-4]}2014_{number:012}.jpg"
            images.append(image)
            for one in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": number, **one})
        first += len(classes)
        data = {
            "info": {"version": version, "year": 2020}, "images": images,
            "licenses": [{"id": 1, "name": "", "url": ""}],
            "annotations": annotations, "categories": categories(),
        }  # fmt: skip
        path = folder / "lvis" / f"lvis_{version}_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))


def page(shown: list[int], generator: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Pixels, and an object a class: a rectangle of the class's colour."""
    pixels = generator.integers(90, 110, (SIZE, SIZE, 3)).astype(np.uint8)
    objects = []
    for place, label in enumerate(shown):
        x, y = 2 + 30 * (place % 2), 2 + 30 * (place // 2)
        w, h = generator.integers(18, 28, 2).tolist()
        pixels[y : y + h, x : x + w] = COLOURS[label - 1]
        objects.append({
            "category_id": label, "bbox": [float(x), float(y), float(w), float(h)],
            "area": float(w * h),
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        })  # fmt: skip
    return pixels, objects


def categories() -> list[dict[str, Any]]:
    return [
        {
            "id": label, "name": f"thing_{label}", "synset": f"thing.n.{label:02}",
            "synonyms": [f"thing_{label}"], "def": "a thing", "frequency": frequency,
            "image_count": sum(label in shown for shown in TRAIN),
            "instance_count": sum(shown.count(label) for shown in TRAIN),
        }
        for label, frequency in enumerate(FREQUENCIES, 1)
    ]  # fmt: skip
