"""Losses with their classes divided over gloo processes, against one process with all classes."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import disalign_ops
from disalign_ops import distributed

N, D, C = 13, 6, 29
# (processes, shards): uneven, a rank without classes, one with a single class.
SHARDS = {
    2: ((15, 14), (29, 0), (1, 28)),
    4: ((8, 7, 7, 7), (0, 13, 1, 15)),
}
FACTOR = 4.0  # of the tolerances: sums of shards are added in another order


@dataclass
class Whole:
    """A problem with all classes. Learned tensors require a gradient."""

    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            made = torch.randn(shape, generator=generator, dtype=torch.float64)
            return made.to(self.dtype).requires_grad_()

        self.logits, self.confidence = normal(N, C), normal(N, 1)
        self.scale, self.bias = normal(C), normal(C)
        self.features, self.weight, self.linear_bias = normal(N, D), normal(C, D), normal(C)
        self.target = torch.randint(0, C, (N,), generator=generator)
        self.options = {
            name: (torch.rand(C, generator=generator, dtype=torch.float64).to(self.dtype)
                   if value == "class" else
                   torch.rand(N, generator=generator, dtype=torch.float64).to(self.dtype)
                   if value == "row" else value)
            for name, value in self.options.items()
        }  # fmt: skip


def shard_of(tensor: Tensor, rank: int, sizes: tuple[int, ...], dim: int = 0) -> Tensor:
    """A rank's classes, as a leaf of its own."""
    part = tensor.detach().split(sizes, dim)[rank].clone()
    return part.requires_grad_(tensor.requires_grad)


def options_of(whole: Whole, rank: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    return {
        name: shard_of(value, rank, sizes)
        if isinstance(value, Tensor) and name != "sample_weight" else value
        for name, value in whole.options.items()
    }  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weight": "class"},
    "weights and smoothing": {"weight": "class", "label_smoothing": 0.2},
    "prior": {"prior": "class"},
    "margin": {"margin": "class"},
    "one margin": {"margin": 0.3},
    "focal": {"focal_gamma": 2.0},
    "sample weights": {"sample_weight": "row", "normalizer": "valid"},
    "denominator": {"normalizer": 7.5},
    "everything": {
        "weight": "class", "label_smoothing": 0.1, "prior": "class", "margin": "class",
        "focal_gamma": 1.5, "sample_weight": "row", "reduction": "none",
    },
}  # fmt: skip


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """float32 against float64 of the same numbers would compare with other inputs' rounding: both
    sides are the same dtype.
    """
    factor = FACTOR if actual.dtype == torch.float64 else 2 * FACTOR
    assert_close(actual, expected.to(actual.dtype), actual.dtype, what, factor)


def compare(
    whole: Whole, rank: int, sizes: tuple[int, ...], what: str, *, calibrated: bool, linear: bool,
    **more: Any,
) -> None:  # fmt: skip
    """Loss and gradients on this rank, and in one process."""
    options, local = whole.options, options_of(whole, rank, sizes)
    a, b = (shard_of(t, rank, sizes) for t in (whole.scale, whole.bias))
    c = whole.confidence.detach().clone().requires_grad_()
    if linear:
        x = whole.features.detach().clone().requires_grad_()
        cosine = "cosine_scale" in more
        w = shard_of(whole.weight, rank, sizes)
        head = [w] if cosine else [w, shard_of(whole.linear_bias, rank, sizes)]
        learned, sharded = [x, *head], [0, *(1 for _ in head)]
        given: dict[str, Any] = {} if cosine else {"local_bias": head[1]}
        if calibrated:
            loss = distributed.class_parallel_disalign_linear_cross_entropy(
                x, w, whole.target, c, a, b, **given, **local, **more
            )
        else:
            loss = distributed.class_parallel_linear_cross_entropy(
                x, w, whole.target, **given, **local, **more
            )
        whole_learned = [whole.features, whole.weight]
        if cosine:
            scale = more["cosine_scale"]
            logits = F.linear(scale * F.normalize(whole.features), F.normalize(whole.weight))
        else:
            whole_learned.append(whole.linear_bias)
            logits = F.linear(*whole_learned)
    else:
        z = shard_of(whole.logits, rank, sizes, 1)
        learned, sharded = [z], [1]
        if calibrated:
            loss = distributed.class_parallel_disalign_cross_entropy(
                z, whole.target, c, a, b, **local, **more
            )
        else:
            loss = distributed.class_parallel_cross_entropy(z, whole.target, **local, **more)
        logits, whole_learned = whole.logits, [whole.logits]
    if calibrated:
        learned, sharded = [*learned, c, a, b], [*sharded, 0, 1, 1]
        whole_learned = [*whole_learned, whole.confidence, whole.scale, whole.bias]
        expected = disalign_ops.disalign_cross_entropy(
            logits, whole.target, whole.confidence, whole.scale, whole.bias, **options
        )
    else:
        expected = disalign_ops.cross_entropy(logits, whole.target, **options)
    upstream = torch.linspace(-1, 2, expected.numel(), dtype=whole.dtype).reshape(expected.shape)
    close(loss, expected, f"{what}: loss")
    grads = torch.autograd.grad(loss, learned, upstream)
    expected_grads = torch.autograd.grad(expected, whole_learned, upstream)
    for k, (grad, exact) in enumerate(zip(grads, expected_grads, strict=True)):
        is_logits = not linear and k == 0
        part = exact
        if sharded[k]:
            part = exact.split(sizes, 1 if is_logits else 0)[rank]
        close(grad, part, f"{what}: gradient {k}")


