"""read_counts: broken files of every format, and what could be read in two ways."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disalign_ops.count_files import read_counts
from support.count_file_cases import ADE20K, COCO, LVIS_CATEGORIES, npy, write


def coco(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**COCO, **changes}.items() if value is not None}


TRUNCATED = r"line 1, column \d+: .*; expected a whole JSON document"
BROKEN: list[tuple[str, str, Any, dict[str, Any], str]] = [
    # annotation JSON
    ("COCO, truncated", "c.json", json.dumps(COCO)[:150], {}, TRUNCATED),
    (
        "COCO, no categories",
        "c.json",
        coco(categories=None),
        {},
        "key 'categories' is missing; expected a list",
    ),
    (
        "COCO, no annotations",
        "c.json",
        coco(annotations=None),
        {},
        "no category has 'image_count' and key 'annotations' is missing; expected one of them",
    ),
    ("COCO, categories no list", "c.json", coco(categories=3), {}, "key 'categories' is 3; expec"),
    ("COCO, categories empty", "c.json", coco(categories=[]), {}, "'categories' is an empty list"),
    (
        "COCO, a category without id",
        "c.json",
        coco(categories=[{"id": 1}, {"name": "b"}]),
        {},
        r"categories\[1\]\['id'\] is missing; expected an integer",
    ),
    (
        "COCO, id is a string",
        "c.json",
        coco(categories=[{"id": "1"}]),
        {},
        r"categories\[0\]\['id'\] is '1'; expected an integer",
    ),
    ("COCO, category no object", "c.json", coco(categories=[4]), {}, r"categories\[0\] is 4; exp"),
    (
        "COCO, id twice",
        "c.json",
        coco(categories=[{"id": 1}, {"id": 1}]),
        {},
        r"categories\[1\]\['id'\] is 1 a second time; expected distinct ids",
    ),
    (
        "COCO, unknown category",
        "c.json",
        coco(annotations=[{"image_id": 1, "category_id": 2}]),
        {},
        r"annotations\[0\]\['category_id'\] is 2; expected an id of 'categories'",
    ),
    (
        "COCO, no category_id",
        "c.json",
        coco(annotations=[{"image_id": 1}]),
        {},
        r"annotations\[0\]\['category_id'\] is missing; expected an integer",
    ),
    (
        "COCO, no image_id",
        "c.json",
        coco(annotations=[{"category_id": 1}]),
        {},
        r"annotations\[0\]\['image_id'\] is None; expected the id of an image",
    ),
    (
        "LVIS, count in some categories",
        "c.json",
        {"categories": [*LVIS_CATEGORIES, {"id": 5}]},
        {},
        "the category with id 5 has no 'image_count'; expected it in all or in none",
    ),
    (
        "LVIS, count no number",
        "c.json",
        [{"id": 1, "image_count": "many"}],
        {},
        "'image_count' of category id 1 is 'many'; expected a number of samples",
    ),
    (
        "COCO, pixels",
        "c.json",
        COCO,
        {"count": "pixel"},
        "annotation files hold no pixel ratios; expected count = 'image' or 'instance'",
    ),
    (
        "COCO, other classes",
        "c.json",
        COCO,
        {"num_classes": 80},
        "holds 3 classes; expected num_cl",
    ),
    # other JSON
    ("interleaved, truncated", "n.json", "[1, 50, 2, 7, 3", {}, TRUNCATED),
    (
        "interleaved, last count lost",
        "n.json",
        [1, 50, 2, 7, 3],
        {},
        r"the last class, 3, has no count; expected \[class, count, \.\.\.\]",
    ),
    (
        "interleaved, name is a number",
        "n.json",
        ["a", 5, 7, 3],
        {},
        "entry 2 is 7; expected a class name, as in entry 0",
    ),
    (
        "interleaved, pair lost",
        "n.json",
        [1, 50, 3, 7, 4, 2],
        {},
        r"entry 2 is 3; expected class 2 \(pass num_classes if all entries are counts\)",
    ),
    (
        "interleaved, last pair lost",
        "n.json",
        [1, 50, 2, 7],
        {"num_classes": 3},
        "it holds 2 classes; expected num_classes = 3",
    ),
    ("interleaved, class twice", "n.json", ["a", 5, "a", 3], {}, "class 'a' stands in it twice"),
    ("interleaved, bad count", "n.json", [1, 50, 2, "x"], {}, "entry 3 is 'x'; expected a number"),
    ("list, negative", "n.json", [5, -1], {}, "entry 1 is -1; expected a finite number of sample"),
    ("list, NaN", "n.json", "[5, NaN]", {}, "entry 1 is nan; expected a finite number"),
    ("list, past int64", "n.json", f"[5, {10**30}]", {}, "entry 1 is 10{30}; expected a finite"),
    ("list, bool", "n.json", [5, True], {}, "entry 1 is True; expected a number of samples"),
    ("list of lists", "n.json", [[0, 5], [1, 3]], {}, r"entry 0 is \[0, 5\]; expected a number"),
    ("list, other classes", "n.json", [5, 3], {"num_classes": 3}, "it holds 2 classes; expected"),
    ("dict, value no number", "n.json", {"a": "x"}, {}, "key 'a' is 'x'; expected a number"),
    (
        "dict, unknown keys",
        "n.json",
        {"info": {}, "licenses": []},
        {},
        "the keys are 'info', 'licenses'; expected 'categories', 'train_shots' or {class: count}",
    ),
    (
        "dict, class absent",
        "n.json",
        {"0": 5, "3": 1},
        {},
        r"no class 1; expected every class from 0, .* \(pass num_classes to count absent",
    ),
    (
        "dict, class too large",
        "n.json",
        {"0": 5, "3": 1},
        {"num_classes": 3},
        "it has class 3; expected classes from 0 to 2",
    ),
    (
        "dict, class 0 absent, or 1-based and truncated",
        "n.json",
        {"1": 5, "2": 1},
        {"num_classes": 3},
        "it has 2 classes up to 2 but no class 0; expected every class from 0, or 1 to the number",
    ),
    ("dict, name among indices", "n.json", {"0": 5, "a": 1}, {}, "class 'a' stands among indices"),
    ("dict, index twice", "n.json", {"0": 5, "00": 1}, {}, "class '00' stands among indices"),
    ("train_shots no list", "n.json", {"train_shots": 3}, {}, "key 'train_shots' is 3; expected a"),
    (
        "train_shots, bad",
        "n.json",
        {"train_shots": [3, None]},
        {},
        r"train_shots\[1\] is None; exp",
    ),
    ("JSON empty list", "n.json", "[]", {}, r"the document is \[\]; expected a filled JSON"),
    ("JSON number", "n.json", "7", {}, "the document is 7; expected a filled JSON object or list"),
    # npy
    ("npy, truncated", "c.npy", npy(np.arange(100))[:300], {}, "not a whole .npy file"),
    ("npy, header truncated", "c.npy", npy(np.arange(100))[:20], {}, "not a whole .npy file"),
    ("npy, empty file", "c.npy", b"", {}, "not a whole .npy file"),
    ("npy, broken zip", "c.npy", b"PK\x03\x04 not one", {}, "not a whole .npy file"),
    ("npy, 2-D", "c.npy", npy(np.ones((2, 3))), {}, r"it holds shape \(2, 3\), dtype float64; ex"),
    ("npy, strings", "c.npy", npy(np.array(["a"])), {}, "dtype <U1; expected a 1-D array of numb"),
    ("npy, no entries", "c.npy", npy(np.zeros(0)), {}, "the array is empty; expected one count"),
    ("npy, NaN", "c.npy", npy(np.array([1, np.nan])), {}, "entry 1 is nan; expected a finite"),
    # ADE20K
    (
        "ADE20K, cut line",
        "objectInfo150.txt",
        ADE20K[: ADE20K.index("\t612")],
        {},
        "line 3 has 3 fields; expected 5: Idx, Ratio, Train, Val, Name",
    ),
    (
        "ADE20K, line lost",
        "objectInfo150.txt",
        ADE20K.replace("2 \t0.1072\t6046\t612\tbuilding, edifice\n", ""),
        {},
        "line 3 has Idx '3'; expected Idx 2",
    ),
    (
        "ADE20K, not a number",
        "objectInfo150.txt",
        ADE20K.replace("6046", "6o46"),
        {},
        "line 3, Train is '6o46'; expected a number of samples",
    ),
    (
        "ADE20K, no column",
        "objectInfo150.txt",
        ADE20K.replace("Train", "Training"),
        {},
        "line 1 has the columns Idx, Ratio, Training, Val, Name; expected a column Train",
    ),
    (
        "ADE20K, header alone",
        "objectInfo150.txt",
        "Idx\tRatio\tTrain\tVal\tName\n",
        {},
        "there is no line after the header; expected one line per class",
    ),
    (
        "ADE20K, instances",
        "objectInfo150.txt",
        ADE20K,
        {"count": "instance"},
        "ADE20K's object list counts no instances; expected count = 'image' or 'pixel'",
    ),
    ("ADE20K, short", "objectInfo150.txt", ADE20K, {"num_classes": 150}, "it holds 3 classes; exp"),
    # csv
    ("csv, cut line", "c.csv", "class,count\n0,50\n1", {}, "line 3 has 1 fields; expected two"),
    ("csv, cut count", "c.csv", "class,count\n0,50\n1,", {}, "line 3, the count is ''; expected a"),
    ("csv, three columns", "c.csv", "0,cat,50\n", {}, "line 1 has 3 fields; expected two: class,"),
    ("csv, class twice", "c.csv", "a,50\na,7\n", {}, "line 2 has class 'a' a second time; expect"),
    ("csv, mixed", "c.csv", "0,50\ncat,7\n", {}, "line 2 has class 'cat'; expected all classes as"),
    ("csv, negative", "c.csv", "0,50\n1,-7\n", {}, "line 2, the count is -7.0; expected a finite"),
    ("csv, class absent", "c.csv", "0,50\n2,7\n", {}, "it has 2 classes up to 2 but no class 1"),
    ("csv, header alone", "c.csv", "class,count\n", {}, "there is no line after the header"),
    ("csv, open quote", "c.csv", '"a,5\n' + "b,6\n" * 50000, {}, r"line \d+: field larger than"),
    # "path label"
    (
        "label list, cut line",
        "l.txt",
        "a/x.jpg 0\na/y.jp",
        {},
        "line 2 is 'a/y.jp'; expected 'path label', label from 0",
    ),
    ("label list, name", "l.txt", "a/x.jpg 0\nb.jpg cat\n", {}, "line 2 is 'b.jpg cat'; expected"),
    ("label list, negative", "l.txt", "a/x.jpg -1\n", {}, "line 1 is 'a/x.jpg -1'; expected"),
    (
        "label list, too large",
        "l.txt",
        "a/x.jpg 0\nb.jpg 3\n",
        {"num_classes": 3},
        "line 2 has label 3; expected a label below 3",
    ),
    (
        "label list, no labels",
        "l.txt",
        "a/x.jpg 20190101\n",
        {},
        r"the largest label is 20190101 in 1 lines; expected class labels \(pass num_classes",
    ),
    # any
    ("empty file", "l.txt", " \n", {}, "the file is empty; expected class counts"),
    ("empty JSON file", "l.json", "", {}, "the file is empty; expected class counts"),
    ("binary", "l.txt", b"ab\xff\xfe", {}, r"byte 2 is not UTF-8; expected a text file"),
]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [case[1:] for case in BROKEN],
    ids=[case[0] for case in BROKEN],
)
def test_broken_files(tmp_path, name, content, options, message) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_counts(path, **options)
    assert str(error.value).startswith(f"{path}: ")
    assert "; expected " in str(error.value)


class Bomb:
    """Its unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_unopened(tmp_path) -> None:
    trace = tmp_path / "ran"
    for content in (
        npy(np.array([Bomb(trace)], dtype=object), allow_pickle=True),
        pickle.dumps(Bomb(trace)),
    ):
        path = write(tmp_path, "c.npy", content)
        with pytest.raises(ValueError, match=r"c\.npy: not a whole \.npy file .*a 1-D array"):
            read_counts(path)
    assert not trace.exists()


