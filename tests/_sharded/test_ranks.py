"""Classes divided over processes: contents, layouts, traffic and failures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import disalign_ops
from disalign_ops import Shard
from support import ranks
from support.sharded_cases import SHARDS, C, N, Whole, close, options_of, shard_of
from support.tolerances import assert_close


def _small_loss(rank: int, world: int) -> None:
    """p_t next to 1 on one rank: what the others have is not lost."""
    logits = torch.tensor([[30.0, 1.0, 0.0, -2.0]])
    z = logits.chunk(2, 1)[rank].clone().requires_grad_()
    loss = disalign_ops.cross_entropy(z, torch.tensor([0]), shard=Shard())
    exact = (logits.double()[0, 1:] - 30).exp().sum().log1p()
    assert 0 < float(exact) < torch.finfo(torch.float32).eps  # log(1 + loss) would be 0
    assert abs(float(loss) / float(exact) - 1) < 1e-5


def _one_row_alone(rank: int, world: int) -> None:
    z = torch.linspace(-1, 2, 5, dtype=torch.float64)
    for target in (0, 7):
        loss = disalign_ops.cross_entropy(z, torch.tensor(target), shard=Shard())
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
        loss = disalign_ops.cross_entropy(
            made, whole.target, inplace_backward=in_place, shard=Shard()
        )
        loss.backward()
        assert z.grad is not None
        grads.append(z.grad)
        if in_place:
            assert torch.equal(made.detach(), z.grad)
    assert torch.equal(*grads)


def _dtensor(rank: int, world: int) -> None:
    from torch.distributed import tensor as dtensors

    by_rows, by_columns, replicated = dtensors.Shard(0), dtensors.Shard(1), dtensors.Replicate()
    whole = Whole(torch.float64, {"label_smoothing": 0.1})
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))

    def over_ranks(tensor: Tensor, placement: Any) -> Any:
        placed = dtensors.distribute_tensor(tensor.detach(), mesh, [placement])
        return placed.requires_grad_(tensor.requires_grad)

    z = over_ranks(whole.logits, by_columns)
    loss = disalign_ops.cross_entropy(z, whole.target, label_smoothing=0.1, shard=Shard.of(z))
    expected = disalign_ops.cross_entropy(whole.logits, whole.target, label_smoothing=0.1)
    close(loss, expected, "loss")
    loss.backward()
    expected.backward()
    assert z.grad is not None
    assert whole.logits.grad is not None
    close(z.grad.full_tensor(), whole.logits.grad, "gradient")
    assert z.grad.placements == (by_columns,)

    a, b = (over_ranks(t, by_rows) for t in (whole.scale, whole.bias))
    target, confidence = (over_ranks(t, replicated) for t in (whole.target, whole.confidence))
    loss = disalign_ops.disalign_cross_entropy(z, target, whole.confidence, a, b, shard=Shard.of(z))
    expected = disalign_ops.disalign_cross_entropy(
        whole.logits, whole.target, whole.confidence, whole.scale, whole.bias
    )
    close(loss, expected, "calibrated loss")

    x, w, bias = (
        over_ranks(whole.features, replicated), over_ranks(whole.weight, by_rows),
        over_ranks(whole.linear_bias, by_rows),
    )  # fmt: skip
    loss = disalign_ops.disalign_linear_cross_entropy(
        x, w, target, confidence, a, b, bias, shard=Shard.of(w, offset=15 * rank)
    )
    expected = disalign_ops.disalign_cross_entropy(
        F.linear(whole.features, whole.weight, whole.linear_bias), whole.target, whole.confidence,
        whole.scale, whole.bias,
    )  # fmt: skip
    close(loss, expected, "loss of a head")
    learned = (x, w, confidence, a, b, bias)
    exact = torch.autograd.grad(
        expected,
        (whole.features, whole.weight, whole.confidence, whole.scale, whole.bias,
         whole.linear_bias),
    )  # fmt: skip
    for k, (grad, e) in enumerate(zip(torch.autograd.grad(loss, learned), exact, strict=True)):
        assert grad.placements == learned[k].placements
        close(grad.full_tensor(), e, f"gradient {k} of a head")


def _wrong_dtensors(rank: int, world: int) -> None:
    from torch.distributed import tensor as dtensors

    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    z, t, vector = torch.randn(4, 6), torch.arange(4), torch.rand(6)

    def over_ranks(tensor: Tensor, placement: Any) -> Any:
        return dtensors.distribute_tensor(tensor, mesh, [placement])

    by_rows, by_columns, replicated = dtensors.Shard(0), dtensors.Shard(1), dtensors.Replicate()
    for placement in (by_rows, replicated):
        with pytest.raises(ValueError, match=r"^input must be a DTensor with Shard\(1\) over its"):
            disalign_ops.cross_entropy(over_ranks(z, placement), t, shard=Shard())
    with pytest.raises(ValueError, match=r"^linear_weight must be a DTensor with Shard\(0\)"):
        disalign_ops.linear_cross_entropy(z, over_ranks(z, by_columns), t, shard=Shard())
    with pytest.raises(ValueError, match="dtensor must be a DTensor with a Shard placement over"):
        Shard.of(over_ranks(z, replicated))
    with pytest.raises(TypeError, match="dtensor must be a DTensor, got a Tensor"):
        Shard.of(z)  # type: ignore[arg-type]
    local = z.chunk(world, 1)[rank]
    with pytest.raises(ValueError, match="weight must be a DTensor with a Shard placement over"):
        disalign_ops.cross_entropy(local, t, over_ranks(vector, replicated), shard=Shard())
    for name, value in (("target", t), ("sample_weight", torch.rand(4))):
        given = {"target": t, name: over_ranks(value, by_rows)}
        with pytest.raises(ValueError, match=f"^{name} must be replicated where shard is given"):
            disalign_ops.cross_entropy(local, shard=Shard(), **given)
    # new_group is a call of all ranks; each group has one.
    alone = [dist.new_group([k]) for k in range(world)]
    with pytest.raises(
        ValueError,
        match=r"^input must be sharded over the group of shard, ranks \[\d\], got .*0, 1",
    ):
        disalign_ops.cross_entropy(over_ranks(z, by_columns), t, shard=Shard(alone[rank]))
    with pytest.raises(ValueError, match="group must contain this process, got a group of other"):
        disalign_ops.cross_entropy(local, t, shard=Shard(alone[1 - rank]))


def _is_deterministic(rank: int, world: int) -> None:
    whole = Whole(torch.float32, {"weight": "class", "label_smoothing": 0.1})
    sizes = SHARDS[world][0]
    found = []
    for _ in range(2):
        z = shard_of(whole.logits, rank, sizes, 1)
        loss = disalign_ops.cross_entropy(
            z, whole.target, **options_of(whole, rank, sizes), shard=Shard()
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, z)))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def _wrong_arguments(rank: int, world: int) -> None:
    z = torch.randn(4, 5)
    outside = torch.tensor([0, 3, 10, 1])
    with pytest.raises(IndexError, match="got targets out of bounds"):
        disalign_ops.cross_entropy(z, outside, shard=Shard())
    with pytest.raises(IndexError, match="more than one"):  # shards that overlap
        disalign_ops.cross_entropy(z, torch.tensor([0, 1, 2, 3]), shard=Shard(offset=0))
    loss = disalign_ops.cross_entropy(z.requires_grad_(), torch.arange(4), shard=Shard())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, z, create_graph=True)
    loss = disalign_ops.cross_entropy(z, torch.arange(4), reduction="none", shard=Shard())
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
        loss = disalign_ops.disalign_linear_cross_entropy(
            x, w, whole.target, c, a, beta, b, sample_rate=wanted,
            generator=torch.Generator().manual_seed(rank), **options_of(whole, rank, sizes),
            shard=Shard(),
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
    _small_loss, _one_row_alone, _in_place, _dtensor, _wrong_dtensors, _is_deterministic, _sampled,
    _wrong_arguments,
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
            loss = disalign_ops.linear_cross_entropy(
                x, w, target, shard=Shard(offset=offset), **options
            )
        assert forward.bytes == [4 * rows, (values - 1) * 4 * rows + numbers]
        with Carried() as backward:
            loss.backward()
        assert backward.bytes == [4 * rows * width]
    one = 4 * rows
    for which, margin, expected in (
        # What is largest, and whether it is NaN; its class, of 8 bytes.
        (True, None, [2 * one, 2 * one]), ("entropy", None, [2 * one, 2 * one, one]),
        (True, 0.5, [one, one, one, 2 * one, 2 * one]),
    ):  # fmt: skip
        with Carried() as forward:
            disalign_ops.linear_cross_entropy(
                x, w, target, shard=Shard(offset=offset), margin=margin, return_details=which
            )
        assert forward.bytes[2:] == expected
    with Carried() as forward:
        loss = disalign_ops.disalign_linear_cross_entropy(
            x, w, target, c, a, b, weight=weight, label_smoothing=0.1, shard=Shard(offset=offset)
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
        with pytest.raises(ValueError, match=r"^weight .*\b4\b"):
            disalign_ops.cross_entropy(
                torch.randn(4, 5), torch.arange(4), weight=weight, shard=Shard(offset=5)
            )
        return
    _expect_failure(weight=weight)


def _expect_failure(**options: Any) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="failed on rank 0 of 2: another rank has raised"):
        disalign_ops.cross_entropy(
            torch.randn(4, 5), torch.arange(4), shard=Shard(offset=0), **options
        )
    assert time.monotonic() - start < 30  # the timeout is 3 seconds


@pytest.mark.parametrize("work", [_one_leaves, _one_is_late, _one_raises])
def test_a_rank_that_fails_is_an_error_on_the_others(work: Callable[[int, int], None]) -> None:
    ranks.run(work, 2, timeout_s=3.0, together=False)


def test_without_processes() -> None:
    z, t = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"^shard must have a process group, got none: call torch\."
    ):
        disalign_ops.cross_entropy(z, t, shard=Shard())
