"""Classes divided over processes: contents, layouts, traffic and failures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import ranks
from support.sharded_cases import SHARDS, C, N, Whole, close, options_of, shard_of
from support.tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

import disalign_ops
from disalign_ops import distributed


def _small_loss(rank: int, world: int) -> None:
    """p_t next to 1 on one rank: what the others have is not lost."""
    logits = torch.tensor([[30.0, 1.0, 0.0, -2.0]])
    z = logits.chunk(2, 1)[rank].clone().requires_grad_()
    loss = distributed.class_parallel_cross_entropy(z, torch.tensor([0]))
    exact = (logits.double()[0, 1:] - 30).exp().sum().log1p()
    assert 0 < float(exact) < torch.finfo(torch.float32).eps  # log(1 + loss) would be 0
    assert abs(float(loss) / float(exact) - 1) < 1e-5


def _one_row_alone(rank: int, world: int) -> None:
    z = torch.linspace(-1, 2, 5, dtype=torch.float64)
    for target in (0, 7):
        loss = distributed.class_parallel_cross_entropy(z, torch.tensor(target))
        assert_close(
            loss, F.cross_entropy(torch.cat([z, z]), torch.tensor(target)), z.dtype, "loss"
        )


def _in_place(rank: int, world: int) -> None:
    sizes = SHARDS[world][0]
    whole = Whole(torch.float32)
    grads = []
    for in_place in (False, True):
        z = shard_of(whole.logits, rank, sizes, 1)
        made = z * 1
        loss = distributed.class_parallel_cross_entropy(made, whole.target,
                                                        inplace_backward=in_place)  # fmt: skip
        loss.backward()
        assert z.grad is not None
        grads.append(z.grad)
        if in_place:
            assert torch.equal(made.detach(), z.grad)
    assert torch.equal(*grads)


def _dtensor(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    whole = Whole(torch.float64, {"label_smoothing": 0.1})
    mesh = init_device_mesh("cpu", (world,))
    z = distribute_tensor(whole.logits.detach(), mesh, [Shard(1)]).requires_grad_()
    loss = distributed.class_parallel_cross_entropy(z, whole.target, label_smoothing=0.1)
    expected = disalign_ops.cross_entropy(whole.logits, whole.target, label_smoothing=0.1)
    close(loss, expected, "loss")
    loss.backward()
    expected.backward()
    assert z.grad is not None
    assert whole.logits.grad is not None
    close(z.grad.full_tensor(), whole.logits.grad, "gradient")
    assert z.grad.placements == (Shard(1),)

    a, b = (distribute_tensor(t.detach(), mesh, [Shard(0)]) for t in (whole.scale, whole.bias))
    loss = distributed.class_parallel_disalign_cross_entropy(
        z, distribute_tensor(whole.target, mesh, [Replicate()]), whole.confidence, a, b
    )
    expected = disalign_ops.disalign_cross_entropy(
        whole.logits, whole.target, whole.confidence, whole.scale, whole.bias
    )
    close(loss, expected, "calibrated loss")
    for placements in ([Shard(0)], [Replicate()]):
        other = distribute_tensor(whole.logits.detach(), mesh, placements)
        with pytest.raises(ValueError, match=r"needed is Shard\(1\) once"):
            distributed.class_parallel_cross_entropy(other, whole.target)


def _is_deterministic(rank: int, world: int) -> None:
    whole = Whole(torch.float32, {"weight": "class", "label_smoothing": 0.1})
    sizes = SHARDS[world][0]
    found = []
    for _ in range(2):
        z = shard_of(whole.logits, rank, sizes, 1)
        loss = distributed.class_parallel_cross_entropy(
            z, whole.target, **options_of(whole, rank, sizes)
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, z)))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def _wrong_arguments(rank: int, world: int) -> None:
    z = torch.randn(4, 5)
    outside = torch.tensor([0, 3, 10, 1])
    with pytest.raises(IndexError, match="targets are out of bounds"):
        distributed.class_parallel_cross_entropy(z, outside)
    with pytest.raises(IndexError, match="more than one"):  # shards that overlap
        distributed.class_parallel_cross_entropy(z, torch.tensor([0, 1, 2, 3]), shard_offset=0)
    with pytest.raises(ValueError, match="shard_offset is -1"):
        distributed.class_parallel_cross_entropy(z, outside, shard_offset=-1)
    with pytest.raises(ValueError, match="class probabilities"):
        distributed.class_parallel_cross_entropy(z, torch.rand(4, 5))
    loss = distributed.class_parallel_cross_entropy(z.requires_grad_(), torch.arange(4))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, z, create_graph=True)
    loss = distributed.class_parallel_cross_entropy(z, torch.arange(4), reduction="none")
    with pytest.raises(RuntimeError, match="nor for a batch"):
        torch.autograd.grad(loss, z, torch.ones(2, 4), is_grads_batched=True)


def _sampled(rank: int, world: int) -> None:
    """Every rank draws from its own classes; the loss is that over all that were drawn."""
    sizes, rate = SHARDS[world][0], 0.6
    whole = Whole(torch.float64, {"weight": "class"})
    whole.target = whole.target % 5 * 3  # 0, 3, 6, 9, 12: of rank 0 alone, N rows
    for wanted in (1.0, rate):
        x = whole.features.detach().clone().requires_grad_()
        w, b, a, beta = (shard_of(t, rank, sizes) for t in (
            whole.weight, whole.linear_bias, whole.scale, whole.bias))  # fmt: skip
        c = whole.confidence.detach().clone().requires_grad_()
        loss = distributed.class_parallel_disalign_linear_cross_entropy(
            x, w, whole.target, c, a, beta, b, sample_rate=wanted,
            generator=torch.Generator().manual_seed(rank), **options_of(whole, rank, sizes),
        )  # fmt: skip
        grads = torch.autograd.grad(loss, (x, w, c, a))
        taken: list[Any] = [None] * world
        dist.all_gather_object(taken, (grads[1].abs().sum(1) > 0).tolist())
        chosen = torch.tensor([drawn for part in taken for drawn in part]).nonzero()[:, 0]
        assert set(whole.target.tolist()) <= set(chosen.tolist())
        assert len(chosen) == C if wanted == 1 else N <= len(chosen) < C
        place = torch.full((C,), -1).scatter(0, chosen, torch.arange(len(chosen)))
        logits = F.linear(whole.features, whole.weight, whole.linear_bias)[:, chosen]
        expected = disalign_ops.disalign_cross_entropy(
            logits, place[whole.target], whole.confidence, whole.scale[chosen],
            whole.bias[chosen], whole.options["weight"][chosen],
        )  # fmt: skip
        close(loss, expected, "sampled loss")
        learned = (whole.features, whole.weight, whole.confidence, whole.scale)
        exact = torch.autograd.grad(expected, learned)
        for k, (grad, e) in enumerate(zip(grads, exact, strict=True)):
            part = e.split(sizes)[rank] if k in (1, 3) else e
            close(grad, part, f"sampled gradient {k}")


SMALL: tuple[Callable[[int, int], None], ...] = (
    _small_loss, _one_row_alone, _in_place, _dtensor, _is_deterministic, _sampled, _wrong_arguments,
)  # fmt: skip


def _small(rank: int, world: int) -> None:
    for work in SMALL:
        torch.manual_seed(0)
        work(rank, world)


def test_small_things() -> None:
    """Of two ranks: SMALL, in one start of the processes."""
    ranks.run(_small, 2)


class Carried:
    """Counts what all-reduces carry, in bytes."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self._all_reduce = dist.all_reduce

    def __enter__(self) -> Carried:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes.append(tensor.numel() * tensor.element_size())
            return self._all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._all_reduce


