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


@pytest.mark.parametrize("wanted", [PREDICTION, ENTROPY, PREDICTION | ENTROPY])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_some_classes(dtype: torch.dtype, name: str, wanted: int) -> None:
    acc = reference.accumulate_dtype(dtype)
    z = (torch.randn(N, C) * 4).to(dtype)
    z[3] = float("-inf")
    z[4, ::3] = z[4].max()
    z[5, 7] = float("nan")
    t = torch.randint(0, C, (N,))
    t[::4], t[1::4] = ELSEWHERE, IGNORED
    t[3:6] = torch.tensor([2, 0, ELSEWHERE])

    def vector(entries: int, option: str, least: float = 0.0) -> Any:
        return torch.rand(entries).to(acc) + least if option in OPTIONS[name] else None

    weight = vector(C, "weight", 0.1)
    scale, bias, row = (vector(k, "calibration") for k in (C, C, N))
    prior, margin = vector(C, "prior"), vector(C, "margin", 0.5)
    share = 0.001 if "smoothing" in OPTIONS[name] else 0.0
    arguments = (z, t, weight, scale, bias, row, prior, margin, 1 - share, share)
    operator = schemas.ROW.operator("shard_forward")
    sums, *details = operator(*arguments, wanted)
    torch.testing.assert_close(sums, operator(*arguments, 0)[0], rtol=0, atol=0, equal_nan=True)
    torch.library.opcheck(operator, (*arguments, wanted), test_utils=("test_faketensor",))

    u = reference.calibrated_logits(z, scale, bias, row, prior)
    entropy = torch.where(t == IGNORED, 0.0, reference.entropy(u, u.logsumexp(1)))
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
