"""Two saved runs side by side: those of `bench --save`, or of benchmarks.run's bench.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .text import number, table

_SHOWN = ("device", "device_type", "backend", "threads", "python", "system")


def load(path: Path) -> dict[str, Any]:
    """A saved run; ArgumentError for a file that is none."""
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ArgumentError(f"{path} must be JSON that bench --save wrote: {error}") from error
    if not isinstance(found, dict) or not {"environment", "results"} <= set(found):
        raise ArgumentError(f"{path} must be JSON that bench --save wrote, got other keys")
    return found


def _about(found: dict[str, Any]) -> dict[str, str]:
    about = found["environment"]
    values = {key: str(about.get(key)) for key in _SHOWN}
    versions = {name: str(version) for name, version in about["versions"].items()}
    return values | versions | {"disalign_ops": str(about["disalign_ops"]["version"])}


def _verdict(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Of B. Ranges from the 20th to the 80th percentile that meet say nothing."""
    if b["p80_ms"] < a["p20_ms"]:
        return "faster"
    return "slower" if b["p20_ms"] > a["p80_ms"] else "no difference seen"


def _mebibytes(result: dict[str, Any]) -> str:
    extra = result["peak_extra_bytes"]
    return "-" if extra is None else f"{extra / 2**20:,.1f}"


def comparison(first: Path, second: Path) -> str:
    """What differs between the machines, and every result that both files have."""
    a, b = load(first), load(second)
    of_a, of_b = _about(a), _about(b)
    lines = [f"A: {first}", f"B: {second}"]
    for key in dict.fromkeys([*of_a, *of_b]):
        if of_a.get(key) != of_b.get(key):
            lines.append(f"  {key}: A {of_a.get(key, 'none')}, B {of_b.get(key, 'none')}")
    in_b = {(r["case"], r["contestant"]): r for r in b["results"] if r["median_ms"]}
    rows = []
    for one in a["results"]:
        other = in_b.get((one["case"], one["contestant"]))
        if other is None or not one["median_ms"]:
            continue
        times = (one["median_ms"], other["median_ms"])
        rows.append([
            f"{one['case']}: {one['contestant']}", *(number(ms) for ms in times),
            f"{times[1] / times[0]:.2f}", _mebibytes(one), _mebibytes(other), _verdict(one, other),
        ])  # fmt: skip
    if not rows:
        raise ArgumentError(f"{first} and {second} must have a result of one shape, got none")
    headings = ["forward and backward", "A ms", "B ms", "B / A", "A MiB", "B MiB", "B is"]
    return "\n".join([*lines, "", table(headings, rows)])