def _traffic(rank: int, world: int) -> None:
    rows, width, classes = 64, 16, 1000
    x = torch.randn(rows, width, requires_grad=True)
    w = torch.randn(classes // world, width, requires_grad=True)
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(0))
    a, b = (torch.ones(classes // world, requires_grad=True) for _ in range(2))
    c = torch.zeros(rows, requires_grad=True)
    weight = torch.rand(classes // world)
    offset = rank * (classes // world)
    numbers = 3 * 4  # for all rows together: the sum of the weights, the classes, the targets
    for options, values in (
        ({}, 3),
        ({"weight": weight}, 4),
        ({"weight": weight, "label_smoothing": 0.1}, 5),
    ):
        with Carried() as forward:
            loss = distributed.class_parallel_linear_cross_entropy(
                x, w, target, shard_offset=offset, **options
            )
        assert forward.bytes == [4 * rows, (values - 1) * 4 * rows + numbers]
        with Carried() as backward:
            loss.backward()
        assert backward.bytes == [4 * rows * width]
    with Carried() as forward:
        loss = distributed.class_parallel_disalign_linear_cross_entropy(
            x, w, target, c, a, b, weight=weight, label_smoothing=0.1, shard_offset=offset
        )
    assert sum(forward.bytes) == 24 * rows + numbers  # 6 values a row
    with Carried() as backward:
        loss.backward()
    assert sorted(backward.bytes) == [4 * rows, 4 * rows * width]


def test_six_values_a_row_in_forward_and_nothing_of_size_c() -> None:
    ranks.run(_traffic, 2)


def _one_leaves(rank: int, world: int) -> None:
    if rank == 1:
        os._exit(0)
    _expect_failure()


def _one_is_late(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(6)
        return
    _expect_failure()


def _one_raises(rank: int, world: int) -> None:
    weight = torch.ones(5 if rank == 0 else 4)  # wrong on rank 1
    if rank == 1:
        with pytest.raises(ValueError, match="weight has 4 entries"):
            distributed.class_parallel_cross_entropy(
                torch.randn(4, 5), torch.arange(4), weight=weight, shard_offset=5
            )
        return
    _expect_failure(weight=weight)


def _expect_failure(**options: Any) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="failed on rank 0 of 2: another rank has raised"):
        distributed.class_parallel_cross_entropy(
            torch.randn(4, 5), torch.arange(4), shard_offset=0, **options
        )
    assert time.monotonic() - start < 30  # the timeout is 3 seconds


@pytest.mark.parametrize("work", [_one_leaves, _one_is_late, _one_raises])
def test_a_rank_that_fails_is_an_error_on_the_others(work: Callable[[int, int], None]) -> None:
    ranks.run(work, 2, timeout_s=3.0, together=False)


def test_without_processes() -> None:
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init"):
        distributed.class_parallel_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))
