"""The model of the times on GPUs: its arithmetic, and that the repository states what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import model, model_planes
from benchmarks.gpus import GPUS

RESULTS = Path(model.__file__).parent / "results" / "README.md"
H100 = GPUS["H100 SXM"]


def test_the_stated_table_is_the_models() -> None:
    assert model.markdown() in RESULTS.read_text()
    assert model_planes.markdown() in RESULTS.read_text()


def test_planes_by_hand() -> None:
    # 150 classes of fp32: 600 bytes of logits and 16 others a position; the memory limits.
    share, limit = model_planes.share_of_copy("H100 SXM", "forward", "fp32", (2, 150, 512, 512))
    assert (share, limit) == (pytest.approx(600 / 616), "memory")
    # Instructions for 512 bytes at half of what is issued at most.
    share, limit = model_planes.share_of_copy("H100 SXM", "stage2", "bf16", (1, 1203, 100, 100))
    issued = model_planes.INSTRUCTIONS[1203, "stage2"][1] / (0.5 * H100.instructions_per_second)
    copied = 512 / (0.9 * H100.gigabytes_per_second * 1e9)
    assert (share, limit) == (pytest.approx(copied / issued), "issue")


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
    monkeypatch.setitem(model.INSTRUCTIONS, ("warp", "gradient"), (190, 0))
    time = model.predict(H100, "plain", "fp32", 65536, 1000)
    logits = 65536 * 1000 * 4
    # 512,000 reads of 512 bytes, 190 instructions each, at 463 G a second: more than the 174 us
    # that the bytes take, read and written at 3.015 TB/s.
    assert time.captured == pytest.approx(512_000 * 190 / 463.32e9, rel=1e-9)
    # The denominator and the row kernel; backward's kernel, which returns at once.
    assert time.launches == pytest.approx(3 * 3e-6)
    assert time.share_of_copy == pytest.approx(2 * logits / 3.015e12 / time.captured)
    assert time.limit == "issue"


def test_tiles_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.INSTRUCTIONS, ("tiles", "forward"), (0, 200))
    monkeypatch.setitem(model.INSTRUCTIONS, ("tiles", "backward"), (0, 1))
    time = model.predict(H100, "plain", "bf16", 512, 500000)  # beyond a cluster
    logits = 512 * 500000 * 2
    # Forward by its instructions; backward reads and writes, and for each row two floats and its
    # target.
    forward = logits / 512 * 200 / 463.32e9
    assert time.captured == pytest.approx(forward + (2 * logits + 512 * 16) / 3.015e12, rel=1e-9)
    # Forward, the sum over tiles, finish_kernel, backward; and the one that returns at once.
    assert time.launches == pytest.approx(5 * 3e-6)
    assert time.limit == "issue / memory"


def test_stage_2_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.INSTRUCTIONS, ("warp", "stage2"), (1, 1))  # memory limits
    time = model.predict(H100, "stage 2", "fp32", 65536, 1000)
    # A block a multiprocessor has sums of all classes, of scale and bias, written and read; 24
    # bytes a row.
    moved = 65536 * 1000 * 4 + 132 * 1000 * 2 * 4 * 2 + 65536 * 24
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