def test_a_missing_file_stays_file_not_found(tmp_path) -> None:
    for name in ("none.json", "none.npy", "none.txt"):
        with pytest.raises(FileNotFoundError, match=name):
            read_counts(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": "images"}, ValueError, "count must be one of 'image', .*, got 'images'"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer, got 2.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an integer, got True"),
    ],
)
def test_wrong_arguments(tmp_path, options, error, message) -> None:
    with pytest.raises(error, match=message):
        read_counts(write(tmp_path, "c.json", [1, 2]), **options)


COULD_BE_BOTH = "a class and its count or a sample and its label; expected format='counts' or"


@pytest.mark.parametrize("name", ["c.csv", "c.txt"])
def test_lines_that_could_be_counts_or_samples_need_a_format(tmp_path, name) -> None:
    separator = "," if name == "c.csv" else ": "
    path = write(tmp_path, name, "".join(f"{i}{separator}1\n" for i in range(3)))
    for options in ({}, {"num_classes": 3}):
        with pytest.raises(ValueError, match=COULD_BE_BOTH):
            read_counts(path, **options)
    assert read_counts(path, format="counts").tolist() == [1, 1, 1]
    assert read_counts(path, format="samples").tolist() == [0, 3]
    with pytest.raises(ValueError, match="format must be 'counts', 'samples' or None, got 'csv'"):
        read_counts(path, format="csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "dx,0\ncat,500\n", "line 1 has 'dx' and 0, a header of pandas or a class of 0"),
        ("c.csv", "Class,Count\na,342\n,342\n", "line 3 has no class; expected a class on every"),
        ("c.csv", "a,342\nb,228\nTotal,570\n", "class 'Total' counts as many as all others"),
        ("c.csv", "class,count\n-1,5\n0,7\n", "line 2 has class '-1'; expected an index from 0"),
        ("c.csv", "class,count\n0.5,5\n", "line 2 has class '0.5'; expected an index from 0"),
        ("c.json", {"": 5}, "key '' has no class; expected a class"),
        ("c.json", [{"Kind": "a", "Count": 2}], "entry 0 has the keys 'Kind', 'Count'; expected"),
        ("c.json", [{"Class": None, "Count": 2}], "entry 0 has class None; expected an index"),
        ("c.json", [{"Class": "a", "Count": 2}] * 2, "entry 1 has class 'a' a second time"),
    ],
)
def test_tables_that_are_refused(tmp_path, name, content, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_counts(write(tmp_path, name, content))


@pytest.mark.parametrize("crowd", ["no", 2, [], {}])
def test_other_crowd_flags_are_refused(tmp_path, crowd) -> None:
    annotations = [{"image_id": 1, "category_id": 1, "iscrowd": crowd}]
    path = write(tmp_path, "c.json", {"categories": [{"id": 1}], "annotations": annotations})
    with pytest.raises(ValueError, match=r"annotations\[0\]\['iscrowd'\] is .*; expected 0 or 1"):
        read_counts(path)


def test_a_key_that_stands_in_an_object_twice_is_refused(tmp_path) -> None:
    path = tmp_path / "counts.json"
    path.write_text('{"0": 5, "1": 3, "0": 9}')
    with pytest.raises(ValueError, match="key '0' stands in an object twice"):
        read_counts(path)
