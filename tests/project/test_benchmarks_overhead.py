"""The overhead benchmark compares equal losses, and counts every call."""

from __future__ import annotations

import pytest
import torch

from benchmarks import overhead


@pytest.mark.parametrize("name", list(overhead.cases(2, 4)))
def test_both_sides_give_the_same_loss(name: str) -> None:
    ours, theirs = overhead.cases(3, 5)[name]
    torch.testing.assert_close(ours(), theirs())


def test_a_wrong_loss_is_not_timed() -> None:
    z = torch.zeros((), requires_grad=True)
    with pytest.raises(AssertionError):
        overhead.measure(lambda: z + 1, lambda: z * 1, 1, 1)


def test_pairs_alternate_and_every_call_is_counted() -> None:
    made: list[str] = []

    def step(name: str) -> torch.Tensor:
        made.append(name)
        return torch.zeros((), requires_grad=True) * 1

    overhead.measure(lambda: step("ours"), lambda: step("theirs"), 3, 2)
    pair = ["ours"] * 3 + ["theirs"] * 3
    assert made == ["ours", "theirs", *pair, *pair, *pair]


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--pairs", "1"])
    printed = capsys.readouterr().out
    assert printed.count("2 x 4") == 3
    assert printed.count("64 x 1000") == 3
