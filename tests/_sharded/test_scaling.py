"""The paper estimate of class parallelism against what is allocated and carried; the example."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from test_ranks import Carried

from benchmarks import scaling
from disalign_ops import Shard, disalign_linear_cross_entropy
from support import ranks
from support.comparison import memory_held
from support.places import ROOT

STEP = scaling.Step(classes=20_000, features=64, rows=256, gpus=2)


def _a_step(rank: int, world: int) -> None:
    for sampled in (1.0, 0.1):
        step = scaling.Step(STEP.classes, STEP.features, STEP.rows, world, sampled)
        torch.manual_seed(0)
        x = torch.randn(step.rows, step.features, requires_grad=True)
        target = torch.randint(0, step.classes, (step.rows,))
        w = torch.randn(step.local_classes, step.features, requires_grad=True)
        a, b = (torch.ones(step.local_classes, requires_grad=True) for _ in range(2))
        c = torch.zeros(step.rows, requires_grad=True)
        weight = torch.rand(step.local_classes)

        def run() -> object:
            loss = disalign_linear_cross_entropy(
                x, w, target, c, a, b, weight=weight,  # noqa: B023
                shard=Shard(offset=rank * step.local_classes),  # noqa: B023
                sample_rate=None if step.sampled == 1 else step.sampled,  # noqa: B023
            )  # fmt: skip
            return torch.autograd.grad(loss, (x, w, c, a, b))  # noqa: B023

        run()
        with Carried() as carried:
            run()
        assert sorted(carried.bytes) == sorted(step.carried_bytes)
        held = memory_held(run)
        assert abs(held / step.loss_bytes - 1) < 0.15, (sampled, held, step.loss_bytes)


def test_the_estimate_is_what_is_allocated_and_carried() -> None:
    ranks.run(_a_step, STEP.gpus)


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(scaling.table()) in page


def test_more_gpus_take_less_memory_and_send_nothing_of_the_classes() -> None:
    steps = [scaling.Step(10**6, 512, 4096, gpus) for gpus in (8, 64, 512)]
    assert steps[0].memory_bytes > steps[1].memory_bytes > steps[2].memory_bytes
    assert len({step.carried_bytes for step in steps}) == 1
    other = scaling.Step(10**7, 512, 4096, 8)
    assert other.carried_bytes == steps[0].carried_bytes


@pytest.mark.parametrize("arguments", [[], ["--no-compare"]], ids=["compared", "alone"])
def test_the_example(arguments: list[str]) -> None:
    classes, rows, features = 30_000, 32, 64
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(ROOT / "examples" / "class_parallel.py"), f"--classes={classes}", f"--rows={rows}",
         f"--features={features}", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    losses = [float(n) for n in re.findall(r"loss (\d+\.\d+)", run.stdout)]
    assert len(losses) == 2 + (not arguments)
    assert losses[0] == losses[1]
    assert losses[-1] == pytest.approx(losses[0], rel=1e-6)
    # Without class weights: maxima; three sums and three numbers; features; confidence.
    expected = 4 * rows + 4 * (3 * rows + 3) + 4 * rows * features + 4 * rows
    assert run.stdout.count(f"carried {expected:,} bytes in 4 all-reduces") == 2
    if arguments:
        return
    peaks = [int(n) for n in re.findall(r"peak (\d+) MiB", run.stdout)]
    assert max(peaks[:2]) < peaks[2]


def test_the_example_says_how_to_start_it() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "class_parallel.py")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "start it by torchrun" in run.stderr
