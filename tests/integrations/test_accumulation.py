"""A step of several batches: Trainer and Lightning divide by what the whole step counts.

The first tests run without the frameworks, with the calls that these make.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_steps import assert_alike, gradients_of_a_step

from disalign_ops import cross_entropy, upsample_cross_entropy
from disalign_ops.errors import ArgumentError
from disalign_ops.integrations.transformers import one_denominator, semantic_segmentation_loss

WHY = "`make test-integrations` installs it"
WEIGHT = torch.tensor([1.0, 7.0, 0.2, 3.0])


@pytest.fixture(autouse=True)
def _seed() -> None:  # `make test-integrations` runs without the conftest.py that does it
    torch.manual_seed(0)


def masks() -> Tensor:
    """Four images whose sums of weights differ; one has nothing that counts."""
    labels = torch.randint(0, 4, (4, 64, 64))
    labels[0, :50] = 255
    labels[1] = 255
    labels[2, 10:] = 1
    return labels


# --- transformers


class StandInTrainer:
    """What transformers.Trainer (5.23) does with compute_loss_func in one step."""

    def __init__(self, loss: Any, processes: int = 1, **arguments: Any) -> None:
        self.compute_loss_func, self.processes = loss, processes
        self.args = SimpleNamespace(
            n_gpu=1, device=torch.device("cpu"), average_tokens_across_devices=True
        )
        vars(self.args).update(arguments)

    def get_batch_samples(self, batches: Iterator[Any], number: int, device: Any) -> Any:
        taken = [next(batches) for _ in range(number)]
        if "labels" not in taken[0]:
            return taken, None
        return taken, torch.stack([b["labels"].ne(-100).sum() for b in taken]).sum()

    def step(self, batches: list[dict[str, Tensor]]) -> Tensor:
        samples, items = self.get_batch_samples(iter(batches), len(batches), self.args.device)
        losses = []
        for batch in samples:
            loss = self.compute_loss_func(
                SimpleNamespace(logits=batch["logits"]), batch["labels"], num_items_in_batch=items
            )
            losses.append(loss * self.processes)  # where average_tokens_across_devices is True
        return torch.stack(losses).sum()


@pytest.mark.parametrize("normalizer", ["weights", "valid", "count"])
def test_one_denominator_of_a_step(normalizer: Any) -> None:
    labels, logits = masks(), torch.randn(4, 4, 16, 16)
    loss = semantic_segmentation_loss(WEIGHT, normalizer=normalizer)
    expected = upsample_cross_entropy(logits, labels, WEIGHT, normalizer=normalizer)
    trainer = StandInTrainer(loss)
    assert one_denominator(trainer) is trainer
    for cuts in ([4], [2, 2], [1, 1, 1, 1], [1, 3]):
        parts = zip(logits.split(cuts), labels.split(cuts), strict=True)
        found = trainer.step([{"logits": z, "labels": y} for z, y in parts])
        torch.testing.assert_close(found, expected)
    # A batch that is evaluated comes with another count, Trainer's own.
    items = torch.tensor(2 * 64 * 64)
    found = loss(SimpleNamespace(logits=logits[2:]), labels[2:], num_items_in_batch=items)
    alone = upsample_cross_entropy(logits[2:], labels[2:], WEIGHT, normalizer=normalizer)
    torch.testing.assert_close(found, alone)
    assert trainer.get_batch_samples(iter([{}]), 1, None) == ([{}], None)


def test_without_it_a_step_is_the_mean_of_its_batches() -> None:
    labels, logits = masks(), torch.randn(4, 4, 16, 16)
    labels[1] = 0
    loss = semantic_segmentation_loss(WEIGHT)
    parts = [
        {"logits": z, "labels": y} for z, y in zip(logits.split(2), labels.split(2), strict=True)
    ]
    means = [upsample_cross_entropy(b["logits"], b["labels"], WEIGHT) for b in parts]
    torch.testing.assert_close(StandInTrainer(loss).step(parts), (means[0] + means[1]) / 2)
    whole = upsample_cross_entropy(logits, labels, WEIGHT)
    assert abs(float(means[0] + means[1]) / 2 - float(whole)) > 0.01


def test_a_normalizer_that_is_a_number_is_taken_as_it_is() -> None:
    labels, logits = masks(), torch.randn(4, 4, 16, 16)
    loss = semantic_segmentation_loss(WEIGHT, normalizer=100.0)
    parts = [
        {"logits": z, "labels": y} for z, y in zip(logits.split(2), labels.split(2), strict=True)
    ]
    expected = upsample_cross_entropy(logits, labels, WEIGHT, normalizer=100.0)
    torch.testing.assert_close(StandInTrainer(loss).step(parts), expected)


def test_what_one_denominator_refuses() -> None:
    loss = semantic_segmentation_loss(WEIGHT)
    with pytest.raises(ArgumentError, match="compute_loss_func that semantic_segmentation_loss"):
        one_denominator(StandInTrainer(nn.CrossEntropyLoss()))
    with pytest.raises(ArgumentError, match="normalizer must be a name, got a float"):
        one_denominator(StandInTrainer(semantic_segmentation_loss(normalizer=3.0)))
    with pytest.raises(ArgumentError, match="trainer must have one GPU a process, got 2"):
        one_denominator(StandInTrainer(loss, n_gpu=2))
    trainer: Any = StandInTrainer(loss)
    trainer.get_tp_size = lambda: 2
    with pytest.raises(ArgumentError, match="batches of its own on every rank, got tp 2"):
        one_denominator(trainer)


def test_trainer_with_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=WHY)
    assert_alike(gradients_of_a_step(
        transformers, tmp_path, masks(), one_denominator,
        compute_loss_func=semantic_segmentation_loss(WEIGHT),
    ))  # fmt: skip


# --- Lightning


@pytest.fixture
def whole_step_mean(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The callback; where Lightning is missing, over a stand-in of its Callback."""
    name = "disalign_ops.integrations.lightning"
    if importlib.util.find_spec("lightning") is None:
        framework = ModuleType("lightning.pytorch")
        framework.Callback = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
        monkeypatch.setitem(sys.modules, "lightning.pytorch", framework)
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
    else:
        module = importlib.import_module(name)
    return module.WholeStepMean


