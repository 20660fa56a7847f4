"""What the readers of count files share: counts, classes by name or index, and their error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn, TypeAlias

Number: TypeAlias = int | float

# Column names, casefolded, that say what a row of two columns is.
CLASS_WORDS = frozenset({
    "class", "classes", "class_name", "classname", "class_id", "label", "labels", "label_id",
    "label_name", "category", "category_id", "target", "name", "species", "y",
})  # fmt: skip
COUNT_WORDS = frozenset({
    "count", "counts", "n", "num", "number", "samples", "num_samples", "n_samples", "images",
    "num_images", "image_count", "instances", "frequency", "freq", "size", "pixels", "total", "0",
})  # fmt: skip
_TOTAL_WORDS = frozenset({"total", "totals", "sum", "all", "overall", "grand total"})


def fail(path: Path, found: str, expected: str) -> NoReturn:
    raise ValueError(f"{path}: {found}; expected {expected}")


def count_of(path: Path, where: str, value: object) -> Number:
    """A count: a finite number >= 0 that fits int64 (bool is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(path, f"{where} is {value!r}", "a number of samples")
    if not 0 <= value < 2**63:  # false for NaN too
        fail(path, f"{where} is {str(value)[:40]}", "a finite number of samples >= 0")
    return value


def count_of_text(path: Path, where: str, text: str) -> Number:
    try:
        value = float(text)
    except ValueError:
        fail(path, f"{where} is {text!r}", "a number of samples")
    count_of(path, where, value)
    return int(text) if text.strip().isdecimal() else value


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def index_of(name: str) -> int | None:
    """The class index that a name is, also as a float (pandas writes 3.0 beside missing values)."""
    return int(name.partition(".")[0]) if re.fullmatch(r"\d+(\.0*)?", name) else None


def check_class(path: Path, where: str, name: str) -> None:
    if not name.strip():
        fail(path, f"{where} has no class", "a class on every line (is it the total?)")
    if index_of(name) is None and is_number(name):
        fail(path, f"{where} has class {name!r}", "an index from 0, or a name")


def in_class_order(path: Path, counts: dict[str, Number], num_classes: int | None) -> list[Number]:
    """Counts given as {class: count} in class order; the rule stands in read_counts."""
    last = next(reversed(counts))
    others = sum(counts.values()) - counts[last]
    if last.casefold() in _TOTAL_WORDS and len(counts) > 1 and counts[last] == others:
        fail(path, f"class {last!r} counts as many as all others", "classes without their total")
    indices = {name: index_of(name) for name in counts}
    indexed = {i: counts[name] for name, i in indices.items() if i is not None}
    if not indexed:
        return list(counts.values())
    if len(indexed) < len(counts):  # a name among indices, or one index written in two ways
        odd = next((name for name, i in indices.items() if name != str(i)), "")
        fail(path, f"class {odd!r} stands among indices", "all classes as indices or as names")
    return _by_index(path, indexed, num_classes)


def _by_index(path: Path, counts: dict[int, Number], num_classes: int | None) -> list[Number]:
    size = len(counts) if num_classes is None else num_classes
    if sorted(counts) == list(range(1, size + 1)):
        return [counts[i] for i in range(1, size + 1)]
    largest = max(counts)
    if num_classes is not None and largest >= num_classes:
        fail(path, f"it has class {largest}", f"classes from 0 to {num_classes - 1}")
    absent = next((i for i in range(size) if i not in counts), None)
    if absent == 0 or (absent is not None and num_classes is None):
        hint = " (pass num_classes to count absent classes as 0)" if absent else ""
        fail(
            path,
            f"it has {len(counts)} classes up to {largest} but no class {absent}",
            f"every class from 0, or 1 to the number of classes{hint}",
        )
    return [counts.get(i, 0) for i in range(size)]
