"""Counts in JSON: annotations (COCO, LVIS, iNaturalist), lists, {class: count}, records."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from .values import (
    CLASS_WORDS,
    COUNT_WORDS,
    Number,
    check_class,
    count_of,
    fail,
    in_class_order,
)

_MISSING = object()  # tells an absent key from one that holds null


def read_json(path: Path, text: str, num_classes: int | None, count: str) -> list[Number]:
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
            return [count_of(path, f"train_shots[{i}]", n) for i, n in enumerate(shots)]
        if any(isinstance(value, (list, dict)) for value in data.values()):
            keys = ", ".join(map(repr, list(data)[:5]))
            fail(path, f"the keys are {keys}", "'categories', 'train_shots' or {class: count}")
        for name in data:
            check_class(path, f"key {name!r}", name)
        named = {name: count_of(path, f"key {name!r}", value) for name, value in data.items()}
        return in_class_order(path, named, num_classes)
    fail(path, f"the document is {str(data)[:40]}", "a filled JSON object or list")


def _read_records(path: Path, data: list[dict[str, Any]], num_classes: int | None) -> list[Number]:
    """A list of {"class": name or index, "count": number}, as a table's rows are written."""
    named: dict[str, Number] = {}
    for i, record in enumerate(data):
        keys = {
            kind: [key for key in record if key.casefold() in words]
            for kind, words in (("class", CLASS_WORDS), ("count", COUNT_WORDS))
        }
        if len(record) != 2 or not all(len(found) == 1 for found in keys.values()):
            found = ", ".join(map(repr, record))
            fail(
                path,
                f"entry {i} has the keys {found}",
                "a class and a count, or categories with 'id'",
            )
        name, number = (record[found[0]] for found in keys.values())
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            fail(path, f"entry {i} has class {name!r}", "an index from 0, or a name")
        name = str(name)
        check_class(path, f"entry {i}", name)
        if name in named:
            fail(path, f"entry {i} has class {name!r} a second time", "every class once")
        named[name] = count_of(path, f"entry {i}, the count", number)
    return in_class_order(path, named, num_classes)


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands in it twice, Python would keep the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        fail(path, f"key {twice!r} stands in an object twice", "every key once")
    return found


def _read_json_list(path: Path, data: list[Any], num_classes: int | None) -> list[Number]:
    classes, shots = data[::2], data[1::2]
    named = isinstance(classes[0], str)
    if not named and (len(data) == num_classes or not _ascends(classes, num_classes)):
        return [count_of(path, f"entry {i}", n) for i, n in enumerate(data)]
    if len(classes) != len(shots):
        fail(
            path,
            f"the last class, {classes[-1]!r}, has no count",
            "[class, count, ...] (pass num_classes if all these are counts)",
        )
    for i, name in enumerate(classes):
        if isinstance(name, str) != named:
            fail(path, f"entry {2 * i} is {name!r}", "a class name, as in entry 0")
        if not named and name != classes[0] + i:
            fail(
                path,
                f"entry {2 * i} is {name}",
                f"class {classes[0] + i} (pass num_classes if all entries are counts)",
            )
    if len(set(classes)) != len(classes):
        twice = next(name for name, times in Counter(classes).items() if times > 1)
        fail(path, f"class {twice!r} stands in it twice", "every class once")
    return [count_of(path, f"entry {2 * i + 1}", n) for i, n in enumerate(shots)]


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
        fail(path, f"{where} is {repr(holder)[:40]}", f"an object with the key {key!r}")
    name = f"{where}[{key!r}]" if where else f"key {key!r}"
    value = holder.get(key, _MISSING)
    if value is _MISSING:
        fail(path, f"{name} is missing", {int: "an integer", list: "a list"}[kind])
    if not isinstance(value, kind) or isinstance(value, bool):
        fail(path, f"{name} is {repr(value)[:40]}", {int: "an integer", list: "a list"}[kind])
    return value


def _read_annotations(path: Path, data: dict[str, Any], count: str) -> list[Number]:
    if count == "pixel":
        fail(path, "annotation files hold no pixel ratios", "count = 'image' or 'instance'")
    categories = _entry(path, data, "categories", list, "")
    if not categories:
        fail(path, "key 'categories' is an empty list", "one category per class")
    by_id: dict[int, dict[str, Any]] = {}
    for i, category in enumerate(categories):
        category_id = _entry(path, category, "id", int, f"categories[{i}]")
        if category_id in by_id:
            fail(path, f"categories[{i}]['id'] is {category_id} a second time", "distinct ids")
        by_id[category_id] = category
    key = f"{count}_count"
    with_key = [i for i in by_id if key in by_id[i]]
    if not with_key:
        if "annotations" not in data:
            fail(path, f"no category has {key!r} and key 'annotations' is missing", "one of them")
        found = _count_annotations(path, data, set(by_id), count)
        return [found[i] for i in sorted(by_id)]
    if len(with_key) < len(by_id):
        lacking = next(i for i in by_id if key not in by_id[i])
        fail(path, f"the category with id {lacking} has no {key!r}", "it in all or in none")
    return [count_of(path, f"{key!r} of category id {i}", by_id[i][key]) for i in sorted(by_id)]


def _count_annotations(path: Path, data: dict[str, Any], ids: set[int], count: str) -> Counter[int]:
    found: Counter[int] = Counter()
    seen: set[tuple[int, int | str]] = set()
    for i, annotation in enumerate(_entry(path, data, "annotations", list, "")):
        where = f"annotations[{i}]"
        category_id = _entry(path, annotation, "category_id", int, where)
        if category_id not in ids:
            fail(path, f"{where}['category_id'] is {category_id}", "an id of 'categories'")
        crowd = annotation.get("iscrowd")
        if crowd not in (None, 0, 1, "0", "1"):
            fail(path, f"{where}['iscrowd'] is {repr(crowd)[:40]}", "0 or 1")
        if crowd in (1, "1"):
            continue
        if count == "image":
            image_id = annotation.get("image_id")
            if not isinstance(image_id, (int, str)):
                fail(path, f"{where}['image_id'] is {image_id!r}", "the id of an image")
            shown = (category_id, image_id)
            if shown in seen:
                continue
            seen.add(shown)
        found[category_id] += 1
    return found
