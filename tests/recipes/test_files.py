"""What a recipe says of files that are missing, damaged or of something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from recipes import imagenet_lt, inaturalist2018
from recipes.common import checkpoint
from recipes.common.log import Log
from recipes.common.ranks import Ranks
from recipes.images import Images
from support import image_sets

OPTIONS = image_sets.OPTIONS
SIZES: Any = {
    "classes": OPTIONS["classes"], "train_images": OPTIONS["train-images"],
    "val_images": OPTIONS["val-images"], "test_images": OPTIONS["test-images"],
}  # fmt: skip
RECIPE = imagenet_lt.ImageNetLT(**SIZES)
TRAIN, JSON = "ImageNet_LT_train.txt", "train2018.json"
ALONE = Ranks(0, 1, torch.device("cpu"))


def plain(image: Any) -> Tensor:
    return torch.tensor(image.size)


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    image_sets.imagenet_lt(tmp_path)
    return tmp_path


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    image_sets.inaturalist2018(tmp_path)
    return tmp_path


def test_the_small_sets_are_read_as_the_official_ones(lists: Path) -> None:
    splits = imagenet_lt.read(lists, RECIPE)
    assert splits.train.counts.tolist() == list(image_sets.COUNTS)
    assert splits.train.paths[0] == lists / "train/n01440764/n01440764_0.JPEG"
    assert splits.val.paths[0].parts[-3] == "train"
    assert splits.test.paths[0].parts[-3] == "val"
    image_sets.inaturalist2018(lists)
    recipe = inaturalist2018.INaturalist2018(**{**SIZES, "val_images": SIZES["test_images"]})
    splits = inaturalist2018.read(lists, recipe)
    assert splits.test is splits.val
    for path, label in zip(splits.train.paths, splits.train.labels, strict=True):
        assert path.parts[-2] == str(label)  # whatever the order of images and annotations


def without_a_line(text: str) -> str:
    return text[: text.rstrip("\n").rfind("\n") + 1]


LISTS: list[tuple[Callable[[str], str], str]] = [
    (without_a_line, "it lists 138 images; expected 139 .*--train-images N"),
    (lambda text: text + "train/x.JPEG\n", "line 140 .*expected 'path label'"),
    (lambda text: text + "train/x.JPEG 6\n", "line 140 has label 6; expected a label below 6"),
    (lambda text: "", "the file is empty"),
]


@pytest.mark.parametrize(("damage", "message"), LISTS)
def test_a_damaged_list(lists: Path, damage: Callable[[str], str], message: str) -> None:
    path = lists / TRAIN
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        imagenet_lt.read(lists, RECIPE)


def test_a_missing_list(lists: Path) -> None:
    (lists / TRAIN).unlink()
    with pytest.raises(FileNotFoundError, match=f'{lists / TRAIN}: no such file; .*"path label"'):
        imagenet_lt.read(lists, RECIPE)


def without(key: str, name: str) -> Callable[[Any], None]:
    def damage(content: Any) -> None:
        del content[key][0][name]

    return damage


ANNOTATIONS: list[tuple[Callable[[Any], Any], str]] = [
    (without("images", "file_name"), "no 'file_name'; expected images with id and file_name"),
    (without("annotations", "image_id"), "image_id.*expected the id of an image"),
    (lambda content: content["annotations"].pop(), "expected"),
    (lambda content: content["images"].pop(), "it lists 138 images; expected 139"),
]


@pytest.mark.parametrize(("damage", "message"), ANNOTATIONS)
def test_damaged_annotations(annotations: Path, damage: Callable[[Any], Any], message: str) -> None:
    path = annotations / JSON
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        inaturalist2018.read(annotations, inaturalist2018.INaturalist2018(**SIZES))


def test_annotations_that_are_cut_off(annotations: Path) -> None:
    path = annotations / JSON
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match=str(path)):
        inaturalist2018.read(annotations, inaturalist2018.INaturalist2018(**SIZES))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path}: no such file; expected iNat"):
        inaturalist2018.read(annotations, inaturalist2018.INaturalist2018(**SIZES))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_or_damaged_image(lists: Path, workers: int) -> None:
    split = imagenet_lt.read(lists, RECIPE).train
    data = Images(split, plain)
    size = split.paths[3].stat().st_size
    with split.paths[3].open("r+b") as file:
        file.truncate(size // 2)
    split.paths[5].unlink()
    loader = DataLoader(data, num_workers=workers, sampler=[3])
    with pytest.raises(ValueError, match=f"{split.paths[3]}: damaged .*expected a whole image"):
        list(loader)
    loader = DataLoader(data, num_workers=workers, sampler=[5])
    with pytest.raises(FileNotFoundError, match=f"{split.paths[5]}: .*image 6 of .*{TRAIN}"):
        list(loader)
    split.paths[0].unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Images(split, plain)  # before anything is trained


def saved(folder: Path, recipe: Any = RECIPE, ranks: Ranks = ALONE) -> checkpoint.Checkpoint:
    log = Log(folder, ranks)
    return checkpoint.Checkpoint(
        folder / "stage1.ckpt", recipe, ranks, log, {"model": torch.nn.Linear(2, 2)}
    )


def test_a_checkpoint_that_cannot_be_gone_on_with(tmp_path: Path) -> None:
    assert saved(tmp_path).resume() == (0, 0)
    saved(tmp_path).save(3, 7)
    assert saved(tmp_path).resume() == (3, 7)
    path = tmp_path / "stage1.ckpt"
    other = imagenet_lt.ImageNetLT(**SIZES, epochs=2)
    with pytest.raises(ValueError, match=f"{path}: .*epochs 90 .now 2.*or another --out"):
        saved(tmp_path, other).resume()
    state = torch.load(path)
    torch.save(state | {"rng": 2 * state["rng"]}, path)
    with pytest.raises(ValueError, match=f"{path}: .*by 2 processes; expected as many as now, 1"):
        saved(tmp_path).resume()
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=f"{path}: no epoch, .*expected a checkpoint"):
        saved(tmp_path).resume()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path}: not a whole file .*expected a checkpoint"):
        saved(tmp_path).resume()


def test_what_was_logged_after_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
    one = saved(tmp_path)
    one.log.write("step", step=1)
    one.save(0, 1)
    one.log.write("step", step=2)
    one.resume()
    assert one.log.path.read_text() == '{"event": "step", "step": 1}\n'
