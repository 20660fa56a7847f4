"""`python -m benchmarks.against_model`: the steps of benchmarks.model on this GPU, beside it.

A step is captured in a CUDA graph, so that the kernels are timed and not the calls. It is replayed
in rounds with a copy of the logits, the L2 cache emptied before. Writes model.csv.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import disalign_ops
from benchmarks import model
from benchmarks.gpus import CAPABILITIES, GPUS, Gpu
from disalign_ops._bench import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPY = "copy"
ROUNDS = 100

# The driver's names of what gpus.py has.
DRIVER_NAMES = {
    "Tesla T4": "T4",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80 GB",
    "NVIDIA L4": "L4",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA B200": "B200",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
}


@dataclass(frozen=True)
class Device:
    """What the driver says of a GPU."""

    name: str
    capability: str  # "90"
    multiprocessors: int
    max_ghz: float = 0.0  # 0: not known


@dataclass(frozen=True)
class Row:
    """A step: measured, and as the model has it (None: it does not know this GPU)."""

    rows: int
    classes: int
    dtype: str
    step: str
    milliseconds: float
    copy_milliseconds: float
    gigabytes_per_second: float
    share_of_copy: float
    predicted_milliseconds: float | None = None
    predicted_share_of_copy: float | None = None
    predicted_limit: str = ""
    predicted_for: str = ""


def gpu_of(device: Device, copy_gigabytes_per_second: float) -> tuple[Gpu | None, str]:
    """The model's GPU, and which one it is; None, and why there is none."""
    name = DRIVER_NAMES.get(device.name, "")
    listed = GPUS.get(name)
    # A slice of a GPU has its name, and fewer multiprocessors.
    if listed and (listed.architecture, listed.multiprocessors) == (
        device.capability, device.multiprocessors
    ):  # fmt: skip
        return listed, f"{name} of benchmarks/gpus.py"
    about = f"{device.name}, {device.multiprocessors} multiprocessors"
    if device.capability not in CAPABILITIES or not device.max_ghz:
        return None, f"{about}: not in benchmarks/gpus.py"
    bandwidth = copy_gigabytes_per_second / model.SHARE_OF_BANDWIDTH
    return (
        Gpu(device.capability, device.multiprocessors, device.max_ghz, bandwidth),
        f"{about}: not in benchmarks/gpus.py; with the driver's {device.max_ghz:g} GHz and the "
        f"bandwidth of which the measured copy is {model.SHARE_OF_BANDWIDTH:.0%}",
    )


def _steps(z: Tensor, target: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward, by the model's names."""
    rows, classes = z.shape
    leaf = z.detach().requires_grad_()
    confidence, scale, bias = (
        torch.randn(n, device=z.device).requires_grad_() for n in (rows, classes, classes)
    )
    learned = [confidence, scale, bias]

    def plain() -> object:
        return torch.autograd.grad(disalign_ops.cross_entropy(leaf, target), leaf)

    def calibrated(logits: Tensor, wanted: list[Tensor]) -> object:
        loss = disalign_ops.disalign_cross_entropy(logits, target, confidence, scale, bias)
        return torch.autograd.grad(loss, wanted)

    return {
        "plain": plain,
        "all gradients": partial(calibrated, leaf, [leaf, *learned]),
        "stage 2": partial(calibrated, z, learned),
    }


def _captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The replay of a step; on a CPU the step itself."""
    if device.type != "cuda":
        return step
    graph, kept = measure.captured(step)

    def replay() -> object:
        graph.replay()
        return kept  # whose memory the graph writes

    return replay


def measured(
    rows: int, classes: int, name: str, device: torch.device, rounds: int = ROUNDS
) -> list[Row]:
    """Every step of the model with logits of one shape and dtype."""
    z = torch.randn(rows, classes, device=device, dtype=DTYPES[name]) * 3
    target = torch.randint(0, classes, (rows,), device=device)
    ready = {step: _captured(work, device) for step, work in _steps(z, target).items()}
    ready[COPY] = partial(torch.empty_like(z).copy_, z)
    clock = measure.make_clock(device, overhead=False)
    paired = measure.paired_seconds(
        {step: partial(_itself, work) for step, work in ready.items()}, clock, rounds, _ignore
    )
    one_pass = z.numel() * z.itemsize
    copy = measure.percentile(paired.seconds[COPY], 50)
    found = []
    for step in model.STEPS:
        passes = 1 if step == "stage 2" else 2  # that are needed: a read, or a read and a write
        seconds = measure.percentile(paired.seconds[step], 50)
        copies = measure.paired_ratio(paired.seconds[step], paired.seconds[COPY])
        found.append(
            Row(rows, classes, name, step, seconds * 1e3, copy * 1e3,
                passes * one_pass / seconds * 1e-9, passes / 2 / copies)
        )  # fmt: skip
    return found


def _itself(work: Callable[[], object]) -> Callable[[], object]:
    return work


def _ignore(done: int) -> None:
    return None


def copy_bandwidth(found: list[Row]) -> float:
    """GB/s, of the largest logits."""
    largest = max(found, key=lambda row: row.rows * row.classes * model.SIZES[row.dtype])
    moved = 2 * largest.rows * largest.classes * model.SIZES[largest.dtype]
    return moved / largest.copy_milliseconds * 1e-6


def predicted(found: list[Row], device: Device) -> list[Row]:
    """The rows with what the model says of them."""
    gpu, which = gpu_of(device, copy_bandwidth(found))
    if gpu is None:
        return [replace(row, predicted_for=which) for row in found]
    times = [model.predict(gpu, row.step, row.dtype, row.rows, row.classes) for row in found]
    return [
        replace(
            row,
            predicted_milliseconds=time.captured * 1e3,
            predicted_share_of_copy=time.share_of_copy,
            predicted_limit=time.limit_of_passes,
            predicted_for=which,
        )
        for row, time in zip(found, times, strict=True)
    ]


def described(device: torch.device, max_ghz: float) -> Device:
    if device.type != "cuda":
        return Device("CPU", "", 0)
    about = torch.cuda.get_device_properties(device)
    return Device(about.name, f"{about.major}{about.minor}", about.multi_processor_count, max_ghz)


def _shape(text: str) -> tuple[int, int]:
    rows, classes = text.split("x")
    return int(rows), int(classes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_model", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", type=_shape, action="append", metavar="ROWSxCLASSES",
                        help="repeatable; default: the model's")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--max-ghz", type=float, default=0.0, help="of a GPU that is not listed")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    device = torch.device(options.device)
    found: list[Row] = []
    for rows, classes in options.shape or model.SHAPES:
        for name in DTYPES:
            try:
                found += measured(rows, classes, name, device, options.rounds)
            except torch.OutOfMemoryError:
                print(f"{rows} x {classes} {name}: left out, the device has too little memory")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if not found:
        print("nothing was measured")
        return 1
    found = predicted(found, described(device, options.max_ghz))
    print(f"predicted for: {found[0].predicted_for}")
    for row in found:
        print(
            f"{row.rows} x {row.classes} {row.dtype} {row.step}: {row.milliseconds:.4f} ms, "
            f"{row.gigabytes_per_second:.0f} GB/s, {row.share_of_copy:.0%} of a copy; predicted "
            + ("-" if row.predicted_milliseconds is None else f"{row.predicted_milliseconds:.4f}")
        )
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "model.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(found[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
