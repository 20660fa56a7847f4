"""recipes/configs with the frameworks themselves: models, optimizers and schedules.

No `make` runs this: the frameworks are in no requirements file, and stand-ins of them would prove
nothing. By hand, in an environment with torch, torchvision, mmengine, mmcv-lite, mmsegmentation and
mmdetection, or detectron2, python -m pytest --noconftest tests/integrations/test_recipe_configs.py.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "tests")]
CONFIGS = ROOT / "recipes" / "configs"
WHY = "by hand alone, with the framework itself: docs/integrations.md"

from recipes import lvis  # noqa: E402
from recipes.common import iterations  # noqa: E402


class Empty(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class EmptyNames(types.ModuleType):
    """mmcv-lite has no compiled operations: names for what is built here and does not run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Empty,), {})


@pytest.fixture
def config() -> Callable[[str], Any]:
    """A file of recipes/configs, read by mmengine."""
    pytest.importorskip("mmengine", reason=WHY)
    import mmcv

    if not hasattr(mmcv, "ops"):
        own = ("carafe", "merge_cells", "modulated_deform_conv", "multi_scale_deform_attn", "nms",
               "roi_align")  # fmt: skip
        for name in ("ops", *(f"ops.{one}" for one in own)):
            sys.modules[f"mmcv.{name}"] = EmptyNames(f"mmcv.{name}")
        sys.modules["mmcv.ops"].__path__ = []
        mmcv.ops = sys.modules["mmcv.ops"]
    from mmengine.config import Config

    return lambda name: Config.fromfile(CONFIGS / name)


