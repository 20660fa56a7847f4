"""make gpu-check: what it does without a GPU, and its steps in the place of the GPU's."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, gpu_check, gpu_machine, gpu_report
from benchmarks.gpu_check import Step
from support.places import ROOT, TESTS

DEVICE = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "multiprocessors": 132}
MACHINE = {"system": "Linux x86_64", "cores": 16, "device": DEVICE}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@needs_no_gpu
def test_make_goes_as_far_as_a_device_is_needed_and_says_so(tmp_path: Path) -> None:
    command = ["make", "gpu-check", f"PYTHON={sys.executable}", f"OUT={tmp_path}"]
    # Not as part of `make test`, whose options it would take over, and name the folders it enters.
    alone = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    last = done.stdout.splitlines()[-1]
    assert "the next steps need a CUDA device: this torch" in last
    if torch.version.cuda is None:
        assert "is built without CUDA" in last
    state = json.loads((tmp_path / "check.json").read_text())
    assert state["machine"]["why_no_device"] in last
    assert state["versions"]["torch"] == torch.__version__
    assert state["steps"] == {}


class Runs:
    """Runs of gpu_check on a device that is not there, with steps of Python's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.steps: list[Step] = []
        self.machine: dict[str, Any] = MACHINE
        monkeypatch.setattr(gpu_machine, "ask", lambda: self.machine)
        monkeypatch.setattr(gpu_check, "steps", lambda machine: self.steps)
        monkeypatch.setattr(gpu_check, "tree", lambda: "one")

    def step(self, name: str, code: str, **more: Any) -> None:
        self.steps.append(Step(name, "tests.log", (("-c", code),), after="", **more))

    def __call__(self, *arguments: str) -> int:
        return gpu_check.main(["--out", str(self.folder), *arguments])

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "check.json").read_text())
        return found

    def ends(self) -> dict[str, str]:
        return {name: record["status"] for name, record in self.state["steps"].items()}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path / "folder", monkeypatch)


MODEL_CSV = """
import pathlib, sys
pathlib.Path(sys.argv[1], "model.csv").write_text(
    "rows,classes,dtype,step,milliseconds,share_of_copy,predicted_milliseconds,"
    "predicted_share_of_copy,predicted_for\\n"
    "16,1000,fp32,plain,0.3,0.4,0.1,0.9,H100 SXM\\n"
)
"""


def test_steps_end_in_one_folder_and_a_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.step("good", f"print({str(ROOT)!r})")
    runs.step("bad", "print('what went wrong'); exit(7)")
    runs.step("lacking", "", needs=("no-such-program",))
    runs.steps.append(Step("model", "bench.log", (("-c", MODEL_CSV, "{out}"),), after="good",
                           table="model.csv"))  # fmt: skip
    runs.steps.append(Step("later", "bench.log", (("-c", ""),), after="bad"))
    assert runs() == 1
    out = capsys.readouterr().out.splitlines()
    assert "what went wrong" in out
    assert out[-1] == (
        "gpu-check: passed: good, model; failed: bad (exit status 7); left out: lacking "
        "(no-such-program was not found), later (bad did not pass); not run: none; largest gaps to "
        "the model: 16 x 1000 fp32 plain: 0.300 ms, 3.00 times the model's"
    )
    assert runs.state["machine"] == MACHINE
    assert runs.state["gaps"] == ["16 x 1000 fp32 plain: 0.300 ms, 3.00 times the model's"]
    assert runs.state["steps"]["model"]["rows"][0]["milliseconds"] == 0.3
    assert {path.name for path in runs.folder.iterdir()} == {
        "check.json", "tests.log", "bench.log", "model.csv", "model.png",
    }  # fmt: skip
    assert (runs.folder / "model.png").read_bytes().startswith(b"\x89PNG\r\n")
    log = (runs.folder / "tests.log").read_text()
    assert str(ROOT) not in log
    assert "== bad: -c print('what went wrong'); exit(7)" in log


