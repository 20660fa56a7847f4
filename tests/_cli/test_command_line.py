"""`python -m disalign_ops`: what serves, a benchmark of a shape, class counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import disalign_ops
from disalign_ops import _cli, class_stats
from disalign_ops._bench import peers
from disalign_ops._bench.peers import Contestant
from disalign_ops._cli import about
from disalign_ops._cli.text import number, table


def output(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert _cli.main([str(a) for a in arguments]) == status
    return capsys.readouterr().out


# --- text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4200.0, "4,200"), (1234.5, "1,234"), (999.6, "1,000"), (99.96, "100"),
        (0.00123, "0.00123"),
        (0.0, "0"), (1e-7, "0.000000100"), (3, "3"), (-1500000, "-1,500,000"), (9.999, "10.0"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text


def test_a_tables_columns_stand_below_each_other() -> None:
    lines = table(["name", "ms"], [["a", "1"], ["long name", "1,000"]]).splitlines()
    assert lines == ["  name          ms", "  a              1", "  long name  1,000"]


# --- without a command


def test_five_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(
        f"disalign_ops {disalign_ops.__version__}, torch {torch.__version__}"
    )
    assert [line.split(":")[0] for line in lines[1:3]] == ["CPU", "CUDA"]


def test_json_is_backend_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(output(capsys, "--json")) == disalign_ops.backend_info()


def info(**changed: Any) -> dict[str, Any]:
    """backend_info() of a machine with all kernels missing, but for what is changed."""
    native = {
        "instruction_set": "avx2", "compiler": "GNU 12", "why_not": "not built",
        "cuda_compiler": "nvcc", "cuda_architectures": ["90"],
        "why_not_cuda": "no CUDA device was found",
    }  # fmt: skip
    devices = dict.fromkeys(("cpu", "cuda", "xpu"), "reference")
    triton = {"available": False, "why_not": "triton is not installed", "version": "3.9.0"}
    return {
        "version": "1", "torch": "2", "backend": "auto", "native": native, "triton": triton,
        "devices": devices,
    } | changed  # fmt: skip


def test_what_is_missing_is_named_with_the_reason() -> None:
    lines = about.five_lines(info())
    assert "no compiled kernels: not built" in lines[1]
    assert "no CUDA device was found; no Triton: triton is not installed" in lines[2]
    assert "no Triton on XPU: triton is not installed" in lines[3]
    found = about.five_lines(info(devices={"cpu": "native", "cuda": "triton", "xpu": "triton"}))
    assert found[1] == "CPU: compiled kernels for AVX2 (GNU 12)"
    assert found[2].startswith("CUDA: Triton 3.9.0; no compiled kernels: ")
    assert found[3].startswith("XPU: Triton 3.9.0")
    assert about.five_lines(info(backend="reference"))[4].startswith("backend set to reference; ")


def test_it_runs_without_rich_and_without_the_repository(tmp_path: Path) -> None:
    """As from an installed wheel: torch, numpy and the package alone."""
    program = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'benchmarks'): sys.modules[name] = None\n"
        "from disalign_ops._cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    package = str(Path(disalign_ops.__file__).parents[1])
    command = [sys.executable, "-c", program, "bench", "--shape", "32x67", "--rounds", "2",
               "--peer", peers.EAGER, "--threads", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": package}, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "DisAlign loss, all gradients, 32 x 67 fp32" in done.stdout


# --- bench


@pytest.fixture
def _threads(threads: None) -> None:
    """Restores what --threads sets."""


QUICK = ("--rounds", 3, "--threads", 1, "--peer", peers.EAGER)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    ("options", "title"),
    [
        (("--shape", "24x67", "--mode", "stage2", "--dtype", "bf16"),
         "DisAlign loss, stage 2, 24 x 67 bf16"),
        (("--shape", "24x67", "--dtype", "fp16"), "DisAlign loss, all gradients, 24 x 67 fp16"),
        (("--shape", "2x9x8x8", "--mode", "plain-in-place"),
         "weighted cross_entropy in place, 2 x 9 x 8 x 8 fp32"),
        (("--shape", "2x9x8x8", "--mask", "32x32"),
         "DisAlign loss, all gradients, 2 x 9 x 8 x 8 to 32 x 32 fp32"),
        (("--shape", "24x67", "--features", 8, "--mode", "plain"),
         "weighted cross_entropy of a linear head, 24 x 8 features to 67 classes fp32"),
    ],
)  # fmt: skip
def test_bench_measures_a_shape(
    options: tuple[object, ...], title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = output(capsys, "bench", *options, *QUICK).splitlines()
    assert lines[0].startswith(title)
    assert ", 1 thread, " in lines[1]
    rows = [
        line.split("  ") for line in lines if line.startswith(("  disalign_ops ", "  torch eager "))
    ]
    assert len(rows) == 2, lines
    assert not [line for line in lines if "no numbers" in line]


@pytest.mark.usefixtures("_threads")
def test_bench_saves_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "sub" / "a.json", tmp_path / "b.json"
    output(capsys, "bench", "--shape", "24x67", *QUICK, "--save", a)
    saved = json.loads(a.read_text())
    machine = saved["environment"]["machine"]
    assert machine["cpu"]
    assert machine["cores"] == os.cpu_count()
    assert saved["environment"]["disalign_ops"]["version"] == disalign_ops.__version__
    assert [r["contestant"] for r in saved["results"]] == [peers.OURS, peers.EAGER]

    for result in saved["results"]:  # a machine twice as fast, with another torch
        for key in ("median_ms", "p20_ms", "p80_ms"):
            result[key] = {"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1}[key]
    a.write_text(json.dumps(saved))
    for result in saved["results"]:
        result |= {"median_ms": 0.5, "p20_ms": 0.4, "p80_ms": 0.6, "peak_extra_bytes": 3 << 20}
    saved["results"][1] |= {"p80_ms": 0.95}  # reaches into the other's range
    saved["environment"]["versions"]["torch"] = "9.9"
    b.write_text(json.dumps(saved))
    text = output(capsys, "bench", "--compare", a, b)
    assert f"torch: A {torch.__version__}, B 9.9" in text
    assert "device" not in text
    ours, eager = (line for line in text.splitlines() if "24x67-fp32-full" in line)
    assert ours.split()[-6:] == ["1", "0.500", "0.50", ours.split()[-3], "3.0", "faster"]
    assert eager.endswith("no difference seen")


@pytest.mark.usefixtures("_threads")
def test_a_wrong_loss_gets_no_numbers_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Contestant(peers.OURS, lambda inputs, logits: 2 * peers.our_loss(inputs, logits))
    monkeypatch.setattr(peers, "contestants", lambda *_: ([wrong], []))
    text = output(capsys, "bench", "--shape", "24x67", *QUICK, status=1)
    assert "disalign_ops: no numbers: loss: relative error 1, allowed 5e-05" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "bench must have --shape"),
        (("--shape", "24"), "--shape must have 2 or 4 numbers, got 1"),
        (("--shape", "24x67", "--mask", "8x8"), "--mask must be HxW"),
        (("--shape", "2x9x8x8", "--features", 3), "--features must go with rows"),
        (("--compare", "nothing.json", "nothing.json"), "nothing.json"),
    ],
)
def test_bench_refuses(
    options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _cli.main(["bench", *map(str, options)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["4096", "0x5", "4096x", "axb", "4096*1204"])
def test_a_shape_is_numbers(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shape == "4096":
        assert _cli.bench.sizes(shape) == (4096,)
        return
    with pytest.raises(SystemExit):
        _cli.main(["bench", "--shape", shape])
    assert f"must be numbers joined by x, got {shape!r}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_what_is_no_saved_run_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(text)
    assert _cli.main(["bench", "--compare", *[str(tmp_path / "a.json")] * 2]) == 2
    assert "must be JSON that bench --save wrote" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli.main(["bench", "--shape", "24x67", "--device", "cuda"]) == 2
    assert "this PyTorch sees no GPU" in capsys.readouterr().err


# --- counts


def test_counts_of_a_list_of_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = [1200, 300, 40, 19, 5]
    file = tmp_path / "train.txt"
    file.write_text("".join(f"{k}/{i}.jpg {k}\n" for k, n in enumerate(counts) for i in range(n)))
    text = output(capsys, "counts", file, "--rho", 1.2)
    assert f"{file}: 5 classes, 1,564 samples" in text
    assert "largest 1,200, smallest 5, ratio 240" in text
    weights = class_stats.grw_weights(counts, 1.2)
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert rows["head,"].split()[3:7] == ["2", "300", "to", "1,200"]
    assert rows["medium"].split()[1:3] == ["1", "40"]
    assert rows["tail,"].split()[3:7] == ["2", "5", "to", "19"]
    assert rows["tail,"].endswith(f"{number(float(weights[3]))} to {number(float(weights[4]))}")
    assert text.split()[-4:] == ["class", "4", "5", number(float(weights[4]))]


def test_counts_names_classes_without_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "n.npy", np.array([30, 0, 200, 0]))
    text = output(capsys, "counts", tmp_path / "n.npy")
    assert "classes without samples, 2: 1, 3; grw_weights raises" in text
    found = json.loads(output(capsys, "counts", tmp_path / "n.npy", "--json"))
    expected = class_stats.grw_weights([30, 0, 200, 0], empty="zero").tolist()
    assert found == {"counts": [30, 0, 200, 0], "rho": 1.0, "grw_weights": expected}


def test_shares_of_pixels_are_split_in_thirds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "n.npy", np.array([0.5, 0.3, 0.1, 0.06, 0.03, 0.01]))
    text = output(capsys, "counts", tmp_path / "n.npy")
    assert "6 classes, a sum of 1" in text
    assert "head, a third 2 0.300 to 0.500 80.0 %" in " ".join(text.split())


def test_a_file_that_holds_no_counts_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text("{")
    assert _cli.main(["counts", str(tmp_path / "x.json")]) == 2
    assert "error: " in capsys.readouterr().err
    assert _cli.main(["counts", str(tmp_path / "none.csv")]) == 2
