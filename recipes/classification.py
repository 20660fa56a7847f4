"""Both stages of DisAlign for image classification, and the official evaluation.

`run` is the main program of the recipes imagenet_lt, inaturalist2018 and places_lt, which have the
numbers. DIR/out then has log.jsonl, stage1.pth and stage2.pth (state_dicts), and the checkpoints
from which a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import disalign_ops
from disalign_ops import nn as dnn
from disalign_ops import sweep
from disalign_ops.class_stats import grw_weights
from disalign_ops.metrics import LongTailAccuracy

from .common import checkpoint, config
from .common.checkpoint import load_weights
from .common.config import Recipe, from_options, sourced
from .common.log import Log
from .common.order import TrainingOrder
from .common.ranks import Ranks, process_group
from .images import Images, Splits, test_transform, training_transform

LOG_STEPS = 50  # between two losses in the log
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Classification(Recipe):
    """What every recipe says. What has a value here is how it is run, and not published."""

    classes: int
    train_images: int
    val_images: int
    test_images: int
    model: str  # torchvision's name, or timm:NAME
    pretrained: str  # weights by torchvision's name, or a file; empty: none
    zero_init_residual: bool
    head_std: float
    image_size: int
    resize: int
    color_jitter: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int
    mean_images: int
    epochs: int
    lr: float
    backbone_lr: float
    lr_steps: tuple[int, ...]
    momentum: float
    weight_decay: float
    stage2_epochs: int
    stage2_lr: float
    stage2_weight_decay: float
    rho: float | None
    form: str
    start: str
    batch_norm: str
    stage1: str = sourced("", "none: stage 1 is trained. A file of its weights: it is skipped")
    rhos: tuple[float, ...] = sourced((0.5, 0.8, 1.0, 1.2, 1.5), "ours, of --sweep-rho")
    bf16: bool = sourced(True, "ours: autocast; the released code trains in float32")
    seed: int = sourced(0, "ours")


def build_model(recipe: Classification) -> nn.Module:
    """The classifier of stage 1."""
    from_file = Path(recipe.pretrained).is_file()
    by_name = "" if from_file else recipe.pretrained
    if recipe.model.startswith("timm:"):
        import timm

        name = recipe.model.removeprefix("timm:")
        model: nn.Module = timm.create_model(name, pretrained=bool(by_name))
    else:
        from torchvision import models

        options: dict[str, Any] = {}
        if recipe.zero_init_residual and recipe.model.startswith(("resne", "wide_resnet")):
            options["zero_init_residual"] = True
        model = models.get_model(recipe.model, weights=by_name or None, **options)
    if from_file:
        load_weights(model, Path(recipe.pretrained))
    name, old = classifier(model)
    new = nn.Linear(old.in_features, recipe.classes)
    nn.init.normal_(new.weight, std=recipe.head_std)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


# A ResNet's names in cvpods, in which the released code runs, and torchvision's.
_CVPODS = (
    (r"^network\.(stem\.)?", ""), (r"^linear\.", "fc."),
    (r"^res(\d)", lambda name: f"layer{int(name[1]) - 1}"),
    (r"\bconv(\d)\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."), (r"\bshortcut\.", "downsample.0."),
)  # fmt: skip


def torchvision_name(name: str) -> str:
    """Of a parameter or buffer of a released checkpoint of stage 1; other names stay."""
    if name.startswith("network."):
        for pattern, replacement in _CVPODS:
            name = re.sub(pattern, replacement, name)
    return name


def classifier(model: nn.Module) -> tuple[str, nn.Linear]:
    """The name of the last nn.Linear, and that layer."""
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(f"model must have an nn.Linear, got a {type(model).__name__} without one")
    return linears[-1]


def stage1_optimizer(model: nn.Module, recipe: Classification) -> torch.optim.SGD:
    """Two groups: the backbone, and the classifier."""
    head = list(classifier(model)[1].parameters())
    of_head = {id(parameter) for parameter in head}
    backbone = [p for p in model.parameters() if id(p) not in of_head]
    groups: list[dict[str, Any]] = [
        {"params": backbone, "lr": recipe.backbone_lr}, {"params": head}
    ]  # fmt: skip
    return torch.optim.SGD(
        groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay,
    )  # fmt: skip


def stage2_optimizer(model: nn.Module, recipe: Classification) -> torch.optim.SGD:
    """Puts the calibration into the model, and freezes all else."""
    options: dict[str, Any] = {"form": recipe.form, "start": recipe.start}
    dnn.convert_to_disalign(model, name=classifier(model)[0], **options)
    batch_norm: Any = recipe.batch_norm
    return torch.optim.SGD(
        dnn.freeze_for_stage2(model, bn=batch_norm),
        lr=recipe.stage2_lr, momentum=recipe.momentum, weight_decay=recipe.stage2_weight_decay,
    )  # fmt: skip


def schedule_of(
    optimizer: torch.optim.Optimizer, epochs: int, steps: Sequence[int] = ()
) -> torch.optim.lr_scheduler.LRScheduler:
    """A step an epoch: along a cosine to 0, or a tenth after each of these epochs."""
    if steps:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(steps), gamma=0.1)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


def loss_of(logits: Tensor, target: Tensor, weight: Tensor, mean_images: int) -> Tensor:
    """The mean, over every `mean_images` rows, of their weighted mean.

    So a batch has the loss that it would have divided over devices of mean_images each, where each
    takes its own weighted mean: DistributedDataParallel averages these. Rows whose targets are
    ignored count 0.
    """
    counted = weight[target.clamp(min=0)] * (target != IGNORED)
    total = counted.view(-1, mean_images).sum(1, keepdim=True)
    share = (mean_images / len(target) / total).masked_fill(total == 0, 0.0)
    return disalign_ops.cross_entropy(
        logits, target, weight, ignore_index=IGNORED, reduction="sum",
        sample_weight=share.expand(-1, mean_images).reshape(-1),
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What both stages need."""

    recipe: Classification
    splits: Splits
    ranks: Ranks
    log: Log
    out: Path
    workers: int
    save_every: int

    def loader(self, images: Images, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            images, num_workers=self.workers, pin_memory=self.ranks.device.type == "cuda",
            persistent_workers=self.workers > 0, generator=torch.Generator(), **options,
        )  # fmt: skip

    def batches(self, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, target in loader:
            yield (images.to(self.ranks.device, non_blocking=True),
                   target.to(self.ranks.device, non_blocking=True))  # fmt: skip

    def in_order(self, images: Images, part: bool) -> DataLoader[Any]:
        """For evaluation; part: this rank's share alone."""
        world = self.ranks.world if part else 1
        return self.loader(
            images, batch_size=self.recipe.batch // self.ranks.world,
            sampler=range(self.ranks.rank if part else 0, len(images), world),
        )  # fmt: skip


def train(
    run: Run, stage: int, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int,
    weight: Tensor, lr_steps: Sequence[int] = (),
) -> None:  # fmt: skip
    """A stage's epochs, from its checkpoint on if there is one."""
    recipe, ranks, log = run.recipe, run.ranks, run.log
    schedule = schedule_of(optimizer, epochs, lr_steps)
    saved = checkpoint.Checkpoint(
        run.out / f"stage{stage}.ckpt", recipe, ranks, log,
        {"model": model, "optimizer": optimizer, "schedule": schedule},
    )  # fmt: skip
    torch.manual_seed(recipe.seed + ranks.rank)
    first, step = saved.resume()
    if (first, step) == (0, 0):
        saved.save(0, 0)
    images = Images(run.splits.train, training_transform(recipe), recipe.seed)
    order = TrainingOrder(len(images), recipe.batch, ranks, recipe.seed)
    loader = run.loader(images, batch_sampler=order)
    wrapped: nn.Module = DistributedDataParallel(model) if ranks.world > 1 else model
    weight = weight.to(ranks.device)
    total = epochs * len(order)
    with log.progress(f"stage {stage}", total, first * len(order) + step) as advance:
        for epoch in range(first, epochs):
            order.epoch, order.step = epoch, step
            wrapped.train()
            for inputs, target in run.batches(loader):
                with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.bf16):
                    logits = wrapped(inputs)
                    loss = loss_of(logits, target, weight, recipe.mean_images)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                word = ""
                if step % LOG_STEPS == 0 or step == len(order):
                    value = sum(ranks.gather(loss.item())) / ranks.world
                    if not math.isfinite(value):
                        raise FloatingPointError(
                            f"loss must be finite, got {value} in stage {stage}, epoch {epoch}, "
                            f"step {step}"
                        )
                    lr = schedule.get_last_lr()[-1]
                    log.write("step", stage=stage, epoch=epoch, step=step, loss=value, lr=lr)
                    word = f"loss {value:.3f}"
                advance(1, word)
                if step % run.save_every == 0 and step < len(order):
                    saved.save(epoch, step)
            schedule.step()
            step = 0
            saved.save(epoch + 1, 0)
    ranks.broadcast(model)


