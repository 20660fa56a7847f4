"""Class probabilities where a graph or several processes are between the loss and its caller:
torch.compile, torch.export, DTensors, FSDP.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import disalign_ops
from disalign_ops.errors import ArgumentTypeError
from support import ranks

IN, CLASSES = 6, 17


def loss_of(z: Tensor, y: Tensor, w: Tensor, *calibration: Tensor) -> Tensor:
    if calibration:
        return disalign_ops.disalign_cross_entropy(z, y, *calibration, weight=w)
    return disalign_ops.cross_entropy(z, y, w, label_smoothing=0.1)


def _vectors(shape: tuple[int, ...], calibrated: bool) -> list[Tensor]:
    """z, y, w and what is learned of a calibration: all but y and w require a gradient."""
    z = torch.randn(shape, requires_grad=True)
    y = torch.randn(shape).softmax(1)
    calibration: list[Tensor] = []
    if calibrated:
        sizes = ((shape[0], *shape[2:]), shape[1:2], shape[1:2])
        calibration = [torch.randn(size, requires_grad=True) for size in sizes]
    return [z, y, torch.rand(shape[1]) + 0.1, *calibration]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("planes", [False, True])
def test_compiled_once_for_all_shapes(planes: bool, calibrated: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=counter)
    for k in (3, 7, 12):
        given = _vectors((k, k + 5, k + 2, k + 3) if planes else (k, k + 5), calibrated)
        learned = [v for v in given if v.requires_grad]
        expected, found = (loss(*given) for loss in (loss_of, compiled))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(loss, learned) for loss in (found, expected)]
        torch.testing.assert_close(*gradients)
        if k == 3:
            first = counter.frame_count
    assert counter.frame_count == first


def test_compiled_by_inductor_with_a_dynamic_batch() -> None:
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    for n in (4, 9):
        z, y, w = _vectors((n, CLASSES), calibrated=False)
        found, expected = (torch.autograd.grad(f(z, y, w), z) for f in (compiled, loss_of))
        torch.testing.assert_close(found, expected)


class Classifier(nn.Module):
    """A model with its loss in it."""

    def __init__(self, upsampled: bool = False) -> None:
        super().__init__()
        self.upsampled = upsampled
        self.head = nn.Conv2d(IN, CLASSES, 1) if upsampled else nn.Linear(IN, CLASSES)
        self.weight = nn.Buffer(torch.linspace(0.5, 2, CLASSES))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = disalign_ops.upsample_cross_entropy if self.upsampled else disalign_ops.cross_entropy
        return loss(self.head(x), y, self.weight, label_smoothing=0.1)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("upsampled", [False, True])
def test_exported_with_the_loss_in_it(upsampled: bool, strict: bool) -> None:
    module, rows = Classifier(upsampled), torch.export.Dim("rows")

    def batch(n: int) -> tuple[Tensor, Tensor]:
        low, size = ((3, 2), (6, 5)) if upsampled else ((), ())
        return torch.randn(n, IN, *low), torch.randn(n, CLASSES, *size).softmax(1)

    program = torch.export.export(
        module, batch(6), dynamic_shapes=({0: rows}, {0: rows}), strict=strict
    )
    x, y = batch(9)
    expected = module(x, y)
    wanted = torch.autograd.grad(expected, list(module.parameters()))
    for exported in (program, program.run_decompositions()):
        graph: Any = exported.module()
        found = graph(x, y)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, list(graph.parameters())), wanted)


def _data_parallel(rank: int, world: int) -> None:
    """Logits that a sharded batch made: each rank has the loss of its rows."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(3)
    z, y = torch.randn(8, CLASSES), torch.randn(8, CLASSES).softmax(1)
    whole = z.clone().requires_grad_()
    expected = disalign_ops.cross_entropy(whole, y)
    expected.backward()
    logits = distribute_tensor(z, mesh, [Shard(0)]).requires_grad_()
    target = distribute_tensor(y, mesh, [Shard(0)])
    for given in ((logits, target.to_local()), (logits.to_local(), target)):
        with pytest.raises(ArgumentTypeError, match=r"rows are divided.*\.to_local\(\)"):
            disalign_ops.cross_entropy(*given)
    loss = disalign_ops.cross_entropy(logits.to_local(), target.to_local(), normalizer=8.0)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach())
    assert isinstance(logits.grad, DTensor)
    torch.testing.assert_close(logits.grad.full_tensor(), whole.grad)


def test_dtensors_of_data_parallelism_go_by_their_local_rows() -> None:
    ranks.run(_data_parallel, 2)


class Calibrated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(IN, 8)
        self.head, self.confidence = nn.Linear(8, CLASSES), nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.full((CLASSES,), 1.1))
        self.bias = nn.Parameter(torch.full((CLASSES,), 0.2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.trunk(x).relu()
        return disalign_ops.disalign_cross_entropy(
            self.head(x), y, self.confidence(x), self.scale, self.bias, label_smoothing=0.1
        )


def _fsdp(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(3)
    whole = Calibrated()
    x, y = torch.randn(8, IN), torch.randn(8, CLASSES).softmax(1)
    sharded = copy.deepcopy(whole)
    fully_shard(sharded.trunk, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    half = slice(4 * rank, 4 * rank + 4)
    loss = sharded(x[half], y[half])
    loss.backward()
    expected = whole(x, y)
    expected.backward()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, expected.detach())
    for (name, parameter), wanted in zip(
        sharded.named_parameters(), whole.parameters(), strict=True
    ):
        assert isinstance(parameter.grad, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted.grad, msg=name)


def test_fsdp_over_two_ranks_gives_the_gradients_of_the_whole_batch() -> None:
    ranks.run(_fsdp, 2)
