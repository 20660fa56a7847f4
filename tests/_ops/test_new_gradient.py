"""Where a new gradient of rows lies: as the logits do modulo 16 bytes, so that kernels store the
vectors that they load.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

import disalign_ops
from disalign_ops._ops import in_forward, schemas
from disalign_ops._ops.codes import CALIBRATION, LOGITS, STATISTICS
from disalign_ops._ops.new_gradient import new_gradient
from support.tolerances import assert_close

ROWS = 5
# Classes, row stride and storage offset of the logits, and where a float32 gradient lies.
PLACES: dict[str, tuple[tuple[int, int, int], tuple[int, int]]] = {
    "contiguous": ((1203, 1203, 0), (1203, 0)),
    "a slice of a padded head": ((1203, 1216, 0), (1216, 0)),
    "of one that begins with a background": ((1203, 1204, 1), (1204, 1)),
    "contiguous rows in the middle of others": ((1203, 1203, 3 * 1203), (1203, 1)),
    "padding of whole vectors": ((1000, 1024, 0), (1000, 0)),
    "an eighth of padding": ((1203, 1353, 0), (1353, 0)),
    "more than an eighth": ((1203, 1354, 0), (1203, 0)),
    "few classes up to the next 8": ((11, 16, 0), (16, 0)),
    "few classes of many": ((10, 49, 2), (10, 0)),
    "expanded": ((1203, 0, 0), (1203, 0)),
    "one class": ((1, 2, 0), (2, 0)),
}


def logits_at(place: str, dtype: torch.dtype = torch.float32) -> Tensor:
    classes, stride, offset = PLACES[place][0]
    memory = torch.randn(offset + ROWS * max(stride, classes)) * 3
    return memory.to(dtype).as_strided((ROWS, classes), (stride, 1), offset)


def where(gradient: Tensor) -> tuple[int, int]:
    """Row stride and offset."""
    assert gradient.shape[1] == 1 or gradient.stride(1) == 1
    return gradient.stride(0), gradient.storage_offset()


# The operators that make a gradient of rows, and which of their results it is.
OPERATORS = {"forward": 3, "backward": 0, "shard_backward": 0, "calibrate_backward": 0}


def arguments_of(name: str, z: Tensor) -> tuple[Any, ...]:
    torch.manual_seed(5)
    target = torch.arange(ROWS) % z.shape[1]
    vectors = torch.float64 if z.dtype == torch.float64 else torch.float32
    scale, bias = (torch.randn(z.shape[1], dtype=vectors) * 0.3 for _ in range(2))
    calibration = scale, bias, torch.randn(ROWS, dtype=vectors)
    if name == "calibrate_backward":
        out = torch.randn(z.shape, dtype=vectors).to(z.dtype)
        return out, z, *calibration, LOGITS | CALIBRATION
    given = z, target, None, *calibration, None, None
    if name == "shard_backward":
        return torch.rand(5, ROWS, dtype=vectors), *given, 1.0, 0.0, LOGITS
    numbers = -100, 0.1, 0.0
    forward = *given, None, None, *numbers, 1, 0, LOGITS | STATISTICS
    if name == "forward":
        return forward
    known = schemas.ROW.operator("forward")(*forward)[1:3]
    upstream = torch.full((), 0.3, dtype=vectors)
    return upstream, *given, None, *known, *numbers, LOGITS | CALIBRATION


def skip_where_backward_alone_makes_it(what: str) -> None:
    if what == "forward" and "row" not in in_forward.NATIVE["cpu"].layouts:
        pytest.skip("Triton's forward makes no gradient of the logits")


def gradient_of(name: str, z: Tensor) -> Tensor:
    results = schemas.ROW.operator(name)(*arguments_of(name, z))
    found: Tensor = results[OPERATORS[name]]
    return found


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_operators_put_the_gradient_where_the_rule_says(
    place: str, dtype: torch.dtype, name: str
) -> None:
    skip_where_backward_alone_makes_it(name)
    z = logits_at(place, dtype)
    if dtype == torch.float32:
        assert where(new_gradient(z)) == PLACES[place][1]
    found = gradient_of(name, z)
    assert where(found) == where(new_gradient(z))
    # In other vectors, and so with another order of sums: one rounding.
    expected = gradient_of(name, z.contiguous())
    if dtype == torch.bfloat16:
        torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-6)
    else:
        assert_close(found, expected, dtype, "gradient")


@pytest.mark.parametrize("place", PLACES)
def test_rows_and_their_gradients_are_alike_modulo_16_bytes(place: str) -> None:
    z = logits_at(place, torch.bfloat16)
    gradient = new_gradient(z)
    _, stride, _ = PLACES[place][0]
    apart = {(gradient[i].data_ptr() - z[i].data_ptr()) % 16 for i in range(ROWS)}
    within_reach = 0 < 8 * (stride - z.shape[1]) <= max(z.shape[1], 64)
    if within_reach or (stride - z.shape[1]) % 8 == 0:
        assert apart == {0}


def test_planes_and_images_have_contiguous_gradients() -> None:
    z = torch.randn(2, 6, 4, 8)[:, 1:, :, :5]
    assert new_gradient(z).is_contiguous()
    z = torch.randn(2, 6, 40)[..., 1:38]
    assert new_gradient(z).is_contiguous()
    target = torch.randint(0, 6, (2, 37))
    z = z.requires_grad_()
    found = torch.autograd.grad(disalign_ops.cross_entropy(z, target), z)[0]
    assert found.is_contiguous()


@pytest.mark.parametrize("place", PLACES)
def test_fakes_know_where(place: str) -> None:
    z = logits_at(place)
    with FakeTensorMode() as fake:
        inside = fake.from_tensor(z)
        assert where(new_gradient(inside)) == PLACES[place][1]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("place", PLACES)
def test_opcheck_of_rows_with_a_stride(place: str, name: str) -> None:
    torch.library.opcheck(
        schemas.ROW.operator(name), arguments_of(name, logits_at(place)),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_opcheck_of_a_gradient_that_forward_made(place: str) -> None:
    z = logits_at(place)
    made = new_gradient(z).zero_()
    upstream, *others, _ = arguments_of("backward", z)
    torch.library.opcheck(
        schemas.ROW.operator("backward_made"), (upstream, made, *others, LOGITS),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("finished", [False, True], ids=["by the host", "by the operator"])
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("background", [0, 1])
def test_the_gradient_of_a_padded_head(
    gradient: Any, background: int, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_backward_alone_makes_it(gradient)
    kernels = in_forward.NATIVE["cpu"]._replace(finished_by_operator=finished)
    monkeypatch.setitem(in_forward.NATIVE, "cpu", kernels)
    classes, target = 1203, torch.arange(ROWS)
    target[2] = -100
    padded = (torch.randn(ROWS, 1216) * 3).requires_grad_()
    seen = []

    def slice_of(padded: Tensor) -> Tensor:
        z = padded[:, background : background + classes]
        z.register_hook(seen.append)
        return z

    for upstream in (1.0, 1 / 3):
        z = slice_of(padded)
        loss = disalign_ops.cross_entropy(z, target, gradient=gradient)
        expected = F.cross_entropy(slice_of(padded), target)
        # A second one is made again.
        for _ in range(2):
            found, same = (
                torch.autograd.grad(x, padded, torch.tensor(upstream), retain_graph=True)[0]
                for x in (loss, expected)
            )
            assert_close(found, same, torch.float32, "padded")
            outside = torch.ones(1216, dtype=torch.bool)
            outside[background : background + classes] = False
            assert not found[:, outside].any()
    ours = seen[::2]
    assert {where(g) for g in ours} == {(1216, background)}
    for g in ours:  # what leaves the padding behind
        assert torch.equal(g.contiguous(), g.clone(memory_format=torch.contiguous_format))
        assert g.contiguous().untyped_storage().nbytes() == 4 * ROWS * classes


def test_a_leaf_with_a_stride_has_a_contiguous_grad() -> None:
    # autograd's own layout of .grad for a leaf that is neither dense nor contiguous.
    leaf = (torch.randn(ROWS, 1216) * 3)[:, :1203].requires_grad_()
    target = torch.arange(ROWS)
    other = leaf.detach().contiguous().requires_grad_()
    for z in (leaf, other):
        for _ in range(2):
            disalign_ops.cross_entropy(z, target).backward()
    assert leaf.grad is not None
    assert leaf.grad.is_contiguous()
    assert other.grad is not None
    assert_close(leaf.grad, other.grad, torch.float32, "grad")


def test_a_second_derivative_of_a_padded_head() -> None:
    padded = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    target = torch.arange(3)

    def loss(padded: Tensor) -> Tensor:
        return disalign_ops.cross_entropy(padded[:, 1:12], target)

    assert torch.autograd.gradcheck(loss, padded)
    assert torch.autograd.gradgradcheck(loss, padded)


def test_channels_last_slices() -> None:
    target = torch.randint(0, 19, (2, 4, 6))
    wide = torch.randn(2, 21, 4, 6).to(memory_format=torch.channels_last).requires_grad_()
    loss = disalign_ops.cross_entropy(wide[:, 1:20], target)
    found = torch.autograd.grad(loss, wide)[0]
    expected = torch.autograd.grad(F.cross_entropy(wide[:, 1:20], target), wide)[0]
    assert_close(found, expected, torch.float32, "wide")


class Head(torch.nn.Module):
    """Its weight has more rows than there are classes, for the matrix product's sake."""

    def __init__(self, background: int = 0) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 24)
        self.background = background

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.linear(x)[:, self.background : self.background + 19]
        return disalign_ops.cross_entropy(logits, target)


