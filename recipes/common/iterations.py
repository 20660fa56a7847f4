"""Training by iterations: an endless order of samples, and the loop over it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from .checkpoint import Checkpoint, load_weights, save
from .config import Recipe
from .log import Log
from .order import Key, seed_of
from .ranks import Ranks


class EndlessOrder(Sampler[list[Key]]):
    """A batch sampler: this rank's part of the batches from `step` to `iterations`.

    Args:
        indices: (n,) int64, the samples of an epoch in any order, by a generator of its own: an
            epoch may repeat samples, and epochs may differ in length.

    Epochs are shuffled and follow one another without a gap; a batch has the same samples on any
    number of ranks. A key has the place in the sequence, so that a sample that comes twice in an
    epoch is augmented twice.
    """

    def __init__(
        self, indices: Callable[[torch.Generator], Tensor], batch: int, iterations: int,
        ranks: Ranks, seed: int,
    ) -> None:  # fmt: skip
        if batch % ranks.world or batch < 1:
            raise ValueError(
                f"batch must be a multiple of the {ranks.world} processes, got {batch}"
            )
        self.indices, self.batch, self.iterations = indices, batch, iterations
        self.ranks, self.seed, self.step = ranks, seed, 0

    def __len__(self) -> int:
        return self.iterations - self.step

    def __iter__(self) -> Iterator[list[Key]]:
        own = self.batch // self.ranks.world
        sequence, place = self._sequence(), 0
        for step in range(self.step, self.iterations):
            first = step * self.batch + self.ranks.rank * own
            keys: list[Key] = []
            while len(keys) < own:
                index = next(sequence)
                if place >= first:
                    keys.append((place, index))
                place += 1
            yield keys

    def _sequence(self) -> Iterator[int]:
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            indices = self.indices(generator)
            yield from indices[torch.randperm(len(indices), generator=generator)].tolist()
            epoch += 1


def repeat_factors(image_classes: list[set[int]], threshold: float) -> Tensor:
    """(n,) float64: how often an epoch has each image, by the classes it shows.

    max over its classes of max(1, sqrt(threshold / share of the images that show the class)).
    Source: Gupta et al., "LVIS", CVPR 2019 (arXiv 1908.03195v2), appendix B.2; as detectron2's
    RepeatFactorTrainingSampler. A threshold of 0 gives 1.
    """
    shown = torch.zeros(1 + max((max(c) for c in image_classes if c), default=0))
    for classes in image_classes:
        shown[list(classes)] += 1
    factor = (threshold * len(image_classes) / shown.double()).sqrt().clamp(min=1)
    return torch.stack([factor[list(c)].max() if c else factor.new_ones(()) for c in image_classes])


def repeated(factors: Tensor) -> Callable[[torch.Generator], Tensor]:
    """For `EndlessOrder`: image i comes factors[i] times an epoch, on average over the epochs."""

    def indices(generator: torch.Generator) -> Tensor:
        draws = torch.rand(len(factors), generator=generator, dtype=torch.float64)
        times = factors.floor() + (draws < factors.frac())
        return torch.repeat_interleave(torch.arange(len(factors)), times.long())

    return indices


def warmup_multistep(
    steps: tuple[int, ...], gamma: float, warmup: int, warmup_factor: float
) -> Callable[[int], float]:
    """The factor of the learning rate by the iteration: WarmupMultiStepLR of cvpods, detectron2."""

    def factor(iteration: int) -> float:
        done = min(1.0, iteration / warmup) if warmup else 1.0
        drops = bisect_right(steps, iteration)
        return (warmup_factor * (1 - done) + done) * float(gamma**drops)

    return factor


def poly(iterations: int, power: float, least: float) -> Callable[[int], float]:
    """The factor of the learning rate by the iteration: mmcv's PolyLrUpdaterHook.

    least: the learning rate after `iterations`, as a share of that at the start.
    """

    def factor(iteration: int) -> float:
        left = max(0.0, 1 - iteration / iterations)
        return float((1 - least) * left**power + least)

    return factor


LOG_EVERY = 50  # iterations


def replicated(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model, its gradients averaged over the ranks where there are several."""
    if ranks.world == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


Step = Callable[[Any], Tensor]  # the loss of a batch


def train(
    stage: int, step: Step, dataset: Dataset[Any], order: EndlessOrder, checkpoint: Checkpoint,
    log: Log, *, collate: Callable[[list[Any]], Any], workers: int, save_every: int,
) -> None:  # fmt: skip
    """From the last checkpoint, if there is one, to the last iteration, and a checkpoint of it.

    checkpoint.parts have "optimizer" and "schedule". Raises FloatingPointError: a loss that is not
    finite.
    """
    optimizer, schedule = checkpoint.parts["optimizer"], checkpoint.parts["schedule"]
    _, order.step = checkpoint.resume()
    if not order.step:
        checkpoint.save(0, 0)  # so that the log is cut back to here
    # A generator of its own: a loader draws a number when it starts, and starts again on resuming.
    loader = DataLoader(
        dataset, batch_sampler=order, collate_fn=collate, num_workers=workers,
        generator=torch.Generator(), pin_memory=order.ranks.device.type == "cuda",
    )  # fmt: skip
    with log.progress(f"stage {stage}", order.iterations, order.step) as advance:
        for done, batch in enumerate(loader, order.step + 1):
            loss = step(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            saved, word = done == order.iterations or done % save_every == 0, ""
            if saved or done % LOG_EVERY == 0:
                number = sum(order.ranks.gather(loss.item())) / order.ranks.world
                if not math.isfinite(number):
                    raise FloatingPointError(
                        f"loss must be finite, got {number} in stage {stage}, iteration {done}"
                    )
                rate = optimizer.param_groups[0]["lr"]
                log.write("step", stage=stage, step=done, loss=number, lr=rate)
                word = f"loss {number:.3f}"
            schedule.step()
            advance(1, word)
            if saved:
                checkpoint.save(0, done)


Scores = dict[str, Any]


def two_stages(
    model: nn.Module, recipe: Recipe, stage1: str, folder: Path, ranks: Ranks, log: Log,
    run: Callable[[int, Path], None], evaluate: Callable[[], Scores],
    table: Callable[[Scores], str],
) -> None:  # fmt: skip
    """Each stage and its scores; folder then has stage1.pth and stage2.pth, state_dicts.

    What an earlier run with this folder has done is not done again.

    Args:
        stage1: "", or a file of the model's weights after stage 1, which is then only evaluated.
        run: trains a stage, with its checkpoint in the file it is given.
    """
    started = [f"stage{stage}.{kind}" for stage in (1, 2) for kind in ("ckpt", "pth")]
    if not any(ranks.gather(any((folder / name).exists() for name in started))):
        log.cut(0)
        log.write("recipe", values=recipe.values(), sources=recipe.sources())
    for stage in (1, 2):
        done = folder / f"stage{stage}.pth"
        if any(ranks.gather(done.exists())):
            load_weights(model, done)
            continue
        if stage == 1 and stage1:
            load_weights(model, Path(stage1))
        else:
            run(stage, folder / f"stage{stage}.ckpt")
            ranks.broadcast(model)
        scores = evaluate()
        log.write("evaluation", stage=stage, **scores)
        if ranks.first:
            print(f"stage {stage}\n{table(scores)}", flush=True)
            save(done, model.state_dict())
