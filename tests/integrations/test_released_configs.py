"""Which counts a name in a config reads, which mean it takes, and the released code's names.

Expected values are the formulas of the released code (Megvii-BaseDetection/DisAlign, cvpods) in
numpy and float64: weight = share ** -rho, over its sum, times the number of classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from registered import COUNTS, close
from torch import Tensor
from torch.nn import functional as F

from disalign_ops.errors import ArgumentError
from disalign_ops.nn import GRWCrossEntropyLoss


@pytest.fixture(autouse=True)
def _seed() -> None:  # `make test-integrations` runs without the conftest.py that does it
    torch.manual_seed(0)


def released_weights(shares: Any, rho: float) -> Tensor:
    weight = 1 / np.asarray(shares, np.float64) ** rho
    return torch.tensor(weight / weight.sum() * len(weight)).float()


def object_list(folder: Path, ratios: list[float], images: list[int]) -> str:
    """A file in the format of ADE20K's objectInfo150.txt."""
    path = folder / "objectInfo150.txt"
    rows = zip(ratios, images, strict=True)
    lines = [f"{i}\t{ratio:.4f}\t{n}\t9\tname {i}" for i, (ratio, n) in enumerate(rows, 1)]
    path.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]) + "\n")
    return str(path)


RATIOS, IMAGES = [0.1576, 0.1072, 0.0002], [11664, 6046, 300]


def seg_loss(**options: Any) -> Any:
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS

    import disalign_ops.integrations.mmseg  # noqa: F401

    return MODELS.build({"type": "GRWCrossEntropyLoss", **options})


def box_loss(**options: Any) -> Any:
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS

    import disalign_ops.integrations.mmdet  # noqa: F401

    return MODELS.build({"type": "GRWCrossEntropyLoss", **options})


def test_the_object_list_of_ade20k_gives_pixel_shares_in_mmseg(tmp_path: Path) -> None:
    file = object_list(tmp_path, RATIOS, IMAGES)
    weight = seg_loss(counts=file, rho=0.2).weight
    assert torch.equal(weight, released_weights(RATIOS, 0.2))
    close(weight, torch.tensor([0.51056, 0.55146, 1.93798]))
    by_images = seg_loss(counts=file, rho=0.2, count="image").weight
    assert torch.equal(by_images, released_weights(IMAGES, 0.2))
    close(by_images, torch.tensor([0.71092, 0.81077, 1.47831]))


@pytest.mark.parametrize("rho", [0.2, 0.3, 1.0])
def test_150_classes_to_the_last_bit(tmp_path: Path, rho: float) -> None:
    # As many steps of 0.0001, in which the column Ratio is printed, as there are classes.
    ratios = [round(1e-4 * n, 4) for n in (np.geomspace(1576, 2, 150)).round()]
    file = object_list(tmp_path, ratios, list(range(1, 151)))
    assert torch.equal(seg_loss(counts=file, rho=rho).weight, released_weights(ratios, rho))


def test_the_released_loss_of_a_segmentation_config(tmp_path: Path) -> None:
    file = object_list(tmp_path, RATIOS, IMAGES)
    loss = seg_loss(use_sigmoid=False, loss_weight=1.0, class_weight=file, exp_scale=0.2)
    z, mask = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    mask[:, 0] = 255
    weight = released_weights(RATIOS, 0.2)
    each = F.cross_entropy(z, mask, weight, ignore_index=255, reduction="none")
    close(loss(z, mask, ignore_index=255), each.mean())  # ignored pixels are counted too
    by_name = seg_loss(counts=file, rho=0.2, normalizer="count")
    assert torch.equal(by_name(z, mask, ignore_index=255), loss(z, mask, ignore_index=255))
    assert torch.equal(seg_loss(class_weight=file).weight, released_weights(RATIOS, 0.3))
    pytorchs = seg_loss(class_weight=file, exp_scale=0.2, normalizer="weights")
    expected = F.cross_entropy(z, mask, weight, ignore_index=255)
    close(pytorchs(z, mask, ignore_index=255), expected)


def lvis(folder: Path) -> str:
    numbers = [(300, 120), (9, 7), (2, 2)]
    categories = [
        {"id": i + 1, "name": f"c{i}", "instance_count": boxes, "image_count": images}
        for i, (boxes, images) in enumerate(numbers)
    ]
    path = folder / "lvis_v1_train.json"
    path.write_text(json.dumps({"categories": categories, "annotations": []}))
    return str(path)


@pytest.mark.parametrize(
    ("options", "counts"),
    [({}, [120, 7, 2]), ({"count": "image"}, [120, 7, 2]), ({"count": "instance"}, [300, 9, 2])],
)
def test_counts_of_images_or_boxes_in_mmdet(
    tmp_path: Path, options: dict[str, Any], counts: list[int]
) -> None:
    loss = box_loss(counts=lvis(tmp_path), rho=0.8, **options)
    expected = torch.cat([released_weights(counts, 0.8), torch.ones(1)])  # the background
    close(loss.weight, expected)


