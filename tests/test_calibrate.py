"""Calibrated logits for inference: native against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops._ops.codes import CALIBRATION, LOGITS
from support import dense_cases
from support.cases import CONTENTS, SHAPES, Rows, rows
from support.tolerances import assert_close, assert_no_worse


def run(r: Rows, upstream: Tensor) -> list[Tensor]:
    out = disalign_ops.calibrate(r.logits, r.confidence, r.scale, r.bias, form="residual")
    return [out.detach(), *torch.autograd.grad(out, r.learned, upstream.to(out.dtype))]


NAMES = ("output", "input", "confidence", "scale", "bias")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    r, upstream = rows(*shape, dtype), torch.randn(shape)
    actual = run(r, upstream)
    with disalign_ops.set_backend("reference"):
        expected = run(r.to(torch.float64), upstream)
    for what, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(a, e, dtype, what)


@pytest.mark.parametrize("content", ["strided", "expanded", "transposed", "masked"])
def test_contents(content: str) -> None:
    r, upstream = CONTENTS[content][0](rows(11, 67)), torch.randn(11, 67)
    actual = run(r, upstream)
    with disalign_ops.set_backend("reference"):
        expected = run(r, upstream)
    for what, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(a, e, torch.float64, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_no_worse_than_the_same_dtype_composition(dtype: torch.dtype) -> None:
    r, upstream = rows(9, 1203).to(dtype), torch.randn(9, 1203).to(dtype)
    actual = run(r, upstream)
    c = torch.sigmoid(r.confidence)[:, None]
    composed = (1 + c * r.scale) * r.logits + c * r.bias
    eager = [composed.detach(), *torch.autograd.grad(composed, r.learned, upstream)]
    with disalign_ops.set_backend("reference"):
        exact = run(r.to(torch.float64), upstream.double())
    for what, a, x, e in zip(NAMES, actual, eager, exact, strict=True):
        assert a.dtype == dtype
        assert_no_worse(a, x, e, dtype, what)


def test_the_identity_at_the_interpolated_forms_start(backend: str) -> None:
    z = torch.randn(4, 9)
    out = disalign_ops.calibrate(z, torch.randn(4), torch.ones(9), torch.zeros(9))
    assert torch.equal(out, z)


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 9, 3, 4)], ids=str)
def test_shape_and_dtype_are_the_inputs(backend: str, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape).bfloat16()
    positions = () if len(shape) == 1 else (shape[0], *shape[2:])
    confidence, scale, bias = torch.randn(positions), torch.rand(9), torch.randn(9)
    out = disalign_ops.calibrate(z, confidence, scale, bias)
    assert out.shape == z.shape
    assert out.dtype == z.dtype
    c = torch.sigmoid(confidence).unsqueeze(0 if len(shape) == 1 else 1)
    view = (-1,) if len(shape) == 1 else (1, -1, *(1,) * (len(shape) - 2))
    u = c * (scale.reshape(view) * z.float() + bias.reshape(view)) + (1 - c) * z.float()
    torch.testing.assert_close(out.float(), u, rtol=2.0**-8, atol=2.0**-8)


@pytest.mark.parametrize("background", ["first", "last"])
def test_background_passes_unchanged(backend: str, background: str) -> None:
    z = torch.randn(4, 9)
    out = disalign_ops.calibrate(
        z, torch.randn(4), torch.rand(8), torch.randn(8), background=background
    )
    column = 0 if background == "first" else 8
    assert torch.equal(out[:, column], z[:, column])
    assert not torch.equal(out[:, 4], z[:, 4])


DENSE_CONTENTS = ("plain", "sliced", "cropped", "channels_last", "expanded", "masked")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("content", DENSE_CONTENTS)
@pytest.mark.parametrize(
    "shape", [(2, 21, 5, 7), (1, 150, 40, 31), (2, 3, 0, 4), (3, 5, 600)], ids=str
)
def test_dense_logits(shape: tuple[int, ...], content: str, dtype: torch.dtype) -> None:
    d = dense_cases.CONTENTS[content][0](dense_cases.dense(shape, dtype=dtype))
    upstream = torch.randn(shape)

    def both(d: dense_cases.Dense) -> list[Tensor]:
        out = disalign_ops.calibrate(d.logits, d.confidence, d.scale, d.bias, form="residual")
        return [out.detach(), *torch.autograd.grad(out, d.learned, upstream.to(out.dtype))]

    actual = both(d)
    with disalign_ops.set_backend("reference"):
        expected = both(d.to(torch.float64) if dtype == torch.float32 else d)
    for what, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(a, e, dtype, what)


def test_dense_logits_in_half_and_their_gradcheck(backend: str) -> None:
    d = dense_cases.dense((2, 3, 2, 2))

    def function(*learned: Tensor) -> Tensor:
        return disalign_ops.calibrate(*learned)

    assert torch.autograd.gradcheck(function, d.learned)
    assert torch.autograd.gradgradcheck(function, d.learned)
    half = d.to(torch.bfloat16)
    out = function(*half.learned)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), function(*d.learned), rtol=2e-2, atol=2e-2)


def test_opcheck_dense_calibrate() -> None:
    d = dense_cases.dense((2, 19, 3, 4))
    tensors = (d.logits.detach().flatten(2).requires_grad_(), d.scale, d.bias,
               d.confidence.detach().flatten().requires_grad_())  # fmt: skip
    torch.library.opcheck(torch.ops.disalign_ops.dense_calibrate.default, tensors)
    detached = [t.detach() for t in tensors]
    torch.library.opcheck(
        torch.ops.disalign_ops.dense_calibrate_backward.default,
        (torch.randn(2, 19, 12, dtype=torch.float64), *detached, LOGITS | CALIBRATION),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
