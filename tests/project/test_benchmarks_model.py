"""The model of the times on GPUs: its arithmetic, and that the repository states what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import model
from benchmarks.gpus import GPUS

RESULTS = Path(model.__file__).parent / "results" / "README.md"
H100 = GPUS["H100 SXM"]


def test_the_stated_table_is_the_models() -> None:
    assert model.markdown() in RESULTS.read_text()


# Of the same data sheets: bits of the memory's bus, Gbit/s of each (of HBM to two digits), FP32
# units of a multiprocessor, TFLOPS of FP32.
DATA_SHEETS = {
    "T4": (256, 10, 64, 8.1),
    "A100 SXM 80 GB": (5120, 3.2, 64, 19.5),
    "L4": (192, 12.5, 128, 30.3),
    "RTX 4090": (384, 21, 128, 82.6),
    "H100 SXM": (5120, 5.2, 128, 66.9),
    "B200": (8192, 8, 128, 75),
    "RTX 5090": (512, 28, 128, 104.8),
}


def test_clocks_and_bandwidths_agree_with_the_rest_of_the_data_sheets() -> None:
    assert set(DATA_SHEETS) == set(GPUS)
    for name, (bits, rate, units, tflops) in DATA_SHEETS.items():
        gpu = GPUS[name]
        assert gpu.gigabytes_per_second == pytest.approx(bits * rate / 8, rel=3e-2), name
        clock = gpu.boost_ghz if name != "H100 SXM" else 1.98  # see gpus.py
        fused = 2 * gpu.multiprocessors * units * clock / 1e3
        assert fused == pytest.approx(tflops, rel=1e-2), name


def test_the_h100_issues_as_many_instructions_as_stated() -> None:
    assert H100.instructions_per_second == pytest.approx(927e9, rel=1e-3)


def test_plain_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.INSTRUCTIONS, ("forward", "fp32"), (149, 0))
    monkeypatch.setitem(model.INSTRUCTIONS, ("backward", "fp32"), (155, 0))
    time = model.predict(H100, "plain", "fp32", 65536, 1000)
    logits = 65536 * 1000 * 4
    # Forward: 512,000 reads of 512 bytes, 149 instructions each, at 463 G a second; more than the
    # 87 us that the bytes take. Backward: the bytes, read and written, at 3.015 TB/s, and for each
    # row two floats and its target; more than the 171 us of 155 instructions.
    forward = 512_000 * 149 / 463.32e9
    backward = (2 * logits + 65536 * 16) / 3.015e12
    assert time.captured == pytest.approx(forward + backward, rel=1e-9)
    assert time.captured == pytest.approx(339e-6, rel=3e-2)
    assert time.launches == pytest.approx(3 * 3e-6)
    assert time.share_of_copy == pytest.approx(3 * logits / 3.015e12 / time.captured)
    assert time.limit == "issue / memory"


def test_stage_2_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.INSTRUCTIONS, ("stage 2", "fp32"), (1, 1))  # memory limits
    time = model.predict(H100, "stage 2", "fp32", 65536, 1000)
    # 8192 classes' sums a multiprocessor, of scale and bias, written and read; 24 bytes a row.
    moved = 65536 * 1000 * 4 + 132 * 8192 * 2 * 4 * 2 + 65536 * 24
    assert time.captured == pytest.approx(moved / 3.015e12)
    assert time.limit == "memory"
    assert time.launches == pytest.approx(2 * 3e-6)


def test_launches_limit_what_is_small() -> None:
    assert model.predict(H100, "plain", "bf16", 100, 1203).limit == "launches"


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main([]) == 0
    assert "Predicted" in capsys.readouterr().out
    assert model.main(["--markdown"]) == 0
    assert capsys.readouterr().out.strip() == model.markdown()
