"""`python -m benchmarks.gpu_check`: builds, tests and measures on the GPU of this machine.

For a machine with a CUDA device, a torch of its own and no network: it installs nothing, and runs
in the checkout. Each step is a process with a time limit. What each gave stands in the folder's
check.json, so that a further run goes on where the last one ended. docs/gpus.md: how to read it.

Exits with 0 if nothing failed, 1 if a step did, 3 where there is no device.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import gpu_machine
from benchmarks.gpu_machine import Json, tool, value, versions, why_missing
from benchmarks.gpu_report import draw, gaps, last_line, rows_of

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "disalign_ops" / "lib" / "libdisalign_ops_cpu.so"
LIMIT_S = 590.0
LOG_BYTES = 200_000  # of a step
TAIL_LINES = 15  # of a step that failed, for the terminal
NO_DEVICE = 3
TABLES = ("bench.csv", "bandwidth.csv", "model.csv")
LOGS = ("build.log", "tests.log", "bench.log")
# Of the caller, which would change what is tested or timed.
UNWANTED = ("DISALIGN_OPS_BACKEND", "DISALIGN_OPS_POISON", "TRITON_INTERPRET")


@dataclass(frozen=True)
class Step:
    """Commands of this interpreter ("-m ..."), or of a tool by its name. "{out}": a folder for
    `table`, a CSV that the step leaves there.

    needs: packages, and programs on the PATH; the step is left out without them. after: a step that
    must have passed.
    """

    name: str
    log: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    after: str = "build"
    table: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    limit: float = LIMIT_S


# Tests of the operators, by step.
_OPERATORS = {
    "rows": ("tests/_ops/test_row.py", "tests/_ops/test_forward_backward.py"),
    "gradient-pass": ("tests/_ops/test_gradient_pass.py",),  # which Triton has not
    "dense": ("tests/_ops/test_dense.py", "tests/_ops/test_in_place.py"),
    "upsample": ("tests/test_upsample.py",),
    "autograd": ("tests/_ops/test_autograd.py", "tests/nn/test_stage2.py"),
    "shards": ("tests/_sharded/test_shard.py", "tests/test_linear.py"),
}
_NEEDS = {"upsample": ("hypothesis",)}
# Names of cases.py, by step.
BENCHMARKS = {
    "rows": (
        "lvis-full", "lvis-stage2", "lvis-plain", "lvis-full-bf16", "lvis-stage2-bf16",
        "lvis-plain-bf16", "inat-in-place", "inat-stage2", "small-plain",
    ),
    "classes": ("inat-plain", "inat-plain-bf16", "100k-*plain", "100k-full", "1m-plain"),
    "dense": ("ade-*",),
    "heads": ("*-head-*",),
}  # fmt: skip
# Tools with their options. Of calls of CUDA that failed memcheck says nothing: torch makes some to
# ask, and looks at what they return.
SANITIZERS = {
    "memcheck": ("--report-api-errors", "no"), "racecheck": (), "synccheck": (), "initcheck": (),
}  # fmt: skip


def _pytest(workers: int, *arguments: str) -> tuple[str, ...]:
    """Without the root's conftest.py, which runs the blocks of the docs and needs more packages."""
    spread = ("-n", str(workers), "--dist", "loadgroup") if workers > 1 else ()
    return (
        "-m", "pytest", "-q", "--confcutdir=tests", "-p", "no:cacheprovider", "--tb=short",
        "--maxfail=20", *spread, *arguments,
    )  # fmt: skip


