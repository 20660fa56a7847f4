"""Where things lie in the tree."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"


def test_files(*names: str) -> list[str]:
    """The files test_<name>.py, in whatever folder of tests."""
    found = {path.stem: str(path) for path in TESTS.rglob("test_*.py")}
    return [found[f"test_{name}"] for name in names]


test_files.__test__ = False  # type: ignore[attr-defined] # not a test of pytest's
