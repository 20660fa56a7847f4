"""Two classes a position, (a, b, lam), where the logits are not one tensor: of linear heads, of
classes over processes, and upsampled.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops import Shard
from disalign_ops.errors import ArgumentError, ArgumentTypeError
from support import linear_cases, ranks
from support.comparison import memory_held
from support.linear_cases import Problem
from support.sharded_cases import SHARDS, C, N, Whole, close, options_of, shard_of
from support.tolerances import assert_close


def two(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, lam); some alike, some ignored in one or in both, some with no share."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randint(0, classes, (2, rows), generator=generator)
    b[1] = a[1]
    a[2] = b[3] = -100
    a[4] = b[4] = -100
    lam = torch.rand(rows, generator=generator, dtype=torch.float64)
    lam[5], lam[6] = 0.0, 1.0
    return a, b, lam


def _double(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}


def _compare_head(p: Problem, calibrated: bool, chunk_bytes: int, options: dict[str, Any]) -> None:
    dtype = p.tensors["features"].dtype
    rows = linear_cases.N
    p.target = two(rows, linear_cases.C)  # type: ignore[assignment]
    loss = p.loss(calibrated, chunk_bytes=chunk_bytes, **options)
    upstream = torch.randn(loss.shape, dtype=torch.float64)
    found = torch.autograd.grad(loss, p.learned(calibrated), upstream.to(loss.dtype))
    exact = p.to(torch.float64)
    with disalign_ops.set_backend("reference"):
        expected = exact.unfused(calibrated, **_double(options))
    assert_close(loss.detach(), expected.detach(), dtype, "loss")
    wanted = torch.autograd.grad(expected, exact.learned(calibrated), upstream)
    names = (*linear_cases.LINEAR, *linear_cases.CALIBRATION)
    for what, a, e in zip(names, found, wanted, strict=False):
        assert_close(a, e, dtype, what, factor=4.0)  # sums of products of the head's matmuls


# The reference differs in nothing that chunks are about, and takes long for small ones.
@pytest.mark.parametrize(
    ("backend", "chunk_bytes"),
    [("native", 1 << 10), ("native", 1 << 26), ("reference", 1 << 14)],
)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_linear_head_with_every_combination_of_options(
    reduction: str, calibrated: bool, backend: str, chunk_bytes: int
) -> None:
    classes, rows = linear_cases.C, linear_cases.N
    for weighted, smoothing, sampled, normalizer, extra in itertools.product(
        (False, True), (0.0, 0.1), (False, True), ("weights", "valid", 7.5),
        ({}, {"prior": torch.linspace(-3, 3, classes, dtype=torch.float64)}, {"margin": 0.5}),
    ):  # fmt: skip
        options = {
            "weight": torch.rand(classes, dtype=torch.float64) + 0.1 if weighted else None,
            "sample_weight": torch.rand(rows, dtype=torch.float64) if sampled else None,
            "label_smoothing": smoothing, "normalizer": normalizer, "reduction": reduction, **extra,
        }  # fmt: skip
        with disalign_ops.set_backend(backend):
            _compare_head(Problem.of(torch.float64), calibrated, chunk_bytes, options)


@pytest.mark.parametrize("chunk_bytes", [1 << 10, 1 << 26], ids=["chunks of classes", "one"])
def test_a_linear_head_in_float32(chunk_bytes: int) -> None:
    options = {"weight": torch.rand(linear_cases.C) + 0.1, "reduction": "mean"}
    for calibrated in (False, True):
        _compare_head(Problem.of(torch.float32), calibrated, chunk_bytes, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"margin": 0.5}], ids=str)
def test_a_linear_head_in_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    """As exact as the sum of the head's two losses."""
    p = Problem.of(dtype)
    a, b, _ = two(linear_cases.N, linear_cases.C)
    a, b = a.clamp(min=0), b.clamp(min=0)
    results = []
    for pair, q in ((True, p), (False, p), (False, p.to(torch.float64))):
        losses = []
        for target in [(a, b, 0.7)] if pair else [a, b]:
            q.target = target  # type: ignore[assignment]
            losses.append(q.loss(False, chunk_bytes=1 << 10, **options))
        loss = losses[0] if pair else 0.7 * losses[0] + 0.3 * losses[1]
        results.append([loss.detach(), *torch.autograd.grad(loss, q.learned(False))])
    for ours, composed, exact in zip(*results, strict=True):
        error, of_two = ((x.double() - exact).norm() for x in (ours, composed))
        assert error <= 1.5 * of_two + 2 * torch.finfo(dtype).eps * exact.norm()


