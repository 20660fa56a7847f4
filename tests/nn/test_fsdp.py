"""Layers whose parameters FSDP shards: `loss` says what it needs, and then computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import disalign_ops
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentTypeError

ROWS = (torch.randn(3, 4), torch.tensor([0, 1, 2]))
LAYERS: dict[str, Any] = {
    "linear": (dnn.DisAlignLinear, ROWS, {}),
    "linear, in chunks": (dnn.DisAlignLinear, ROWS, {"chunk_bytes": 16}),
    "cosine": (dnn.DisAlignCosineLinear, ROWS, {}),
    "cosine, in chunks": (dnn.DisAlignCosineLinear, ROWS, {"chunk_bytes": 16}),
    "dense": (dnn.DisAlignSegHead, (torch.randn(1, 4, 3, 3), torch.zeros(1, 6, 6).long()), {}),
}


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("case", LAYERS)
def test_loss_of_a_sharded_layer(mesh: Any, case: str) -> None:
    kind, (x, target), options = LAYERS[case]
    layer = kind(4, 5)
    wanted = layer.loss(x, target, **options)
    wanted.backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    fully_shard(layer, mesh=mesh)
    for call in (lambda: layer.loss(x, target, **options), lambda: layer.raw_logits(x)):
        with pytest.raises(ArgumentTypeError, match=r"a DTensor.*register_fsdp_forward_method"):
            call()
    register_fsdp_forward_method(layer, "loss")
    found = layer.loss(x, target, **options)
    torch.testing.assert_close(found, wanted)
    found.backward()
    for name, parameter in layer.named_parameters():
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), grads[name], msg=name)


def test_a_layer_within_a_sharded_model(mesh: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 4), dnn.DisAlignLinear(4, 5))
    x, target = torch.randn(3, 6), torch.tensor([0, 1, 2])
    wanted = model[1].loss(model[0](x), target)
    fully_shard(model[1], mesh=mesh)
    register_fsdp_forward_method(model[1], "loss")
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model[1].loss(model[0](x), target), wanted)


def test_tensors_and_dtensors_in_one_call(mesh: Any) -> None:
    z, t = torch.randn(4, 5), torch.tensor([0, 4, 2, 1])
    vector = torch.rand(5)

    def sharded(tensor: torch.Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    row = torch.zeros(4)
    calls: dict[str, Any] = {
        "input": lambda: disalign_ops.cross_entropy(sharded(z), t),
        "target": lambda: disalign_ops.cross_entropy(z, sharded(t)),
        "weight": lambda: disalign_ops.cross_entropy(z, t, sharded(vector)),
        "sample_weight": lambda: disalign_ops.cross_entropy(z, t, sample_weight=sharded(row)),
        "scale": lambda: disalign_ops.disalign_cross_entropy(z, t, row, sharded(vector), vector),
        "linear_weight": lambda: disalign_ops.linear_cross_entropy(z, sharded(torch.rand(9, 5)), t),
        "linear_bias": lambda: disalign_ops.linear_cross_entropy(
            z, torch.rand(5, 5), t, sharded(vector)
        ),
    }
    for name, call in calls.items():
        with pytest.raises(
            ArgumentTypeError, match=f"^{name} must be a torch.Tensor, got a DTensor"
        ):
            call()


def test_losses_with_a_shard_take_dtensors(mesh: Any) -> None:
    z, t = torch.randn(4, 5), torch.tensor([0, 4, 2, 1])
    sharded = distribute_tensor(z, mesh, [Shard(1)])
    found = disalign_ops.cross_entropy(
        sharded, distribute_tensor(t, mesh, [Replicate()]), shard=disalign_ops.Shard.of(sharded)
    )
    torch.testing.assert_close(found, disalign_ops.cross_entropy(z, t))
