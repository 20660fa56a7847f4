"""The one table of tolerances, and the rule that compares with it."""

from __future__ import annotations

import torch
from torch import Tensor

# Error allowed relative to the largest magnitude of the expected tensor. float64 and float32: the
# kernels add in another order than the reference and exponentiate with a relative error of about
# 2e-7 + 4e-8 |x| (float32), 3e-16 (float64).
RELATIVE = {torch.float64: 1e-12, torch.float32: 4e-6}

# Half dtypes are compared with float64 and with the same-dtype PyTorch composition (see no_worse):
# beyond that composition's own error this much of the largest magnitude is allowed: one rounding.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _finite_scale(expected: Tensor) -> float:
    finite = expected.detach()[torch.isfinite(expected)].abs()
    # The floor: where next to nothing is expected (C = 1, p_t = 1), what is left of terms of order
    # 1 to 10 that cancel.
    return max(float(finite.max()), 1e-2) if finite.numel() else 1.0


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, factor: float = 1.0
) -> None:
    """Same shape, same NaN and infinities, and close by RELATIVE[dtype] * factor."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    scale = _finite_scale(expected)
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=0,
        atol=RELATIVE[dtype] * factor * scale,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def assert_no_worse(
    actual: Tensor, composed: Tensor, exact: Tensor, dtype: torch.dtype, what: str
) -> None:
    """Against float64, no worse than the same-dtype PyTorch composition, plus one rounding."""
    scale = _finite_scale(exact)
    error = float((actual.double() - exact).abs().max())
    allowed = float((composed.double() - exact).abs().max()) + ROUNDING[dtype] * scale
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