def test_a_further_run_goes_on(runs: Runs, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'calls')!r}, 'a').write("
    runs.step("first", f"{count}'1')")
    runs.step("second", f"{count}'2'); exit(open({str(tmp_path / 'calls')!r}).read() == '12')")

    def calls() -> str:
        return (tmp_path / "calls").read_text()

    assert runs() == 1
    assert runs() == 0
    assert calls() == "122"  # what has passed is not run again, what failed is
    assert runs() == 0
    assert calls() == "122"
    assert runs("first") == 0  # but by its name
    assert calls() == "1221"
    with pytest.raises(SystemExit) as stopped:
        runs("third")
    assert stopped.value.code == 2
    runs.machine = MACHINE | {"cores": 8}  # results of two machines are not mixed
    assert runs() == 0
    assert calls() == "122112"
    runs.machine = {"why_no_device": "it is lost"}
    assert runs() == gpu_check.NO_DEVICE
    assert runs.ends() == {"first": "passed", "second": "passed"}


# Its child would go on writing.
SLOW = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c",
    "import sys, time\\nwhile True: open(sys.argv[1], 'a').write('.'); time.sleep(0.05)", sys.argv[1]])
time.sleep(60)
"""  # noqa: E501


def test_a_step_has_a_time_limit_with_all_that_it_starts(runs: Runs, tmp_path: Path) -> None:
    child = tmp_path / "child"
    slow = Step("slow", "tests.log", (("-c", SLOW, str(child)),), after="", limit=1.0)
    runs.steps = [slow]
    begin = time.monotonic()
    assert runs() == 1
    assert time.monotonic() - begin < 20
    assert runs.state["steps"]["slow"]["reason"] == "not done in 1 s"
    written = child.stat().st_size
    time.sleep(0.3)
    assert child.stat().st_size == written > 0
    assert runs("--minutes", "0.005") == 0  # the run's end, and not the step's failure
    assert runs.ends() == {"slow": "not run"}


def test_a_long_log_is_cut(runs: Runs) -> None:
    runs.step("long", "print('x' * 10**6)")
    assert runs() == 0
    log = (runs.folder / "tests.log").read_text()
    assert len(log) < 1.1 * gpu_check.LOG_BYTES
    assert "characters left out" in log


def test_without_matplotlib_there_is_no_plot(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "why_missing", lambda need: f"{need} is not installed")
    runs.steps.append(Step("model", "bench.log", (("-c", MODEL_CSV, "{out}"),), after="",
                           table="model.csv"))  # fmt: skip
    assert runs() == 0
    assert runs.state["why_no_plot"] == "matplotlib is not installed"
    assert not (runs.folder / "model.png").exists()


def row(classes: int, milliseconds: float, predicted: float | None) -> dict[str, Any]:
    return {"rows": 8, "classes": classes, "dtype": "bf16", "step": "plain",
            "milliseconds": milliseconds, "predicted_milliseconds": predicted}  # fmt: skip


def test_gaps_are_ranked_by_their_ratio_either_way() -> None:
    few = gpu_report.RANKED_MS / 2
    rows = [row(1, 0.1, 0.1), row(2, 0.1, 0.3), row(3, 0.2, 0.1), row(4, 0.15, 0.1),
            row(5, 9.0, few), row(6, 9.0, None)]  # fmt: skip
    found = gpu_report.gaps(rows)
    assert [text.split(" bf16")[0] for text in found] == ["8 x 2", "8 x 3", "8 x 4"]
    assert found[0] == "8 x 2 bf16 plain: 0.100 ms, 0.33 times the model's"


# --- the steps themselves


@pytest.fixture(scope="module")
def all_steps() -> dict[str, Step]:
    return {step.name: step for step in gpu_check.steps(MACHINE)}


def test_every_step_is_bounded_and_starts_with_what_is_fast(all_steps: dict[str, Step]) -> None:
    assert all(step.limit < 600 for step in all_steps.values())
    assert list(all_steps)[:2] == ["build", "tests-fast"]
    assert dict(all_steps["build"].environment)["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert {step.log for step in all_steps.values()} <= {*gpu_check.LOGS}
    assert {step.table for step in all_steps.values()} - {""} == {*gpu_check.TABLES}
    assert len([*gpu_check.LOGS, *gpu_check.TABLES, "check.json", "model.png"]) <= 8


def test_the_steps_name_files_and_cases_that_are_there(all_steps: dict[str, Step]) -> None:
    words = [word for step in all_steps.values() for command in step.commands for word in command]
    files = [word for word in words if word.endswith(".py")]
    assert len(files) > 10
    assert [file for file in files if not (ROOT / file).exists()] == []
    patterns = [pattern for of in gpu_check.BENCHMARKS.values() for pattern in of]
    chosen = cases.select(patterns, full=False)
    assert {*cases.select([], full=False)} <= {*chosen}  # the quick set
    assert all(cases.select([pattern], full=False) for pattern in patterns)


EVERY_OPERATOR = """
import torch
from support import every_operator, operator_swap
from disalign_ops._ops import schemas
every_operator.DTYPES, every_operator.ROWS = (torch.float32,), ((7, 19),)
operator_swap.swap(dict(schemas._OPERATORS).__getitem__)  # counted, and in forward what CUDA makes
for call in every_operator.calls("cpu"):
    pass
