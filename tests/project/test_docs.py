"""The reference pages name all that is public. Blocks of docs and README run by conftest.py."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

import disalign_ops
from support.compiler_report import KNOWN_SPILLS
from support.places import ROOT

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


@pytest.mark.parametrize("name", sorted({*disalign_ops.__all__} - {*MODULES, "integrations"}))
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


DESIGN = (ROOT / "docs" / "design.md").read_text()
MAP = DESIGN[DESIGN.index("\n## Map\n") : DESIGN.index("\n### Where is ...\n")]
ANSWERS = DESIGN[DESIGN.index("\n### Where is ...\n") :].split("\n## ")[0]


def mapped_files() -> list[str]:
    """The paths that the map of docs/design.md names, in its order: a heading's folder, a file."""
    folder, found = "", []
    for line in MAP.splitlines():
        if line.startswith("### "):
            folder = line.removeprefix("### ")
        elif entry := re.match(r"- `([^`]+)`: \S", line):
            found.append(entry[1] if folder == "tests" else f"{folder}/{entry[1]}")
    return found


def test_the_map_names_every_file_and_nothing_else() -> None:
    mapped = mapped_files()
    assert len(mapped) == len(set(mapped))
    there = {path for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    for part in ("disalign_ops", "buildtools"):
        there |= set((ROOT / part).rglob("*.py"))
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    # Stand-ins are packages of frameworks, which their own README lists.
    folders = {path for path in folders if "standins" not in path.parts}
    folders |= {ROOT / "tests/data", ROOT / "tests/cpu"}
    expected = {str(path.relative_to(ROOT)) for path in there}
    expected |= {f"{path.relative_to(ROOT)}/" for path in folders}
    assert set(mapped) - expected == set()
    assert expected - set(mapped) == set()


def test_the_answers_name_files_that_are_there() -> None:
    named = re.findall(r"`([\w./]+/[\w.]+)`", ANSWERS)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_docs_say_how_much_kernels_spill() -> None:
    spills = {spill[1:]: most for spill, most in KNOWN_SPILLS.items() if spill[0] in ("80", "90")}
    most = max(most for spill, most in KNOWN_SPILLS.items() if spill[0] in ("80", "90"))
    text = " ".join((ROOT / "docs" / "gpus.md").read_text().split())
    assert f"a thread spills at most {most} bytes, of {len(spills)} kernels" in text
