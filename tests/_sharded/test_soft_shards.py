"""Class probabilities where classes are in parts: a head's chunks, shards of processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops import Shard
from disalign_ops._ops import schemas, shard_reference
from disalign_ops._ops.codes import CALIBRATION, LOGITS
from disalign_ops.errors import ArgumentError
from support import linear_cases, ranks
from support.linear_cases import Problem
from support.sharded_cases import SHARDS, C, N, Whole, close, options_of, shard_of
from support.tolerances import assert_close

NAMES = ("logits", "scale", "bias", "confidence")


def soft(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows that sum to 1, half of their classes 0."""
    y = torch.rand(rows, classes, generator=torch.Generator().manual_seed(7)).to(dtype)
    y[:, ::2] = 0
    return y / y.sum(1, keepdim=True).clamp(min=1e-3)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_bytes", [1 << 10, 1 << 26], ids=["chunks of classes", "one"])
def test_a_linear_head(
    chunk_bytes: int, dtype: torch.dtype, reduction: str, calibrated: bool
) -> None:
    p = Problem.of(dtype)
    p.target = soft(linear_cases.N, linear_cases.C, dtype)
    options: dict[str, Any] = {
        "weight": torch.rand(linear_cases.C).to(dtype) + 0.1, "label_smoothing": 0.1,
        "sample_weight": torch.rand(linear_cases.N).to(dtype), "reduction": reduction,
        "prior": torch.randn(linear_cases.C).to(dtype),
    }  # fmt: skip
    upstream = torch.randn(linear_cases.N if reduction == "none" else ()).to(dtype)
    loss = p.loss(calibrated, chunk_bytes=chunk_bytes, **options)
    found = torch.autograd.grad(loss, p.learned(calibrated), upstream)
    exact = p.to(torch.float64)
    exact.target = p.target.double()
    with disalign_ops.set_backend("reference"):
        expected = exact.unfused(calibrated, **{
            k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()
        })  # fmt: skip
    assert_close(loss.detach(), expected.detach(), dtype, "loss")
    wanted = torch.autograd.grad(expected, exact.learned(calibrated), upstream.double())
    for k, (a, e) in enumerate(zip(found, wanted, strict=True)):
        assert_close(a, e, dtype, str(k), factor=4.0)  # sums of products of the head's matmuls


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_operators_of_a_shard(dtype: torch.dtype, smoothing: float) -> None:
    n, c = 9, 41
    z = torch.randn(n, c).to(dtype) * 3
    z[2, :30] = float("-inf")
    y = soft(n, c, dtype)
    y[z == float("-inf")] = 0
    vectors = [torch.rand(c).to(dtype), torch.randn(c).to(dtype).abs(), torch.randn(c).to(dtype)]
    row = torch.randn(n).to(dtype)
    # Masked classes have a share of the smoothing, which is infinite: without it there.
    if smoothing:
        z = z.clamp(min=-50)
    arguments = (z, y, *vectors, row, torch.randn(c).to(dtype), None, 1 - smoothing, smoothing / 99)
    exact = tuple(t.double() if isinstance(t, Tensor) else t for t in arguments)
    (sums,) = schemas.ROW.operator("shard_forward")(*arguments, 0)
    expected = shard_reference.shard_sums(*exact)  # type: ignore[arg-type]
    assert_close(sums, expected, dtype, "sums", factor=4.0)
    factors = torch.rand(5, n, dtype=torch.float64)
    factors[0] = expected[0] + 0.3
    factors[3:] = 0
    found = schemas.ROW.operator("shard_backward")(
        factors.to(dtype), *arguments, LOGITS | CALIBRATION
    )
    wanted = shard_reference.shard_gradients(factors.to(dtype).double(), *exact)  # type: ignore[arg-type]
    for name, a, e in zip(NAMES, found, wanted, strict=True):
        assert_close(a, e, dtype, name, factor=4.0)


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "weights": {"weight": "class"},
    "everything": {
        "weight": "class", "label_smoothing": 0.1, "sample_weight": "row", "prior": "class",
    },
    "each": {"weight": "class", "reduction": "none"},
}  # fmt: skip


def _over_ranks(rank: int, world: int) -> None:
    for sizes in SHARDS[world]:
        for given in OPTIONS.values():
            whole = Whole(torch.float64, given)
            y = soft(N, C, torch.float64)
            c = whole.confidence.detach().clone().requires_grad_()
            z, a, b = (
                shard_of(t, rank, sizes, dim)
                for t, dim in ((whole.logits, 1), (whole.scale, 0), (whole.bias, 0))
            )
            loss = disalign_ops.disalign_cross_entropy(
                z, y.split(sizes, 1)[rank], c, a, b, **options_of(whole, rank, sizes),
                shard=Shard(),
            )  # fmt: skip
            with disalign_ops.set_backend("reference"):
                expected = disalign_ops.disalign_cross_entropy(
                    whole.logits, y, whole.confidence, whole.scale, whole.bias, **whole.options
                )
            assert_close(
                loss.detach(), expected.detach(), torch.float64, f"loss of {given}, {sizes}"
            )
            loss.sum().backward()
            expected.sum().backward()
            for local, all_classes, dim in ((z, whole.logits, 1), (a, whole.scale, 0),
                                            (b, whole.bias, 0)):  # fmt: skip
                assert all_classes.grad is not None
                close(local.grad, all_classes.grad.split(sizes, dim)[rank], "gradient")
            close(c.grad, whole.confidence.grad, "confidence")


def _head_over_ranks(rank: int, world: int) -> None:
    sizes = SHARDS[world][0]
    whole = Whole(torch.float64, {"weight": "class", "label_smoothing": 0.1})
    y = soft(N, C, torch.float64)
    x = whole.features.detach().clone().requires_grad_()
    w = shard_of(whole.weight, rank, sizes)
    loss = disalign_ops.linear_cross_entropy(
        x, w, y.split(sizes, 1)[rank], **options_of(whole, rank, sizes), shard=Shard()
    )
    expected = disalign_ops.linear_cross_entropy(whole.features, whole.weight, y, **whole.options)
    assert_close(loss.detach(), expected.detach(), torch.float64, "loss")
    loss.backward()
    expected.backward()
    assert whole.weight.grad is not None
    close(w.grad, whole.weight.grad.split(sizes)[rank], "weight")
    close(x.grad, whole.features.grad, "features")


@pytest.mark.parametrize("work", [_over_ranks, _head_over_ranks])
def test_over_processes(work: Any) -> None:
    ranks.run(work, 2)


def test_what_is_refused() -> None:
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    y = soft(4, 5, torch.float32)
    with pytest.raises(ArgumentError, match=r"^sample_rate must be None where target is"):
        disalign_ops.linear_cross_entropy(x, w, y, sample_rate=0.5)
    with pytest.raises(ArgumentError, match=r"^target must not require a gradient where logits"):
        disalign_ops.linear_cross_entropy(x, w, y.requires_grad_())
    with pytest.raises(ArgumentError, match=r"^margin must be None where target holds class"):
        disalign_ops.linear_cross_entropy(x, w, y.detach(), margin=0.5)
    with pytest.raises(ArgumentError, match=r"^target must have the input's shape"):
        disalign_ops.linear_cross_entropy(x, w, y.detach()[:, 1:])


def test_a_layers_loss_in_chunks_is_that_of_its_logits() -> None:
    linear_cases.compare_layer(soft(13, 29, torch.float64))
