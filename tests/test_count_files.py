"""read_counts: every format it names, on good files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disalign_ops.count_files import read_counts
from support.count_file_cases import ADE20K, COCO, LVIS_CATEGORIES, npy, write

GOOD: list[tuple[str, str, Any, dict[str, Any], list[float]]] = [
    ("COCO, images", "coco.json", COCO, {}, [2, 0, 1]),
    ("COCO, instances", "coco.json", COCO, {"count": "instance"}, [2 + 1, 0, 1]),
    ("LVIS, images", "lvis.json", {"categories": LVIS_CATEGORIES}, {}, [120, 7]),
    (
        "LVIS, instances",
        "lvis.json",
        {"categories": LVIS_CATEGORIES, "annotations": []},
        {"count": "instance"},
        [300, 9],
    ),
    ("LVIS cat_info list", "lvis_v1_train_cat_info.json", LVIS_CATEGORIES, {}, [120, 7]),
    (
        "iNaturalist 2018",
        "train2018.json",
        {
            "images": [{"id": 0}, {"id": 1}, {"id": 2}],
            "categories": [{"id": 0, "name": "x", "supercategory": "Plantae"}, {"id": 1}],
            "annotations": [
                {"id": 0, "image_id": 0, "category_id": 1},
                {"id": 1, "image_id": 1, "category_id": 1},
                {"id": 2, "image_id": 2, "category_id": 0},
            ],
        },
        {"num_classes": 2},
        [1, 2],
    ),
    ("interleaved, ids from 1", "num_shots.json", [1, 50, 2, 7, 3, 1], {}, [50, 7, 1]),
    ("interleaved, ids from 0", "num_shots.json", [0, 50, 1, 7], {}, [50, 7]),
    ("interleaved, names", "num_shots.json", ["zebra", 50, "ant", 7], {}, [50, 7]),
    ("list of counts", "counts.json", [50, 7, 1], {}, [50, 7, 1]),
    ("list of counts like pairs", "c.json", [1, 50, 2, 7], {"num_classes": 4}, [1, 50, 2, 7]),
    ("released ImageNet-LT", "lt.json", {"train_shots": [9, 8], "val_shots": [1, 1]}, {}, [9, 8]),
    ("dict by index", "c.json", {"1": 7, "0": 50}, {}, [50, 7]),
    ("dict by index from 1", "c.json", {"2": 7, "1": 50}, {}, [50, 7]),
    ("dict, absent classes", "c.json", {"0": 7, "2": 5}, {"num_classes": 4}, [7, 0, 5, 0]),
    ("dict, class 0 is empty", "c.json", {"0": 0, "1": 7, "2": 5}, {}, [0, 7, 5]),
    ("dict by name", "c.json", {"zebra": 50, "ant": 7}, {}, [50, 7]),
    ("npy", "num_shots_v0.5.npy", npy(np.array([3, 2], dtype=np.int32)), {}, [3, 2]),
    ("npy, whole floats", "n.npy", npy(np.array([3.0, 2.0])), {}, [3, 2]),
    ("ADE20K", "objectInfo150.txt", ADE20K, {}, [11664, 6046, 8265]),
    (
        "ADE20K csv",
        "object150_info.csv",
        "Idx,Ratio,Train,Val,Stuff,Name\n1,0.1,9,2,0,a;b\n",
        {},
        [9],
    ),
    ("csv with header", "c.csv", "class,count\n0,50\n1,7\n", {}, [50, 7]),
    ("csv without header", "c.csv", "1,7\n0,50\n", {}, [50, 7]),
    ("csv, names with commas", "c.csv", '"dog, wild",50\ncat , 7\n\n', {}, [50, 7]),
    ("csv from a spreadsheet", "c.csv", b"\xef\xbb\xbf0,50\r\n1,7\r\n", {}, [50, 7]),
    ("csv, absent class", "c.csv", "0,50\n2,7\n", {"num_classes": 3}, [50, 0, 7]),
    (
        "ImageNet-LT list",
        "ImageNet_LT_train.txt",
        "train/n01/x.jpg 2\ntrain/n02/y.jpg 0\ntrain/n01/z w.jpg 2\n",
        {},
        [1, 0, 2],
    ),
    ("label list, last classes", "l.txt", "a.jpg 0\n", {"num_classes": 3}, [1, 0, 0]),
]


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [case[1:] for case in GOOD],
    ids=[case[0] for case in GOOD],
)
def test_good_files(tmp_path, name, content, options, expected) -> None:
    counts = read_counts(write(tmp_path, name, content), **options)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected
    # The same file with its classes announced, and a path given as a string.
    options = {**options, "num_classes": len(expected)}
    assert read_counts(str(tmp_path / name), **options).tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("objectInfo150.txt", ADE20K, {"count": "pixel"}, [0.1576, 0.1072, 0.0878]),
        ("c.csv", "0,0.5\n1,7\n", {}, [0.5, 7.0]),
        ("c.npy", npy(np.array([0.25, 2.0], dtype=np.float32)), {}, [0.25, 2.0]),
        ("c.json", [0.25, 2], {}, [0.25, 2.0]),
    ],
)
def test_fractions_give_float64(tmp_path, name, content, options, expected) -> None:
    counts = read_counts(write(tmp_path, name, content), **options)
    assert counts.dtype == torch.float64
    assert counts.tolist() == expected


def test_counts_past_float64_precision_stay_exact(tmp_path) -> None:
    assert read_counts(write(tmp_path, "c.csv", f"0,{2**53 + 1}\n")).tolist() == [2**53 + 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=30), st.randoms())
def test_all_formats_agree(tmp_path_factory, counts, random) -> None:
    folder = tmp_path_factory.mktemp("counts")
    lines = [f"{i},{n}" for i, n in enumerate(counts)]
    categories = [{"id": 7 * i + 2, "image_count": n} for i, n in enumerate(counts)]
    random.shuffle(lines)
    random.shuffle(categories)
    interleaved = [x for pair in enumerate(counts, start=1) for x in pair]
    for name, content in (
        ("c.csv", "\n".join(["class,count", *lines])),
        ("lvis.json", {"categories": categories}),
        ("num_shots.json", interleaved),
        ("c.npy", npy(np.array(counts))),
    ):
        path = write(folder, name, content)
        assert read_counts(path, num_classes=len(counts)).tolist() == counts


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.booleans())
def test_samples_are_never_taken_for_counts(tmp_path_factory, labels, header) -> None:
    lines = [f"a{i}.jpg,{label}" for i, label in enumerate(labels)]
    folder = tmp_path_factory.mktemp("samples")
    path = write(folder, "c.csv", "\n".join(["image,label"] * header + lines))
    assert read_counts(path, num_classes=7).tolist() == [labels.count(i) for i in range(7)]
    if max(labels) >= len(labels):
        with pytest.raises(ValueError, match="the largest label is"):
            read_counts(path)


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("c.csv", "label,0\ncat,500\ndog,300\n", {}, [500, 300]),  # pandas, an unnamed series
        ("c.csv", ",0\n1,300\n0,500\n", {}, [500, 300]),
        ("c.csv", "dx,0\n0,500\n1,300\n", {}, [500, 300]),
        ("c.csv", "dx,0\ncat,500\n", {"num_classes": 1}, [500]),
        ("c.csv", "dx,0\ncat,500\n", {"num_classes": 2}, [0, 500]),
        ("c.csv", "1.0,3\n0.0,5\n", {}, [5, 3]),
        ("c.csv", "class,count\n1,1\n0,1\n2,0\n", {}, [1, 1, 0]),
        ("c.csv", "image_id,label\nISIC_1,0\nISIC_2,1\n", {}, [1, 1]),
        ("c.txt", "0: 50\n1: 7\n", {}, [50, 7]),
        ("c.json", {"1.0": 3, "0.0": 5}, {}, [5, 3]),
        ("c.json", [0.0, 50, 1.0, 7], {}, [50, 7]),
        ("c.json", [{"Class": "a", "Count": 2}, {"Class": "b", "Count": 1}], {}, [2, 1]),
        ("c.json", [{"label": 1, "n": 2}, {"label": 0, "n": 1}], {}, [1, 2]),
    ],
)
def test_tables_as_people_write_them(tmp_path, name, content, options, expected) -> None:
    assert read_counts(write(tmp_path, name, content), **options).tolist() == expected


@pytest.mark.parametrize(
    ("crowd", "left_out"),
    [(None, False), (False, False), ("0", False), (0.0, False), (True, True), ("1", True)],
)
def test_crowd_flags(tmp_path, crowd, left_out) -> None:
    annotations = [{"image_id": 1, "category_id": 1, "iscrowd": crowd}]
    path = write(tmp_path, "c.json", {"categories": [{"id": 1}], "annotations": annotations})
    assert read_counts(path).tolist() == [0 if left_out else 1]


def test_counts_have_values_whatever_the_default_device_is(tmp_path) -> None:
    for content in ([5, 3], [0.5, 3]):
        path = write(tmp_path, "c.json", content)
        with torch.device("meta"):
            found = read_counts(path, num_classes=np.int64(2))
        assert found.tolist() == content
