"""inplace_backward: right where it is possible, refused or raising where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops.errors import ArgumentError
from support.cases import rows
from support.tolerances import assert_close


def logits(n: int = 9, c: int = 67, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = (torch.randn(n, c, dtype=dtype) * 3).requires_grad_()
    return x, x * 1.0


TARGET = torch.arange(9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_gradient_is_the_same_and_lies_over_the_logits(
    dtype: torch.dtype, reduction: str, calibrated: bool
) -> None:
    r = rows(9, 67, torch.float32, reduction=reduction, label_smoothing=0.1).to(dtype)
    upstream = torch.randn(9 if reduction == "none" else ()).to(dtype)

    def gradients(in_place: bool) -> tuple[Tensor, list[Tensor]]:
        z = r.logits * 1.0
        options = {**r.options, "inplace_backward": in_place}
        if calibrated:
            loss = disalign_ops.disalign_cross_entropy(
                z, TARGET, r.confidence, r.scale, r.bias, **options
            )
            learned = [z, r.confidence, r.scale, r.bias]
        else:
            loss = disalign_ops.cross_entropy(z, TARGET, **options)
            learned = [z]
        before = z.detach().clone()
        assert torch.equal(before, z)  # never in forward
        return z, list(torch.autograd.grad(loss, learned, upstream))

    _, expected = gradients(False)
    z, actual = gradients(True)
    assert actual[0].data_ptr() == z.data_ptr()
    for a, e in zip(actual, expected, strict=True):
        if dtype in (torch.float64, torch.float32):
            assert_close(a, e, dtype, "in place")
        else:
            # Both round the same float32 values, made in forward or in backward.
            torch.testing.assert_close(a, e, rtol=2.0**-7, atol=1e-6)


def test_rows_with_a_stride_are_overwritten_where_they_lie() -> None:
    x = torch.randn(9, 80, requires_grad=True)
    wide = x * 1.0
    z = wide[:, 5:72]
    untouched = wide.detach().clone()
    loss = disalign_ops.cross_entropy(z, TARGET, inplace_backward=True)
    loss.backward()
    assert torch.equal(wide.detach()[:, :5], untouched[:, :5])
    assert torch.equal(wide.detach()[:, 72:], untouched[:, 72:])
    leaf = x.detach().requires_grad_()
    disalign_ops.cross_entropy(leaf[:, 5:72], TARGET).backward()
    assert x.grad is not None
    assert leaf.grad is not None
    assert_close(x.grad, leaf.grad, torch.float32, "strided")


def test_a_second_backward_raises() -> None:
    _, z = logits()
    loss = disalign_ops.cross_entropy(z, TARGET, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("other_in_place", [False, True])
def test_a_second_loss_on_the_same_logits_raises(other_in_place: bool) -> None:
    _, z = logits()
    other = disalign_ops.cross_entropy(z, TARGET, inplace_backward=other_in_place)
    loss = disalign_ops.cross_entropy(z, TARGET + 1, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_the_sum_of_two_losses_on_the_same_logits_raises_or_is_right() -> None:
    x, z = logits()
    first = disalign_ops.cross_entropy(z, TARGET, inplace_backward=True)
    second = disalign_ops.cross_entropy(z, TARGET + 1)
    (first + second).backward()  # second's backward comes first and reads what is still logits
    leaf = x.detach().requires_grad_()
    (
        disalign_ops.cross_entropy(leaf, TARGET) + disalign_ops.cross_entropy(leaf, TARGET + 1)
    ).backward()
    assert x.grad is not None
    assert leaf.grad is not None
    assert_close(x.grad, leaf.grad, torch.float32, "sum")


def test_a_layer_that_needs_its_output_raises() -> None:
    x = torch.randn(9, 67, requires_grad=True)
    z = torch.tanh(x)
    loss = disalign_ops.cross_entropy(z, TARGET, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_raises() -> None:
    _, z = logits()
    loss = disalign_ops.cross_entropy(z, TARGET, inplace_backward=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_a_leaf_is_refused() -> None:
    z = torch.randn(9, 67, requires_grad=True)
    with pytest.raises(ArgumentError, match="got a leaf"):
        disalign_ops.cross_entropy(z, TARGET, inplace_backward=True)


def test_a_view_of_a_leaf_is_refused() -> None:
    parameter = torch.randn(3, 3, 67, requires_grad=True)
    for view in (parameter.view(9, 67), parameter[:, 0], parameter.flatten()[67:].view(8, 67)):
        target = torch.arange(len(view))
        with pytest.raises(ArgumentError, match="got a leaf, or a view of one"):
            disalign_ops.cross_entropy(view, target, inplace_backward=True)


def test_overlapping_rows_are_refused() -> None:
    x = torch.randn(1, 67, requires_grad=True)
    z = (x * 1.0).expand(9, 67)
    with pytest.raises(ArgumentError, match="input must have memory of its own for each row"):
        disalign_ops.cross_entropy(z, TARGET, inplace_backward=True)
    windows = (torch.randn(80, requires_grad=True) * 1.0).as_strided((9, 67), (1, 1))
    with pytest.raises(ArgumentError, match="input must have memory of its own for each row"):
        disalign_ops.cross_entropy(windows, TARGET, inplace_backward=True)


def test_logits_that_had_to_be_copied_are_refused() -> None:
    x = torch.randn(67, 9, requires_grad=True)
    with pytest.raises(ArgumentError, match="input must have neighbouring classes"):
        disalign_ops.cross_entropy((x * 1.0).t(), TARGET, inplace_backward=True)
    dense = (torch.randn(2, 5, 3, 8, requires_grad=True) * 1.0)[..., ::2]
    with pytest.raises(ArgumentError, match="input must have neighbouring classes"):
        disalign_ops.cross_entropy(dense, torch.zeros(2, 3, 4).long(), inplace_backward=True)


def test_torch_compile_refuses() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def loss(x: Tensor) -> Tensor:
        return disalign_ops.cross_entropy(x * 1.0, TARGET, inplace_backward=True)

    with pytest.raises(Exception, match=r"must be False under torch\.compile"):
        loss(torch.randn(9, 67, requires_grad=True))


def test_frozen_logits_are_left_alone() -> None:
    z = torch.randn(9, 67)
    before = z.clone()
    scale = torch.ones(67, requires_grad=True)
    loss = disalign_ops.disalign_cross_entropy(
        z, TARGET, torch.randn(9), scale, torch.zeros(67), inplace_backward=True
    )
    loss.backward()
    assert torch.equal(z, before)
    assert scale.grad is not None
