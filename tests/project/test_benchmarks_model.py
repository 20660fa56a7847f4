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
    assert time.captured == pytest.approx(339e-6, rel=2e-3)
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