@pytest.mark.parametrize("background", [0, 1])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_padded_head(backend: str, background: int) -> None:
    head = Head(background)
    compiled = torch.compile(head, backend=backend, fullgraph=True)
    for n in (5, 7, 6):
        x, target = torch.randn(n, 8), torch.arange(n)
        found, expected = (
            torch.autograd.grad(module(x, target), list(head.parameters()))
            for module in (compiled, head)
        )
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, torch.float32, "parameters")


def test_a_compiled_loss_of_rows_in_the_middle() -> None:
    # The graph's input has an offset, which its graph was not made for.
    def loss(z: Tensor, target: Tensor) -> Tensor:
        return disalign_ops.cross_entropy(z * 1, target) + disalign_ops.cross_entropy(z, target)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    memory = torch.randn(12, 19)
    for first in (0, 1, 3):
        z = memory[first : first + 6].requires_grad_()
        target = torch.arange(6)
        found, expected = (torch.autograd.grad(f(z, target), z)[0] for f in (compiled, loss))
        assert_close(found, expected, torch.float32, "logits")


@pytest.mark.parametrize("background", [0, 1])
def test_an_exported_padded_head(background: int) -> None:
    head = Head(background)
    x, target = torch.randn(5, 8), torch.arange(5)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(head, (x, target), dynamic_shapes=({0: rows}, {0: rows}))
    for n in (5, 7):
        x, target = torch.randn(n, 8), torch.arange(n)
        found = program.module()(x, target)
        assert_close(found, head(x, target), torch.float32, "loss")
