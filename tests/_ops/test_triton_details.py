"""Prediction and entropy from the Triton kernels' read of the logits: interpreted, and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from disalign_ops._ops.codes import CALIBRATION, DETAILS, ENTROPY, PREDICTION
from disalign_ops._ops.triton import operators
from support import sets, triton_compile
from support.places import TESTS, test_files
from support.triton_compile import SHAPES, Launch

ROWS_AND_PLANES = [shape for shape, size in SHAPES if not size[0]]


@pytest.mark.parametrize("part", sets.PARTS)
def test_the_operators_pass_the_tests_of_details(part: str) -> None:
    only = (
        "every_field and native or most_probable or entropy or ignored_position or empty_batch or "
        "class_probabilities or some_classes or nan_at_the_target"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "-p", "support.triton_operators", *sets.arguments(part, only),
         *test_files("details", "shard_details")],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert "row_forward called" in run.stdout
    assert "dense_forward called" in run.stdout
    assert "row_shard_forward called" in run.stdout


def launched(
    shape: tuple[int, ...], dtype: torch.dtype, calibrated: bool, wanted: int, soft: bool = False
) -> Launch:
    """What forward launches with the loss and its options."""
    z = torch.zeros(shape, dtype=dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    classes, n = shape[1], z.numel() // shape[1]

    def vector(entries: int) -> Any:
        return torch.zeros(entries, dtype=acc)

    calibration = (vector(classes), vector(classes), vector(n)) if calibrated else (None,) * 3
    options = (vector(classes), vector(classes), vector(n))
    if soft:
        target, options = torch.zeros_like(z), (options[0], None, options[2])
    else:
        target = torch.zeros(n).long()
    with triton_compile.launches() as found:
        operators.forward(
            z, target, vector(classes), *calibration, *options, None, -100, 0.1, 0.0, 1, 0, wanted
        )
    return found[0]


# Bytes that a thread keeps in memory, where the registers are full without details: (shape, dtype).
SPILLED = {
    ((4096, 19), torch.float64): 64,
    ((2, 19, 1024), torch.bfloat16): 160,
    ((2, 19, 1024), torch.float64): 32,
}
SOFT_SPILLED = {((2, 19, 1024), torch.float64): 112}


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ROWS_AND_PLANES, ids=str)
def test_the_kernels_compile_and_spill_what_is_known(
    shape: tuple[int, ...], dtype: torch.dtype, soft: bool
) -> None:
    known = SOFT_SPILLED if soft else SPILLED
    for calibrated in (True, False):
        wanted = DETAILS | PREDICTION | ENTROPY | CALIBRATION * calibrated
        found = triton_compile.compile_launch(launched(shape, dtype, calibrated, wanted, soft), 90)
        assert found.spilled <= known.get((shape, dtype), 0), found
        assert soft or found.asserts, "a wrong target must stop the kernel"


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_a_call_without_details_compiles_what_it_did(soft: bool) -> None:
    """No argument, and no instruction, of what is not wanted."""
    texts = []
    for wanted in (0, DETAILS, DETAILS | PREDICTION):
        found = launched((64, 1203), torch.float32, False, wanted, soft)
        texts.append(triton_compile.translate(found, 90).asm["ptx"])
    assert "prediction" not in texts[0]
    assert texts[0].count("st.global") + 1 == texts[1].count("st.global")
    assert texts[1].count("st.global") + 1 == texts[2].count("st.global")
