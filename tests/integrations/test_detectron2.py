"""The box predictor of detectron2, with it or its stand-in."""

from __future__ import annotations

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


def proposals(classes: list[list[int]]) -> list[Any]:
    found = []
    for given in classes:
        boxes = {
            name: SimpleNamespace(tensor=torch.rand(len(given), 4))
            for name in ("proposal_boxes", "gt_boxes")
        }
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
    from detectron2.config import CfgNode
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, fast_rcnn

    from disalign_ops.integrations import detectron2 as ours

    if hasattr(fast_rcnn, "LOGGED"):
        fast_rcnn.LOGGED.clear()
    file = tmp_path / "counts.csv"
    file.write_text("class,count\n0,400\n1,60\n2,9\n")
    cfg = CfgNode({"MODEL": CfgNode({"ROI_HEADS": CfgNode({"NUM_CLASSES": 3}),
                                     "ROI_BOX_HEAD": CfgNode()})})  # fmt: skip
    ours.add_disalign_config(cfg)
    plain = fast_rcnn.FastRCNNOutputLayers(cfg, fast_rcnn.ShapeSpec(channels=6))
    assert ours.DisAlignFastRCNNOutputLayers(
        cfg, fast_rcnn.ShapeSpec(channels=6)
    ).class_weight is None  # fmt: skip
    cfg.MODEL.ROI_BOX_HEAD.DISALIGN.COUNTS = str(file)
    heads = ROI_HEADS_REGISTRY["DisAlignROIHeads"]
    predictor = heads._init_box_head(cfg, {})["box_predictor"]
    assert isinstance(predictor, ours.DisAlignFastRCNNOutputLayers)
    missing, unexpected = predictor.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert len(missing) == 4
    parameters = dnn.freeze_for_stage2(predictor)
    assert len(parameters) == 4

    x = torch.randn(6, 6)
    given = proposals([[0, 2, 3], [3, 3, 3]])
    close(predictor(x)[0], plain(x)[0])
    found, own = predictor.losses(predictor(x), given), plain.losses(plain(x), given)
    weight = class_stats.grw_weights(COUNTS, 0.8, background="last")
    labels = torch.cat([p.gt_classes for p in given])
    close(found["loss_cls"], F.cross_entropy(plain(x)[0], labels, weight))
    close(found["loss_box_reg"], own["loss_box_reg"])
    assert set(found) == set(own)
    if hasattr(fast_rcnn, "LOGGED"):
        (logged,) = fast_rcnn.LOGGED
        assert torch.equal(logged[1], labels)
    none = predictor.losses(predictor(x[:0]), [])
    assert none["loss_cls"].item() == 0.0
    assert all(torch.equal(g, torch.zeros_like(g))
               for g in grads(none["loss_cls"], predictor).values())  # fmt: skip


@pytest.mark.parametrize("other", ["use_sigmoid_ce", "use_fed_loss"])
def test_a_sigmoid_of_detectron2_is_refused(other: str) -> None:
    from detectron2.modeling.roi_heads import fast_rcnn

    from disalign_ops.integrations.detectron2 import DisAlignFastRCNNOutputLayers

    with pytest.raises(ArgumentError, match="must be False, since this is a softmax"):
        DisAlignFastRCNNOutputLayers(
            fast_rcnn.ShapeSpec(channels=6), box2box_transform=None, num_classes=3, **{other: True}
        )