def test_a_head_twice_differentiated_and_with_several_upstreams() -> None:
    results = []
    for unfused in (False, True):
        torch.manual_seed(1)
        p = Problem.of(torch.float64)
        p.target = two(linear_cases.N, linear_cases.C)  # type: ignore[assignment]
        options = {"weight": torch.rand(linear_cases.C, dtype=torch.float64)}
        loss = (p.unfused if unfused else p.loss)(True, **options)
        learned = p.learned(True)
        first = torch.autograd.grad(loss, learned, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), learned)
        loss = (p.unfused if unfused else p.loss)(True, **options)
        upstreams = torch.tensor([1.0, 0.5], dtype=torch.float64)
        several = torch.autograd.grad(loss, learned, upstreams, is_grads_batched=True)
        results.append([*first, *second, *several])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_head_makes_its_logits_once() -> None:
    """As with class indices: what two losses would make twice."""
    from torch.utils.flop_counter import FlopCounterMode

    p = Problem.of(torch.float32)
    flops = []
    a, b, lam = two(linear_cases.N, linear_cases.C)
    for target in (a, (a, b, lam)):
        p.target = target  # type: ignore[assignment]
        with FlopCounterMode(display=False) as counter:
            p.loss(False).backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_a_head_takes_no_memory_of_the_logits_size() -> None:
    rows, classes, chunk_bytes = 512, 4096, 1 << 18
    p = Problem.of(torch.float32, rows, 16, classes)
    a, b, lam = two(rows, classes)
    taken = []
    for target in (a, (a, b, lam)):
        p.target = target  # type: ignore[assignment]
        taken.append(memory_held(lambda: p.loss(False, chunk_bytes=chunk_bytes).backward()))
    assert taken[1] - taken[0] < 400 * rows < rows * classes // 8


def test_a_masked_class_is_infinite_unless_it_has_no_share() -> None:
    x = torch.eye(2, dtype=torch.float64, requires_grad=True)
    w = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(5, dtype=torch.float64)
    bias[1] = float("-inf")
    a, b = torch.zeros(2).long(), torch.ones(2).long()
    lam = torch.tensor([0.4, 1.0], dtype=torch.float64)
    each = disalign_ops.linear_cross_entropy(x, w, (a, b, lam), bias, reduction="none")
    assert each[0] == float("inf")
    assert torch.isfinite(each[1])
    for gradient in torch.autograd.grad(each[1], (x, w)):
        assert torch.isfinite(gradient).all()


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "weights": {"weight": "class", "prior": "class"},
    "smoothing": {"label_smoothing": 0.1, "sample_weight": "row"},
    "two reads": {"weight": "class", "label_smoothing": 0.1, "sample_weight": "row"},
    "margin": {"margin": "class", "normalizer": "valid"},
    "each": {"weight": "class", "reduction": "none"},
}


def _over_ranks(rank: int, world: int) -> None:
    target = two(N, C)
    for sizes, given in itertools.product(SHARDS[world], OPTIONS.values()):
        whole = Whole(torch.float64, given)
        c = whole.confidence.detach().clone().requires_grad_()
        z, a, b = (
            shard_of(t, rank, sizes, dim)
            for t, dim in ((whole.logits, 1), (whole.scale, 0), (whole.bias, 0))
        )
        loss = disalign_ops.disalign_cross_entropy(
            z, target, c, a, b, **options_of(whole, rank, sizes), shard=Shard()
        )
        with disalign_ops.set_backend("reference"):
            expected = disalign_ops.disalign_cross_entropy(
                whole.logits, target, whole.confidence, whole.scale, whole.bias, **whole.options
            )
        assert_close(loss.detach(), expected.detach(), torch.float64, f"{given}, {sizes}")
        loss.sum().backward()
        expected.sum().backward()
        for local, of_all, dim in ((z, whole.logits, 1), (a, whole.scale, 0), (b, whole.bias, 0)):
            assert of_all.grad is not None
            close(local.grad, of_all.grad.split(sizes, dim)[rank], "gradient")  # type: ignore[arg-type]
        close(c.grad, whole.confidence.grad, "confidence")  # type: ignore[arg-type]


def _heads_over_ranks(rank: int, world: int) -> None:
    target = two(N, C)
    for sizes, given in itertools.product(SHARDS[world], OPTIONS.values()):
        whole = Whole(torch.float64, given)
        x = whole.features.detach().clone().requires_grad_()
        w = shard_of(whole.weight, rank, sizes)
        loss = disalign_ops.linear_cross_entropy(
            x, w, target, **options_of(whole, rank, sizes), shard=Shard(), chunk_bytes=1 << 10
        )
        expected = disalign_ops.linear_cross_entropy(
            whole.features, whole.weight, target, **whole.options
        )
        assert_close(loss.detach(), expected.detach(), torch.float64, f"{given}, {sizes}")
        loss.sum().backward()
        expected.sum().backward()
        assert whole.weight.grad is not None
        close(w.grad, whole.weight.grad.split(sizes)[rank], "weight")  # type: ignore[arg-type]
        close(x.grad, whole.features.grad, "features")  # type: ignore[arg-type]


