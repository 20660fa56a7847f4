"""Training by iterations: the order of samples, repeat factors, schedules, what mmengine reads."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import ade20k, lvis
from recipes.common import iterations
from recipes.common.ranks import Ranks
from support.places import ROOT


def order(rank: int = 0, world: int = 1, **options: Any) -> iterations.EndlessOrder:
    ranks = Ranks(rank, world, torch.device("cpu"))
    given: Any = {
        "indices": iterations.repeated(torch.ones(10)), "batch": 4, "iterations": 12, "seed": 3
    } | options  # fmt: skip
    return iterations.EndlessOrder(ranks=ranks, **given)


# --- the order


def test_epochs_follow_one_another_without_a_gap() -> None:
    keys = [key for batch in order() for key in batch]
    assert [place for place, _ in keys] == list(range(48))
    indices = [index for _, index in keys]
    epochs = [indices[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = [index for batch in order(seed=4) for _, index in batch]
    assert other != indices


def test_a_batch_is_the_same_on_any_number_of_ranks_and_after_a_start_in_the_middle() -> None:
    whole = list(order())
    parts = [list(order(rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    resumed = order()
    resumed.step = 7
    assert len(resumed) == 5
    assert list(resumed) == whole[7:]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 processes, got 4"):
        order(world=3)


# --- repeat factors


def test_repeat_factors_are_lviss() -> None:
    """r(I) = max over its classes of max(1, sqrt(t / f(c))): LVIS's paper, appendix B.2."""
    images = [{1}, {1, 2}, {1}, set(), {1, 3}, {1}, {1}, {1}]
    f1, f2 = 7 / 8, 1 / 8
    assert f1 > 0.5 > f2
    rare = math.sqrt(0.5 / f2)
    expected = torch.tensor([1, rare, 1, 1, rare, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(iterations.repeat_factors(images, 0.5), expected)
    assert (iterations.repeat_factors(images, 0.0) == 1).all()


def test_images_are_repeated_by_their_factors_on_average() -> None:
    factors = torch.tensor([1.0, 2.25, 1.5, 4.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    seen: Counter[int] = Counter()
    draw = iterations.repeated(factors)
    for _ in range(2000):
        indices = draw(generator).tolist()
        times = Counter(indices)
        assert times[0] == 1
        assert times[3] == 4
        assert times[1] in (2, 3)
        seen.update(indices)
    for index, factor in enumerate(factors.tolist()):
        assert seen[index] / 2000 == pytest.approx(factor, abs=0.05)


# --- schedules, against the released code's formulas


@pytest.mark.parametrize("version", ["v1", "v0.5"])
def test_lviss_learning_rate(version: str) -> None:
    """cvpods, solver/lr_scheduler.py (2deea5d), WarmupMultiStepLR."""
    recipe = lvis.RECIPES[version]()
    for stage, steps in ((1, recipe.steps), (2, recipe.stage2_steps)):
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        optimizer, schedule = lvis.optimizer_of(recipe, parameters, stage)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 / 1000)
        for iteration in range(1, 1200):
            optimizer.step()
            schedule.step()
            alpha = iteration / 1000
            warmup = 1 / 1000 * (1 - alpha) + alpha if iteration < 1000 else 1
            assert schedule.get_last_lr()[0] == pytest.approx(0.02 * warmup)
        (factor,) = schedule.lr_lambdas
        assert [factor(s) for s in steps] == pytest.approx(
            [0.1 ** (i + 1) for i in range(len(steps))]
        )
        assert factor(steps[0] - 1) == 1


def test_ade20ks_learning_rate() -> None:
    """mmcv 1.x, PolyLrUpdaterHook: (base - min) (1 - i / max_iters) ** power + min."""
    recipe = ade20k.ADE20KRecipe()
    for total in (recipe.iterations, recipe.stage2_iterations):
        factor = iterations.poly(total, recipe.power, recipe.min_lr / recipe.lr)
        for iteration in (0, 1, 400, total // 2, total - 1, total):
            expected = (0.01 - 1e-4) * (1 - iteration / total) ** 0.9 + 1e-4
            assert 0.01 * factor(iteration) == pytest.approx(expected)
    # Half way, and at the last of 4000 iterations.
    assert 0.01 * factor(2000) == pytest.approx(0.0054053, abs=1e-7)
    assert 0.01 * factor(3999) == pytest.approx(0.00010567, abs=1e-8)


# --- recipes/configs, whose files mmengine reads: tests/integrations/test_recipe_configs.py


class Node(dict[str, Any]):
    """A base of which nothing is known but that names may be read and set."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.setdefault(name, Node())

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def settings(name: str) -> Node:
    """What a file of mmengine's sets, over those of its base where this is one of ours."""
    path = ROOT / "recipes" / "configs" / name
    lines = path.read_text().splitlines()
    (base,) = (line for line in lines if line.startswith("_base_ ="))
    lines[lines.index(base)] = ""
    file = Path(base.split('"')[1])
    names: dict[str, Any] = {"_base_": settings(file.name) if file.suffix and ":" not in str(file)
                             else Node()}  # fmt: skip
    exec(compile("\n".join(lines), str(path), "exec"), names)
    return Node({k: Node(v) if type(v) is dict else v for k, v in names.items()})


def test_the_numbers_of_mmsegmentations_file_are_the_recipes() -> None:
    recipe, found = ade20k.ADE20KRecipe(), settings("mmseg_ade20k_fcn_r50.py")
    loss = found.model["model"].decode_head.loss_decode
    assert (loss["rho"], loss["normalizer"]) == (recipe.rho, recipe.normalizer)
    assert found.model["bn"] == recipe.batch_norm
    aux = found.model["model"].auxiliary_head.loss_decode.loss_weight
    assert aux == recipe.stage2_aux_weight
    assert found.train_cfg["max_iters"] == recipe.stage2_iterations
    (poly,) = found.param_scheduler
    assert (poly["power"], poly["eta_min"]) == (recipe.power, recipe.min_lr)
    assert poly["end"] == recipe.stage2_iterations + 1


@pytest.mark.parametrize("version", ["v1", "v0.5"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_numbers_of_mmdetections_files_are_the_recipes(version: str, stage: int) -> None:
    recipe = lvis.RECIPES[version]()
    name = "mmdet_lvis_" + version.replace(".", "") + ("_stage2" if stage == 2 else "")
    found = settings(f"{name}.py")
    assert found.model["type"] == f"DisAlignStage{stage}"
    head = found.model["model"].roi_head.bbox_head
    assert head.cls_predictor_cfg["scale_init"] == recipe.cosine_scale
    warmup, steps = found.param_scheduler
    assert (warmup["start_factor"], warmup["end"]) == (recipe.warmup_factor, recipe.warmup + 1)
    assert steps["gamma"] == recipe.gamma
    expected = recipe.steps if stage == 1 else recipe.stage2_steps
    assert tuple(steps["milestones"]) == expected
    total = recipe.iterations if stage == 1 else recipe.stage2_iterations
    assert found.train_cfg["max_iters"] == total
    if stage == 2:
        loss = head.loss_cls
        assert (loss["rho"], loss["num_classes"]) == (recipe.rho, recipe.classes)
        assert loss["normalizer"] == "weights"
