"""Runs a recipe as a user does, kills it, and compares what two runs leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # last: where a wheel of the library is installed, it is taken


def start(module: str, arguments: list[str], ranks: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *(launcher if ranks > 1 else []), "-m", module,
         *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )  # fmt: skip


def run(module: str, arguments: list[str], ranks: int = 1) -> str:
    """What it prints."""
    process = start(module, arguments, ranks)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return printed


def kill(module: str, arguments: list[str], out: Path, stage: int, step: int) -> None:
    """Starts a run with --out `out` and kills it once its log has that step, or shortly after."""
    process = start(module, arguments)
    while process.poll() is None:
        if any((line.get("stage"), line.get("step")) == (stage, step) for line in log(out)):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended by itself: {errors[-3000:]}"


def log(out: Path) -> list[dict[str, Any]]:
    file = out / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def scores(out: Path) -> dict[int, dict[str, Any]]:
    """The evaluation after each stage."""
    lines = [line for line in log(out) if line["event"] == "evaluation"]
    assert [line["stage"] for line in lines] == [1, 2]
    return {line["stage"]: line for line in lines}


def same(one: Path, other: Path) -> None:
    """The logs and every tensor of the weights, to the bit."""
    assert log(one) == log(other)
    for name in ("stage1.pth", "stage2.pth"):
        states = [torch.load(folder / name) for folder in (one, other)]
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
