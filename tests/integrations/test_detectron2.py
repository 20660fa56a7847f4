"""The box predictor of detectron2, with it or its stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from registered import COUNTS, close, grads
from torch.nn import functional as F

from disalign_ops import class_stats
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentError


@pytest.fixture(autouse=True)
def _seed() -> None:  # `make test-integrations` runs without the conftest.py that does it
    torch.manual_seed(0)


def config(**disalign: Any) -> Any:
    """Of three classes and boxes' features of six numbers."""
    from detectron2.config import get_cfg

    from disalign_ops.integrations.detectron2 import add_disalign_config

    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    head = cfg.MODEL.ROI_BOX_HEAD
    head.NAME, head.NUM_FC, head.FC_DIM = "FastRCNNConvFCHead", 1, 6
    for name, value in disalign.items():
        assert name in head.DISALIGN
        setattr(head.DISALIGN, name, value)
    return cfg


def box_predictors(cfg: Any, heads: str = "DisAlignROIHeads") -> list[Any]:
    """Those that RoI heads of that name make."""
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, fast_rcnn

    shape = fast_rcnn.ShapeSpec(channels=2)
    if hasattr(shape, "stride"):  # the stand-in's has none
        shape = fast_rcnn.ShapeSpec(channels=2, stride=16)
    cls = ROI_HEADS_REGISTRY.get(heads)
    found = cls._init_box_head(cfg, {"res4": shape})
    return found["box_predictors"] if "box_predictors" in found else [found["box_predictor"]]


@contextmanager
def logged() -> Iterator[list[Any]]:
    """What the predictors log: detectron2 needs a storage, the stand-in keeps it."""
    from detectron2.modeling.roi_heads import fast_rcnn

    if hasattr(fast_rcnn, "LOGGED"):
        fast_rcnn.LOGGED.clear()
        yield fast_rcnn.LOGGED
        return
    from detectron2.utils.events import EventStorage

    with EventStorage():
        yield []


def proposals(classes: list[list[int]]) -> list[Any]:
    found = []
    for given in classes:
        boxes = {}
        for name in ("proposal_boxes", "gt_boxes"):
            corner = torch.rand(len(given), 2)
            size = 0.1 + torch.rand(len(given), 2)
            boxes[name] = SimpleNamespace(tensor=torch.cat([corner, corner + size], 1))
        if not any(c < 3 for c in given):
            del boxes["gt_boxes"]  # detectron2 leaves it out where no box is
        found.append(
            SimpleNamespace(
                gt_classes=torch.tensor(given, dtype=torch.int64), **boxes,
                has=lambda name, boxes=boxes: name in boxes,
            )
        )  # fmt: skip
    return found


def test_a_predictor_of_detectron2_and_its_losses(tmp_path: Path) -> None:
    from detectron2.modeling.roi_heads import fast_rcnn

    from disalign_ops.integrations import detectron2 as ours

    file = tmp_path / "counts.csv"
    file.write_text("class,count\n0,400\n1,60\n2,9\n")
    shape = fast_rcnn.ShapeSpec(channels=6)
    plain = fast_rcnn.FastRCNNOutputLayers(config(), shape)
    assert ours.DisAlignFastRCNNOutputLayers(config(), shape).class_weight is None
    (predictor,) = box_predictors(config(COUNTS=str(file)))
    assert isinstance(predictor, ours.DisAlignFastRCNNOutputLayers)
    missing, unexpected = predictor.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert len(missing) == 4
    parameters = dnn.freeze_for_stage2(predictor)
    assert len(parameters) == 4

    x = torch.randn(6, 6)
    given = proposals([[0, 2, 3], [3, 3, 3]])
    close(predictor(x)[0], plain(x)[0])
    with logged():
        own = plain.losses(plain(x), given)
    weight = class_stats.grw_weights(COUNTS, 0.8, background="last")
    labels = torch.cat([p.gt_classes for p in given])
    with logged() as log:
        found = predictor.losses(predictor(x), given)
        assert not log or torch.equal(log[0][1], labels)
        none = predictor.losses(predictor(x[:0]), [])
    close(found["loss_cls"], F.cross_entropy(plain(x)[0], labels, weight))
    close(found["loss_box_reg"], own["loss_box_reg"])
    assert set(found) == set(own)
    assert none["loss_cls"].item() == 0.0
    assert all(torch.equal(g, torch.zeros_like(g))
               for g in grads(none["loss_cls"], predictor).values())  # fmt: skip


def test_a_cosine_predictor_of_detectron2_in_both_stages() -> None:
    torch.manual_seed(0)
    (predictor,) = box_predictors(config(COSINE=True))
    layer = predictor.cls_score
    assert isinstance(layer, dnn.DisAlignCosineLinear)
    assert (layer.background, layer.form, layer.normalize_confidence) == (
        "last", "interpolated", False,
    )  # fmt: skip
    names = {name for name, _ in layer.named_parameters()}
    dnn.freeze_for_stage1(predictor)
    stage1 = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert stage1 == {"weight", "scale"}
    x = torch.randn(6, 6)
    z = 20 * F.normalize(x) @ F.normalize(layer.weight).T
    close(predictor(x)[0], z)
    dnn.freeze_for_stage2(predictor)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == names - stage1
    (other,) = box_predictors(config(COSINE=True, COSINE_SCALE=7.0))
    assert other.cls_score.scale.item() == 7.0


@pytest.mark.parametrize("cosine", [False, True])
def test_every_stage_of_a_cascade_of_detectron2_is_calibrated(cosine: bool, tmp_path: Path) -> None:
    from disalign_ops.integrations import detectron2 as ours

    file = tmp_path / "counts.csv"
    file.write_text("class,count\n0,400\n1,60\n2,9\n")
    cfg = config(COUNTS=str(file), COSINE=cosine)
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    predictors = box_predictors(cfg, "DisAlignCascadeROIHeads")
    plain = box_predictors(cfg, "CascadeROIHeads")
    assert len(predictors) == len(plain) == 3
    weight = class_stats.grw_weights(COUNTS, 0.8, background="last")
    transforms = []
    for one, theirs in zip(predictors, plain, strict=True):
        assert type(one) is ours.DisAlignFastRCNNOutputLayers
        assert isinstance(one.cls_score, dnn.DisAlignCosineLinear) == cosine
        assert torch.equal(one.class_weight, weight)
        weights = getattr(one.box2box_transform, "weights", one.box2box_transform)
        assert weights == getattr(theirs.box2box_transform, "weights", theirs.box2box_transform)
        transforms.append(weights)
        if not cosine:
            missing, unexpected = one.load_state_dict(theirs.state_dict(), strict=False)
            assert not unexpected
            assert {name.split(".")[1] for name in missing} == {
                "logit_scale", "logit_bias", "confidence_layer",
            }  # fmt: skip
    assert len(set(transforms)) == 3


@pytest.mark.parametrize("federated", [False, True])
def test_a_sigmoid_of_detectron2_is_refused(federated: bool) -> None:
    from detectron2.modeling.roi_heads import fast_rcnn

    from disalign_ops.integrations.detectron2 import DisAlignFastRCNNOutputLayers

    options: dict[str, Any] = {"use_sigmoid_ce": True}
    if federated:
        options |= {"use_fed_loss": True, "get_fed_loss_cls_weights": lambda: torch.ones(3)}
    with pytest.raises(ArgumentError, match="must be False, since this is a softmax"):
        DisAlignFastRCNNOutputLayers(config(), fast_rcnn.ShapeSpec(channels=6), **options)
