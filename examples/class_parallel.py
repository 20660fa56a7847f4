"""One training step of a DisAlign head whose classes are divided over processes.

    torchrun --nproc-per-node 2 examples/class_parallel.py                      # CPU, gloo
    torchrun --nproc-per-node 8 examples/class_parallel.py --classes 10000000   # 8 GPUs, NCCL

Prints the loss, the bytes that collectives carry, and each rank's peak memory; then the same step
in one process with all classes, for comparison (--no-compare leaves it out).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from disalign_ops import Shard, disalign_linear_cross_entropy

_DRAW = 1000  # classes whose weight is drawn at a time, so that no division changes them


class CarriedBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that this process gives to all-reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if "allreduce" in str(func):
            self.calls.append(sum(t.numel() * t.element_size() for t in args[0]))
        return func(*args, **(kwargs or {}))


class Head(nn.Module):
    """The classes [first, last) of a classifier, and the confidence of every row."""

    def __init__(self, first: int, last: int, features: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(last - first, features, device=device))
        for j in range(first - first % _DRAW, last, _DRAW):
            generator = torch.Generator().manual_seed(j)
            drawn = torch.randn(_DRAW, features, generator=generator) / features**0.5
            begin, end = max(j, first), min(j + _DRAW, last)
            with torch.no_grad():
                self.weight[begin - first : end - first] = drawn[begin - j : end - j].to(device)
        self.scale = nn.Parameter(torch.ones(last - first, device=device))
        self.bias = nn.Parameter(torch.zeros(last - first, device=device))
        self.confidence = nn.Linear(features, 1, device=device)
        nn.init.zeros_(self.confidence.weight)
        nn.init.zeros_(self.confidence.bias)


def batch(rows: int, features: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same on every rank: in training, all ranks' features by an all-gather."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, features, generator=generator)
    target = torch.randint(0, classes, (rows,), generator=generator)
    return x.to(device).requires_grad_(), target.to(device)


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes of this process, now and at most so far: on a GPU of tensors, else what is resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def step(
    options: argparse.Namespace, rank: int, world: int, device: torch.device
) -> dict[str, Any]:
    """One step of SGD on this rank's classes."""
    before, _ = memory(device)
    first, last = (options.classes * k // world for k in (rank, rank + 1))
    head = Head(first, last, options.features, device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    x, target = batch(options.rows, options.features, options.classes, device)
    calibration = (head.confidence(x.detach()), head.scale, head.bias)
    with CarriedBytes() as carried:
        loss = disalign_linear_cross_entropy(
            x, head.weight, target, *calibration, shard=None if world == 1 else Shard(offset=first)
        )
        loss.backward()
    optimizer.step()
    return {
        "loss": loss.item(), "carried": carried.calls, "peak": memory(device)[1] - before,
    }  # fmt: skip


def alone(options: argparse.Namespace) -> dict[str, Any]:
    """The step in a process of its own, with all classes."""
    arguments = ["--alone", f"--classes={options.classes}", f"--rows={options.rows}",
                 f"--features={options.features}"]  # fmt: skip
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    run = subprocess.run([sys.executable, __file__, *arguments], env=environment,
                         capture_output=True, text=True, check=True)  # fmt: skip
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--classes", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=512, help="of the whole batch")
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--no-compare", action="store_true", help="without the step in one process")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if options.alone:
        print(json.dumps(step(options, 0, 1, torch.device("cuda" if cuda else "cpu"))))
        return
    if "RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node 2 examples/class_parallel.py")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = step(options, rank, world, device)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        print(f"{options.rows} rows of {options.features} features, {options.classes:,} classes "
              f"over {world} processes, {device.type}")  # fmt: skip
        for k, found in enumerate(everyone):
            print(f"rank {k}: loss {found['loss']:.6f}, carried {sum(found['carried']):,} bytes in "
                  f"{len(found['carried'])} all-reduces, peak {found['peak'] / 2**20:.0f} MiB"
                  )  # fmt: skip
        if not options.no_compare:
            found = alone(options)
            print(f"one process: loss {found['loss']:.6f}, peak {found['peak'] / 2**20:.0f} MiB")
    dist.barrier()
    if not cuda:
        # Ending gloo's threads now and then aborts a process that is done ("terminate called
        # without an active exception"): leave without.
        sys.stdout.flush()
        os._exit(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
