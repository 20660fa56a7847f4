"""detectron2, LVIS v1 and v0.5, Mask R-CNN R50-FPN: both stages of the released recipe.

    python -m recipes.configs.detectron2_lvis --version v1 --stage 1 --num-gpus 8 OUTPUT_DIR out1
    python -m recipes.configs.detectron2_lvis --version v1 --stage 2 --num-gpus 8 OUTPUT_DIR out2 \
        MODEL.WEIGHTS out1/model_final.pth

with lvis and coco in $DETECTRON2_DATASETS (./datasets), and --resume to go on. --head linear;
repeat-factor sampling: DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler, the default of stage 1
of v0.5. Not trained by us: no data. The model, the optimizer and the schedule were built once by
hand with detectron2's source (commit 02b5c4e2, of which nothing was compiled):
tests/integrations/test_recipe_configs.py.

Numbers are those of recipes/lvis.py, and of detectron2's own mask_rcnn_R_50_FPN_1x.yaml.
"""

from __future__ import annotations

import os
from typing import Any

from detectron2 import model_zoo
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import LVISEvaluator

from disalign_ops import nn as dnn
from disalign_ops.integrations import detectron2 as ours
from recipes.lvis import RECIPES

BASES = {"v1": "LVISv1-InstanceSegmentation", "v0.5": "LVISv0.5-InstanceSegmentation"}


def config(version: str, stage: int, head: str = "cosine") -> Any:
    """detectron2's CfgNode of a stage."""
    cfg: Any = model_zoo.get_config(f"{BASES[version]}/mask_rcnn_R_50_FPN_1x.yaml")
    ours.add_disalign_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "DisAlignROIHeads"
    recipe = RECIPES[version]()
    disalign, solver = cfg.MODEL.ROI_BOX_HEAD.DISALIGN, cfg.SOLVER
    disalign.COSINE, disalign.COSINE_SCALE = head == "cosine", recipe.cosine_scale
    solver.STEPS, solver.MAX_ITER = recipe.steps, recipe.iterations
    repeats = stage == 1 and recipe.repeat_threshold > 0
    sampler = "RepeatFactorTrainingSampler" if repeats else "TrainingSampler"
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    if stage == 2:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        disalign.COUNTS = f"{root}/lvis/lvis_{version}_train.json"
        disalign.RHO = recipe.rho
        solver.STEPS, solver.MAX_ITER = recipe.stage2_steps, recipe.stage2_iterations
        cfg.TEST.EVAL_PERIOD = solver.MAX_ITER // 3
    return cfg


class Trainer(DefaultTrainer):  # type: ignore[misc]
    @classmethod
    def build_model(cls, cfg: Any) -> Any:
        model = super().build_model(cfg)
        stage2 = bool(cfg.MODEL.ROI_BOX_HEAD.DISALIGN.COUNTS)
        (dnn.freeze_for_stage2 if stage2 else dnn.freeze_for_stage1)(model)
        return model

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: Any = None) -> Any:
        return LVISEvaluator(dataset_name, output_dir=output_folder or cfg.OUTPUT_DIR)


def main(options: Any) -> None:
    cfg = config(options.version, options.stage, options.head)
    cfg.merge_from_list(options.opts)
    cfg.freeze()
    default_setup(cfg, options)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=options.resume)
    trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument("--version", choices=sorted(BASES), default="v1")
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--head", choices=("linear", "cosine"), default="cosine")
    given = parser.parse_args()
    launch(main, given.num_gpus, given.num_machines, given.machine_rank, given.dist_url, (given,))
