"""Time in paired rounds, memory at its peak, and the bytes that a mode has to move."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from .case import Case, Mode

# Kineto announces every profile on stderr, in the middle of the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

Result = TypeVar("Result")
Clock = Callable[[Callable[[], object]], float]

_BUDGET_S = 10.0  # of timed rounds a case: six quick cases and their compilation in three minutes
_FEWEST, _MOST = 7, 1000
_FLUSH_BYTES = 256 << 20  # more than the last-level cache of any GPU


@dataclass(frozen=True)
class Timing:
    """Seconds a step: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    rounds: int


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values, as numpy's default."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def timing(seconds: list[float]) -> Timing:
    p20, median, p80 = (percentile(seconds, p) for p in (20, 50, 80))
    return Timing(median, p20, p80, len(seconds))


def paired_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the rounds' ratios: a slow spell of the machine hits both sides of a round."""
    ratios = [n / d for n, d in zip(numerators, denominators, strict=True)]
    return percentile(ratios, 50)


def make_clock(device: torch.device, overhead: bool) -> Clock:
    """Seconds of one call. `overhead`: of the caller's time too, where a GPU would hide it."""
    if device.type != "cuda":

        def on_cpu(function: Callable[[], object]) -> float:
            start = time.perf_counter_ns()
            kept = function()
            seconds = (time.perf_counter_ns() - start) * 1e-9
            del kept  # freed after the clock stopped, for everyone
            return seconds

        return on_cpu

    if overhead:

        def on_cuda_with_overhead(function: Callable[[], object]) -> float:
            torch.cuda.synchronize(device)
            start = time.perf_counter_ns()
            kept = function()
            torch.cuda.synchronize(device)
            seconds = (time.perf_counter_ns() - start) * 1e-9
            del kept
            return seconds

        return on_cuda_with_overhead

    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_cuda(function: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        # Empties the L2 cache, and keeps the GPU busy while Python launches what is timed.
        flush.zero_()
        begin.record()
        kept = function()
        end.record()
        end.synchronize()
        del kept
        return float(begin.elapsed_time(end)) * 1e-3

    return on_cuda


def captured(step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A step as a CUDA graph, and what it returned, whose memory a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


@dataclass(frozen=True)
class Paired:
    """Seconds of each step in each round, and how many cores other programs used meanwhile."""

    seconds: dict[str, list[float]]
    other_cores: float | None


def _busy_seconds() -> float | None:
    """CPU time that this machine has spent on anything but this process; None where unknown."""
    try:
        total = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(t) for t in total[1:9])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def _other_cores(busy_before: float | None, elapsed: float) -> float | None:
    busy = _busy_seconds()
    if busy is None or busy_before is None or elapsed < 1:  # /proc/stat counts in 10 ms
        return None
    return max(busy - busy_before, 0.0) / elapsed


def _goes_on(done: int, rounds: int | None, elapsed: float) -> bool:
    if rounds is not None:
        return done < rounds
    return done < _FEWEST or (done < _MOST and elapsed < _BUDGET_S)


def paired_seconds(
    steps: Mapping[str, Callable[[], Callable[[], object]]],
    clock: Clock,
    rounds: int | None,
    on_round: Callable[[int], None],
) -> Paired:
    """Times of every step, interleaved: each round runs each step once, in a shuffled order.

    A step is a function that prepares a call, untimed, and returns it. Shuffled, since what ran
    before decides what is in the cache. `rounds` None: as many as fit a budget. `on_round` gets
    the number of rounds done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffler = random.Random(0)
    for name in order:
        clock(steps[name]())  # warms up
    gc.collect()
    gc.disable()  # as timeit: a collection would be billed to whoever allocates next
    busy, start = _busy_seconds(), time.perf_counter()
    done = 0
    try:
        while _goes_on(done, rounds, time.perf_counter() - start):
            shuffler.shuffle(order)
            for name in order:
                seconds[name].append(clock(steps[name]()))
            done += 1
            on_round(done)
    finally:
        gc.enable()
    return Paired(seconds, _other_cores(busy, time.perf_counter() - start))


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """How far the tensors alive rise, while `function` runs, above those alive at its start.

    CPU: the events of PyTorch's allocator, which all tensors come from; what C++ takes from malloc
    itself is not seen. `function` must free nothing that is older than the call: the profiler knows
    the size of such memory only by chance. CUDA: the caching allocator's own peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    gc.collect()  # garbage of earlier calls is older memory too
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()
    del kept  # after the record's end: the result is alive at the peak that a caller sees
    assert record.profiler is not None
    events = [
        event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def counted_passes(case: Case, device: torch.device) -> tuple[int, int]:
    """Reads and writes of the logits that the mode needs, at least, as design.md counts them."""
    if case.mode is Mode.STAGE2:
        return 1, 0
    on_cpu = device.type == "cpu"
    # As _ops/in_forward.py has it; else backward reads the logits again.
    in_forward = case.dtype == torch.float32 if on_cpu else not (case.size or case.features)
    if not in_forward or case.mode.in_place:
        return 2, 1
    # A GPU makes it again where it turns out in backward that the upstream gradient is not 1.
    return (1, 1) if on_cpu or case.upstream == 1 else (2, 2)


def counted_bytes(case: Case, device: torch.device) -> int:
    """Of the logits, and of class probabilities, which are read as often."""
    reads, writes = counted_passes(case, device)
    return ((2 if case.soft else 1) * reads + writes) * case.logits_bytes