def built(cfg: Any, model: nn.Module) -> tuple[Any, list[Any]]:
    """Of mmengine: the optimizer and the schedules, of the parameters that learn."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    schedules = [PARAM_SCHEDULERS.build({**s, "optimizer": optimizer}) for s in cfg.param_scheduler]
    return optimizer, schedules


def check_schedule(
    optimizer: Any, step: Callable[[], None], expected: Callable[[int], float], total: int
) -> None:
    """The learning rate of every iteration; expected: the factor in recipes."""
    first = None
    for iteration in range(total):
        rate = optimizer.param_groups[0]["lr"]
        first = rate / expected(0) if first is None else first
        assert rate == pytest.approx(first * expected(iteration), rel=1e-5), iteration
        optimizer.step()  # of no gradients
        step()


def counts_file(folder: Path, classes: int) -> str:
    path = folder / "train.json"
    categories = [{"id": i, "name": f"c{i}", "image_count": 1 + 7 * i % 50, "instance_count": 90}
                  for i in range(1, classes + 1)]  # fmt: skip
    path.write_text(json.dumps({"categories": categories, "annotations": []}))
    return str(path)


def released_weights(classes: int) -> torch.Tensor:
    weight = 1 / np.array([1 + 7 * i % 50 for i in range(1, classes + 1)], float) ** 0.8
    return torch.tensor([*weight / weight.sum() * classes, 1.0]).float()  # the background is last


def test_mmsegmentations(config: Any, tmp_path: Path) -> None:
    pytest.importorskip("mmseg", reason=WHY)
    from mmengine.model import revert_sync_batchnorm
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    from recipes.ade20k import ADE20KRecipe
    from support import ade20k_files

    register_all_modules(init_default_scope=False)
    recipe = ADE20KRecipe()
    cfg = config("mmseg_ade20k_fcn_r50.py")
    root = ade20k_files.write(tmp_path)
    loss = cfg.model.model.decode_head.loss_decode
    assert loss.counts == "data/ade/ADEChallengeData2016/objectInfo150.txt"
    loss.counts = str(root / "objectInfo150.txt")
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] + "." + n.split(".")[1] for n in names} == {
        "decode_head.logit_scale", "decode_head.logit_bias", "decode_head.confidence_layer",
    }  # fmt: skip
    head = model.decode_head
    assert (head.loss_decode.normalizer, model.auxiliary_head.loss_decode.loss_weight) == (
        recipe.normalizer, recipe.stage2_aux_weight)  # fmt: skip
    ratio = 1 / np.array(ade20k_files.ratios()) ** recipe.rho
    expected = torch.tensor(ratio / ratio.sum() * 150).float()
    torch.testing.assert_close(head.loss_decode.weight, expected)
    assert head.dropout.p == recipe.dropout
    model.train()
    assert all(m.training for m in model.modules())

    optimizer, schedules = built(cfg, model)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (
        recipe.lr, recipe.momentum, recipe.weight_decay)  # fmt: skip
    assert cfg.train_cfg.max_iters == recipe.stage2_iterations
    factor = iterations.poly(recipe.stage2_iterations, recipe.power, recipe.min_lr / recipe.lr)
    check_schedule(
        optimizer, lambda: [s.step() for s in schedules], factor, recipe.stage2_iterations
    )
    pipeline = {t["type"]: t for t in cfg.train_dataloader.dataset.pipeline}
    assert pipeline["RandomResize"]["scale"] == recipe.scale
    assert pipeline["RandomResize"]["ratio_range"] == recipe.ratios
    assert pipeline["RandomCrop"] == {"type": "RandomCrop", "crop_size": (recipe.crop,) * 2,
                                      "cat_max_ratio": recipe.most_of_a_crop}  # fmt: skip
    assert 8 * cfg.train_dataloader.batch_size == recipe.stage2_batch

    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 150, (1, 64, 64))))
    sample.set_metainfo({"img_shape": (64, 64)})
    losses = model.loss(torch.randn(2, 3, 64, 64), [sample, sample])
    losses["decode.loss_ce"].backward()
    assert losses["aux.loss_ce"] == 0
    assert head.logit_scale.grad.abs().max() > 0


@pytest.mark.parametrize("version", ["v1", "v0.5"])
@pytest.mark.parametrize("stage", [1, 2])
def test_mmdetections(config: Any, tmp_path: Path, version: str, stage: int) -> None:
    pytest.importorskip("mmdet", reason=WHY)
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    recipe = lvis.RECIPES[version]()
    name = "mmdet_lvis_" + version.replace(".", "") + ("_stage2" if stage == 2 else "")
    cfg = config(f"{name}.py")
    heads = cfg.model.model.roi_head
    cfg.model.model.backbone.init_cfg = None
    if stage == 2:
        counts = f"data/lvis_{version}/annotations/lvis_{version}_train.json"
        assert heads.bbox_head.loss_cls.counts == counts
        heads.bbox_head.loss_cls.counts = counts_file(tmp_path, recipe.classes)
    model = MODELS.build(cfg.model)
    box = model.roi_head.bbox_head
    assert tuple(box.fc_cls.weight.shape) == (recipe.classes + 1, 1024)
    assert box.fc_cls.background == "last"
    assert box.fc_cls.scale.item() == recipe.cosine_scale
    names = {n.removeprefix("roi_head.bbox_head.fc_cls.") for n, p in model.named_parameters()
             if p.requires_grad}  # fmt: skip
    calibration = {"logit_scale", "logit_bias", "confidence_layer.weight", "confidence_layer.bias"}
    if stage == 1:
        assert {"weight", "scale"} <= names
        assert not names & calibration
        assert not any("bn" in n or n.startswith(("backbone.conv1", "backbone.layer1"))
                       for n in names)  # fmt: skip
        assert type(box.loss_cls).__name__ == "CrossEntropyLoss"
    else:
        assert names == calibration
        torch.testing.assert_close(box.loss_cls.weight, released_weights(recipe.classes))
        assert box.loss_cls.normalizer == "weights"

    optimizer, schedules = built(cfg, model)
    (group,) = {json.dumps([g["lr"], g["momentum"], g["weight_decay"]])
                for g in optimizer.param_groups}  # fmt: skip
    start = recipe.lr * recipe.warmup_factor
    assert json.loads(group) == pytest.approx([start, recipe.momentum, recipe.weight_decay])
    total = recipe.iterations if stage == 1 else recipe.stage2_iterations
    assert cfg.train_cfg.max_iters == total
    (factor,) = lvis.optimizer_of(recipe, list(box.parameters()), stage)[1].lr_lambdas
    if stage == 1:  # of so many steps it looks at the warm-up and the milestones
        (steps,) = (s.milestones for s in schedules if hasattr(s, "milestones"))
        assert sorted(steps) == list(recipe.steps)
        total = 1100
    check_schedule(optimizer, lambda: [s.step() for s in schedules], factor, total)
    data = cfg.train_dataloader.dataset
    repeats = stage == 1 and recipe.repeat_threshold > 0
    assert (data.type == "ClassBalancedDataset") == repeats
    if repeats:
        assert data.oversample_thr == recipe.repeat_threshold
        data = data.dataset
    sizes = next(t for t in data.pipeline if t["type"] == "RandomChoiceResize")["scales"]
    assert sizes == [(recipe.max_size, size) for size in recipe.min_sizes]
    test = cfg.model.model.test_cfg.rcnn
    assert (test.score_thr, test.max_per_img) == (recipe.score_threshold, recipe.detections)
    assert 8 * cfg.train_dataloader.batch_size == recipe.batch


@pytest.mark.parametrize("version", ["v1", "v0.5"])
@pytest.mark.parametrize("stage", [1, 2])
def test_detectron2s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, stage: int
) -> None:
    pytest.importorskip("detectron2.model_zoo", reason=WHY)
    from recipes.configs import detectron2_lvis

    recipe = lvis.RECIPES[version]()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = detectron2_lvis.config(version, stage)
    cfg.MODEL.DEVICE = "cpu"
    disalign = cfg.MODEL.ROI_BOX_HEAD.DISALIGN
    if stage == 2:
        assert Path(disalign.COUNTS) == tmp_path / "lvis" / f"lvis_{version}_train.json"
        disalign.COUNTS = counts_file(tmp_path, recipe.classes)
    model = detectron2_lvis.Trainer.build_model(cfg)
    predictor = model.roi_heads.box_predictor
    score = predictor.cls_score
    assert tuple(score.weight.shape) == (recipe.classes + 1, 1024)
    assert score.scale.item() == recipe.cosine_scale
    names = {n.removeprefix("roi_heads.box_predictor.cls_score.")
             for n, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    calibration = {"logit_scale", "logit_bias", "confidence_layer.weight", "confidence_layer.bias"}
    assert (names == calibration) if stage == 2 else not names & calibration
    if stage == 2:
        torch.testing.assert_close(predictor.class_weight, released_weights(recipe.classes))
    assert predictor.normalizer == "weights"

    optimizer = detectron2_lvis.Trainer.build_optimizer(cfg, model)
    schedule = detectron2_lvis.Trainer.build_lr_scheduler(cfg, optimizer)
    (group,) = {json.dumps([g["momentum"], g["weight_decay"]]) for g in optimizer.param_groups}
    assert json.loads(group) == [recipe.momentum, recipe.weight_decay]
    total = recipe.iterations if stage == 1 else recipe.stage2_iterations
    solver, heads = cfg.SOLVER, cfg.MODEL.ROI_HEADS
    found = solver.MAX_ITER, solver.BASE_LR, solver.IMS_PER_BATCH
    assert found == (total, recipe.lr, recipe.batch)
    assert (recipe.steps if stage == 1 else recipe.stage2_steps) == solver.STEPS
    (factor,) = lvis.optimizer_of(recipe, list(score.parameters()), stage)[1].lr_lambdas
    check_schedule(optimizer, schedule.step, factor, 1100 if stage == 1 else total)
    repeats = stage == 1 and recipe.repeat_threshold > 0
    assert (cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler") == repeats
    assert cfg.DATALOADER.REPEAT_THRESHOLD == 0.001
    sizes = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN
    assert (recipe.min_sizes, recipe.max_size) == sizes
    found = heads.SCORE_THRESH_TEST, heads.BATCH_SIZE_PER_IMAGE, cfg.TEST.DETECTIONS_PER_IMAGE
    assert found == (recipe.score_threshold, recipe.regions, recipe.detections)
    proposals = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN
    assert proposals == recipe.proposals
