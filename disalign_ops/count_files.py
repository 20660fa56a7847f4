"""Reads the number of training samples of each class out of the files that data sets ship.

`read_counts` is the one public function; its docstring lists the formats. Each reader, here and in
`_counts`, returns the counts in class order. Whatever a file holds that does not fit raises
ValueError with the file, the line or key, and what was expected there.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from ._call.arguments import check_integer
from ._counts.json_file import read_json
from ._counts.text_file import read_ade20k, read_pairs
from ._counts.values import Number, count_of, fail
from .errors import ArgumentError

__all__ = ["read_counts"]

CountKind: TypeAlias = Literal["image", "instance", "pixel"]


def read_counts(
    path: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    count: CountKind = "image",
    format: Literal["counts", "samples"] | None = None,
) -> torch.Tensor:
    """Reads class counts from a file; extension and content tell which format it has.

    Formats, and the class order of the result:
      - COCO, LVIS, iNaturalist annotation JSON (keys "categories", "annotations"): sorted by
        category id (ids have gaps in COCO). Counts are the categories' image_count or
        instance_count; where no category has one, the annotations are counted, crowd regions
        (iscrowd 1) left out, as detectors leave them out of training. A JSON list of such
        categories alone (lvis_v1_train_cat_info.json) is read the same way.
      - JSON list of numbers: the counts.
      - JSON list [class, count, class, count, ...] (num_shots_v1.0.json of the released DisAlign
        code): class is a name (file order), or an index that runs from 0 or 1. A list of numbers
        is taken for this one if every other number ascends from 0 or 1; pass `num_classes` where
        that is chance.
      - JSON {class: count}, or {"train_shots": [counts]} (the released ImageNet-LT file), or a
        list of objects like {"Class": "cat", "Count": 5}.
      - .npy: 1-D array of counts. Pickled objects are refused.
      - objectInfo150.txt of ADE20K, or object150_info.csv (columns Idx, Ratio, Train, Val, Name):
        file order, class 0 is Idx 1.
      - .csv, and any other text, with two columns, with or without a header row: a class and its
        count, or a sample and its label, an index from 0 ("path label" on each line of ImageNet-LT
        and Places-LT). File names and the header's words tell which. Without them, lines that
        could be both (counts below the number of lines) are refused unless `format` is passed.

    Classes given as an index are 0-based, or 1-based if they are exactly 1..C. Where some are
    absent (a truncated file?) ValueError names the first, unless `num_classes` is passed: then
    they count 0, except class 0, without which the indices could as well be 1-based. In
    lists of samples a label that never occurs counts 0. Classes given by name keep the file's
    order. A line of totals is refused.

    Args:
        path: the file.
        num_classes: the number of classes expected; what does not fit raises ValueError. Needed
            where the last classes of a list of samples have none.
        count: "image" counts the images that show a class (image_count; column Train of ADE20K),
            "instance" its objects (annotation JSON only), "pixel" gives its share of all pixels
            (column Ratio of ADE20K only; what the released DisAlign segmentation code weights
            by). Formats that hold one count per class ignore it.
        format: of a text with two columns: "counts" (class, count) or "samples" (sample, label).
            None finds out. Other formats ignore it.

    Returns:
        (C,) int64 counts on the CPU; float64 if any of them is a fraction.

    Raises:
        ValueError: the file is truncated, malformed, or does not hold what was asked for.
        FileNotFoundError: there is no such file.
    """
    if count not in ("image", "instance", "pixel"):
        raise ValueError(f"count must be one of 'image', 'instance', 'pixel', got {count!r}")
    if format not in (None, "counts", "samples"):
        raise ArgumentError(f"format must be 'counts', 'samples' or None, got {format!r}")
    if num_classes is not None:
        num_classes = check_integer("num_classes", num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        counts = _read_npy(path)
    else:
        text = _read_text(path)
        if suffix == ".json" or text.lstrip()[:1] in ("{", "["):
            counts = read_json(path, text, num_classes, count)
        elif re.match(r"Idx\s*[\t,]", text):
            counts = read_ade20k(path, text, count)
        else:
            counts = read_pairs(path, text, num_classes, format)
    if num_classes is not None and len(counts) != num_classes:
        fail(path, f"it holds {len(counts)} classes", f"num_classes = {num_classes}")
    if all(float(n).is_integer() for n in counts):
        return torch.tensor([int(n) for n in counts], dtype=torch.int64, device="cpu")
    return torch.tensor(counts, dtype=torch.float64, device="cpu")


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; expected a text file (or .npy)"
        ) from error
    if not text.strip():
        fail(path, "the file is empty", "class counts")
    return text


def _read_npy(path: Path) -> list[Number]:
    import numpy as np

    with path.open("rb") as file:
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path}: not a whole .npy file ({error}); expected a 1-D array of numbers"
            ) from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iuf":
        what = f"shape {array.shape}, dtype {array.dtype}" if hasattr(array, "shape") else "an .npz"
        fail(path, f"it holds {what}", "a 1-D array of numbers")
    if array.size == 0:
        fail(path, "the array is empty", "one count per class")
    return [count_of(path, f"entry {i}", value) for i, value in enumerate(array.tolist())]
