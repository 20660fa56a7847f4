"""How many instructions a warp of the Triton kernels issues, counted in the machine code."""

from __future__ import annotations

import pytest

from machine_code import triton_kernels
from support import cuda_tools

# Instructions for 512 bytes of logits, forward and backward: those of triton 3.9 and 3 %.
# `python -m machine_code.triton_kernels` prints them.
BUDGETS = {
    ("rows", 1203, "float32"): (83, 75),
    ("rows", 1203, "bfloat16"): (170, 170),
    ("rows", 8142, "float32"): (57, 55),
    ("rows", 8142, "bfloat16"): (114, 128),
    ("rows", 8192, "float32"): (45, 33),
    ("rows", 8192, "bfloat16"): (99, 74),
    ("planes", 19, "float32"): (76, 62),
    ("planes", 19, "bfloat16"): (163, 134),
    ("planes", 150, "float32"): (49, 46),
    ("planes", 150, "bfloat16"): (102, 98),
}


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    if why := cuda_tools.why_not():
        pytest.skip(why)


@pytest.mark.parametrize(("layout", "classes", "dtype"), BUDGETS)
def test_kernels_keep_their_budgets_and_issue_no_more_than_a_fused_peer(
    layout: str, classes: int, dtype: str
) -> None:
    forward, backward, peer = (
        triton_kernels.count(layout, classes, dtype, step)
        for step in ("forward", "backward", "peer")
    )
    found = sum(forward.values()), sum(backward.values())
    budgets = BUDGETS[layout, classes, dtype]
    assert all(n <= most for n, most in zip(found, budgets, strict=True)), (found, budgets)
    assert sum(found) <= sum(peer.values()), (found, sum(peer.values()))


@pytest.mark.parametrize("dtype", triton_kernels.DTYPES)
def test_the_walk_reads_each_logit_once(dtype: str) -> None:
    """Else the counts are of something else: 8192 classes are whole vectors, in whole tiles."""
    forward = triton_kernels.count("rows", 8192, dtype, "forward")
    backward = triton_kernels.count("rows", 8192, dtype, "backward")
    peer = triton_kernels.count("rows", 8192, dtype, "peer")
    for found, reads, writes in ((forward, 1, 0), (backward, 1, 1), (peer, 2, 1)):
        assert found["LDG.E.128"] == pytest.approx(reads, abs=0.01)
        assert found.get("STG.E.128", 0) == pytest.approx(writes, abs=0.01)
