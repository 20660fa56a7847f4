"""Counts in text: CSV, ADE20K's object lists, two columns of classes or of samples."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from .values import (
    CLASS_WORDS,
    COUNT_WORDS,
    Number,
    check_class,
    count_of_text,
    fail,
    in_class_order,
    index_of,
    is_number,
)

_SAMPLE_WORDS = frozenset({
    "image", "image_id", "image_name", "image_path", "img", "img_path", "file", "file_name",
    "filename", "filepath", "path", "sample", "sample_id", "id", "index", "idx",
})  # fmt: skip
_FILE_NAME = re.compile(
    r"\.(jpe?g|png|bmp|gif|tiff?|webp|ppm|npy|npz|pt|pth|mp4|avi|wav|mp3|flac|txt|dcm|nii|gz|h5)$",
    re.IGNORECASE,
)


class _Pair(NamedTuple):
    """A line of two columns."""

    line: int
    name: str
    value: str


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


def read_ade20k(path: Path, text: str, count: str) -> list[Number]:
    if count == "instance":
        fail(path, "ADE20K's object list counts no instances", "count = 'image' or 'pixel'")
    rows = _rows(path, text, "\t" if "\t" in text.split("\n", 1)[0] else ",")
    _, header = next(rows)
    column = "Train" if count == "image" else "Ratio"
    if column not in header:
        fail(path, f"line 1 has the columns {', '.join(header)}", f"a column {column}")
    counts: list[Number] = []
    for line, row in rows:
        if len(row) != len(header):
            fail(path, f"line {line} has {len(row)} fields", f"{len(header)}: {', '.join(header)}")
        if row[0] != str(len(counts) + 1):
            fail(path, f"line {line} has Idx {row[0]!r}", f"Idx {len(counts) + 1}")
        counts.append(count_of_text(path, f"line {line}, {column}", row[header.index(column)]))
    if not counts:
        fail(path, "there is no line after the header", "one line per class")
    return counts


def _csv_pairs(path: Path, text: str) -> list[_Pair]:
    pairs = []
    for line, row in _rows(path, text, ","):
        if len(row) != 2:
            fail(path, f"line {line} has {len(row)} fields", "two: class,count or sample,label")
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
            fail(path, f"line {number} is {line.strip()[:60]!r}", "'path label', label from 0")
        pairs.append(_Pair(number, found[1], found[2]))
    return pairs


def read_pairs(path: Path, text: str, num_classes: int | None, format: str | None) -> list[Number]:
    """Lines of a class and its count, or of a sample and its label."""
    pairs = _csv_pairs(path, text) if path.suffix.lower() == ".csv" else _text_pairs(path, text)
    header = None
    if not is_number(pairs[0].value) and index_of(pairs[0].name) is None:
        # A header, unless it names a file: then it is a sample with a broken label.
        if not _FILE_NAME.search(pairs[0].name):
            header, pairs = pairs[0], pairs[1:]
    elif _pandas_header(path, pairs, num_classes):
        header, pairs = pairs[0], pairs[1:]
    if not pairs:
        fail(path, "there is no line after the header", "one line class,count per class")
    if format is None:
        format = _format(path, header, pairs, num_classes)
    if format == "samples":
        return _count_labels(path, pairs, num_classes)
    counts: dict[str, Number] = {}
    for line, name, number in pairs:
        check_class(path, f"line {line}", name)
        if name in counts:
            fail(path, f"line {line} has class {name!r} a second time", "every class once")
        if counts and (index_of(name) is None) != (index_of(next(iter(counts))) is None):
            fail(path, f"line {line} has class {name!r}", "all classes as indices or as names")
        counts[name] = count_of_text(path, f"line {line}, the count", number)
    return in_class_order(path, counts, num_classes)


def _pandas_header(path: Path, pairs: list[_Pair], num_classes: int | None) -> bool:
    """Whether line 1, "label,0", is what pandas writes above a series without a name."""
    first, *others = pairs
    if first.value != "0" or index_of(first.name) is not None or _FILE_NAME.search(first.name):
        return False
    if not others:
        return False
    if num_classes in (len(others), len(pairs)):
        return num_classes == len(others)
    if first.name.casefold() in {"", *CLASS_WORDS} or index_of(others[0].name) is not None:
        return True
    return fail(
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
        if second in COUNT_WORDS and first not in _SAMPLE_WORDS - {"id", "index", "idx"}:
            return "counts"
        if first in _SAMPLE_WORDS and second in CLASS_WORDS:
            return "samples"
    limit = len(pairs) if num_classes is None else num_classes
    labels = [index_of(pair.value) for pair in pairs]
    if any(label is None or label >= limit for label in labels):
        if path.suffix.lower() != ".csv" and any(re.search(r"[/\\]", p.name) for p in pairs):
            return "samples"  # whose labels the reader then refuses
        return "counts"
    if len({pair.name for pair in pairs}) < len(pairs):
        return "samples"
    if path.suffix.lower() != ".csv" and all(re.search(r"[/\\]", p.name) for p in pairs):
        return "samples"
    line, name, value = pairs[0]
    fail(
        path,
        f"line {line} has {name!r} and {value!r}, a class and its count or a sample and its label",
        "format='counts' or format='samples'",
    )


def _count_labels(path: Path, pairs: list[_Pair], num_classes: int | None) -> list[Number]:
    found: Counter[int] = Counter()
    for line, name, text in pairs:
        label = index_of(text)
        if label is None:
            fail(path, f"line {line} is {f'{name} {text}'[:60]!r}", "'path label', label from 0")
        if num_classes is not None and label >= num_classes:
            fail(path, f"line {line} has label {label}", f"a label below {num_classes}")
        found[label] += 1
    if num_classes is None:
        num_classes = max(found) + 1
        if num_classes > found.total():
            # Sizes or dates in the last column would otherwise pass for millions of classes.
            fail(
                path,
                f"the largest label is {num_classes - 1} in {found.total()} lines",
                "class labels (pass num_classes if there are more classes than lines)",
            )
    return [found[label] for label in range(num_classes)]
