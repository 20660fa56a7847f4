"""Reads the number of training samples of each class out of the files that data sets ship.

`read_counts` is the one public function; its docstring lists the formats. Each reader below
returns the counts in class order. Whatever a file holds that does not fit raises ValueError with
the file, the line or key, and what was expected there.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import numpy as np
import torch

from ._call.arguments import check_integer
from .errors import ArgumentError

__all__ = ["read_counts"]

Number: TypeAlias = int | float

_MISSING = object()  # tells an absent key from one that holds null

# Column names, casefolded, that say what a row of two columns is.
_CLASS_WORDS = frozenset({
    "class", "classes", "class_name", "classname", "class_id", "label", "labels", "label_id",
    "label_name", "category", "category_id", "target", "name", "species", "y",
})  # fmt: skip
_COUNT_WORDS = frozenset({
    "count", "counts", "n", "num", "number", "samples", "num_samples", "n_samples", "images",
    "num_images", "image_count", "instances", "frequency", "freq", "size", "pixels", "total", "0",
})  # fmt: skip
_SAMPLE_WORDS = frozenset({
    "image", "image_id", "image_name", "image_path", "img", "img_path", "file", "file_name",
    "filename", "filepath", "path", "sample", "sample_id", "id", "index", "idx",
})  # fmt: skip
_TOTAL_WORDS = frozenset({"total", "totals", "sum", "all", "overall", "grand total"})
_FILE_NAME = re.compile(
    r"\.(jpe?g|png|bmp|gif|tiff?|webp|ppm|npy|npz|pt|pth|mp4|avi|wav|mp3|flac|txt|dcm|nii|gz|h5)$",
    re.IGNORECASE,
)


def read_counts(
    path: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    count: Literal["image", "instance", "pixel"] = "image",
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
            counts = _read_json(path, text, num_classes, count)
        elif re.match(r"Idx\s*[\t,]", text):
            counts = _read_ade20k(path, text, count)
        else:
            rows = _csv_pairs(path, text) if suffix == ".csv" else _text_pairs(path, text)
            counts = _read_pairs(path, rows, num_classes, format)
    if num_classes is not None and len(counts) != num_classes:
        _fail(path, f"it holds {len(counts)} classes", f"num_classes = {num_classes}")
    if all(float(n).is_integer() for n in counts):
        return torch.tensor([int(n) for n in counts], dtype=torch.int64, device="cpu")
    return torch.tensor(counts, dtype=torch.float64, device="cpu")


class _Pair(NamedTuple):
    """A line of two columns."""

    line: int
    name: str
    value: str


def _fail(path: Path, found: str, expected: str) -> NoReturn:
    raise ValueError(f"{path}: {found}; expected {expected}")


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; expected a text file (or .npy)"
        ) from error
    if not text.strip():
        _fail(path, "the file is empty", "class counts")
    return text


def _count(path: Path, where: str, value: object) -> Number:
    """A count: a finite number >= 0 that fits int64 (bool is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(path, f"{where} is {value!r}", "a number of samples")
    if not 0 <= value < 2**63:  # false for NaN too
        _fail(path, f"{where} is {str(value)[:40]}", "a finite number of samples >= 0")
    return value


def _count_text(path: Path, where: str, text: str) -> Number:
    try:
        value = float(text)
    except ValueError:
        _fail(path, f"{where} is {text!r}", "a number of samples")
    _count(path, where, value)
    return int(text) if text.strip().isdecimal() else value


def _read_npy(path: Path) -> list[Number]:
    with path.open("rb") as file:
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path}: not a whole .npy file ({error}); expected a 1-D array of numbers"
            ) from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iuf":
        what = f"shape {array.shape}, dtype {array.dtype}" if hasattr(array, "shape") else "an .npz"
        _fail(path, f"it holds {what}", "a 1-D array of numbers")
    if array.size == 0:
        _fail(path, "the array is empty", "one count per class")
    return [_count(path, f"entry {i}", value) for i, value in enumerate(array.tolist())]


