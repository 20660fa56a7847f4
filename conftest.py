"""Runs the Python blocks of README.md and docs: every file is one session, its blocks in order.

Here is what the blocks take for granted: tensors, a model, files. A page of docs says most of it
itself; the README's sections each have their own.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from torch import nn

Names = dict[str, Any]


def rows() -> Names:
    logits = torch.randn(8, 5, requires_grad=True)
    return {
        "logits": logits,
        "target": torch.randint(0, 5, (8,)),
        "weight": torch.rand(5),
        "train": lambda: nn.CrossEntropyLoss()(logits, torch.zeros(8, dtype=torch.int64)),
    }


def classifier() -> Names:
    """Of five classes, with a list of paths and labels as ImageNet-LT's."""
    samples = [k for k, n in enumerate((200, 60, 20, 6, 2)) for _ in range(n)]
    with open("ImageNet_LT_train.txt", "w") as file:
        file.writelines(f"{k}/{i}.jpg {k}\n" for i, k in enumerate(samples))
    images, target = torch.randn(64, 12), torch.randint(0, 5, (64,))
    return {
        "model": nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)),
        "loader": list(zip(images.split(16), target.split(16), strict=True)),
    }


def dense() -> Names:
    return {
        "logits": torch.randn(2, 6, 8, 8, requires_grad=True),
        "masks": torch.randint(0, 6, (2, 32, 32), dtype=torch.uint8),
        "weight": torch.rand(6),
        "model": nn.Module(),
        "features": torch.randn(2, 4, 8, 8),
        "in_channels": 4,
        "num_classes": 6,
        "pixels_per_class": torch.tensor([9000, 4000, 900, 400, 90, 40]),
    }


def linear() -> Names:
    return {
        "features": torch.randn(16, 8, requires_grad=True),
        "target": torch.randint(0, 50, (16,)),
        "head": nn.Linear(8, 50),
    }


def ranks() -> Names:
    """A process group of this process alone, which has nobody to exchange anything with."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    return linear() | {
        "group": None,
        "local_logits": torch.randn(16, 50),
        "local_weight": torch.randn(50, 8, requires_grad=True),
        "confidence": torch.zeros(16, requires_grad=True),
        "local_scale": torch.ones(50, requires_grad=True),
        "local_bias": torch.zeros(50, requires_grad=True),
    }


def boxes() -> Names:
    """Regions of a detector, class 0 the background."""
    return {
        "features": torch.randn(16, 256),
        "labels": torch.randint(0, 4, (16,)),
        "boxes_per_class": torch.tensor([400, 60, 9]),
    }


def sharded() -> Names:
    """A model, and a mesh of the same group."""
    from torch.distributed.device_mesh import init_device_mesh

    from disalign_ops import nn as dnn

    names = ranks()
    model = nn.Module()
    model.head = dnn.DisAlignLinear(8, 50)
    mesh = init_device_mesh("cpu", (1,))
    return names | {"mesh": mesh, "model": model, "weight": torch.rand(50)}


# File or heading of the README -> what its blocks take for granted.
STAND_INS: dict[str, Callable[[], Names]] = {
    "In place of F.cross_entropy": rows,
    "Classification: the second stage in ten lines": classifier,
    "Segmentation": dense,
    "Very many classes": linear,
    "Several GPUs": ranks,
    "Detection": boxes,
    "class_parallel.md": ranks,
    "integrations.md": sharded,
}


class InPlace(PythonEvaluator):
    """Before the first block of a file or section, its stand-ins."""

    def __call__(self, example: Example) -> None:
        place = os.path.basename(example.path)
        if place == "README.md":
            above = example.document.text[: example.start]
            place = re.findall(r"^## (.+)$", above, re.MULTILINE)[-1]
        missing = example.namespace["_stand_ins"].pop(place, None)
        if missing is not None:
            example.namespace.update(missing())
        super().__call__(example)


def start(namespace: Names) -> None:
    """In a folder of its own: blocks may write files."""
    torch.manual_seed(0)
    namespace["_folder"] = tempfile.TemporaryDirectory()
    namespace["_before"] = os.getcwd()
    namespace["_stand_ins"] = dict(STAND_INS)
    namespace["_threads"] = torch.get_num_threads()
    torch.set_num_threads(1)  # the blocks are small
    os.chdir(namespace["_folder"].name)


def end(namespace: Names) -> None:
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()
    torch.set_num_threads(namespace["_threads"])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", InPlace())],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=start,
    teardown=end,
).pytest()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The blocks of a page are one session: pytest-xdist gives them to one process."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(pytest.mark.xdist_group(item.path.name))
