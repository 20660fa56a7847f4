"""The benchmarks: what they report is right, and a wrong contestant gets no speed."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from benchmarks import cases, report, run
from benchmarks.cases import CASES, select
from disalign_ops._bench import gate, measure, peers
from disalign_ops._bench.case import Case, Inputs, Mode, make_inputs
from disalign_ops._bench.peers import Contestant, eager_loss, our_loss
from disalign_ops._bench.record import environment
from disalign_ops._bench.results import run_case
from support.places import ROOT

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def tiny(mode: Mode, dtype: torch.dtype = torch.float32) -> Case:
    return Case("tiny", 24, 67, dtype, mode, "fast")


def silent(what: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Nothing here is large enough for two."""
    torch.set_num_threads(1)


# --- the registry


def test_the_quick_set_is_the_table_of_the_readme() -> None:
    cases = select([], full=False)
    heads = [(c.shape, c.features, c.mode) for c in cases if c.features]
    assert heads == [((4096, 8142), 512, Mode.PLAIN), ((4096, 8142), 512, Mode.STAGE2)]
    quick = {(c.shape, c.target_size, c.mode) for c in cases if not c.features}
    assert quick == {
        ((4096, 1204), (), Mode.FULL),
        ((4096, 1204), (), Mode.STAGE2),
        ((4096, 1204), (), Mode.PLAIN),
        ((2048, 8142), (), Mode.IN_PLACE),
        ((2048, 8142), (), Mode.STAGE2),
        ((64, 1000), (), Mode.PLAIN),
        ((2, 150, 256, 256), (), Mode.PLAIN),
        ((2, 150, 256, 256), (), Mode.PLAIN_IN_PLACE),
        ((2, 150, 32, 32), (256, 256), Mode.FULL),
    }
    assert all(c.dtype == torch.float32 for c in select([], full=False))


def test_the_registry_covers_what_it_promises() -> None:
    every = select([], full=True)
    assert every == list(CASES.values())
    assert all(case.name == name and case.reason for name, case in CASES.items())
    for classes in (1000, 1204, 8142, 100_000, 1_000_000):
        cases = [c for c in every if c.classes == classes and not c.features]
        found = {(c.mode, c.dtype) for c in cases}
        modes = set(Mode) - {Mode.PLAIN_IN_PLACE}
        assert found == {(mode, dtype) for mode in modes for dtype in DTYPES}
    assert {c.dtype for c in every} == set(gate.RELATIVE) - {torch.float16}
    # Eager takes a few times as much, float64 twice that of an image: it must fit a small machine.
    assert max(c.full_bytes for c in every) <= 630e6
    large = CASES["ade-upsample-large"]
    assert (large.shape, large.target_shape) == ((4, 150, 128, 128), (4, 512, 512))


def test_cases_are_selected_by_name_and_wildcard() -> None:
    assert [c.name for c in select(["inat-full"], full=False)] == ["inat-full"]
    assert len(select(["lvis-*", "inat-full"], full=False)) == 15
    with pytest.raises(ValueError, match=r"a case must be one of imagenet-full, .*, got 'lviss'"):
        select(["lvis-full", "lviss"], full=False)


@pytest.mark.parametrize("mode", list(Mode))
def test_inputs_are_equal_each_time_and_ask_for_the_modes_gradients(mode: Mode) -> None:
    first, second = (make_inputs(tiny(mode, torch.bfloat16), CPU) for _ in range(2))
    for name in ("logits", "target", "confidence", "scale", "bias", "weight"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    wanted = first.wanted(first.logits)
    assert all(tensor.requires_grad for tensor in wanted.values())
    vectors = ["confidence", "scale", "bias"] if mode.calibrated else []
    assert list(wanted) == ([] if mode is Mode.STAGE2 else ["logits"]) + vectors
    assert first.logits.requires_grad == (mode is not Mode.STAGE2)
    assert (first.logits.dtype, first.scale.dtype) == (torch.bfloat16, torch.float32)


def test_contestants_and_the_reasons_of_those_left_out() -> None:
    found, left_out = peers.contestants(tiny(Mode.FULL), CPU, (peers.EAGER, "quack"))
    assert [c.name for c in found] == [peers.OURS, peers.EAGER]
    assert [p.name for p in left_out] == ["quack"]
    assert "cannot be imported" in left_out[0].reason or "CUDA only" in left_out[0].reason
    _, left_out = peers.contestants(tiny(Mode.PLAIN), CPU)
    assert {p.name for p in left_out} == set(peers.NAMES) - {peers.EAGER, peers.COMPILED}


TRITON_GATE = """
import torch
from disalign_ops._bench import peers
from disalign_ops._bench.case import Case, Mode
from disalign_ops._bench.record import environment
from disalign_ops._bench.results import run_case
cpu = torch.device("cpu")
for mode in (Mode.FULL, Mode.PLAIN, Mode.STAGE2):
    case = Case("tiny", 24, 67, torch.float32, mode, "fast")
    found, _ = peers.contestants(case, cpu, (peers.TRITON,))
    result = run_case(case, found, cpu, 1, lambda what: None)
    print(result.of(peers.TRITON).problem or "passed", result.ours_failed)
"""


def test_triton_is_compared_where_it_serves_and_passes_the_gate() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRITON_GATE], cwd=ROOT, capture_output=True,
        text=True, timeout=120, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["passed False"] * 3, done.stderr
    _, left_out = peers.contestants(tiny(Mode.FULL), CPU, (peers.TRITON,))
    assert "GPU" in left_out[0].reason


