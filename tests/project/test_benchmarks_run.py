"""The benchmarks' runs: a case with its contestants, the command line, the files it writes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import benchmarks
from benchmarks import report, run
from disalign_ops._bench import peers
from disalign_ops._bench.case import Case, Inputs, Mode
from disalign_ops._bench.peers import Contestant, eager_loss, our_loss
from disalign_ops._bench.results import run_case
from support.places import ROOT

CPU = torch.device("cpu")


def tiny(mode: Mode) -> Case:
    return Case("tiny", 24, 67, torch.float32, mode, "fast")


def silent(what: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Nothing here is large enough for two."""
    torch.set_num_threads(1)


def test_in_place_gets_new_logits_each_time_and_allocates_no_gradient_of_them() -> None:
    seen: list[int] = []

    def spying(inputs: Inputs, logits: Tensor) -> Tensor:
        seen.append(logits.data_ptr() if torch.equal(logits, inputs.logits) else -1)
        return our_loss(inputs, logits)

    case = tiny(Mode.IN_PLACE)
    contestants = [
        Contestant(peers.OURS, spying, overwrites=True),
        Contestant(peers.EAGER, eager_loss),
    ]
    result = run_case(case, contestants, CPU, 4, silent)
    assert not any(r.problem for r in result.results)
    assert len(seen) == 1 + 1 + 1 + 4  # gate, memory, warm-up, rounds
    assert -1 not in seen
    ours, eager = result.results
    vectors = 4 * (24 + 2 * 67)
    assert ours.gradient_bytes == vectors
    assert eager.gradient_bytes == vectors + case.logits_bytes


def test_our_extra_memory_is_far_below_the_logits() -> None:
    case = Case("some", 512, 1204, torch.float32, Mode.FULL, "large enough for the ratio")
    contestants = [Contestant(peers.OURS, our_loss), Contestant(peers.EAGER, eager_loss)]
    ours, eager = run_case(case, contestants, CPU, 1, silent).results
    assert ours.memory_share is not None
    assert eager.memory_share is not None
    assert 0 <= ours.memory_share < 0.05 < 2 < eager.memory_share


def test_a_busy_machine_is_named() -> None:
    result = run_case(tiny(Mode.PLAIN), [Contestant(peers.OURS, our_loss)], CPU, 1, silent)
    assert result.other_cores is None  # too short to know
    assert report.disturbance([result]) == ""
    busy = replace(result, other_cores=1.4)
    assert "used up to 1.4 cores" in report.disturbance([result, busy])


def test_the_command_line_writes_files_that_parse(tmp_path: Path) -> None:
    what = ["--case", "small-plain", "--peer", peers.EAGER, "--peer", "flash-attn"]
    how = ["--rounds", "3", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.run", *what, *how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "weighted cross_entropy, 64 x 1000 fp32" in done.stdout
    assert "flash-attn" in done.stdout
    assert done.stderr == ""

    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["contestant"] for row in rows] == [peers.OURS, peers.EAGER]
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["copies"]) > 0
        assert (row["device"] != "", row["torch"]) == (True, torch.__version__)
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["environment"]["disalign_ops"]["version"]
    assert document["environment"]["threads"] == 2
    assert [peer["name"] for peer in document["left_out"]] == ["flash-attn"]
    assert document["results"][0]["relative_errors"].keys() == {"loss", "logits"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_without_matplotlib_there_is_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plot", raising=False)
    monkeypatch.delattr(benchmarks, "plot", raising=False)
    what = ["--case", "small-plain", "--peer", "flash-attn", "--rounds", "1"]
    assert run.main([*what, "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "no plot: import of matplotlib halted" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"bench.csv", "bench.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "nothing-*"], "got 'nothing-*'"),
        (["--rounds", "0"], "must be at least 1, got 0"),
        (["--threads", "two"], "invalid positive_integer value: 'two'"),
        (["--peer", "me"], "invalid choice: 'me'"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert "this PyTorch sees no GPU" in capsys.readouterr().err
