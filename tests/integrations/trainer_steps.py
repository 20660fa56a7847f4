"""One step of transformers' Trainer on a small Segformer, its rows divided in several ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DIVISIONS = ((4, 1), (2, 2), (1, 4))  # rows a batch, batches a step


def gradients_of_a_step(
    transformers: Any, folder: Path, labels: Tensor, prepare: Callable[[Any], None], **given: Any
) -> list[list[Tensor]]:
    """What SGD of learning rate 1 takes off each parameter, for each of DIVISIONS.

    labels: (4, 64, 64), four classes. prepare(trainer): before it trains. given: to the Trainer.
    """
    config = transformers.SegformerConfig(
        num_labels=4, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=16, hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    data = [{"pixel_values": torch.randn(3, 64, 64), "labels": y} for y in labels]
    grads = []
    for rows, steps in DIVISIONS:
        torch.manual_seed(0)
        model = transformers.SegformerForSemanticSegmentation(config)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
        arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=rows, gradient_accumulation_steps=steps,
            max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, optim="sgd",
            learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
        )  # fmt: skip
        before = [p.detach().clone() for p in model.parameters()]
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data, eval_dataset=data[2:], **given
        )
        prepare(trainer)
        trainer.train()
        grads.append([b - p.detach() for b, p in zip(before, model.parameters(), strict=True)])
        assert trainer.evaluate()["eval_loss"] > 0
    assert max(float(grad.abs().max()) for grad in grads[0]) > 0.01
    return grads


def assert_alike(grads: list[list[Tensor]]) -> None:
    for other in grads[1:]:
        for grad, expected in zip(other, grads[0], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)