def test_what_has_no_pixels_is_refused_in_mmseg(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected count = 'image' or 'instance'"):
        seg_loss(counts=lvis(tmp_path))
    assert len(seg_loss(counts=lvis(tmp_path), count="image").weight) == 3


def test_a_named_normalizer_goes_before_the_box_heads(tmp_path: Path) -> None:
    """A box head gives its avg_factor in every call."""
    z, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 3])
    label_weights = torch.tensor([1.0, 1, 0, 1, 1, 1])
    weight = torch.cat([released_weights(COUNTS, 0.8), torch.ones(1)])
    total = (F.cross_entropy(z, labels, weight, reduction="none") * label_weights).sum()
    for options, divisor in (
        ({}, 5.0),
        ({"normalizer": "weights"}, float((weight[labels] * label_weights).sum())),
        ({"normalizer": "valid"}, 6.0),
        ({"normalizer": "count"}, 6.0),
    ):
        loss = box_loss(counts=COUNTS, rho=0.8, **options)
        close(loss(z, labels, label_weights, avg_factor=5.0), total / divisor)


@pytest.mark.parametrize("count", ["image", "instance"])
@pytest.mark.parametrize("normalizer", ["weights", "valid"])
def test_counts_and_mean_in_detectron2(tmp_path: Path, count: str, normalizer: str) -> None:
    from detectron2.modeling.roi_heads import fast_rcnn
    from test_detectron2 import config, logged, proposals

    from disalign_ops.integrations import detectron2 as ours

    default = config().MODEL.ROI_BOX_HEAD.DISALIGN
    assert (default.COUNT, default.NORMALIZER) == ("image", "weights")
    cfg = config(COUNTS=lvis(tmp_path), COUNT=count, NORMALIZER=normalizer)
    predictor = ours.DisAlignFastRCNNOutputLayers(cfg, fast_rcnn.ShapeSpec(channels=6))
    counts = [120, 7, 2] if count == "image" else [300, 9, 2]
    weight = torch.cat([released_weights(counts, 0.8), torch.ones(1)])
    close(predictor.class_weight, weight)
    z, boxes = predictor(torch.randn(4, 6))
    labels = torch.tensor([0, 1, 3, 3])
    with logged():
        found = predictor.losses((z, boxes), proposals([[0, 1, 3, 3]]))["loss_cls"]
    total = F.cross_entropy(z, labels, weight, reduction="sum")
    close(found, total / (weight[labels].sum() if normalizer == "weights" else 4))


# --- the names of the released constructors


@pytest.mark.parametrize("make", [GRWCrossEntropyLoss, seg_loss])
def test_the_released_names(make: Any) -> None:
    loss = make(num_samples_list=COUNTS, num_classes=3, exp_scale=1.2)
    assert torch.equal(loss.weight, released_weights(np.array(COUNTS) / sum(COUNTS), 1.2))
    assert torch.equal(loss.weight, make(counts=COUNTS, rho=1.2).weight)
    assert torch.equal(make(num_samples_list=COUNTS).weight, make(counts=COUNTS, rho=1.0).weight)
    with pytest.raises(ArgumentError, match="counts or num_samples_list must be None, got both"):
        make(counts=COUNTS, num_samples_list=COUNTS)
    with pytest.raises(ArgumentError, match=r"rho must be left out where .*, got 1\.1"):
        make(counts=COUNTS, rho=1.1, exp_scale=1.2)
    with pytest.raises(ArgumentError, match=r"must be the number of counts \(3\), got 1000"):
        make(num_samples_list=COUNTS, num_classes=1000)


def test_the_released_criterion_of_imagenet_lt() -> None:
    z, t = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    weight = released_weights(np.array(COUNTS) / sum(COUNTS), 1.2)
    loss = GRWCrossEntropyLoss(
        reduction="mean", ignore_index=1, num_samples_list=COUNTS, num_classes=3, exp_scale=1.2
    )
    close(loss(z, t), F.cross_entropy(z, t, weight, ignore_index=1))
    mapping = GRWCrossEntropyLoss(num_samples_list={0: 4, 2: 1}, num_classes=3, empty="zero")
    assert mapping.weight[1] == 0.0
    with pytest.raises(ArgumentError, match="counts must be one number a class, got None"):
        GRWCrossEntropyLoss()


@pytest.mark.parametrize("name", ["use_sigmoid", "use_mask"])
def test_a_sigmoid_is_refused(name: str) -> None:
    seg_loss(**{name: False})
    with pytest.raises(ArgumentError, match="must be False, since this is a softmax, got True"):
        seg_loss(**{name: True})