@torch.no_grad()
def evaluate(run: Run, stage: int, model: nn.Module) -> None:
    """The official evaluation, in float32, into the log and to the terminal: top-1, top-5 and macro
    F1; many, medium and few by the training images.
    """
    model.eval()
    metric = LongTailAccuracy(run.splits.train.counts, topk=(1, 5))
    images = Images(run.splits.test, test_transform(run.recipe))
    for inputs, target in run.batches(run.in_order(images, part=True)):
        metric.update(model(inputs), target)
    # A split without classes is NaN.
    found = {k: v for k, v in metric.compute().items() if isinstance(v, float)}
    scores = {k: v for k, v in found.items() if not math.isnan(v)}
    run.log.write("evaluation", stage=stage, images=str(run.splits.test.listed), **scores)
    if run.ranks.first:
        shown = (f"{name} {100 * value:.2f}" for name, value in scores.items())
        print(f"stage {stage} on {run.splits.test.listed.name}, %: {', '.join(shown)}", flush=True)


def choose_rho(run: Run, model: nn.Module) -> float:
    """The rho whose stage 2, over the features of the training images, is best on val.

    Features are of the middle of each image, without augmentation, and every rank computes all.
    """
    recipe, kept = run.recipe, run.out / "rho.json"
    if not any(run.ranks.gather(kept.exists())):
        model.eval()
        transform = test_transform(recipe)
        train, val = (
            sweep.cache_features(model, run.batches(run.in_order(Images(split, transform), False)))
            for split in (run.splits.train, run.splits.val)
        )
        layers = sweep.sweep_rho(
            model, *train, run.splits.train.counts, recipe.rhos, epochs=recipe.stage2_epochs,
            batch_size=recipe.batch, lr=recipe.stage2_lr, momentum=recipe.momentum,
            weight_decay=recipe.stage2_weight_decay,
            generator=torch.Generator().manual_seed(recipe.seed),
        )  # fmt: skip
        accuracy = {rho: _accuracy(layer, *val, recipe.batch) for rho, layer in layers.items()}
        if run.ranks.first:
            best = {"rho": max(accuracy, key=lambda rho: accuracy[rho]), "accuracy": accuracy}
            kept.write_text(json.dumps(best))
            run.log.write("sweep", images=str(run.splits.val.listed), **best)
        run.ranks.gather(None)  # until the file is there
    return float(json.loads(kept.read_text())["rho"])