def steps(machine: Json) -> list[Step]:
    """All steps for this machine, in their order."""
    device = machine["device"]
    workers = 1 if why_missing("pytest-xdist") else max(1, min(8, machine["cores"] // 2))
    threads = (("OMP_NUM_THREADS", str(max(1, machine["cores"] // workers))),)
    nvcc = not why_missing("nvcc")
    serves = "import disalign_ops as d; exit(d.backend_info()['native']['why_not_cuda'])"
    build = [("setup.py", "-q", "build_ext", "--inplace")]
    found = [
        Step(
            "build", "build.log", (*build, *([("-c", serves)] if nvcc else [])),
            ("torch", "setuptools", "cmake", "ninja"), after="",
            environment=(
                ("DISALIGN_OPS_CUDA", "1" if nvcc else "0"),
                ("TORCH_CUDA_ARCH_LIST", device["capability"]),
            ),
        )
    ]  # fmt: skip

    def tests(name: str, needs: tuple[str, ...], *arguments: str, alone: bool = False) -> None:
        command = _pytest(1 if alone else workers, *arguments)
        # One process writes how often each operator was called; several do not.
        environment = () if alone else threads
        needs = ("pytest", *needs)
        found.append(Step(name, "tests.log", (command,), needs, environment=environment))

    cuda, on_device = ("-p", "support.cuda_operators"), "tests/cuda/test_cuda.py"
    fast = [file for kind, files in _OPERATORS.items() if kind not in _NEEDS for file in files]
    tests("tests-fast", ("nvcc",), "--once", *cuda, *fast, alone=True)
    chosen = "not operators_pass and not sanitizer and not triton"
    tests("tests-device", ("nvcc",), "-k", chosen, on_device, alone=True)
    for kind, files in _OPERATORS.items():
        tests(f"tests-{kind}", ("nvcc", *_NEEDS.get(kind, ())), *cuda, *files)
    metrics = ("-m", "cuda", "tests/test_segmentation_metrics.py")
    tests("tests-metrics", ("hypothesis",), *metrics, alone=True)

    tests("triton-device", ("triton",), "-k", "triton", on_device, alone=True)
    triton = ("-p", "support.triton_cuda_operators", "--once")
    # As `make test-triton`.
    left_out = ("-k", "not depend_on and not beyond_the_cache and not keeps_no_gradient")
    for kind, files in _OPERATORS.items():
        if kind == "gradient-pass":
            continue
        tests(f"triton-{kind}", ("triton", *_NEEDS.get(kind, ())), *triton, *left_out, *files)

    for name, options in SANITIZERS.items():
        watched = (
            "compute-sanitizer",
            "--tool",
            name,
            *options,
            "--target-processes",
            "all",
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "support.every_operator",
        )
        # Without torch's cache of memory every tensor is an allocation, whose ends are seen.
        alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        found.append(
            Step(f"sanitizer-{name}", "tests.log", (watched,), ("nvcc", "compute-sanitizer"),
                 environment=alone)
        )  # fmt: skip

    def measures(name: str, table: str, *command: str, needs: tuple[str, ...] = ()) -> None:
        command = (*command, "--device", "cuda", "--out", "{out}")
        found.append(Step(name, "bench.log", (command,), ("nvcc", *needs), table=table))

    ghz = str((device.get("max_mhz") or 0) / 1000)
    measures("model", "model.csv", "-m", "benchmarks.against_model", "--max-ghz", ghz)
    for kind, cases in BENCHMARKS.items():
        command = ["-m", "benchmarks.run", *(f"--case={case}" for case in cases)]
        measures(f"bench-{kind}", "bench.csv", *command, needs=("rich",))
    measures("bandwidth", "bandwidth.csv", "-m", "benchmarks.bandwidth", needs=("rich",))
    return found


def run_limited(
    command: Sequence[str], log: Path, limit: float, environment: dict[str, str]
) -> int | None:
    """The exit status; None where the time limit ended it, with all that it had started."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tidy(log: Path, start: int) -> str:
    """A log without this machine's folders, and what begins at `start` not too long.

    Returns its last lines.
    """
    data = log.read_bytes()
    before, text = data[:start].decode(errors="replace"), data[start:].decode(errors="replace")
    for folder, name in ((str(ROOT), "."), (sys.prefix, "<python>"), (str(Path.home()), "~")):
        if len(folder) > 1:
            before, text = before.replace(folder, name), text.replace(folder, name)
    if len(text) > LOG_BYTES:
        half = LOG_BYTES // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    log.write_text(before + text)
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def run_step(step: Step, folder: Path, limit: float) -> Json:
    """Runs a step, and says how it ended."""
    if missing := [why for why in map(why_missing, step.needs) if why]:
        return {"status": "left out", "reason": ", ".join(missing)}
    environment = {k: v for k, v in os.environ.items() if k not in UNWANTED}
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PATH": gpu_machine.path(),
        "PYTHONUNBUFFERED": "1",
        **dict(step.environment),
    }
    log = folder / step.log
    log.touch()
    begin, started = log.stat().st_size, time.monotonic()
    record: Json = {"status": "passed", "log": step.log}
    with tempfile.TemporaryDirectory() as out:
        for command in step.commands:
            words = [word.replace("{out}", out) for word in command]
            program = tool(words[0]) if words[0] in step.needs else None
            words = [program, *words[1:]] if program else [sys.executable, *words]
            with log.open("a") as file:
                file.write(f"\n== {step.name}: {' '.join(command)}\n")
            left = min(step.limit, limit) - (time.monotonic() - started)
            status = run_limited(words, log, left, environment)
            if status is None and limit < step.limit:
                record |= {"status": "not run", "reason": "cut off by --minutes"}
            elif status is None:
                record |= {"status": "failed", "reason": f"not done in {step.limit:g} s"}
            elif status != 0:
                record |= {"status": "failed", "reason": f"exit status {status}"}
            if status != 0:
                break
        table = Path(out) / step.table
        if step.table and table.exists():
            with table.open(newline="") as rows:
                record["rows"] = [
                    {k: value(v) for k, v in row.items()} for row in csv.DictReader(rows)
                ]
        if (peers := Path(out) / "bench.json").exists():
            record["peers_left_out"] = json.loads(peers.read_text())["left_out"]
    record["seconds"] = round(time.monotonic() - started, 1)
    record["tail"] = _tidy(log, begin)
    return record


def tree() -> str:
    """Of the sources: results of two trees do not belong into one folder."""
    files = [ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]
    for part in ("benchmarks", "buildtools", "disalign_ops", "tests"):
        files += (ROOT / part).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write(state: Json, folder: Path) -> None:
    """check.json, the tables and the plot."""
    for table in TABLES:
        if rows := rows_of(state, table):
            with (folder / table).open("w", newline="") as file:
                writer = csv.DictWriter(file, [*rows[0]])
                writer.writeheader()
                writer.writerows(rows)
    device = state["machine"].get("device", {}).get("name", "")
    state["why_no_plot"] = draw(rows_of(state, "model.csv"), folder / "model.png", device)
    state["gaps"] = gaps(rows_of(state, "model.csv"))
    save(state, folder)


def save(state: Json, folder: Path) -> None:
    text = json.dumps(state, indent=1) + "\n"
    half_written = folder / "check.json.new"
    half_written.write_text(text)
    half_written.replace(folder / "check.json")


def load(folder: Path, about: Json) -> Json:
    """What an earlier run on the same device with the same sources left, or a new state."""
    new = {"tree": tree(), "machine": about, "versions": versions(), "steps": {}}
    path = folder / "check.json"
    if not path.exists():
        return new
    old: Json = json.loads(path.read_text())
    same = all(old[key] == new[key] for key in ("tree", "machine", "versions"))
    if same:
        return old
    print(f"{path} is of other sources, versions or another machine: all steps run anew")
    for name in (*TABLES, *LOGS):
        (folder / name).unlink(missing_ok=True)
    return new


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("steps", nargs="*", metavar="STEP",
                        help="run these again, and no others; wrong names are listed")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of this run, at most")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    about = gpu_machine.ask()
    print(json.dumps(about | {"versions": versions()}, indent=1), flush=True)
    if "device" not in about:
        if not (folder / "check.json").exists():  # else it may have the results of a device
            save({"tree": tree(), "machine": about, "versions": versions(), "steps": {}}, folder)
        print(
            f"gpu-check: the next steps need a CUDA device: {about['why_no_device']}. Nothing was "
            "built, tested or measured."
        )
        return NO_DEVICE
    state = load(folder, about)
    todo = steps(about)
    names = [step.name for step in todo]
    if unknown := set(options.steps) - {*names}:
        parser.error(f"a step must be one of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    for step in todo:
        record = state["steps"].get(step.name, {})
        done = record.get("status") == "passed" and (step.name != "build" or BUILT.exists())
        if (step.name not in options.steps) if options.steps else done:
            continue
        if step.after and state["steps"].get(step.after, {}).get("status") != "passed":
            reason = f"{step.after} did not pass"
            state["steps"][step.name] = {"status": "left out", "reason": reason}
            continue
        if time.monotonic() >= end:
            break
        print(f"{step.name} ...", end=" ", flush=True)
        record = run_step(step, folder, end - time.monotonic())
        tail = record.pop("tail", "")
        state["steps"][step.name] = record | ({"table": step.table} if step.table else {})
        shown = [record["status"], record.get("reason", ""), f"{record.get('seconds', 0):.0f} s"]
        print(", ".join(part for part in shown if part), flush=True)
        if record["status"] == "failed":
            print(tail, flush=True)
        save(state, folder)
    write(state, folder)
    print(last_line(state, names))
    return int(any(record["status"] == "failed" for record in state["steps"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
