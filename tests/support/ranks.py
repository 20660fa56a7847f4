"""Runs a function in several gloo processes."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 60.0


def _start(
    rank: int, world: int, folder: str, timeout_s: float, together: bool,
    work: Callable[[int, int], None],
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=max(timeout_s, TIMEOUT_S)),
    )  # fmt: skip
    # A short timeout is that of the work: to connect takes longer on a machine that is busy.
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s))
    # A rank that leaves at once would break the connection that another is still making.
    Path(folder, f"connected {rank}").touch()
    while len(list(Path(folder).glob("connected *"))) < world:
        time.sleep(0.01)
    try:
        work(rank, world)
    except BaseException:
        told = f"rank {rank} of {world}:\n{traceback.format_exc()}"
        Path(folder, f"{time.monotonic_ns():020} of rank {rank}").write_text(told)
        raise
    # Nobody leaves before all are here, and nobody ends gloo's threads: now and then, on a machine
    # that is busy, that aborts the process ("terminate called without an active exception").
    if together:
        dist.barrier()
    os._exit(0)


def run(
    work: Callable[[int, int], None], world: int, timeout_s: float = TIMEOUT_S,
    together: bool = True,
) -> None:  # fmt: skip
    """work(rank, world), which can be pickled (a function at the top of its module, or a partial of
    one), in every process.

    Fails with what was raised first; the other ranks then fail for that. together: all of them
    come to the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_start, (world, folder, timeout_s, together, work), nprocs=world)
        except Exception as error:
            told = sorted(Path(folder).glob("* of rank *"))
            raise AssertionError(told[0].read_text() if told else str(error)) from None