def _every_option(rank: int, world: int) -> None:
    kinds = list(itertools.product((False, True), (False, True)))
    for dtype, sizes in itertools.product((torch.float64, torch.float32), SHARDS[world]):
        for name, options in OPTIONS.items():
            for calibrated, linear in kinds:
                whole = Whole(dtype, options)
                whole.target[::4] = -100
                what = f"{name}, {sizes}, {dtype}, calibrated {calibrated}, linear {linear}"
                compare(whole, rank, sizes, what, calibrated=calibrated, linear=linear)


@pytest.mark.parametrize("world", [2, 4])
def test_every_option(world: int) -> None:
    ranks.run(_every_option, world)


def _contents(rank: int, world: int) -> None:
    sizes = SHARDS[world][0]
    offset = sum(sizes[:rank])

    # The first class given: no exchange of sizes.
    whole = Whole(torch.float64, {"weight": "class"})
    compare(whole, rank, sizes, "offset", calibrated=True, linear=False, shard_offset=offset)
    compare(whole, rank, sizes, "offset", calibrated=False, linear=True, shard_offset=offset)

    # A cosine head, in chunks of a few rows and classes.
    whole = Whole(torch.float64)
    for size in (1 << 20, 400):
        compare(whole, rank, sizes, f"cosine, {size} bytes", calibrated=True, linear=True,
                cosine_scale=9.0, chunk_bytes=size)  # fmt: skip

    # Targets on one rank alone.
    whole.target = whole.target % sizes[0]
    compare(whole, rank, sizes, "one rank", calibrated=True, linear=False)
    compare(whole, rank, sizes, "one rank", calibrated=False, linear=True)

    # A shard that is masked, then a large offset with smoothing over all classes.
    whole = Whole(torch.float64)
    whole.target = whole.target % sizes[0]
    with torch.no_grad():
        whole.logits[:, sizes[0] :] = float("-inf")
    compare(whole, rank, sizes, "masked", calibrated=False, linear=False)
    for dtype in (torch.float64, torch.float32):
        whole = Whole(dtype, {"label_smoothing": 0.1, "weight": "class"})
        with torch.no_grad():
            whole.logits += 4096.0  # exact in float32 to 2^-11, so are differences
            whole.logits.copy_((whole.logits * 256).round() / 256)
        compare(whole, rank, sizes, "offset of the logits", calibrated=False, linear=False)

    # Nothing left: NaN, or 0 by a count, and gradients of 0.
    for options in ({}, {"normalizer": "valid"}):
        whole = Whole(torch.float64, options)
        whole.target[:] = -100
        compare(whole, rank, sizes, f"all ignored {options}", calibrated=True, linear=False)
        compare(whole, rank, sizes, f"all ignored {options}", calibrated=True, linear=True)


