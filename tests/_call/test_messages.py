"""Error messages have one form: "X must be B, got A". The package's source is read, not run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from support.places import ROOT

# What other wordings of the same look like.
OTHER_FORM = re.compile(r"\bneeded (?:is|are)\b|[,;:] needs\b|[,;:] needed\b")
FILES = sorted(
    path
    for path in (
        *(ROOT / "disalign_ops").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
        *(ROOT / "buildtools").rglob("*.py"),
        ROOT / "setup.py",
    )
)


def literals(source: str) -> list[tuple[int, str]]:
    """Line and text of every string in a file but docstrings; what is formatted in becomes {}."""
    tree = ast.parse(source)
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    skip = docstrings | inside
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
            found.append((node.lineno, "".join(map(str, parts))))
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip
        ):
            found.append((node.lineno, node.value))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_say_what_must_be(path: Path) -> None:
    wrong = [(line, text) for line, text in literals(path.read_text()) if OTHER_FORM.search(text)]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ('raise ValueError(f"x is {x}, needed is a number")', True),
        ('raise ValueError(\n    f"x is {x}, "\n    "needs a number"\n)', True),
        ('text = f"x has shape {x}: needed are (N,)"\nraise ValueError(text)', True),
        ('raise ValueError(f"x must be a number, got {x}")', False),
        ('raise ImportError("plots needs matplotlib")', False),
        ('def f():\n    """No x, needed is none."""', False),
    ],
)
def test_the_other_form_is_caught(source: str, caught: bool) -> None:
    assert any(OTHER_FORM.search(text) for _, text in literals(source)) == caught
