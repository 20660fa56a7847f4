"""`python -m benchmarks.run`: speed and memory of disalign_ops beside its peers.

Each case passes a correctness gate, then all contestants are timed in interleaved rounds. Writes
bench.csv, bench.json and bench.png. Exits with 1 if disalign_ops failed a gate.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.cases import select
from disalign_ops._bench import peers
from disalign_ops._bench.case import Case
from disalign_ops._bench.record import environment
from disalign_ops._bench.results import CaseResult, run_case

_REFRESH_S = 0.5
_WIDTH = 110


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--full", action="store_true", help="all cases, not the quick set")
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME",
        help="only this case, in the quick set or not; wildcards as in 'lvis-*'; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--peer", action="append", choices=peers.NAMES,
        help="compare with this peer only; repeatable; default: all",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive_integer, default=2, help="of PyTorch; default 2")
    parser.add_argument(
        "--rounds", type=positive_integer, help="timed rounds a case; default: some seconds' worth"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the files")
    return parser


def _measure(
    cases: list[Case],
    device: torch.device,
    names: tuple[str, ...],
    rounds: int | None,
    console: Console,
) -> tuple[list[CaseResult], list[peers.LeftOut]]:
    done: list[CaseResult] = []
    left_out: dict[peers.LeftOut, None] = {}  # the same reason in every case is one line
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    # Refreshed by hand between steps: rich's own thread would run beside what is timed.
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            shown = 0.0

            def show(what: str, case: Case = case) -> None:
                nonlocal shown
                starts = not what.startswith("round")
                if starts or time.monotonic() - shown > _REFRESH_S:
                    shown = time.monotonic()
                    bar.update(task, description=f"{case.name}: {what}", refresh=True)

            contestants, without = peers.contestants(case, device, names)
            left_out |= dict.fromkeys(without)
            result = run_case(case, contestants, device, rounds, show)
            done.append(result)
            console.print(report.case_table(result))
            for line in report.case_problems(result):
                console.print(line, style="red", markup=False)
            bar.update(task, advance=1, refresh=True)
        bar.update(task, description="done", refresh=True)
    return done, list(left_out)


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        cases = select(options.case, options.full)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    about = environment(device)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # a file has none, and rich would assume 80
    console.print(
        f"{about['device']}, {options.threads} threads, torch {torch.__version__}, disalign_ops "
        f"backend: {about['backend']}"
    )

    names = tuple(options.peer) if options.peer else peers.NAMES
    results, left_out = _measure(cases, device, names, options.rounds, console)

    if left_out:
        console.print(report.left_out_table(left_out))
    console.print(report.summary_table(results, about))
    if warning := report.disturbance(results):
        console.print(warning, style="yellow")
    written = report.write(options.out, results, left_out, about)
    try:
        from benchmarks import plot
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error}")
    else:
        written.append(plot.bar_chart(options.out / "bench.png", results, about))
    console.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True)

    failed = [result.case.name for result in results if result.ours_failed]
    if failed:
        console.print(f"disalign_ops failed in {', '.join(failed)}: see above", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