@pytest.mark.parametrize("world", [2, 4])
def test_contents(world: int) -> None:
    ranks.run(_contents, world)


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


SMALL: tuple[Callable[[int, int], None], ...] = (
    _small_loss, _one_row_alone, _in_place, _dtensor, _is_deterministic, _wrong_arguments,
)  # fmt: skip


def _small(rank: int, world: int) -> None:
    for work in SMALL:
        torch.manual_seed(0)
        work(rank, world)


def test_small_things() -> None:
    """Of two ranks: SMALL, in one start of the processes."""
    ranks.run(_small, 2)


class _Model(nn.Module):
    """Features by data parallelism; a head whose classes are divided."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(D, D, dtype=dtype)
        self.confidence = nn.Linear(D, 1, dtype=dtype)


def _data_and_classes(rank: int, world: int) -> None:
    """2 x 2: rows over pairs of processes that differ in the first bit, classes in the second."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    data, classes = mesh["data"].get_group(), mesh["classes"].get_group()
    row, column = mesh.get_local_rank("data"), mesh.get_local_rank("classes")
    sizes, rows = (17, 12), slice(6 * row, 6 * row + 6)
    whole = Whole(torch.float64, {"weight": "class"})
    weight = whole.options["weight"]
    model = _Model(torch.float64)
    parallel = nn.parallel.DistributedDataParallel(_Head(model, whole, column, sizes, classes),
                                                   process_group=data)  # fmt: skip
    parallel(whole.features.detach()[rows], whole.target[rows]).backward()

    alone = _Model(torch.float64)
    losses = []
    for k in (0, 1):
        part = slice(6 * k, 6 * k + 6)
        x = alone.body(whole.features.detach()[part])
        losses.append(disalign_ops.disalign_cross_entropy(
            F.linear(x, whole.weight), whole.target[part], alone.confidence(x), whole.scale,
            whole.bias, weight,
        ))  # fmt: skip
    (sum(losses) / 2).backward()
    for (name, p), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert p.grad is not None
        assert expected.grad is not None
        close(p.grad, expected.grad, name)
    head = parallel.module
    for p, exact in ((head.weight, whole.weight), (head.scale, whole.scale)):
        assert p.grad is not None
        assert exact.grad is not None
        close(p.grad, exact.grad.split(sizes)[column], "head")


class _Head(nn.Module):
    def __init__(
        self, model: _Model, whole: Whole, rank: int, sizes: tuple[int, ...], group: Any
    ) -> None:
        super().__init__()
        self.model, self.group = model, group
        self.weight, self.scale, self.bias = (
            nn.Parameter(shard_of(t, rank, sizes)) for t in (whole.weight, whole.scale, whole.bias)
        )
        self.class_weight = shard_of(whole.options["weight"], rank, sizes)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.model.body(x)
        return distributed.class_parallel_disalign_linear_cross_entropy(
            x, self.weight, target, self.model.confidence(x), self.scale, self.bias,
            group=self.group, weight=self.class_weight,
        )  # fmt: skip


def test_data_and_classes_over_two_by_two_processes() -> None:
    ranks.run(_data_and_classes, 4)


class _Carried:
    """Counts what all-reduces carry, in bytes."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self._all_reduce = dist.all_reduce

    def __enter__(self) -> _Carried:
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
        with _Carried() as forward:
            loss = distributed.class_parallel_linear_cross_entropy(
                x, w, target, shard_offset=offset, **options
            )
        assert forward.bytes == [4 * rows, (values - 1) * 4 * rows + numbers]
        with _Carried() as backward:
            loss.backward()
        assert backward.bytes == [4 * rows * width]
    with _Carried() as forward:
        loss = distributed.class_parallel_disalign_linear_cross_entropy(
            x, w, target, c, a, b, weight=weight, label_smoothing=0.1, shard_offset=offset
        )
    assert sum(forward.bytes) == 24 * rows + numbers  # 6 values a row
    with _Carried() as backward:
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
    ranks.run(work, 2, timeout_s=3.0)


def test_without_processes() -> None:
    with pytest.raises(ValueError, match="needed is torch.distributed.init_process_group"):
        distributed.class_parallel_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))