def _index(name: str) -> int | None:
    """The class index that a name is, also as a float (pandas writes 3.0 beside missing values)."""
    return int(name.partition(".")[0]) if re.fullmatch(r"\d+(\.0*)?", name) else None


def _check_class(path: Path, where: str, name: str) -> None:
    if not name.strip():
        _fail(path, f"{where} has no class", "a class on every line (is it the total?)")
    if _index(name) is None and _is_number(name):
        _fail(path, f"{where} has class {name!r}", "an index from 0, or a name")


def _by_name_or_index(
    path: Path, counts: dict[str, Number], num_classes: int | None
) -> list[Number]:
    """Counts given as {class: count} in class order; the rule stands in read_counts."""
    last = next(reversed(counts))
    others = sum(counts.values()) - counts[last]
    if last.casefold() in _TOTAL_WORDS and len(counts) > 1 and counts[last] == others:
        _fail(path, f"class {last!r} counts as many as all others", "classes without their total")
    indices = {name: _index(name) for name in counts}
    indexed = {i: counts[name] for name, i in indices.items() if i is not None}
    if not indexed:
        return list(counts.values())
    if len(indexed) < len(counts):  # a name among indices, or one index written in two ways
        odd = next((name for name, i in indices.items() if name != str(i)), "")
        _fail(path, f"class {odd!r} stands among indices", "all classes as indices or as names")
    return _by_index(path, indexed, num_classes)


def _by_index(path: Path, counts: dict[int, Number], num_classes: int | None) -> list[Number]:
    size = len(counts) if num_classes is None else num_classes
    if sorted(counts) == list(range(1, size + 1)):
        return [counts[i] for i in range(1, size + 1)]
    largest = max(counts)
    if num_classes is not None and largest >= num_classes:
        _fail(path, f"it has class {largest}", f"classes from 0 to {num_classes - 1}")
    absent = next((i for i in range(size) if i not in counts), None)
    if absent == 0 or (absent is not None and num_classes is None):
        hint = " (pass num_classes to count absent classes as 0)" if absent else ""
        _fail(
            path,
            f"it has {len(counts)} classes up to {largest} but no class {absent}",
            f"every class from 0, or 1 to the number of classes{hint}",
        )
    return [counts.get(i, 0) for i in range(size)]


# --- JSON


def _read_json(path: Path, text: str, num_classes: int | None, count: str) -> list[Number]:
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: _object(path, pairs))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; "
            "expected a whole JSON document (is the file truncated?)"
        ) from error
    if isinstance(data, list) and data:
        if all(isinstance(entry, dict) for entry in data):
            if "id" not in data[0]:
                return _read_records(path, data, num_classes)
            return _read_annotations(path, {"categories": data}, count)
        return _read_json_list(path, data, num_classes)
    if isinstance(data, dict) and data:
        if "categories" in data or "annotations" in data:
            return _read_annotations(path, data, count)
        if "train_shots" in data:
            shots = _entry(path, data, "train_shots", list, "")
            return [_count(path, f"train_shots[{i}]", n) for i, n in enumerate(shots)]
        if any(isinstance(value, (list, dict)) for value in data.values()):
            keys = ", ".join(map(repr, list(data)[:5]))
            _fail(path, f"the keys are {keys}", "'categories', 'train_shots' or {class: count}")
        for name in data:
            _check_class(path, f"key {name!r}", name)
        named = {name: _count(path, f"key {name!r}", value) for name, value in data.items()}
        return _by_name_or_index(path, named, num_classes)
    _fail(path, f"the document is {str(data)[:40]}", "a filled JSON object or list")


