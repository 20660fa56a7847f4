"""torchvision beside a CPU build of torch, in a process of its own.

torchvision's wheels are built for torch's CUDA build. With a CPU build their compiled operators do
not load, and `import torchvision` fails for want of the schemas of two; the models and transforms
of the recipes need none. `make setup` installs it into a folder that is not on Python's path, since
torchmetrics imports it where it finds it.

    python -m support.with_torchvision recipes.imagenet_lt --data DIR --out DIR

runs a module as `python -m` does; `run` a function of a test. With KILL_AFTER=N in the environment
the process kills itself after N steps of the optimizers.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import ranks
from .places import ROOT, TESTS

FOLDER = Path(sys.prefix, "torchvision")
FOUND = FOLDER.is_dir() or importlib.util.find_spec("torchvision") is not None


def use() -> None:
    """Makes `import torchvision` work in this process."""
    sys.path.append(str(FOLDER))
    if torch.version.cuda is None:
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", boxes)


def _work(function: Callable[[], None], rank: int, world: int) -> None:
    use()
    function()


def run(function: Callable[[], None], world: int = 1) -> None:
    """function, at the top of its module or a partial of one, in `world` processes with gloo."""
    from functools import partial

    ranks.run(partial(_work, function), world)


def start(
    *arguments: Any, processes: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A module with its arguments, by Python or by torchrun."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.run(
        [*launcher, "support.with_torchvision", *map(str, arguments)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def _kill_after(steps: int) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)


if __name__ == "__main__":
    use()
    if "KILL_AFTER" in os.environ:
        _kill_after(int(os.environ["KILL_AFTER"]))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
