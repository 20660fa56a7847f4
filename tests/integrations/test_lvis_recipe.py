"""recipes.lvis: its numbers, its data, its AP, and runs on a tiny LVIS in the official layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

WHY = "`make test-integrations` installs it"
pytest.importorskip("torchvision", reason=WHY)
pytest.importorskip("faster_coco_eval", reason=WHY)

import lvis_files  # noqa: E402
from recipe_runs import kill, log, run, same, scores  # noqa: E402

from recipes import lvis, lvis_data  # noqa: E402

TINY = """
--classes 5 --train-images 12 12 --val-images 4 4 --batch 2 --iterations 8 --steps 6
--stage2-iterations 8 --stage2-steps 6 --warmup 2 --min-sizes 48 64 --max-size 96
--backbone resnet18 --backbone-weights none --lr 0.002 --regions 16 --proposals 40 --workers 0
--save-every 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lvis")
    for version in ("v1", "v0.5"):
        lvis_files.write(path, version)
    return path


def read(folder: Path, split: str = "val", version: str = "v1") -> dict[str, Any]:
    number = len(lvis_files.VAL if split == "val" else lvis_files.TRAIN)
    file = folder / "lvis" / f"lvis_{version}_{split}.json"
    return lvis_data.read_annotations(file, 5, (number, number), folder / "coco")


# --- the released numbers


