"""Losses with their classes divided over gloo processes, against one process with all classes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disalign_ops
from disalign_ops import Shard
from support import ranks
from support.sharded_cases import SHARDS, D, Whole, close, options_of, shard_of

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


def compare(
    whole: Whole, rank: int, sizes: tuple[int, ...], what: str, *, calibrated: bool, linear: bool,
    offset: int | None = None, **more: Any,
) -> None:  # fmt: skip
    """Loss and gradients on this rank, and in one process."""
    more["shard"] = Shard(offset=offset)
    options, local = whole.options, options_of(whole, rank, sizes)
    a, b = (shard_of(t, rank, sizes) for t in (whole.scale, whole.bias))
    c = whole.confidence.detach().clone().requires_grad_()
    if linear:
        x = whole.features.detach().clone().requires_grad_()
        cosine = "cosine_scale" in more
        w = shard_of(whole.weight, rank, sizes)
        head = [w] if cosine else [w, shard_of(whole.linear_bias, rank, sizes)]
        learned, sharded = [x, *head], [0, *(1 for _ in head)]
        given: dict[str, Any] = {} if cosine else {"linear_bias": head[1]}
        if calibrated:
            loss = disalign_ops.disalign_linear_cross_entropy(
                x, w, whole.target, c, a, b, **given, **local, **more
            )
        else:
            loss = disalign_ops.linear_cross_entropy(x, w, whole.target, **given, **local, **more)
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
            loss = disalign_ops.disalign_cross_entropy(z, whole.target, c, a, b, **local, **more)
        else:
            loss = disalign_ops.cross_entropy(z, whole.target, **local, **more)
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
    compare(whole, rank, sizes, "offset", calibrated=True, linear=False, offset=offset)
    compare(whole, rank, sizes, "offset", calibrated=False, linear=True, offset=offset)

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
        return disalign_ops.disalign_linear_cross_entropy(
            x, self.weight, target, self.model.confidence(x), self.scale, self.bias,
            weight=self.class_weight, shard=Shard(self.group),
        )  # fmt: skip


def test_data_and_classes_over_two_by_two_processes() -> None:
    ranks.run(_data_and_classes, 4)