def _read_records(path: Path, data: list[dict[str, Any]], num_classes: int | None) -> list[Number]:
    """A list of {"class": name or index, "count": number}, as a table's rows are written."""
    named: dict[str, Number] = {}
    for i, record in enumerate(data):
        keys = {
            kind: [key for key in record if key.casefold() in words]
            for kind, words in (("class", _CLASS_WORDS), ("count", _COUNT_WORDS))
        }
        if len(record) != 2 or not all(len(found) == 1 for found in keys.values()):
            found = ", ".join(map(repr, record))
            _fail(
                path,
                f"entry {i} has the keys {found}",
                "a class and a count, or categories with 'id'",
            )
        name, number = (record[found[0]] for found in keys.values())
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            _fail(path, f"entry {i} has class {name!r}", "an index from 0, or a name")
        name = str(name)
        _check_class(path, f"entry {i}", name)
        if name in named:
            _fail(path, f"entry {i} has class {name!r} a second time", "every class once")
        named[name] = _count(path, f"entry {i}, the count", number)
    return _by_name_or_index(path, named, num_classes)


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands in it twice, Python would keep the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        _fail(path, f"key {twice!r} stands in an object twice", "every key once")
    return found


def _read_json_list(path: Path, data: list[Any], num_classes: int | None) -> list[Number]:
    classes, shots = data[::2], data[1::2]
    named = isinstance(classes[0], str)
    if not named and (len(data) == num_classes or not _ascends(classes, num_classes)):
        return [_count(path, f"entry {i}", n) for i, n in enumerate(data)]
    if len(classes) != len(shots):
        _fail(
            path,
            f"the last class, {classes[-1]!r}, has no count",
            "[class, count, ...] (pass num_classes if all these are counts)",
        )
    for i, name in enumerate(classes):
        if isinstance(name, str) != named:
            _fail(path, f"entry {2 * i} is {name!r}", "a class name, as in entry 0")
        if not named and name != classes[0] + i:
            _fail(
                path,
                f"entry {2 * i} is {name}",
                f"class {classes[0] + i} (pass num_classes if all entries are counts)",
            )
    if len(set(classes)) != len(classes):
        twice = next(name for name, times in Counter(classes).items() if times > 1)
        _fail(path, f"class {twice!r} stands in it twice", "every class once")
    return [_count(path, f"entry {2 * i + 1}", n) for i, n in enumerate(shots)]


def _ascends(numbers: list[Any], num_classes: int | None) -> bool:
    """Whether every other entry of a list looks like class indices rather than counts."""
    whole = all(type(n) is int or (type(n) is float and n.is_integer()) for n in numbers)
    if not whole or numbers[0] not in (0, 1):
        return False
    if len(numbers) == 1:  # any list may start with 0 or 1
        return num_classes == 1
    return all(a < b for a, b in itertools.pairwise(numbers))


def _entry(path: Path, holder: object, key: str, kind: type, where: str) -> Any:
    """holder[key], which must be there and be of that kind; `where` names the holder."""
    if not isinstance(holder, dict):
        _fail(path, f"{where} is {repr(holder)[:40]}", f"an object with the key {key!r}")
    name = f"{where}[{key!r}]" if where else f"key {key!r}"
    value = holder.get(key, _MISSING)
    if value is _MISSING:
        _fail(path, f"{name} is missing", {int: "an integer", list: "a list"}[kind])
    if not isinstance(value, kind) or isinstance(value, bool):
        _fail(path, f"{name} is {repr(value)[:40]}", {int: "an integer", list: "a list"}[kind])
    return value


def _read_annotations(path: Path, data: dict[str, Any], count: str) -> list[Number]:
    if count == "pixel":
        _fail(path, "annotation files hold no pixel ratios", "count = 'image' or 'instance'")
    categories = _entry(path, data, "categories", list, "")
    if not categories:
        _fail(path, "key 'categories' is an empty list", "one category per class")
    by_id: dict[int, dict[str, Any]] = {}
    for i, category in enumerate(categories):
        category_id = _entry(path, category, "id", int, f"categories[{i}]")
        if category_id in by_id:
            _fail(path, f"categories[{i}]['id'] is {category_id} a second time", "distinct ids")
        by_id[category_id] = category
    key = f"{count}_count"
    with_key = [i for i in by_id if key in by_id[i]]
    if not with_key:
        if "annotations" not in data:
            _fail(path, f"no category has {key!r} and key 'annotations' is missing", "one of them")
        found = _count_annotations(path, data, set(by_id), count)
        return [found[i] for i in sorted(by_id)]
    if len(with_key) < len(by_id):
        lacking = next(i for i in by_id if key not in by_id[i])
        _fail(path, f"the category with id {lacking} has no {key!r}", "it in all or in none")
    return [_count(path, f"{key!r} of category id {i}", by_id[i][key]) for i in sorted(by_id)]