def _no_rank_has(rank: int) -> None:
    """A class that no rank has raises on every rank, whichever of the two it is."""
    z = torch.randn(4, 3, requires_grad=True)
    for k, weight in itertools.product((0, 1), (None, torch.ones(3))):
        pair = torch.zeros(2, 4).long()
        pair[k, 2] = 6
        with pytest.raises(IndexError, match=r"^target must be global class ids"):
            disalign_ops.cross_entropy(
                z, (pair[0], pair[1], 0.5), weight, shard=Shard(offset=3 * rank)
            )


def _in_place(rank: int) -> None:
    target = two(N, 6)
    full = torch.randn(N, 6, generator=torch.Generator().manual_seed(2))
    gradients = []
    for in_place in (False, True):
        z = full[:, 3 * rank : 3 * rank + 3].clone().requires_grad_()
        logits = z * 1
        disalign_ops.cross_entropy(
            logits, target, shard=Shard(), inplace_backward=in_place
        ).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients)


def _everything(rank: int, world: int) -> None:
    _over_ranks(rank, world)
    _heads_over_ranks(rank, world)
    if world == 2:
        _no_rank_has(rank)
        _in_place(rank)


# In one start of the processes, which takes longer than the losses.
@pytest.mark.parametrize("world", [2, 4])
def test_over_processes(world: int) -> None:
    ranks.run(_everything, world)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_upsampled_logits(calibrated: bool, reduction: str) -> None:
    n, c, h, w, size = 2, 5, 3, 4, (7, 9)
    a, b, _ = two(n * size[0] * size[1], c)
    a, b = (t.reshape(n, *size) for t in (a, b))
    lam = torch.rand(n, *size, dtype=torch.float64)
    form = torch.float64
    z = torch.randn(n, c, h, w, dtype=form, requires_grad=True)
    calibration: dict[str, Any] = {}
    if calibrated:
        calibration = {
            "confidence": torch.randn(n, 1, h, w, dtype=form, requires_grad=True),
            "scale": torch.randn(c, dtype=form, requires_grad=True),
            "bias": torch.randn(c, dtype=form, requires_grad=True),
        }
    learned = [z, *calibration.values()]
    for options in ({}, {"weight": torch.rand(c, dtype=form) + 0.1, "label_smoothing": 0.1}):
        loss = disalign_ops.upsample_cross_entropy(
            z, (a, b, lam), reduction=reduction, ignore_index=-100, **calibration, **options
        )
        u = disalign_ops.calibrate(z, **calibration) if calibrated else z
        u = torch.nn.functional.interpolate(u, size, mode="bilinear")
        expected = disalign_ops.cross_entropy(u, (a, b, lam), reduction=reduction, **options)
        assert_close(loss.detach(), expected.detach(), form, "loss")
        upstream = torch.randn(loss.shape, dtype=form)
        gradients = (torch.autograd.grad(x, learned, upstream) for x in (loss, expected))
        for found, wanted in zip(*gradients, strict=True):
            assert_close(found, wanted, form, "gradient", factor=4.0)


def test_a_layers_loss_in_chunks_is_that_of_its_logits() -> None:
    linear_cases.compare_layer(two(13, 29))


def test_what_is_refused() -> None:
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    a = torch.zeros(4).long()
    with pytest.raises(ArgumentError, match=r"^sample_rate must be None where target is \(a, b"):
        disalign_ops.linear_cross_entropy(x, w, (a, a, 0.5), sample_rate=0.5)
    with pytest.raises(ArgumentError, match=r"^target must hold class indices"):
        disalign_ops.linear_cross_entropy(x, w, (torch.rand(4, 5), a, 0.5))
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        disalign_ops.linear_cross_entropy(x, w, (a, a + 5, 0.5))
    z, masks = torch.randn(1, 5, 2, 2), torch.zeros(1, 4, 4).long()
    with pytest.raises(ArgumentError, match=r"^target must be one tensor where return_details"):
        disalign_ops.upsample_cross_entropy(z, (masks, masks, 0.5), return_details=True)  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match=r"^target must have three parts, .*, got 0"):
        disalign_ops.upsample_cross_entropy(z, ())  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"^return_details must be a bool"):
        disalign_ops.upsample_cross_entropy(z, (masks, masks, 0.5), return_details="entropy")  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match=r"^gradient must be .* or of upsampled logits"):
        disalign_ops.upsample_cross_entropy(z, (masks, masks, 0.5), gradient="forward")
    with pytest.raises(ArgumentError, match=r"^target must have shape"):
        disalign_ops.upsample_cross_entropy(z, (masks, masks[0], 0.5))
