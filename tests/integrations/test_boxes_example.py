"""The detection demo as a user runs it, small; its pages, boxes and masks; its cached regions."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
WHY = "`make test-integrations` installs it"

pytest.importorskip("jieba", reason=WHY)
import boxes_data as data  # noqa: E402


@pytest.fixture(scope="module")
def few() -> data.BoxData:
    return data.BoxData(6, 9, 3, seed=0)


def test_a_silhouette_is_what_strokes_enclose() -> None:
    ink = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0],
                    [0, 1, 0, 0, 0]], dtype=bool)  # fmt: skip
    filled = ink.copy()
    filled[2, 2] = True
    assert (data.silhouette(ink) == filled).all()
    assert (data.silhouette(ink[:3]) == ink[:3]).all()  # open below


def test_a_box_encloses_its_mask_and_a_mask_its_ink(few: data.BoxData) -> None:
    for page in few.train + few.test:
        assert page.image.shape == (1, data.RENDERED, data.RENDERED)
        assert len(page.boxes) == len(page.labels) == len(page.masks) > 0
        for box, mask in zip(page.boxes.int().tolist(), page.masks, strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert box[:2] == [int(columns.min()), int(rows.min())]
            assert box[2:] == [int(columns.max()) + 1, int(rows.max()) + 1]
            assert 8 <= box[2] - box[0] <= 30
            assert (page.image[0][mask.bool()] > data.INK * 140).any()  # of the faintest ink
        beside = page.image[0][~page.masks.bool().any(0)]
        assert (beside <= data.INK * 255).all()


def test_counts_are_those_of_the_boxes(few: data.BoxData) -> None:
    labels = torch.cat([page.labels for page in few.train])
    assert torch.equal(torch.bincount(labels, minlength=7), torch.tensor([0, *few.counts]))
    assert few.counts.max() > 3 * few.counts.min()
    with_rarest = sum(int((page.labels == few.counts.argmin() + 1).any()) for page in few.train)
    assert int(few.pages_with[few.counts.argmin()]) == with_rarest
    equal = torch.bincount(torch.cat([page.labels for page in few.test]))[1:]
    assert equal.max() - equal.min() <= 1


def test_a_shifted_page_keeps_its_boxes_on_their_masks(few: data.BoxData) -> None:
    generator = torch.Generator().manual_seed(0)
    page, moved = few.train[0], set()
    for _ in range(8):
        image, target = data.augmented(page, generator)
        assert image.shape == page.image.shape
        assert image.min() >= 0
        assert image.max() <= 1
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"].numpy(), strict=True):
            assert box == list(data.box_of(mask))
        moved.add(tuple((target["boxes"] - page.boxes)[0].tolist()))
    assert len(moved) > 4


def test_too_few_classes_say_what_is_needed() -> None:
    with pytest.raises(ValueError, match="got 2 classes, 4 training pages, 1 test pages"):
        data.BoxData(2, 4, 1, seed=0)


def test_every_page_has_a_character() -> None:
    slots = data.sparse(20, random.Random(0))
    assert {slot.page for slot in slots} == set(range(20))


# --- with torchvision


def boxes_module() -> Any:
    pytest.importorskip("torchvision", reason=WHY)
    import boxes

    return boxes


def test_the_cached_regions_are_those_that_training_sees(few: data.BoxData) -> None:
    boxes = boxes_module()
    from disalign_ops import nn as dnn
    from disalign_ops.integrations.torchvision import DisAlignFastRCNNPredictor

    torch.manual_seed(0)
    model = boxes.detector(6, masks=False)
    plain = model.roi_heads.box_predictor
    model.roi_heads.box_predictor = DisAlignFastRCNNPredictor.from_predictor(plain)
    assert len(dnn.freeze_for_stage2(model)) == 4
    torch.manual_seed(1)
    rows, classes = boxes.cached_regions(model, few.train[:8], 1, lambda done: None)
    seen: list[torch.Tensor] = []
    model.roi_heads.box_predictor.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    generator = torch.Generator().manual_seed(2)
    images, targets = zip(*(data.augmented(page, generator) for page in few.train[:8]), strict=True)
    torch.manual_seed(1)
    with torch.no_grad():
        model.train()(list(images), list(targets))
    torch.testing.assert_close(rows, seen[0])
    assert len(classes) == len(rows)
    assert {int(c) for c in classes.unique()} <= set(range(7))


def test_a_prior_leaves_the_background_alone() -> None:
    boxes = boxes_module()
    prior = boxes.prior_of(torch.tensor([900, 90, 9]))
    assert prior[0] == 0
    torch.testing.assert_close(prior[1:] - prior[1:].roll(-1), torch.tensor([2.3, 2.3, -4.6]),
                               rtol=0, atol=0.01)  # fmt: skip
    assert abs(float(prior.sum())) < 1e-6
    plain = torch.nn.Module()
    plain.cls_score = torch.nn.Linear(2, 4)
    changed = boxes.with_bias(plain, -prior)
    torch.testing.assert_close(changed.cls_score.bias, plain.cls_score.bias - prior)


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_a_run_prints_the_tables(kind: str) -> None:
    boxes_module()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / "boxes.py"), "--threads", "1", "--pages",
         "12", "--classes", "6", "--epochs", "1", "--stage2-epochs", "1", "--test-pages", "4",
         *(["--boxes-only"] if kind == "boxes" else [])],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for text in (
        "pages are rendered", "12 training pages, 4 test pages of 160 x 160 pixels, 6 classes",
        "stage 1, cross-entropy", "logit adjustment, tau 1", "balanced softmax",
        "stage 2, DisAlign, rho 0.8", "boxes: AP", "best AP of rare classes", "regions cached",
    ):  # fmt: skip
        assert text in run.stdout, text
    assert ("masks: AP" in run.stdout) == (kind == "masks")


def test_a_box_is_right_by_its_most_confident_detection() -> None:
    import boxes_plots

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [40.0, 0.0, 50.0, 10.0]])
    page = data.Page(torch.zeros(1, 60, 60), boxes, torch.tensor([1, 2, 3]), torch.zeros(3, 60, 60))
    found = {
        "boxes": torch.cat([boxes[:2], boxes[:2] + 1, boxes[2:] + 9]),
        "labels": torch.tensor([1, 1, 2, 2, 3]),
        "scores": torch.tensor([0.3, 0.9, 0.2, 0.4, 0.9]),
    }
    assert boxes_plots.outcomes(page, found) == ["right", "wrong class", "missed"]
    overlap = boxes_plots.overlaps(boxes[:1], torch.tensor([[0.0, 0.0, 10.0, 5.0]]))
    assert float(overlap) == pytest.approx(0.5)
