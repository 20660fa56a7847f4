"""Two processes, of which one sees only ignored targets in one step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from recipes import classification, imagenet_lt
from recipes.common.config import from_options
from recipes.common.order import TrainingOrder
from recipes.common.ranks import Ranks, process_group
from support import image_sets, with_torchvision
from support.tolerances import assert_close

IGNORED_STEP = 3


def train(data: Path, out: Path) -> None:
    """Stage 2 of a small network with frozen BatchNorm, which is then the same on any number of
    processes; one has only ignored targets in step IGNORED_STEP of epoch 0.
    """
    options = classification.command_line(imagenet_lt.ImageNetLT).parse_args(
        image_sets.arguments(data, out, model="shufflenet_v2_x0_5", epochs=1, batch_norm="eval",
                             stage1=data / "stage1.pth")
    )  # fmt: skip
    recipe = from_options(imagenet_lt.ImageNetLT, options)
    splits = imagenet_lt.read(data, recipe)
    second = Ranks(1, 2, torch.device("cpu"))
    order = list(TrainingOrder(len(splits.train.paths), recipe.batch, second, recipe.seed))
    ignored = {index for _, index in order[IGNORED_STEP]}
    labels = [-100 if k in ignored else t for k, t in enumerate(splits.train.labels)]
    splits = replace(splits, train=replace(splits.train, labels=labels))
    with process_group() as ranks:
        if not Path(recipe.stage1).exists():
            torch.manual_seed(1)
            torch.save(classification.build_model(recipe).state_dict(), data / "stage1.pth")
        model = classification.train_and_evaluate(recipe, splits, ranks, options)
        first, *others = ranks.gather(model.state_dict())
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    image_sets.imagenet_lt(data)
    for world in (1, 2):
        with_torchvision.run(partial(train, data, tmp_path / str(world)), world)
    one, two = (torch.load(tmp_path / name / "stage2.pth") for name in "12")
    assert one.keys() == two.keys()
    learned = [name for name in one if "logit_" in name or "confidence" in name]
    assert len(learned) == 4
    for name in learned:
        assert two[name].isfinite().all()
        assert two[name].unique().numel() > 1 or two[name].numel() == 1  # it learned
        assert_close(two[name], one[name], torch.float32, name)
    first = torch.load(data / "stage1.pth")
    assert all(torch.equal(two[name], first[name]) for name in first)
