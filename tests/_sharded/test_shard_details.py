"""Prediction and entropy of some of a row's classes, from the operator that sums them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disalign_ops._ops import reference, schemas
from disalign_ops._ops.codes import ENTROPY, PREDICTION
from disalign_ops._ops.shard_reference import ELSEWHERE, IGNORED
from support.tolerances import assert_close

N, C = 23, 5 * 16 + 7
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "margin": ("margin",),
    "everything": ("calibration", "prior", "margin", "weight", "smoothing"),
}


def given(dtype: torch.dtype, name: str, soft: bool) -> tuple[Any, ...]:
    """Arguments of the operator, but for what is wanted."""
    acc = reference.accumulate_dtype(dtype)
    z = (torch.randn(N, C) * 4).to(dtype)
    z[3] = float("-inf")
    z[4, ::3] = z[4].max()
    z[5, 7] = float("nan")
    t = torch.randint(0, C, (N,))
    t[::4], t[1::4] = ELSEWHERE, IGNORED
    t[3:6] = torch.tensor([2, 0, ELSEWHERE])
    if soft:
        t = torch.rand(N, C).to(dtype)

    def vector(entries: int, option: str, least: float = 0.0) -> Any:
        return torch.rand(entries).to(acc) + least if option in OPTIONS[name] else None

    weight = vector(C, "weight", 0.1)
    scale, bias, row = (vector(k, "calibration") for k in (C, C, N))
    prior, margin = vector(C, "prior"), None if soft else vector(C, "margin", 0.5)
    share = 0.001 if "smoothing" in OPTIONS[name] else 0.0
    return (z, t, weight, scale, bias, row, prior, margin, 1 - share, share)


@pytest.mark.parametrize("wanted", [PREDICTION, ENTROPY, PREDICTION | ENTROPY])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_some_classes(dtype: torch.dtype, name: str, soft: bool, wanted: int) -> None:
    acc = reference.accumulate_dtype(dtype)
    arguments = z, t, _, scale, bias, row, prior, *_ = given(dtype, name, soft)
    operator = schemas.ROW.operator("shard_forward")
    sums, *details = operator(*arguments, wanted)
    torch.testing.assert_close(sums, operator(*arguments, 0)[0], rtol=0, atol=0, equal_nan=True)

    u = reference.calibrated_logits(z, scale, bias, row, prior)
    entropy = reference.entropy(u, u.logsumexp(1))
    if not soft:
        entropy = torch.where(t == IGNORED, 0.0, entropy)
    if wanted & PREDICTION:
        # A calibration may be rounded otherwise: equal up to that.
        at = details.pop(0)
        assert torch.equal(at[:6], u.argmax(1)[:6])
        largest = u.gather(1, at[:, None])[:, 0]
        assert_close(largest[6:], u[6:].amax(1), acc, "largest")
    if wanted & ENTROPY:
        (found,) = details
        assert found[5].isnan()
        entropy[3] = 0  # nothing but masked classes
        rest = torch.arange(N) != 5
        assert_close(found[rest], entropy[rest], acc, "entropy", factor=8.0)


@pytest.mark.parametrize("wanted", [0, PREDICTION, ENTROPY, PREDICTION | ENTROPY])
@pytest.mark.parametrize("soft", [False, True])
def test_fakes_pass_opcheck(soft: bool, wanted: int) -> None:
    arguments = *given(torch.float32, "everything", soft), wanted
    operator = schemas.ROW.operator("shard_forward")
    torch.library.opcheck(operator, arguments, test_utils=("test_faketensor",))


@pytest.mark.parametrize("wanted", [PREDICTION, PREDICTION | ENTROPY])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 9], ids=["row by row", "blocks"])
def test_nan_at_the_target_is_the_prediction(step: int, dtype: torch.dtype, wanted: int) -> None:
    """A shard's sums leave the target's exponential out."""
    z = torch.randn(9, C).to(dtype)
    t = torch.full((9,), 7)
    z[1:, 7] = float("nan")
    z[2, 3] = float("nan")  # an earlier one
    operator = schemas.ROW.operator("shard_forward")
    nothing = (None,) * 6
    for k in range(0, 9, step):
        rows = slice(k, k + step)
        found = operator(z[rows], t[rows], *nothing, 1.0, 0.0, wanted)[1]
        assert torch.equal(found, z[rows].argmax(1))