def _accuracy(layer: nn.Module, features: Tensor, target: Tensor, batch: int) -> float:
    predicted = torch.cat([layer(rows).argmax(1) for rows in features.split(batch)])
    return (predicted == target).double().mean().item()


def command_line(recipe_class: type[Classification]) -> argparse.ArgumentParser:
    parser = config.command_line(recipe_class, "the data set's folder")
    parser.add_argument("--sweep-rho", action="store_true", help="choose rho among rhos on val")
    return parser


def run(
    recipe_class: type[Classification], read: Callable[[Path, Any], Splits],
    arguments: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """The main program of a recipe; read(DIR, recipe) reads the data set."""
    parser = command_line(recipe_class)
    options = parser.parse_args(arguments)
    recipe = from_options(recipe_class, options)
    if options.sweep_rho:
        recipe = replace(recipe, rho=None)
    elif recipe.rho is None:
        parser.error("--rho or --sweep-rho must be given: rho was never published")
    with process_group() as ranks:
        train_and_evaluate(recipe, read(options.data, recipe), ranks, options)


def train_and_evaluate(
    recipe: Classification, splits: Splits, ranks: Ranks, options: argparse.Namespace
) -> nn.Module:
    """Both stages, or what is left of them; returns the model of stage 2."""
    if recipe.batch % (ranks.world * recipe.mean_images):
        raise ValueError(
            f"batch must be a multiple of {ranks.world} processes x mean_images "
            f"{recipe.mean_images}, got {recipe.batch}"
        )
    log = Log(options.out, ranks)
    this = Run(recipe, splits, ranks, log, options.out, options.workers, options.save_every)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe)
    if ranks.device.type == "cuda":
        model.to(ranks.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    done = options.out / "stage1.pth"
    if any(ranks.gather(done.exists())):
        load_weights(model, done)
    else:
        log.write("recipe", values=recipe.values(), sources=recipe.sources())
        if recipe.stage1:
            load_weights(model, Path(recipe.stage1), torchvision_name)
        else:
            train(this, 1, model, stage1_optimizer(model, recipe), recipe.epochs,
                  torch.ones(recipe.classes), recipe.lr_steps)  # fmt: skip
        evaluate(this, 1, model)
        if ranks.first:
            checkpoint.save(done, model.state_dict())
    optimizer = stage2_optimizer(model, recipe)
    rho = choose_rho(this, model) if recipe.rho is None else recipe.rho
    this = replace(this, recipe=replace(recipe, rho=rho))
    weight = grw_weights(splits.train.counts, rho)
    train(this, 2, model, optimizer, recipe.stage2_epochs, weight)
    evaluate(this, 2, model)
    if ranks.first:
        checkpoint.save(options.out / "stage2.pth", model.state_dict())
    return model