@pytest.mark.parametrize(
    ("version", "head", "classes", "iterations", "steps", "stage2", "step2"),
    [
        ("v1", "cosine", 1203, 180_000, (120_000, 160_000), 9000, 8000),
        ("v1", "linear", 1203, 180_000, (120_000, 160_000), 9000, 8000),
        ("v0.5", "cosine", 1230, 90_000, (60_000, 80_000), 4500, 4000),
    ],
)
def test_the_released_model_optimizer_and_schedule(
    version: str, head: str, classes: int, iterations: int, steps: tuple[int, int], stage2: int,
    step2: int,
) -> None:  # fmt: skip
    recipe, _ = lvis.parse(
        ["--data", "d", "--out", "o", "--version", version, "--head", head, "--backbone-weights",
         "none"]
    )  # fmt: skip
    model = lvis.build_model(recipe)
    assert model.transform.min_size == (640, 672, 704, 736, 768, 800)
    assert model.transform.max_size == 1333
    heads = model.roi_heads
    assert (heads.score_thresh, heads.detections_per_img, heads.nms_thresh) == (1e-4, 300, 0.5)
    assert heads.fg_bg_sampler.batch_size_per_image == 512
    assert heads.fg_bg_sampler.positive_fraction == 0.25
    assert model.rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert model.rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    score = heads.box_predictor.cls_score
    assert tuple(score.weight.shape) == (classes + 1, 1024)
    assert tuple(score.logit_scale.shape) == (1, classes)
    assert heads.mask_predictor.mask_fcn_logits.out_channels == classes + 1
    assert 0.009 < float(score.weight.detach().std()) < 0.011
    if head == "cosine":
        assert score.scale.item() == 20
        assert score.scale.requires_grad
    assert len(model.backbone.body.layer3) == 6  # ResNet-50
    frozen = {n.split(".")[0] for n, p in model.backbone.body.named_parameters()
              if not p.requires_grad}  # fmt: skip
    assert frozen == {"conv1", "layer1"}  # FREEZE_AT 2

    learned = lvis.dnn.freeze_for_stage1(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("logit_" in n or "confidence" in n for n in names)
    for stage, total, drops in ((1, iterations, steps), (2, stage2, (step2,))):
        if stage == 2:
            learned = lvis.dnn.freeze_for_stage2(model)
            assert len(learned) == 4  # scale, bias, the confidence's weight and bias
        optimizer, schedule = lvis.optimizer_of(recipe, learned, stage)
        (group,) = optimizer.param_groups
        assert set(group["params"]) == set(learned)
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
        assert total == (recipe.iterations if stage == 1 else recipe.stage2_iterations)
        (factor,) = schedule.lr_lambdas
        for iteration in (0, 1, 500, 999, 1000, drops[0] - 1, drops[0], drops[-1], total - 1):
            alpha = min(iteration / 1000, 1)  # cvpods, solver/lr_scheduler.py
            lr = 0.02 * (1e-3 * (1 - alpha) + alpha) * 0.1 ** sum(iteration >= d for d in drops)
            assert factor(iteration) * recipe.lr == pytest.approx(lr, rel=1e-12)
    assert (recipe.batch, recipe.mean_images, recipe.rho) == (16, 2, 0.8)
    assert recipe.repeat_threshold == (0.001 if version == "v0.5" else 0)
    assert not recipe.changed().keys() - {"backbone_weights", "head"}


def test_weights_are_the_released_formula_with_the_background_first(folder: Path) -> None:
    recipe, _ = lvis.parse(["--data", "d", "--out", "o", "--classes", "5"])
    weight = lvis.class_weights(recipe, read(folder, "train")["categories"])
    counts = np.array([sum(c in shown for shown in lvis_files.TRAIN) for c in range(1, 6)])
    ratio = 1 / (counts / counts.sum()) ** 0.8  # the released fast_rcnn.py
    assert weight[0] == 1
    torch.testing.assert_close(weight[1:], torch.tensor(ratio / ratio.sum() * 5).float())


def test_the_mean_is_that_of_gpus_with_two_images_each() -> None:
    """F.cross_entropy(..., weight=..., reduction="mean") on each, as in the released fast_rcnn.py;
    the last of five images is alone.
    """
    from torchvision.models.detection import roi_heads

    plain = roi_heads.fastrcnn_loss
    weight = torch.tensor([1.0, 0.2, 1.8])
    sizes = (4, 7, 5, 6, 3)
    z, boxes = torch.randn(25, 3, requires_grad=True), torch.randn(25, 12)
    labels = list(torch.randint(0, 3, (25,)).split(sizes))
    targets = list(torch.randn(25, 4).split(sizes))
    with lvis.released_loss(weight, 2):
        classes, regression = roi_heads.fastrcnn_loss(z, boxes, labels, targets)
    assert roi_heads.fastrcnn_loss is plain
    means = [
        torch.nn.functional.cross_entropy(logits, target, weight)
        for logits, target in zip(z.split((11, 11, 3)), torch.cat(labels).split((11, 11, 3)),
                                  strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(classes, torch.stack(means).mean())
    own = [plain(z[i:j], boxes[i:j], labels[k : k + 2], targets[k : k + 2])[1]
           for i, j, k in ((0, 11, 0), (11, 22, 2), (22, 25, 4))]  # fmt: skip
    torch.testing.assert_close(regression, torch.stack(own).mean())


# --- data


def test_a_validation_image_of_train2017_is_found_and_a_sample_fits_its_annotation(
    folder: Path,
) -> None:
    data = read(folder)
    places = [lvis_data.image_file(image, folder / "coco").parent.name for image in data["images"]]
    assert set(places) == {"train2017", "val2017"}
    assert "file_name" not in data["images"][0]
    assert read(folder, version="v0.5")["images"][0]["file_name"].startswith("COCO_val2014")
    assert len(lvis_data.LVISImages(data, folder / "coco", training=False)) == len(lvis_files.VAL)

    images = lvis_data.LVISImages(read(folder, "train"), folder / "coco", training=True)
    assert len(images) == len(lvis_files.TRAIN) - 1  # without the one that shows nothing
    assert images.classes == [set(shown) for shown in lvis_files.TRAIN if shown]
    widths = set()
    for draw in range(8):
        pixels, target = images[draw, 0]
        assert tuple(pixels.shape) == (3, 64, 64)
        assert 0 <= pixels.min() <= pixels.max() <= 1
        assert target["labels"].tolist() == lvis_files.TRAIN[0]
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        colour = pixels[:, target["masks"][0].bool()].mean(1) * 255
        torch.testing.assert_close(
            colour, torch.tensor(lvis_files.COLOURS[0]).float(), rtol=0, atol=12
        )
        widths.add(target["boxes"][0, 0].item())
    assert len(widths) == 2  # flipped now and then
    again, _ = images[3, 0]
    assert torch.equal(again, images[3, 0][0])


def copied(folder: Path, tmp_path: Path) -> Path:
    lvis_files.write(tmp_path)
    return tmp_path / "lvis" / "lvis_v1_train.json"


def test_a_missing_or_damaged_file_is_named_with_what_is_expected(
    folder: Path, tmp_path: Path
) -> None:
    def fails(error: type[Exception], text: str, most: int = 12) -> None:
        with pytest.raises(error, match=text):
            lvis_data.read_annotations(file, 5, (12, most), tmp_path / "coco")

    file = tmp_path / "lvis" / "lvis_v1_train.json"
    fails(FileNotFoundError, "lvis_v1_train.json: no such file; expected LVIS annotations of 5")
    file = copied(folder, tmp_path)
    whole = file.read_text()
    file.write_text(whole[:1000])
    fails(ValueError, "lvis_v1_train.json: not a whole JSON file .*; expected LVIS annotations")
    file.write_text(json.dumps({"images": []}))
    fails(ValueError, "lvis_v1_train.json: no annotations, categories; expected LVIS")
    data = json.loads(whole)
    file.write_text(json.dumps(data | {"categories": data["categories"][:4]}))
    fails(ValueError, "it holds 4 classes; expected the classes 1 to 5")
    nameless = [{k: v for k, v in c.items() if k != "image_count"} for c in data["categories"]]
    file.write_text(json.dumps(data | {"categories": nameless}))
    fails(ValueError, "a category has no image_count; expected LVIS")
    file.write_text(json.dumps(data | {"images": data["images"][:-1]}))
    fails(ValueError, "it holds 11 images; expected 12$")
    fails(ValueError, "it holds 11 images; expected 12 to 13$", most=13)
    file.write_text(whole)
    image = tmp_path / "coco" / "train2017" / f"{1:012}.jpg"
    pixels = image.read_bytes()
    image.write_bytes(pixels[:300])
    read = lvis_data.read_annotations(file, 5, (12, 12), tmp_path / "coco")
    images = lvis_data.LVISImages(read, tmp_path / "coco", training=True)
    with pytest.raises(ValueError, match="not a whole image"):
        images[0, 0]
    images.images[0]["height"] = 65
    image.write_bytes(pixels)
    with pytest.raises(ValueError, match="it is 64 x 64 pixels; expected 64 x 65"):
        images[0, 0]
    image.unlink()
    fails(FileNotFoundError, "000000000001.jpg: no such file; expected an image of lvis_v1_train")


def test_a_backbone_from_a_file(tmp_path: Path) -> None:
    from torchvision import models

    file = tmp_path / "resnet.pth"
    options = [
        "--data",
        "d",
        "--out",
        "o",
        "--backbone",
        "resnet18",
        "--backbone-weights",
        str(file),
    ]
    recipe, _ = lvis.parse(options)
    with pytest.raises(FileNotFoundError, match=r"resnet.pth: no such file; expected a state_dict"):
        lvis.build_model(recipe)
    state = models.resnet18().state_dict()
    torch.save(state, file)
    body = lvis.build_model(recipe).backbone.body
    assert torch.equal(body.layer3[0].conv1.weight, state["layer3.0.conv1.weight"])
    assert torch.equal(body.bn1.running_var, state["bn1.running_var"])
    del state["conv1.weight"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"resnet.pth: no conv1.weight; expected a state_dict of"):
        lvis.build_model(recipe)


def test_a_wrong_head_is_named() -> None:
    recipe, _ = lvis.parse(["--data", "d", "--out", "o", "--head", "cos"])
    with pytest.raises(ValueError, match="head must be 'linear' or 'cosine', got 'cos'"):
        lvis.build_model(recipe)


# --- AP


def perfect(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The annotations as detections."""
    masks = {}
    images = {image["id"]: image for image in data["images"]}
    for a in data["annotations"]:
        mask = np.zeros((64, 64), np.uint8, order="F")
        x, y, w, h = map(int, a["bbox"])
        mask[y : y + h, x : x + w] = 1
        masks[a["id"]] = torch.from_numpy(mask)[None]
    found = []
    judged = lvis_data.judged_classes(data)
    for image in images.values():
        own = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        output = {
            "labels": torch.tensor([a["category_id"] for a in own]),
            "scores": torch.full((len(own),), 0.5), "boxes": boxes,
            "masks": torch.stack([masks[a["id"]] for a in own]) if own else torch.zeros(0, 1, 1, 1),
        }  # fmt: skip
        found += lvis_data.detections(output, image, judged[image["id"]])
    return found


def test_ap_is_lviss(folder: Path) -> None:
    """By hand; the numbers of lvis-api for its 100 images are in docs/detection.md."""
    data = read(folder)
    scores = lvis_data.average_precision(data, perfect(data))
    assert scores == {kind: dict.fromkeys(lvis_data.SCORES, 100.0) for kind in ("bbox", "segm")}

    # Class 5, the rare one, is on the third image. A false positive there with a higher score:
    # AP 50 in each of its thresholds. The other groups do not change.
    (third,) = (i for i in data["images"] if i["id"] == data["images"][2]["id"])
    far = next(d for d in perfect(data) if d["category_id"] == 5)
    wrong = {**far, "score": 0.9, "bbox": [0.0, 60.0, 3.0, 3.0]}
    wrong["segmentation"] = lvis_data.rle.encode(np.asfortranarray(np.eye(64, dtype=np.uint8)))
    scores = lvis_data.average_precision(data, [*perfect(data), wrong])
    for kind in ("bbox", "segm"):
        assert scores[kind]["APr"] == pytest.approx(50.0)
        assert scores[kind]["APc"] == scores[kind]["APf"] == 100.0
        assert scores[kind]["AP"] == pytest.approx(90.0)
    # Of a class that the image is not annotated in full for (class 1 there), it does not count; of
    # one that it is not annotated for at all (class 4), it is left out.
    assert third["not_exhaustive_category_ids"] == [1]
    unjudged = {**wrong, "category_id": 1}
    assert lvis_data.average_precision(data, [*perfect(data), unjudged])["bbox"]["AP"] == 100.0
    assert 4 not in lvis_data.judged_classes(data)[third["id"]]
    output = {"labels": torch.tensor([4]), "scores": torch.ones(1), "boxes": torch.zeros(1, 4),
              "masks": torch.zeros(1, 1, 64, 64)}  # fmt: skip
    assert lvis_data.detections(output, third, lvis_data.judged_classes(data)[third["id"]]) == []
    assert lvis_data.average_precision(data, [])["segm"]["AP"] == 0.0


# --- runs


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    printed = run("recipes.lvis", ["--data", str(folder), "--out", str(out), *TINY.split()])
    assert printed.count("APr") == 2
    return out


def test_a_run_from_stage_1_to_the_scores(undisturbed: Path) -> None:
    lines = log(undisturbed)
    assert [line["event"] for line in lines] == [
        "recipe", *3 * ["step"], "evaluation", *3 * ["step"], "evaluation"
    ]  # fmt: skip
    assert lines[0]["sources"]["lr"] == "changed by the user"
    assert lines[0]["sources"]["rho"].endswith("GRW_SCALE")
    assert [line["lr"] for line in lines[1:4]] == pytest.approx([2e-3, 2e-3, 2e-4])
    assert scores(undisturbed)[2]["segm"].keys() == lvis_data.SCORES.keys()
    first, second = (torch.load(undisturbed / f"stage{s}.pth") for s in (1, 2))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    score = "roi_heads.box_predictor.cls_score."
    names = ("logit_scale", "logit_bias", "confidence_layer.weight", "confidence_layer.bias")
    assert changed == {score + name for name in names}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_run_goes_on_with_the_same_result(
    folder: Path, undisturbed: Path, tmp_path: Path, stage: int
) -> None:
    arguments = ["--data", str(folder), "--out", str(tmp_path / "out"), *TINY.split()]
    kill("recipes.lvis", arguments, tmp_path / "out", stage, step=3)
    run("recipes.lvis", arguments)
    same(tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_two_ranks_of_v05_with_repeat_factors_and_a_linear_head(
    folder: Path, tmp_path: Path
) -> None:
    arguments = ["--data", str(folder), "--out", str(tmp_path / "out"), "--version", "v0.5",
                 "--head", "linear", "--repeat-threshold", "0.3", *TINY.split()]  # fmt: skip
    run("recipes.lvis", arguments, ranks=2)
    assert scores(tmp_path / "out")[2]["bbox"].keys() == lvis_data.SCORES.keys()
    assert [line.get("stage") for line in log(tmp_path / "out")].count(2) == 4
