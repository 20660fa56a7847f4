"""The benchmarks' measurements: percentiles, paired rounds, memory, counted bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import Case, Mode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Nothing here is large enough for two."""
    torch.set_num_threads(1)


def test_percentiles_are_numpys() -> None:
    values = torch.randn(23, dtype=torch.float64).tolist()
    for percent in (0, 20, 50, 80, 100):
        assert measure.percentile(values, percent) == pytest.approx(
            float(numpy.percentile(values, percent))
        )
    assert measure.percentile([3.0], 80) == 3.0
    found = measure.timing(values)
    assert found.median == pytest.approx(statistics.median(values))
    assert found.p20 < found.median < found.p80
    assert found.rounds == 23


def test_ratios_are_paired_by_round() -> None:
    # The machine is ten times slower in the last two rounds; the ratio is 2 in every round.
    assert measure.paired_ratio([2, 2, 20, 20], [1, 1, 10, 10]) == 2


def test_rounds_run_each_step_once_prepared_before_the_clock_starts() -> None:
    log: list[str] = []

    def step(name: str) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            log.append(f"prepare {name}")
            return lambda: log.append(f"run {name}")

        return prepare

    def clock(function: Callable[[], object]) -> float:
        log.append("start")
        function()
        return 1.0

    rounds: list[int] = []
    paired = measure.paired_seconds({"a": step("a"), "b": step("b")}, clock, 6, rounds.append)
    assert paired.seconds == {"a": [1.0] * 6, "b": [1.0] * 6}
    assert rounds == [1, 2, 3, 4, 5, 6]
    timed = log[-6 * 6 :]  # after the warm-up; prepare, start, run of two steps a round
    orders = set()
    for k in range(0, len(timed), 6):
        first, second = timed[k + 2][-1], timed[k + 5][-1]
        assert {first, second} == {"a", "b"}
        orders.add(first)
        assert timed[k : k + 3] == [f"prepare {first}", "start", f"run {first}"]
    assert orders == {"a", "b"}, "the order is shuffled: what ran before is not always the same"


MIB = 1 << 20


def _bytes(mebibytes: float) -> Tensor:
    return torch.empty(int(mebibytes * MIB), dtype=torch.uint8)


def _freed() -> Tensor:
    first = _bytes(4)
    second = _bytes(8)  # the peak: 12
    del first
    third = _bytes(2)  # 10
    del second
    return third


@pytest.mark.parametrize(
    ("function", "mebibytes"),
    [
        (_freed, 12),
        (lambda: _bytes(5), 5),
        (lambda: [_bytes(1) for _ in range(6)], 6),
        (lambda: [_bytes(1).numel() for _ in range(6)], 1),
        (lambda: None, 0),
    ],
    ids=["freed", "returned", "kept", "one at a time", "nothing"],
)
def test_peak_extra_bytes(function: Callable[[], object], mebibytes: float) -> None:
    extra = measure.peak_extra_bytes(function, CPU)
    assert extra == pytest.approx(mebibytes * MIB, abs=4096)


def test_peak_extra_bytes_sees_the_backward_pass() -> None:
    x = torch.randn(MIB // 4, requires_grad=True)

    def step() -> object:
        return torch.autograd.grad(x.exp().sum(), x)

    # exp(x), kept for backward, and the gradient.
    assert measure.peak_extra_bytes(step, CPU) == pytest.approx(2 * MIB, abs=4096)


@pytest.mark.parametrize(
    ("mode", "dtype", "device", "passes"),
    [
        (Mode.FULL, torch.float32, "cpu", (1, 1)),
        (Mode.PLAIN, torch.float32, "cpu", (1, 1)),
        (Mode.STAGE2, torch.float32, "cpu", (1, 0)),
        (Mode.IN_PLACE, torch.float32, "cpu", (2, 1)),
        (Mode.FULL, torch.bfloat16, "cpu", (2, 1)),
        (Mode.STAGE2, torch.bfloat16, "cuda", (1, 0)),
        (Mode.FULL, torch.float32, "cuda", (2, 1)),
    ],
)
def test_counted_bytes(
    mode: Mode, dtype: torch.dtype, device: str, passes: tuple[int, int]
) -> None:
    case = Case("tiny", 24, 67, dtype, mode, "fast")
    assert measure.counted_passes(case, torch.device(device)) == passes
    assert measure.counted_bytes(case, torch.device(device)) == (
        sum(passes) * 24 * 67 * dtype.itemsize
    )