ROWS = ([0, 1, 1, -100], [-100, -100], [2, 0, 3])


def test_the_gradients_of_a_step(whole_step_mean: Any) -> None:
    x, target = torch.randn(9, 4), torch.tensor([t for part in ROWS for t in part])
    sample_weight = torch.rand(9)
    model, accumulated = nn.Linear(4, 4), nn.Linear(4, 4)
    accumulated.load_state_dict(model.state_dict())
    cross_entropy(model(x), target, WEIGHT, sample_weight=sample_weight).backward()
    mean = whole_step_mean(WEIGHT)
    optimizer = torch.optim.SGD(accumulated.parameters(), lr=0.1)
    trainer = SimpleNamespace(accumulate_grad_batches=3)
    cuts = [len(part) for part in ROWS]
    for _ in range(2):  # a step leaves nothing to the next
        optimizer.zero_grad()
        for z, t, v in zip(
            x.split(cuts), target.split(cuts), sample_weight.split(cuts), strict=True
        ):
            mean.add(t, sample_weight=v)
            loss = cross_entropy(accumulated(z), t, WEIGHT, reduction="sum", sample_weight=v)
            (loss / 3).backward()  # as Lightning does
        mean.on_before_optimizer_step(trainer, accumulated, optimizer)
        for found, expected in zip(accumulated.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad)
    with pytest.raises(ArgumentError, match=r"training_step must call WholeStepMean.add"):
        mean.on_before_optimizer_step(trainer, accumulated, optimizer)
    nothing = torch.full((3,), -100)
    mean.add(nothing)
    optimizer.zero_grad()
    cross_entropy(accumulated(x[:3]), nothing, reduction="sum").backward()
    mean.on_before_optimizer_step(trainer, accumulated, optimizer)
    assert accumulated.weight.grad is not None
    assert (accumulated.weight.grad == 0).all()


def test_lightning_accumulates() -> None:
    lightning = pytest.importorskip("lightning", reason=WHY)
    from disalign_ops.integrations.lightning import WholeStepMean

    target = torch.tensor([0, 1, 1, -100, 2, 0, 3, 1])
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), target)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, mean: Any) -> None:
            super().__init__()
            self.layer, self.mean = nn.Linear(4, 4), mean

        def training_step(self, batch: Any, _: int) -> Tensor:
            self.mean.add(batch[1])
            return cross_entropy(self.layer(batch[0]), batch[1], WEIGHT, reduction="sum")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    found = []
    for rows in (8, 4, 1):
        torch.manual_seed(0)
        mean = WholeStepMean(WEIGHT)
        module = Module(mean)
        start = module.layer.weight.detach().clone()
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", accumulate_grad_batches=8 // rows, callbacks=[mean],
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            gradient_clip_val=100.0,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=rows))
        found.append(start - module.layer.weight.detach())
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    cross_entropy(layer(data.tensors[0]), target, WEIGHT).backward()
    for step in found:
        torch.testing.assert_close(step, layer.weight.grad)
