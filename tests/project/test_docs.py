"""The reference pages name all that is public. Blocks of docs and README run by conftest.py."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from support.places import ROOT

import disalign_ops

REFERENCE = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
DIRECTIVES = set(re.findall(r"^::: disalign_ops\.(\S+)$", REFERENCE, re.MULTILINE))
MODULES = (
    "checkpoints", "class_stats", "errors", "losses", "metrics", "nn", "plots",
    "segmentation_metrics", "sweep",
)  # fmt: skip
FRAMEWORKS = {path.stem for path in (ROOT / "disalign_ops/integrations").glob("[a-z]*.py")}


def public_names(source: str) -> set[str]:
    """Functions and classes that a file defines."""
    return set(re.findall(r"^(?:def|class) ([A-Za-z]\w*)", source, re.MULTILINE))


@pytest.mark.parametrize("name", sorted({*disalign_ops.__all__} - {*MODULES}))
def test_the_packages_own_names(name: str) -> None:
    assert name in DIRECTIVES


@pytest.mark.parametrize("name", MODULES)
def test_a_module(name: str) -> None:
    assert name in DIRECTIVES
    module = importlib.import_module(f"disalign_ops.{name}")
    names = public_names(inspect.getsource(module)) | {*getattr(module, "__all__", ())}
    if name == "nn":
        names |= {"DisAlignLinear", "DisAlignCosineLinear", "DisAlignSegHead"}
    for each in names:
        in_package = each in disalign_ops.__all__ and each in DIRECTIVES
        constant = each.isupper() and f"`{name}.{each}`" in REFERENCE  # has no docstring
        assert in_package or constant or f"{name}.{each}" in DIRECTIVES, each


@pytest.mark.parametrize("name", sorted(FRAMEWORKS))
def test_an_adapter(name: str) -> None:
    # Read and not imported: the frameworks are not here.
    names = public_names((ROOT / f"disalign_ops/integrations/{name}.py").read_text())
    wanted = {f"integrations.{name}"} | {f"integrations.{name}.{each}" for each in names}
    assert wanted <= DIRECTIVES


def test_what_is_made_when_it_is_asked_for() -> None:
    assert "`metrics.LongTailAccuracyMetric`" in REFERENCE
