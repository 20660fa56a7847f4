"""The reference has every public name. (The blocks run by conftest.py; `make docs` builds.)"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import disalign_ops

ROOT = Path(__file__).parents[1]
MODULES = (
    "nn", "class_stats", "metrics", "segmentation_metrics", "losses", "sweep", "checkpoints",
    "plots",
    "distributed", "integrations.timm", "integrations.torchvision", "integrations.transformers",
    "integrations.smp", "integrations.lightning", "integrations.mmseg", "integrations.mmdet",
    "integrations.detectron2",
)  # fmt: skip


def documented() -> set[str]:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    return {name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}


def public(module: str) -> set[str]:
    """Functions and classes of a module, and what it exports of a private one (`X as X`)."""
    path = ROOT / "disalign_ops" / f"{module.replace('.', '/')}.py"
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names if alias.asname == alias.name}
    return {name for name in found if not name.startswith("_")}


def test_every_name_of_the_package_is_in_the_reference() -> None:
    pages = documented()
    names = {name for name in disalign_ops.__all__ if name not in MODULES}
    assert names
    assert {name for name in names if f"disalign_ops.{name}" not in pages} == set()


@pytest.mark.parametrize("module", MODULES)
def test_every_name_of_a_module_is_in_the_reference(module: str) -> None:
    pages = documented()
    whole = f"disalign_ops.{module}"
    assert whole in pages
    missing = {
        name
        for name in public(module)
        if f"{whole}.{name}" not in pages and f"disalign_ops.{name}" not in pages
    }
    assert missing == set()