def _count_annotations(path: Path, data: dict[str, Any], ids: set[int], count: str) -> Counter[int]:
    found: Counter[int] = Counter()
    seen: set[tuple[int, int | str]] = set()
    for i, annotation in enumerate(_entry(path, data, "annotations", list, "")):
        where = f"annotations[{i}]"
        category_id = _entry(path, annotation, "category_id", int, where)
        if category_id not in ids:
            _fail(path, f"{where}['category_id'] is {category_id}", "an id of 'categories'")
        crowd = annotation.get("iscrowd")
        if crowd not in (None, 0, 1, "0", "1"):
            _fail(path, f"{where}['iscrowd'] is {repr(crowd)[:40]}", "0 or 1")
        if crowd in (1, "1"):
            continue
        if count == "image":
            image_id = annotation.get("image_id")
            if not isinstance(image_id, (int, str)):
                _fail(path, f"{where}['image_id'] is {image_id!r}", "the id of an image")
            shown = (category_id, image_id)
            if shown in seen:
                continue
            seen.add(shown)
        found[category_id] += 1
    return found


# --- text


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line number and the fields of every row that is not blank."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in rows:
            if row:
                yield rows.line_num, [field.strip() for field in row]
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {rows.line_num}: {error}; expected fields separated by {delimiter!r}"
        ) from error


def _read_ade20k(path: Path, text: str, count: str) -> list[Number]:
    if count == "instance":
        _fail(path, "ADE20K's object list counts no instances", "count = 'image' or 'pixel'")
    rows = _rows(path, text, "\t" if "\t" in text.split("\n", 1)[0] else ",")
    _, header = next(rows)
    column = "Train" if count == "image" else "Ratio"
    if column not in header:
        _fail(path, f"line 1 has the columns {', '.join(header)}", f"a column {column}")
    counts: list[Number] = []
    for line, row in rows:
        if len(row) != len(header):
            _fail(path, f"line {line} has {len(row)} fields", f"{len(header)}: {', '.join(header)}")
        if row[0] != str(len(counts) + 1):
            _fail(path, f"line {line} has Idx {row[0]!r}", f"Idx {len(counts) + 1}")
        counts.append(_count_text(path, f"line {line}, {column}", row[header.index(column)]))
    if not counts:
        _fail(path, "there is no line after the header", "one line per class")
    return counts


def _csv_pairs(path: Path, text: str) -> list[_Pair]:
    pairs = []
    for line, row in _rows(path, text, ","):
        if len(row) != 2:
            _fail(path, f"line {line} has {len(row)} fields", "two: class,count or sample,label")
        pairs.append(_Pair(line, row[0], row[1]))
    return pairs


def _text_pairs(path: Path, text: str) -> list[_Pair]:
    pairs = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        # The path may hold spaces. A colon or comma may stand between the two.
        found = re.fullmatch(r"\s*(\S.*?)\s*[\s:,;]\s*([^\s:,;]+)\s*", line)
        if found is None:
            _fail(path, f"line {number} is {line.strip()[:60]!r}", "'path label', label from 0")
        pairs.append(_Pair(number, found[1], found[2]))
    return pairs


