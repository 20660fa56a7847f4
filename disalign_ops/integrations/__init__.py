"""Adapters to frameworks, a file each, imported only when asked for:

from disalign_ops.integrations import timm, torchvision, transformers, smp, lightning
from disalign_ops.integrations import mmseg, mmdet, detectron2
"""

from __future__ import annotations

import importlib
from types import ModuleType

_ADAPTERS = (
    "detectron2", "lightning", "mmdet", "mmseg", "smp", "timm", "torchvision", "transformers",
)  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    """The adapter, which imports its framework."""
    if name in _ADAPTERS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_ADAPTERS]