print(sorted(set(schemas.fakes()) - set(operator_swap.calls)))
"""

# Triton's operators in its interpreter, and no sybil, which the blocks of the docs need.
INTERPRETED = """
import os, sys, pytest
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["sybil"] = None
from support import cuda_operators
cuda_operators._to_gpu = lambda value: value
sys.exit(pytest.main([*sys.argv[1:], "-n", "0", "-W", "ignore", "-k", "integer_type"]))
"""


def python(code: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


def test_the_sanitizers_see_every_operator() -> None:
    assert python(EVERY_OPERATOR).strip() == "[]"


def test_a_step_of_tests_runs_with_tritons_operators(all_steps: dict[str, Step]) -> None:
    (command,) = all_steps["triton-dense"].commands
    assert command[:2] == ("-m", "pytest")
    assert "dense_forward called" in python(INTERPRETED, *command[2:])


# --- the machine


def test_versions_are_compared_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_machine.version("2.10.0a0+cu130") == (2, 10, 0)
    for found, why in (("2.9.1", "torch must be 2.10 or newer, got 2.9.1"), ("2.10.0+cu130", "")):
        monkeypatch.setattr(gpu_machine, "versions", lambda found=found: {"torch": found})
        assert gpu_machine.why_missing("torch") == why
    assert gpu_machine.why_missing("no-such-program") == "no-such-program was not found"


def test_cells_are_numbers_where_json_has_them() -> None:
    found = [gpu_machine.value(text) for text in ("3", "0.5", "", "fp32", "nan", "inf")]
    assert found == [3, 0.5, None, "fp32", "nan", "inf"]


def test_what_nvidia_smi_says_of_the_device() -> None:
    text = "NVIDIA T4, 1, 2, 3, 4\nNVIDIA L4, 580.95, 2040, 6251, [N/A]\n\nfailed\n"
    assert gpu_machine.parse_driver(text, "NVIDIA L4") == {
        "driver": "580.95", "max_mhz": 2040, "max_memory_mhz": 6251, "power_limit_w": "[N/A]",
    }  # fmt: skip
    assert gpu_machine.parse_driver(text, "NVIDIA B200") == {}


def _raises() -> None:
    raise RuntimeError("Found no NVIDIA driver on your system.\nPlease ...")


@pytest.mark.parametrize(
    ("cuda", "hip", "init", "why"),
    [
        (None, None, None, "is built without CUDA"),
        (None, "7.0", None, "is built for ROCm"),
        ("13.0", None, _raises, "cannot use a device: Found no NVIDIA driver on your system."),
    ],
)
def test_why_there_is_no_device(
    cuda: str | None, hip: str | None, init: Callable[[], None], why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "init", init)
    found = gpu_machine.describe()
    assert found["why_no_device"] == f"this torch ({torch.__version__}) {why}"
    assert math.isfinite(found["cores"])


def test_a_python_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_machine, "why_missing", lambda need: f"{need} is not installed")
    assert gpu_machine.describe()["why_no_device"] == "torch is not installed"