def _read_pairs(
    path: Path, pairs: list[_Pair], num_classes: int | None, format: str | None
) -> list[Number]:
    """Lines of a class and its count, or of a sample and its label."""
    header = None
    if not _is_number(pairs[0].value) and _index(pairs[0].name) is None:
        # A header, unless it names a file: then it is a sample with a broken label.
        if not _FILE_NAME.search(pairs[0].name):
            header, pairs = pairs[0], pairs[1:]
    elif _pandas_header(path, pairs, num_classes):
        header, pairs = pairs[0], pairs[1:]
    if not pairs:
        _fail(path, "there is no line after the header", "one line class,count per class")
    if format is None:
        format = _format(path, header, pairs, num_classes)
    if format == "samples":
        return _count_labels(path, pairs, num_classes)
    counts: dict[str, Number] = {}
    for line, name, number in pairs:
        _check_class(path, f"line {line}", name)
        if name in counts:
            _fail(path, f"line {line} has class {name!r} a second time", "every class once")
        if counts and (_index(name) is None) != (_index(next(iter(counts))) is None):
            _fail(path, f"line {line} has class {name!r}", "all classes as indices or as names")
        counts[name] = _count_text(path, f"line {line}, the count", number)
    return _by_name_or_index(path, counts, num_classes)


def _pandas_header(path: Path, pairs: list[_Pair], num_classes: int | None) -> bool:
    """Whether line 1, "label,0", is what pandas writes above a series without a name."""
    first, *others = pairs
    if first.value != "0" or _index(first.name) is not None or _FILE_NAME.search(first.name):
        return False
    if not others:
        return False
    if num_classes in (len(others), len(pairs)):
        return num_classes == len(others)
    if first.name.casefold() in {"", *_CLASS_WORDS} or _index(others[0].name) is not None:
        return True
    return _fail(
        path,
        f"line {first.line} has {first.name!r} and 0, a header of pandas or a class of 0 samples",
        "a header like 'class,count' (or pass num_classes)",
    )


def _format(
    path: Path, header: _Pair | None, pairs: list[_Pair], num_classes: int | None
) -> Literal["counts", "samples"]:
    """What the lines are: file names and the header tell, else what they cannot be."""
    if any(_FILE_NAME.search(pair.name) for pair in pairs):
        return "samples"
    if header is not None:
        first, second = header.name.casefold(), header.value.casefold()
        if second in _COUNT_WORDS and first not in _SAMPLE_WORDS - {"id", "index", "idx"}:
            return "counts"
        if first in _SAMPLE_WORDS and second in _CLASS_WORDS:
            return "samples"
    limit = len(pairs) if num_classes is None else num_classes
    labels = [_index(pair.value) for pair in pairs]
    if any(label is None or label >= limit for label in labels):
        if path.suffix.lower() != ".csv" and any(re.search(r"[/\\]", p.name) for p in pairs):
            return "samples"  # whose labels the reader then refuses
        return "counts"
    if len({pair.name for pair in pairs}) < len(pairs):
        return "samples"
    if path.suffix.lower() != ".csv" and all(re.search(r"[/\\]", p.name) for p in pairs):
        return "samples"
    line, name, value = pairs[0]
    _fail(
        path,
        f"line {line} has {name!r} and {value!r}, a class and its count or a sample and its label",
        "format='counts' or format='samples'",
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _count_labels(path: Path, pairs: list[_Pair], num_classes: int | None) -> list[Number]:
    found: Counter[int] = Counter()
    for line, name, text in pairs:
        label = _index(text)
        if label is None:
            _fail(path, f"line {line} is {f'{name} {text}'[:60]!r}", "'path label', label from 0")
        if num_classes is not None and label >= num_classes:
            _fail(path, f"line {line} has label {label}", f"a label below {num_classes}")
        found[label] += 1
    if num_classes is None:
        num_classes = max(found) + 1
        if num_classes > found.total():
            # Sizes or dates in the last column would otherwise pass for millions of classes.
            _fail(
                path,
                f"the largest label is {num_classes - 1} in {found.total()} lines",
                "class labels (pass num_classes if there are more classes than lines)",
            )
    return [found[label] for label in range(num_classes)]
