"""What `shard=` refuses, before any exchange: only tests with `group` have processes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import disalign_ops as ops
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentError, ArgumentTypeError

Z, T, VECTOR, ROW = torch.randn(4, 5), torch.tensor([0, 4, 2, 1]), torch.rand(5), torch.zeros(4)
X, HEAD = torch.randn(4, 3), torch.randn(5, 3)
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda target=T, **k: ops.cross_entropy(Z, target, **k),
    "disalign_cross_entropy": lambda target=T, **k: ops.disalign_cross_entropy(
        Z, target, ROW, VECTOR, VECTOR, **k
    ),
    "linear_cross_entropy": lambda target=T, **k: ops.linear_cross_entropy(X, HEAD, target, **k),
    "disalign_linear_cross_entropy": lambda target=T, **k: ops.disalign_linear_cross_entropy(
        X, HEAD, target, ROW, VECTOR, VECTOR, **k
    ),
}
CALIBRATED = [name for name in LOSSES if name.startswith("disalign")]
IMAGES, MASKS = torch.randn(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)


@pytest.fixture
def group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refused(match: str, error: type[Exception] = ArgumentError) -> Any:
    return pytest.raises(error, match=f"^{match}")


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("background", ["first", "last"])
def test_a_background(name: str, background: str) -> None:
    with refused(f"background must be None where shard is given, .*, got '{background}'; pass"):
        LOSSES[name](background=background, shard=ops.Shard())


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 3), ()])
def test_logits_that_are_no_rows(shape: tuple[int, ...]) -> None:
    expected = re.escape(str(shape))
    with refused(rf"input must have shape \(N, C_rank\) or \(C_rank,\) where .* got {expected}"):
        ops.cross_entropy(torch.randn(shape), T, shard=ops.Shard())


@pytest.mark.parametrize("return_details", [False, True])
def test_upsampling_and_so_details(return_details: bool) -> None:
    with refused("shard must be None for upsample_cross_entropy, which .*, got a Shard"):
        ops.upsample_cross_entropy(
            IMAGES, MASKS, return_details=return_details, shard=ops.Shard()  # type: ignore[call-overload]
        )  # fmt: skip
    head = dnn.DisAlignSegHead(3, 6)
    with refused("shard must be None for upsample_cross_entropy, which .*, got a Shard"):
        head.loss(IMAGES, MASKS, return_details=return_details, shard=ops.Shard())  # type: ignore[call-overload]


@pytest.mark.parametrize("layer", [dnn.DisAlignLinear, dnn.DisAlignCosineLinear])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 16])
def test_layers(layer: Any, chunk_bytes: int) -> None:
    with refused(rf"shard must be None for {layer.__name__}\.loss, which .*, got a Shard"):
        layer(3, 5).loss(X, T, chunk_bytes=chunk_bytes, shard=ops.Shard())


def test_in_place_over_a_dtensor(group: None) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    z = distribute_tensor(Z, mesh, [Shard(1)]).requires_grad_()
    with refused("inplace_backward must be False where input is a DTensor, got True"):
        ops.cross_entropy(z * 1, T, inplace_backward=True, shard=ops.Shard.of(z))


@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_argument_raises_before_the_exchange(name: str) -> None:
    """On the rank that has it, which else would wait for the others."""
    for wrong in ("weight", "prior", "sample_weight"):
        with refused(rf"{wrong} "):
            LOSSES[name](shard=ops.Shard(), **{wrong: torch.ones(7)})
    with refused("shard must have a process group, got none: call"):
        LOSSES[name](shard=ops.Shard())


@pytest.mark.parametrize("name", LOSSES)
def test_transforms(name: str) -> None:
    def loss(sample_weight: Tensor) -> Tensor:
        return LOSSES[name](sample_weight=sample_weight, shard=ops.Shard())

    with refused("torch.func transforms.* are not supported with", RuntimeError):
        torch.func.vmap(loss)(torch.ones(2, 4))


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_shard(name: str, group: None) -> None:
    for given, what in (
        (3, "a builtins.int"),
        (torch.distributed.tensor.Shard(1), r"a torch\.distributed\.tensor\S*\.Shard"),
        (dist.group.WORLD, r".*ProcessGroup; pass Shard\(group\)"),
    ):
        with refused(
            rf"shard must be a disalign_ops\.Shard or None, got {what}", ArgumentTypeError
        ):
            LOSSES[name](shard=given)
    with refused(
        r"group must be a torch\.distributed\.ProcessGroup .* got a str", ArgumentTypeError
    ):
        LOSSES[name](shard=ops.Shard("nccl"))  # type: ignore[arg-type]


def test_offsets() -> None:
    with refused("offset must be an integer >= 0, got -1"):
        ops.Shard(offset=-1)
    with refused("offset must be an integer, got 1.5", ArgumentTypeError):
        ops.Shard(offset=1.5)  # type: ignore[arg-type]
    assert ops.Shard(offset=np.int64(3)) == ops.Shard(None, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSSES)
def test_a_group_of_one_gives_the_loss_without_a_shard(name: str, group: None) -> None:
    for options in ({}, {"label_smoothing": 0.1, "weight": VECTOR, "reduction": "none"}):
        plain = LOSSES[name](**options)
        torch.testing.assert_close(LOSSES[name](shard=ops.Shard(), **options), plain)


def test_the_table_is_in_the_docstring_and_on_the_page() -> None:
    """The tests above, and those of double backward in _sharded/test_ranks.py, are its rows."""
    from support.places import ROOT

    table = (ops.Shard.__doc__ or "").split("Refused with `shard=`:")[1]
    rows = [line.strip() for line in table.splitlines() if line.strip().startswith("|")][2:]
    assert len(rows) == 7
    page = (ROOT / "docs" / "class_parallel.md").read_text()
    assert all(row in page for row in rows)
