"""The recipes end to end, on small data sets in the official layouts."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recipes import classification
from recipes.common.log import Log
from recipes.common.ranks import Ranks
from recipes.imagenet_lt import ImageNetLT
from recipes.places_lt import PlacesLT, read
from support import image_sets
from support.with_torchvision import start

DATA = {
    "imagenet_lt": image_sets.imagenet_lt,
    "places_lt": image_sets.places_lt,
    "inaturalist2018": image_sets.inaturalist2018,
}
SCORES = ("overall", "many", "medium", "few", "top5_overall", "macro_f1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three data sets in one folder: none of their names is another's."""
    folder = tmp_path_factory.mktemp("data")
    for write in DATA.values():
        write(folder)
    return folder


def run(recipe: str, data: Path, out: Path, *more: str, processes: int = 1, **options: Any) -> Any:
    environment = {k: options.pop(k) for k in ("KILL_AFTER",) if k in options}
    arguments = image_sets.arguments(data, out, **options)
    return start(f"recipes.{recipe}", *arguments, *more, processes=processes, **environment)


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def check(out: Path) -> None:
    """Both stages were trained and evaluated; stage 2 changed nothing but the calibration."""
    log = events(out)
    stages = [event["stage"] for event in log if event["event"] == "evaluation"]
    assert stages == [1, 2]
    for event in log:
        if event["event"] == "evaluation":
            assert all(0 <= event[name] <= 1 for name in SCORES)
    first, second = (torch.load(out / f"stage{k}.pth") for k in (1, 2))
    learned = {name.rpartition("classifier.3.")[2] for name in second.keys() - first.keys()}
    assert learned == {
        "logit_scale", "logit_bias", "confidence_layer.weight", "confidence_layer.bias",
        "calibration_form",
    }  # fmt: skip
    kept = [n for n in first if "running" not in n and "num_batches" not in n]  # BatchNorm trains
    assert all(torch.equal(first[name], second[name]) for name in kept)


def test_imagenet_lt_from_stage_1_to_the_evaluation(data: Path, tmp_path: Path) -> None:
    done = run("imagenet_lt", data, tmp_path)
    assert done.returncode == 0, done.stderr
    check(tmp_path)
    log = events(tmp_path)
    assert log[0]["event"] == "recipe"
    assert log[0]["values"]["lr"] == 0.1
    assert log[0]["sources"]["epochs"] == "changed by the user"
    assert "stage 2 on ImageNet_LT_test.txt" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["places_lt", "inaturalist2018"])
def test_rho_by_the_sweep(data: Path, tmp_path: Path, recipe: str) -> None:
    options = {"val_images": 18} if recipe == "inaturalist2018" else {"lr_steps": 1}
    done = run(recipe, data, tmp_path, "--sweep-rho", bf16=True, **options)
    assert done.returncode == 0, done.stderr
    check(tmp_path)
    (sweep,) = [event for event in events(tmp_path) if event["event"] == "sweep"]
    assert len(sweep["accuracy"]) == 5
    assert sweep["accuracy"][str(sweep["rho"])] == max(sweep["accuracy"].values())


def test_a_rho_that_was_never_published_must_be_given(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        classification.run(PlacesLT, read, image_sets.arguments(data, tmp_path / "out"))
    assert "--rho or --sweep-rho must be given" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_with_the_same_bits(
    data: Path, tmp_path: Path, processes: int
) -> None:
    """Killed in each stage, in the middle of an epoch and of the steps between checkpoints. The
    images of the other run are read by processes of their own; dropout draws its own numbers.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run("imagenet_lt", data, whole, processes=processes, workers=1)
    assert done.returncode == 0, done.stderr
    epoch = -(-sum(image_sets.COUNTS) // image_sets.OPTIONS["batch"])  # steps
    # Goes on at step 4 of epoch 1; then all of stage 1, and into the second epoch of stage 2.
    for after in (epoch + 6, 2 * epoch - (epoch + 4) + epoch + 2):
        stopped = run("imagenet_lt", data, killed, processes=processes, KILL_AFTER=str(after))
        assert stopped.returncode == (-signal.SIGKILL if processes == 1 else 1)
        assert not (killed / "stage2.pth").exists()
    assert (killed / "stage1.pth").exists()
    done = run("imagenet_lt", data, killed, processes=processes)
    assert done.returncode == 0, done.stderr
    for name in ("stage1.pth", "stage2.pth"):
        expected, found = torch.load(whole / name), torch.load(killed / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert (whole / "log.jsonl").read_text() == (killed / "log.jsonl").read_text()


def test_timm_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is not installed here; its models were built by hand."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1000))
    asked: list[Any] = []
    stand_in: Any = types.ModuleType("timm")
    stand_in.create_model = lambda name, pretrained: asked.append((name, pretrained)) or model
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    recipe = ImageNetLT(model="timm:resnet50", classes=7)
    assert classification.build_model(recipe) is model
    assert asked == [("resnet50", False)]
    assert model[1].out_features == 7


def test_the_log_needs_no_rich(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    log = Log(tmp_path, Ranks(0, 1, torch.device("cpu")))
    with log.progress("stage 1", 3) as advance:
        advance(1, "loss 1")


@pytest.mark.slow
def test_stage_1_from_a_file(data: Path, tmp_path: Path) -> None:
    """Of a run, or of torchvision's or timm's training scripts; then stage 1 is not trained."""
    done = run("imagenet_lt", data, tmp_path / "a", epochs=1)
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "a" / "stage1.pth")
    model = {f"module.{k}": v for k, v in weights.items()}
    torch.save({"model": model, "args": argparse.Namespace(lr=0.1)}, tmp_path / "stage1.pth")
    done = run("imagenet_lt", data, tmp_path / "b", stage1=tmp_path / "stage1.pth")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "b")
    assert not (tmp_path / "b" / "stage1.ckpt").exists()
    a, b = (
        next(event for event in events(tmp_path / name) if event["event"] == "evaluation")
        for name in "ab"
    )
    assert a == b
    del weights["classifier.3.weight"]
    torch.save(weights, tmp_path / "stage1.pth")
    done = run("imagenet_lt", data, tmp_path / "c", stage1=tmp_path / "stage1.pth")
    assert f"{tmp_path / 'stage1.pth'}: " in done.stderr
    assert "classifier.3.weight" in done.stderr
