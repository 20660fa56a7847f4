"""LVIS as torchvision's detectors see it, and its average precision."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .common.order import Key, seeded

Target = dict[str, Tensor]
SCORES = {  # their names in faster-coco-eval
    "AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75", "APr": "APr", "APc": "APc", "APf": "APf",
}  # fmt: skip


def read_annotations(
    path: Path, classes: int, images: tuple[int, ...], images_in: Path
) -> dict[str, Any]:
    """The object of an LVIS file, whose classes are 1 to `classes`.

    Args:
        images: the least and the greatest number of images.
        images_in: the folder of train2017 and val2017.

    Raises FileNotFoundError and ValueError: what is missing, or does not fit, and what is expected.
    """
    expected = f"LVIS annotations of {classes} classes"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected {expected}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a whole JSON file ({error}); expected {expected}") from None
    missing = {"images", "annotations", "categories"} - set(data)
    if missing:
        raise ValueError(f"{path}: no {', '.join(sorted(missing))}; expected {expected}")
    lacking = {"id", "image_count", "frequency"} - set.intersection(
        *(set(category) for category in data["categories"])
    )
    if lacking:
        raise ValueError(
            f"{path}: a category has no {', '.join(sorted(lacking))}; expected {expected}"
        )
    ids = sorted(category["id"] for category in data["categories"])
    if ids != list(range(1, classes + 1)):
        raise ValueError(
            f"{path}: it holds {len(ids)} classes; expected the classes 1 to {classes}"
        )
    least, most = images
    if not least <= len(data["images"]) <= most:
        raise ValueError(
            f"{path}: it holds {len(data['images'])} images; expected "
            + (f"{least}" if least == most else f"{least} to {most}")
        )
    there: dict[Path, set[str]] = {}
    for image in data["images"]:
        file = image_file(image, images_in)
        if file.parent not in there:
            names = file.parent.iterdir() if file.parent.is_dir() else ()
            there[file.parent] = {name.name for name in names}
        if file.name not in there[file.parent]:
            raise FileNotFoundError(f"{file}: no such file; expected an image of {path.name}")
    return dict(data)


def image_file(image: dict[str, Any], images_in: Path) -> Path:
    """By the end of coco_url, as detectron2: file_name has COCO's old names in v0.5, v1 has none.

    Some images of LVIS's validation set are in COCO's train2017.
    """
    folder, name = str(image["coco_url"]).split("/")[-2:]
    return images_in / folder / name


class LVISImages(Dataset[Any]):
    """Images with boxes, labels (the category's id, 0 is the background) and masks.

    Args:
        training: leave out images without a usable annotation, and flip half of the images: then
            an index is a `Key`. False: an index is a number, and a target has the image's id alone.

    The objects of an image are kept as JSON: those of all training images of LVIS v1 are 1 GB so,
    and several times that as Python's lists, which every process that reads images would copy.
    """

    def __init__(
        self, data: dict[str, Any], images_in: Path, training: bool, seed: int = 0
    ) -> None:
        self.images_in, self.seed = images_in, seed
        objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for one in data["annotations"] if training else ():
            if one["bbox"][2] > 0 and one["bbox"][3] > 0:
                kept = ("category_id", "bbox", "segmentation")
                objects[one["image_id"]].append({key: one[key] for key in kept})
        self.images = [
            image for image in sorted(data["images"], key=lambda image: image["id"])
            if not training or image["id"] in objects
        ]  # fmt: skip
        own = [objects.get(image["id"], []) for image in self.images]
        self.classes = [{one["category_id"] for one in part} for part in own]  # of each image
        self.objects = [json.dumps(part) for part in own]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, Target]:
        if isinstance(key, int):
            image = self.images[key]
            return self._read(image), {"image_id": torch.tensor(image["id"])}
        image = self.images[key[1]]
        with seeded(self.seed, key):
            flip = bool(torch.rand(()) < 0.5)
        pixels, target = self._read(image), self._objects(key[1])
        if flip:
            width = pixels.shape[2]
            boxes = target["boxes"]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            pixels, target["masks"] = pixels.flip(2), target["masks"].flip(2)
        return pixels, target

    def _read(self, image: dict[str, Any]) -> Tensor:
        """(3, H, W) float32 in [0, 1]."""
        path = image_file(image, self.images_in)
        try:
            pixels = np.asarray(Image.open(path).convert("RGB"))
        except OSError as error:
            raise ValueError(f"{path}: not a whole image ({error})") from error
        if pixels.shape[:2] != (image["height"], image["width"]):
            raise ValueError(
                f"{path}: it is {pixels.shape[1]} x {pixels.shape[0]} pixels; expected "
                f"{image['width']} x {image['height']}"
            )
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def _objects(self, index: int) -> Target:
        height, width = (self.images[index][name] for name in ("height", "width"))
        objects = json.loads(self.objects[index])
        boxes = torch.tensor([o["bbox"] for o in objects])
        boxes[:, 2:] += boxes[:, :2]
        masks = [
            rle.decode(rle.merge(rle.frPyObjects(o["segmentation"], height, width)))
            for o in objects
        ]
        return {
            "boxes": boxes,
            "labels": torch.tensor([o["category_id"] for o in objects]),
            "masks": torch.from_numpy(np.stack(masks)),
        }


def detections(output: Target, image: dict[str, Any], judged: set[int]) -> list[dict[str, Any]]:
    """A detector's output for an image, in the format of LVIS's results.

    Args:
        judged: classes that the image is annotated for. LVIS's evaluation drops detections of the
            others; left out here, 300 an image would not pile up.
    """
    found = []
    parts = (output["labels"].tolist(), output["scores"].tolist(), output["boxes"].tolist())
    for label, score, (x0, y0, x1, y1), mask in zip(*parts, output["masks"], strict=True):
        if label in judged:
            area = np.asfortranarray((mask[0] > 0.5).byte().cpu().numpy())
            found.append({
                "image_id": image["id"], "category_id": label, "score": score,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": rle.encode(area),
            })  # fmt: skip
    return found


def judged_classes(data: dict[str, Any]) -> dict[int, set[int]]:
    """Of each image, the classes it shows and those it is known not to show."""
    judged = {image["id"]: set(image["neg_category_ids"]) for image in data["images"]}
    for annotation in data["annotations"]:
        judged[annotation["image_id"]].add(annotation["category_id"])
    return judged


def average_precision(
    data: dict[str, Any], found: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """LVIS's AP of boxes and masks, in %; APr, APc and APf of rare, common and frequent classes.

    As lvis-api: 300 detections an image; detections of a class that an image is not annotated for
    are dropped, and unmatched ones of a class that is not annotated in full do not count. -1 where
    no class of a group occurs.
    """
    scores: dict[str, dict[str, float]] = {}
    for kind in ("bbox", "segm"):
        # Masks without their boxes, whose area would be taken for the masks'.
        left_out = {"bbox"} if kind == "segm" else {"segmentation"}
        given = [{k: v for k, v in one.items() if k not in left_out} for one in found]
        truth = COCO(data)
        evaluation = COCOeval_faster(truth, truth.loadRes(given), kind, lvis_style=True)
        evaluation.params.maxDets = [300]
        # One range of areas in the place of four: there is an entry a range, class and image.
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats = evaluation.stats_as_dict
        scores[kind] = {
            name: 100 * stats[key] if stats[key] > -1 else -1.0 for name, key in SCORES.items()
        }
    return scores