# --- measuring


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
        (Mode.FULL, torch.float32, "cuda", (1, 1)),
        (Mode.PLAIN, torch.bfloat16, "cuda", (1, 1)),
        (Mode.IN_PLACE, torch.bfloat16, "cuda", (2, 1)),
    ],
)
def test_counted_bytes(
    mode: Mode, dtype: torch.dtype, device: str, passes: tuple[int, int]
) -> None:
    case = tiny(mode, dtype)
    assert measure.counted_passes(case, torch.device(device)) == passes
    assert measure.counted_bytes(case, torch.device(device)) == (
        sum(passes) * 24 * 67 * dtype.itemsize
    )


@pytest.mark.parametrize("size", [(), (5, 4)])
def test_class_probabilities(size: tuple[int, ...]) -> None:
    case = replace(tiny(Mode.PLAIN), size=size, soft=True)
    inputs = make_inputs(case, CPU)
    assert inputs.target.shape == case.shape
    torch.testing.assert_close(inputs.target.sum(1), torch.ones(case.target_shape))
    found, left_out = peers.contestants(case, CPU, (peers.EAGER, "quack"))
    expected = gate.exact(inputs)
    for contestant in found:
        logits = inputs.logits.detach().clone().requires_grad_()
        errors = gate.errors(gate.computed(contestant, inputs, logits), expected)
        assert max(errors.values()) < gate.RELATIVE[case.dtype]
    assert [peer.name for peer in left_out] == ["quack"]
    assert measure.counted_bytes(case, CPU) == 3 * case.logits_bytes
    assert case.title.endswith("fp32, class probabilities")


def test_a_gpu_makes_the_gradient_again_for_another_upstream_gradient() -> None:
    case = replace(tiny(Mode.PLAIN), upstream=65536.0)
    assert measure.counted_passes(case, torch.device("cuda")) == (2, 2)
    assert measure.counted_passes(case, CPU) == (1, 1)
    assert case.title.endswith("fp32, upstream gradient 65536")


# --- the gate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [171 / 512, 65536.0])
def test_the_gate_takes_the_upstream_gradient(upstream: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(replace(tiny(Mode.FULL, dtype), upstream=upstream), CPU)
    expected = gate.exact(inputs)
    outputs = gate.computed(Contestant("any", our_loss), inputs, inputs.logits)
    assert gate.objections(outputs, expected, dtype) == ""
    assert "relative error" in gate.objections(
        outputs, gate.exact(replace(inputs, upstream=1.0)), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", list(Mode))
def test_the_gate_passes_what_is_right(mode: Mode, dtype: torch.dtype) -> None:
    inputs = make_inputs(tiny(mode, dtype), CPU)
    expected = gate.exact(inputs)
    assert list(expected) == ["loss", *inputs.wanted(inputs.logits)]
    for loss in (our_loss, eager_loss):
        outputs = gate.computed(Contestant("any", loss), inputs, inputs.logits.clone())
        assert gate.objections(outputs, expected, dtype) == ""


def _biased(inputs: Inputs, logits: Tensor) -> Tensor:
    return eager_loss(inputs, logits) * 1.01


def _unweighted(inputs: Inputs, logits: Tensor) -> Tensor:
    return eager_loss(replace(inputs, weight=torch.ones_like(inputs.weight)), logits)


def _frozen_scale(inputs: Inputs, logits: Tensor) -> Tensor:
    """Right in its loss; the gradient of scale is half of what it should be."""
    scale = inputs.scale.detach() * 0.5 + inputs.scale * 0.5
    return eager_loss(replace(inputs, scale=scale), logits)


def _nan(inputs: Inputs, logits: Tensor) -> Tensor:
    return eager_loss(inputs, logits) * float("nan")


def _raising(inputs: Inputs, logits: Tensor) -> Tensor:
    raise NotImplementedError("no such shape\nsecond line")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (_biased, "loss: relative error 0.01"),
        (_unweighted, "loss: relative error"),
        (_frozen_scale, "scale: relative error 0.5"),
        (_nan, "loss: relative error nan"),
        (_raising, "raised NotImplementedError: no such shape"),
    ],
)
def test_a_wrong_contestant_gets_no_speed(
    fault: peers.Loss, word: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    wrong, right = Contestant(peers.EAGER, fault), Contestant(peers.OURS, our_loss)
    result = run_case(tiny(Mode.FULL, dtype), [right, wrong], CPU, 3, silent)
    ours, theirs = result.results
    assert word in theirs.problem
    assert (theirs.timing, theirs.copies, theirs.times_ours, theirs.memory_share) == (None,) * 4
    assert "second line" not in theirs.problem
    assert ours.timing is not None
    assert not ours.problem
    assert not result.ours_failed
    assert report.case_problems(result) == [f"torch eager: no speed reported: {theirs.problem}"]
    report.write(tmp_path, [result], [], environment(CPU))
    rows = list(csv.DictReader((tmp_path / "bench.csv").open()))
    assert [bool(row["median_ms"]) for row in rows] == [True, False]


def test_our_own_fault_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "our_loss", _biased)
    monkeypatch.setitem(cases.CASES, "tiny", tiny(Mode.FULL))
    arguments = ["--case", "tiny", "--peer", peers.EAGER, "--rounds", "2", "--threads", "1"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "disalign_ops: no speed reported: loss: relative error 0.01" in printed
    assert "disalign_ops failed in tiny" in printed
    ours, eager = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert ours["median_ms"] is None
    assert eager["median_ms"] > 0
    assert eager["times_ours"] is None
