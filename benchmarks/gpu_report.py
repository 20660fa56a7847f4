"""What gpu_check.py says of its steps: the last line, the gaps to the model, the plot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu_machine import Json, why_missing

# A case for which the model has less is shown, and not ranked: it leaves out the start and the end
# of a launch.
RANKED_MS = 0.03
GAPS = 3


def rows_of(state: Json, table: str) -> list[Json]:
    """Of all steps that gave this table."""
    return [row for step in state["steps"].values() if step.get("table") == table
            for row in step.get("rows", ())]  # fmt: skip


def gaps(rows: Iterable[Json], most: int = GAPS) -> list[str]:
    """Where measurement and model differ most, by their ratio."""
    ranked = [row for row in rows if (row["predicted_milliseconds"] or 0) >= RANKED_MS]

    def ratio(row: Json) -> float:
        return float(row["milliseconds"] / row["predicted_milliseconds"])

    ranked.sort(key=lambda row: -abs(math.log(ratio(row))))
    return [
        f"{row['rows']:.0f} x {row['classes']:.0f} {row['dtype']} {row['step']}: "
        f"{row['milliseconds']:.3f} ms, {ratio(row):.2f} times the model's"
        for row in ranked[:most]
    ]


def last_line(state: Json, names: Iterable[str]) -> str:
    """What passed, failed, was left out; the largest gaps."""
    ends: dict[str, list[str]] = {"passed": [], "failed": [], "left out": [], "not run": []}
    for name in names:
        record = state["steps"].get(name, {"status": "not run"})
        reason = f" ({record['reason']})" if record.get("reason") else ""
        ends[record["status"]].append(name + reason)
    parts = [f"{end}: {', '.join(of) or 'none'}" for end, of in ends.items()]
    rows = rows_of(state, "model.csv")
    found = gaps(rows)
    why = rows[0]["predicted_for"] if rows else "nothing was measured"
    parts.append("largest gaps to the model: " + (", ".join(found) or f"none, {why}"))
    return "gpu-check: " + "; ".join(parts)


def draw(rows: list[Json], path: Path, title: str) -> str:
    """Shares of a copy, measured and predicted. Returns why there is no plot, or an empty text."""
    if not rows:
        return "nothing was measured"
    if why := why_missing("matplotlib"):
        return why
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(rows)), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [100 * row["share_of_copy"] for row in rows], label="measured")
    known = [(i, 100 * row["predicted_share_of_copy"]) for i, row in enumerate(rows)
             if row["predicted_share_of_copy"]]  # fmt: skip
    axes.plot([x for _, x in known], [i for i, _ in known], "k|", markersize=9, label="model")
    names = [f"{r['rows']:.0f} x {r['classes']:.0f} {r['dtype']} {r['step']}" for r in rows]
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of a copy of the same logits, %")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return ""
