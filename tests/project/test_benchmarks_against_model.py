"""Steps beside the model: they run, and the comparison is the model's."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import against_model, model
from benchmarks.against_model import Device, Row
from benchmarks.gpus import GPUS

H100 = Device("NVIDIA H100 80GB HBM3", "90", 132)


def test_it_measures_every_step(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--shape", "40x67", "--rounds", "2", "--out", str(tmp_path)]
    assert against_model.main(arguments) == 0
    with (tmp_path / "model.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["dtype"], r["step"]) for r in rows] == [
        (dtype, step) for dtype in model.SIZES for step in model.STEPS
    ]
    for r in rows:
        passes = 1 if r["step"] == "stage 2" else 2
        moved = passes * 40 * 67 * model.SIZES[r["dtype"]]
        assert float(r["gigabytes_per_second"]) == pytest.approx(
            moved / float(r["milliseconds"]) * 1e-6
        )
        assert r["predicted_milliseconds"] == ""
        assert r["predicted_for"].endswith("not in benchmarks/gpus.py")


def test_the_steps_are_those_that_the_model_means() -> None:
    z, target = torch.randn(5, 9), torch.arange(5)
    steps = against_model._steps(z, target)
    assert list(steps) == list(model.STEPS)
    shapes = {name: [tuple(g.shape) for g in step()] for name, step in steps.items()}  # type: ignore[attr-defined]
    assert shapes == {
        "plain": [(5, 9)],
        "all gradients": [(5, 9), (5,), (9,), (9,)],
        "stage 2": [(5,), (9,), (9,)],
    }


def test_a_listed_gpu_is_known_by_name_and_size() -> None:
    assert {*against_model.DRIVER_NAMES.values()} == {*GPUS}
    gpu, which = against_model.gpu_of(H100, 1.0)
    assert gpu is GPUS["H100 SXM"]
    assert which == "H100 SXM of benchmarks/gpus.py"


def test_another_gpu_is_counted_by_what_is_known_of_it() -> None:
    # A slice of a listed one; one that is not listed.
    for device in (Device(H100.name, "90", 16, 1.98), Device("NVIDIA H200", "90", 132, 1.98)):
        gpu, which = against_model.gpu_of(device, 4320.0)
        assert gpu is not None
        assert (gpu.multiprocessors, gpu.boost_ghz) == (device.multiprocessors, 1.98)
        assert gpu.gigabytes_per_second == pytest.approx(4800)
        assert "not in benchmarks/gpus.py" in which
    for device in (Device("NVIDIA H200", "90", 132), Device("NVIDIA A10", "86", 72, 1.7)):
        assert against_model.gpu_of(device, 1.0) == (
            None, f"{device.name}, {device.multiprocessors} multiprocessors: not in "
            "benchmarks/gpus.py",
        )  # fmt: skip


def test_the_prediction_is_of_a_captured_step() -> None:
    found = [Row(8192, 32000, "bf16", "plain", 0.9, 0.4, 0.0, 0.5),
             Row(16, 67, "fp32", "stage 2", 0.9, 0.1, 0.0, 0.5)]  # fmt: skip
    assert against_model.copy_bandwidth(found) == pytest.approx(2 * 8192 * 32000 * 2 / 0.4e6)
    large, _ = against_model.predicted(found, H100)
    time = model.predict(GPUS["H100 SXM"], "plain", "bf16", 8192, 32000)
    assert large.predicted_milliseconds == pytest.approx(time.captured * 1e3)
    assert large.predicted_share_of_copy == time.share_of_copy
    assert large.predicted_limit == time.limit_of_passes


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        against_model.main([])
    assert "this PyTorch sees no GPU" in capsys.readouterr().err
