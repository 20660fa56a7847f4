"""recipes.ade20k: its numbers, its data, and runs on a tiny ADE20K in the official layout."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional as F

from recipes import ade20k, ade20k_data
from support import ade20k_files, with_torchvision
from support.places import ROOT

TINY = """
--train-images 12 --val-images 3 --batch 2 --stage2-batch 2 --iterations 8 --stage2-iterations 8
--scale 128 64 --crop 64 --backbone resnet18 --no-dilation --backbone-weights none --workers 0
--save-every 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ade20k_files.write(tmp_path_factory.mktemp("ade20k"))


def recipe_of(options: str = "") -> ade20k.ADE20KRecipe:
    return ade20k.parse(["--data", "d", "--out", "o", *options.split()])[0]


# --- the released numbers


def _check_the_model() -> None:
    recipe = recipe_of("--backbone-weights none")
    assert recipe.changed().keys() == {"backbone_weights"}
    with torch.device("meta"):
        model = ade20k.FCN(recipe)
        found = model.backbone(torch.empty(2, 3, 512, 512))
        assert found["out"].shape == (2, 2048, 64, 64)  # 1/8
        assert found["aux"].shape == (2, 1024, 64, 64)
        features = model.features(found["out"])
        assert features.shape == (2, 512, 64, 64)
        assert model.decode_head(features).shape == (2, 150, 64, 64)
    dilations = [m.dilation[0] for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert dilations.count(2) == 5 + 1  # mmseg's contract_dilation: the first block is half as far
    assert dilations.count(4) == 2
    assert model.decode_head.dropout.p == model.auxiliary_head[1].p == 0.1

    weight = torch.rand(150)
    calibration = {"decode_head." + name for name in (
        "logit_scale", "logit_bias", "confidence_layer.conv.weight", "confidence_layer.bn.weight",
        "confidence_layer.bn.bias")}  # fmt: skip
    for stage, total, aux in ((1, 160_000, 0.4), (2, 4000, 0.0)):
        optimizer, schedule = ade20k.start_stage(stage, recipe, model, weight)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        everything = {name for name, _ in model.named_parameters()}
        assert names == (calibration if stage == 2 else everything - calibration)
        (group,) = optimizer.param_groups
        assert len(group["params"]) == len(names)
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
        assert model.aux_weight == aux
        assert model.weight is (weight if stage == 2 else None)
        (factor,) = schedule.lr_lambdas
        for iteration in (0, 1, total // 2, total - 1):  # mmcv, PolyLrUpdaterHook
            lr = (1 - iteration / total) ** 0.9 * (0.01 - 1e-4) + 1e-4
            assert factor(iteration) * recipe.lr == pytest.approx(lr, rel=1e-12)
        assert total == (recipe.iterations if stage == 1 else recipe.stage2_iterations)
        model.train()
        assert all(m.training for m in model.modules())  # BatchNorm too, as released
    ade20k.start_stage(2, recipe_of("--batch-norm eval --backbone-weights none"), model, weight)
    model.train()
    assert not model.convs[0][1].training
    assert model.decode_head.confidence_layer.bn.training
    assert model.options == {"ignore_index": 255, "normalizer": "count"}
    assert (recipe.batch, recipe.stage2_batch, recipe.rho) == (16, 32, 0.2)
    assert (recipe.scale, recipe.ratios, recipe.crop) == ((2048, 512), (0.5, 2.0), 512)


def test_the_released_model_optimizer_and_schedule() -> None:
    with_torchvision.run(_check_the_model)


def _check_the_loss() -> None:
    recipe = recipe_of(TINY)
    model = ade20k.FCN(recipe)
    weight = torch.rand(150) + 0.5
    images, masks = torch.randn(2, 3, 64, 64), torch.randint(0, 150, (2, 64, 64), dtype=torch.uint8)
    masks[:, :20] = 255
    for stage in (1, 2):
        ade20k.start_stage(stage, recipe, model, weight)
        model.eval()
        found = model.backbone(images)
        logits = [model.decode_head(model.features(found["out"]))]
        if stage == 1:
            logits.append(model.auxiliary_head(found["aux"]))
        means = [
            F.cross_entropy(
                F.interpolate(z, masks.shape[1:], mode="bilinear"), masks.long(),
                weight if stage == 2 else None, ignore_index=255, reduction="none",
            ).mean()  # ignored pixels are counted: mmsegmentation's default
            for z in logits
        ]  # fmt: skip
        expected = means[0] + 0.4 * means[1] if stage == 1 else means[0]
        torch.testing.assert_close(model(images, masks), expected)


def test_the_loss_of_both_stages_is_the_released_mean_over_all_pixels() -> None:
    with_torchvision.run(_check_the_loss)


def test_weights_are_the_released_formula_of_the_pixels_shares(folder: Path) -> None:
    weight = ade20k.class_weights(recipe_of(), folder)
    ratio = 1 / np.array(ade20k_files.ratios()) ** 0.2  # the released grw_cross_entropy_loss.py
    torch.testing.assert_close(weight, torch.tensor(ratio / ratio.sum() * 150).float())


@pytest.mark.slow
def test_predicted_costs_are_those_on_the_page() -> None:
    done = with_torchvision.start("recipes.vision_cost")
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs" / "recipes.md").read_text()


# --- data


def test_a_mask_has_classes_from_0_and_255_for_what_is_ignored(folder: Path) -> None:
    pairs = ade20k_data.read_split(folder, "validation", 3)
    data = ade20k_data.ADE20K(pairs, recipe_of(TINY), augment=False)
    for index, (_, file) in enumerate(pairs):
        annotation = torch.from_numpy(np.asarray(Image.open(file)).copy())
        pixels, mask = data[index]
        assert torch.equal(mask[annotation > 0], annotation[annotation > 0] - 1)
        assert (mask[annotation == 0] == 255).all()
        assert pixels.shape[0] == 3
        assert max(pixels.shape[1:]) <= 128
        assert min(pixels.shape[1:]) == 64 or max(pixels.shape[1:]) == 128


def test_training_samples_are_cropped_padded_and_the_same_for_a_key(folder: Path) -> None:
    pairs = ade20k_data.read_split(folder, "training", 12)
    data = ade20k_data.ADE20K(pairs, recipe_of(TINY), augment=True)
    middles = set()
    for draw in range(12):
        pixels, mask = data[draw, 0]
        assert pixels.shape == (3, 64, 64)
        assert mask.shape == (64, 64)
        assert mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) <= {*ade20k_files.SHOWN, 255}
        middles.add(int(mask[32, 32]))
    assert len(middles) > 1
    again, mask = data[3, 0]
    assert torch.equal(again, data[3, 0][0])
    assert torch.equal(mask, data[3, 0][1])

    small = ade20k_data.ADE20K(pairs, recipe_of(f"{TINY} --ratios 0.5 0.5"), augment=True)
    pixels, mask = small[0, 0]  # at most 64 x 32 pixels: the rest has the mean colour, ignored
    shown = (pixels != 0).any(0)
    height, width = int(shown.any(1).sum()), int(shown.any(0).sum())
    assert min(height, width) == 32
    assert shown[:height, :width].all()
    assert not shown[height:].any()
    assert not shown[:, width:].any()
    assert (mask[~shown] == 255).all()
    assert (mask[shown] != 255).any()


def test_image_and_mask_are_cut_flipped_and_resized_together() -> None:
    """An image that shows its mask; one of two classes in a corner, so that crops differ."""
    recipe = recipe_of("--scale 200 100 --crop 80")
    mask = np.zeros((90, 120), np.uint8)
    mask[20:50, 10:70] = 1
    image = np.repeat(mask[..., None] * np.uint8(200), 3, axis=2)
    positions = set()
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, cut = ade20k_data.augmented(image, mask, recipe)
        inside = pixels.mean(2) > pixels.mean()
        assert pixels.shape[:2] == cut.shape
        assert max(cut.shape) <= 80
        if 0 < cut.sum() < cut.size:
            assert (inside == cut).mean() > 0.95
            positions.add((cut.argmax(), cut.shape))
    assert len(positions) > 10


def test_no_class_takes_more_than_three_quarters_of_a_crop_where_that_can_be() -> None:
    recipe = recipe_of("--scale 512 256 --crop 64 --ratios 1 1")
    mask = np.zeros((256, 256), np.uint8)
    mask[:, 120:] = 1
    image = np.zeros((256, 256, 3), np.uint8)
    shares = []
    for seed in range(30):
        torch.manual_seed(seed)
        _, cut = ade20k_data.augmented(image, mask, recipe)
        shares.append(max(cut.mean(), 1 - cut.mean()))
    assert np.mean(np.array(shares) < 0.75) > 0.6  # of 11 draws; of one, a sixth
    torch.manual_seed(0)
    nothing = np.full((256, 256), 255, np.uint8)
    assert (ade20k_data.augmented(image, nothing, recipe)[1] == 255).all()


def test_a_resize_is_opencvs_size_and_keeps_classes() -> None:
    mask = np.random.default_rng(0).choice([0, 3, 149, 255], (30, 50)).astype(np.uint8)
    made = ade20k_data.resized(mask, (2048, 512), 0.1, "nearest")
    assert made.shape == (51, 85)  # int(512 * 0.1) / 30; int(n * 1.7 + 0.5)
    assert set(np.unique(made)) <= {0, 3, 149, 255}
    image = np.full((10, 100, 3), 77, np.uint8)
    made = ade20k_data.resized(image, (200, 100), 1.0, "bilinear")
    assert made.shape == (20, 200, 3)  # the longer side
    assert (made == 77).all()


def test_a_distortion_is_none_half_of_the_times_and_within_its_bounds() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    grey = []
    for seed in range(200):
        torch.manual_seed(seed)
        made = ade20k_data.distorted(image)
        assert made.std() == 0  # grey has no saturation and no hue
        grey.append(int(made.flat[0]))
    assert 0.15 < np.mean(np.array(grey) == 100) < 0.4  # neither brightness nor contrast: 1/4
    assert min(grey) < 60
    assert max(grey) > 150
    assert all(34 <= value <= 198 for value in grey)  # (100 -+ 32) * 0.5 to 1.5

    # Where two greys stay as they are, only saturation and hue can have changed: of HSV's red, 0 of
    # 360 degrees, saturation 100 / 200, the value does not.
    three = np.array([[[100] * 3, [30] * 3, [200, 100, 100]]], np.uint8)
    colours = []
    for seed in range(200):
        torch.manual_seed(seed)
        made = ade20k_data.distorted(three)
        if (made[0, :2] == three[0, :2]).all():
            colours.append(tuple(made[0, 2].tolist()))
    assert all(colour[0] == 200 for colour in colours)  # up to 36 degrees: still red's sector
    assert all(48 <= min(colour) <= 152 for colour in colours)  # 200 (1 - s), s 0.25 to 0.75
    assert {min(colour) for colour in colours} - {100}
    assert any(green > blue for _, green, blue in colours)
    assert any(blue > green for _, green, blue in colours)


def test_a_missing_or_damaged_file_is_named_with_what_is_expected(
    folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "ade"

    def fails(error: type[Exception], text: str, number: int = 3) -> None:
        with pytest.raises(error, match=text):
            ade20k_data.read_split(root, "validation", number)

    fails(FileNotFoundError, "images.validation: no such folder; expected 3 .jpg images")
    shutil.copytree(folder, root)
    fails(ValueError, "images.validation: it holds 3 .jpg images; expected 2000", number=2000)
    annotation = root / "annotations" / "validation" / "ADE_val_00000002.png"
    whole = annotation.read_bytes()
    data = ade20k_data.ADE20K(
        ade20k_data.read_split(root, "validation", 3), recipe_of(TINY), augment=False
    )
    annotation.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"ADE_val_00000002.png: not a whole image"):
        data[1]
    annotation.write_bytes(whole)
    mask = np.array(Image.open(annotation))
    mask[0, 0] = 151
    Image.fromarray(mask).save(annotation)
    with pytest.raises(ValueError, match="it holds class 151; expected 0 to 150"):
        data[1]
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(annotation)
    with pytest.raises(ValueError, match=r"it is 7 x 5 pixels; expected \d+ x \d+, the size of"):
        data[1]
    annotation.unlink()
    fails(FileNotFoundError, "ADE_val_00000002.png: no such file; expected the annotation of ADE")
    (root / "objectInfo150.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"objectInfo150.txt: no such file; expected a tab"):
        ade20k.class_weights(recipe_of(), root)


# --- runs


def run(folder: Path, out: Path, processes: int = 1, code: int = 0, **environment: str) -> str:
    arguments = ["--data", folder, "--out", out, *TINY.split()]
    done = with_torchvision.start("recipes.ade20k", *arguments, processes=processes, **environment)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(folder, out).count("tail") == 2
    return out


def test_a_run_from_stage_1_to_the_scores(whole: Path) -> None:
    log = events(whole)
    assert [e["event"] for e in log] == ["recipe", *2 * [*3 * ["step"], "evaluation"]]
    assert {"mean", "head", "body", "tail", "pixel_accuracy"} <= log[-1].keys()
    first, second = (torch.load(whole / f"stage{stage}.pth") for stage in (1, 2))
    parameters = [n for n in first if "running" not in n and "num_batches" not in n]
    learned = ("logit_scale", "logit_bias", "confidence_layer")
    for name in parameters:
        assert torch.equal(first[name], second[name]) != any(part in name for part in learned)
    assert not torch.equal(first["convs.0.1.running_mean"], second["convs.0.1.running_mean"])


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Killed between two checkpoints, once in each stage."""
    for after in (4, 4 + 5):  # stage 1 goes on at 3, and stage 2 is killed at 4
        run(folder, tmp_path, code=-signal.SIGKILL, KILL_AFTER=str(after))
    assert (tmp_path / "stage1.pth").exists()
    run(folder, tmp_path)
    assert events(tmp_path) == events(whole)
    for name in ("stage1.pth", "stage2.pth"):
        states = [torch.load(out / name) for out in (whole, tmp_path)]
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.slow
def test_two_ranks_one_of_which_sees_only_ignored_pixels_once(folder: Path, tmp_path: Path) -> None:
    """An image whose annotation is 0 comes once an epoch, a rank's only one of that step."""
    run(folder, tmp_path, processes=2)
    log = events(tmp_path)
    assert [e["stage"] for e in log if e["event"] == "evaluation"] == [1, 2]
    state = torch.load(tmp_path / "stage2.pth")
    assert all(torch.isfinite(value).all() for value in state.values())


def _compare_gradients(folder: Path) -> None:
    """With the mean over all pixels, two ranks have the gradient of one that has both images."""
    recipe = recipe_of(f"{TINY} --batch-norm eval --dropout 0")
    torch.manual_seed(0)
    model = ade20k.FCN(recipe)
    ade20k.start_stage(2, recipe, model, ade20k.class_weights(recipe, folder))
    model.eval()
    with torch.no_grad():  # at the start, u = z, the confidence has no gradient
        model.decode_head.logit_scale.normal_(1, 0.1)
        model.decode_head.confidence_layer.bn.bias.fill_(1.0)
    pairs = ade20k_data.read_split(folder, "training", 12)
    data = ade20k_data.ADE20K(pairs, recipe, augment=True)
    ignored, other = data[0, ade20k_files.ALL_IGNORED - 1], data[0, 0]
    assert (ignored[1] == 255).all()
    both = [torch.stack(parts) for parts in zip(ignored, other, strict=True)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(*both), parameters)
    own = (ignored, other)[dist.get_rank()]
    replicas = nn.parallel.DistributedDataParallel(model)
    loss = replicas(*(part[None] for part in own))
    assert (loss == 0) == (dist.get_rank() == 0)
    loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
        assert gradient.abs().max() > 0


def test_a_rank_that_sees_only_ignored_pixels_adds_nothing(folder: Path) -> None:
    with_torchvision.run(partial(_compare_gradients, folder), world=2)
