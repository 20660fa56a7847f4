"""The bandwidth benchmark: it runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import bandwidth


def test_it_measures_every_kernel(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--megabytes", "0.2", "--classes", "67", "--rounds", "2"]
    assert bandwidth.main([*arguments, "--out", str(tmp_path)]) == 0
    with (tmp_path / "bandwidth.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["dtype"], r["work"]) for r in rows] == [
        (dtype, work) for dtype in bandwidth.DTYPES for work in bandwidth.PASSES
    ]
    for row in rows:
        count = int(0.2e6 / (67 * bandwidth.DTYPES[row["dtype"]].itemsize))
        moved = bandwidth.PASSES[row["work"]] * count * 67 * bandwidth.DTYPES[row["dtype"]].itemsize
        assert float(row["gigabytes_per_second"]) == pytest.approx(
            moved / float(row["milliseconds"]) * 1e-6
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bandwidth.main([])
    assert "this PyTorch sees no GPU" in capsys.readouterr().err
