"""replace_cross_entropy: an existing loop gains, and what is not covered stays torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import nn

import disalign_ops

TORCHS = F.cross_entropy


def is_ours(loss: torch.Tensor) -> bool:
    return type(loss.grad_fn).__name__ in ("_EagerLossBackward", "_PlainLossBackward")


def test_functions_and_modules_are_ours_within_the_block_only() -> None:
    z, t = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 1, 2, 3])
    module = nn.CrossEntropyLoss(torch.rand(9), label_smoothing=0.1)
    with disalign_ops.replace_cross_entropy():
        ours = module(z, t)
        assert is_ours(ours)
        assert is_ours(nn.functional.cross_entropy(z, t))
    assert F.cross_entropy is TORCHS
    theirs = module(z, t)
    assert not is_ours(theirs)
    assert_close(ours.detach(), theirs.detach(), torch.float32, "loss")


def test_a_plain_call_holds_until_undo() -> None:
    replaced = disalign_ops.replace_cross_entropy()
    try:
        assert F.cross_entropy is not TORCHS
    finally:
        replaced.undo()
    assert F.cross_entropy is TORCHS


def test_several_replacements_may_end_in_any_order() -> None:
    first, second = disalign_ops.replace_cross_entropy(), disalign_ops.replace_cross_entropy()
    first.undo()
    assert F.cross_entropy is not TORCHS
    first.undo()  # says nothing new
    assert F.cross_entropy is not TORCHS
    second.undo()
    assert F.cross_entropy is TORCHS


def test_the_block_ends_with_an_exception_too() -> None:
    with pytest.raises(KeyError), disalign_ops.replace_cross_entropy():
        raise KeyError
    assert F.cross_entropy is TORCHS


NOT_COVERED: dict[str, tuple[Any, ...]] = {
    "class probabilities": (torch.randn(3, 5), torch.rand(3, 5)),
    "dense, contiguous": (torch.randn(2, 5, 3, 3), torch.zeros(2, 3, 3).long()),
    "a learnable weight": (
        torch.randn(3, 5), torch.zeros(3).long(), torch.rand(5, requires_grad=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_COVERED)
def test_what_is_not_covered_goes_to_torch(case: str) -> None:
    z, *rest = NOT_COVERED[case]
    z = z.requires_grad_()
    try:
        expected: Any = TORCHS(z, *rest).detach()
    except RuntimeError as error:
        expected = str(error)
    with disalign_ops.replace_cross_entropy():
        if isinstance(expected, str):
            with pytest.raises(RuntimeError, match=expected[:20]):
                F.cross_entropy(z, *rest)
        else:
            loss = F.cross_entropy(z, *rest)
            assert not is_ours(loss)
            assert torch.equal(loss.detach(), expected)


def test_transforms_go_to_torch() -> None:
    z, t = torch.randn(4, 9), torch.tensor([0, 1, 2, 3])
    with disalign_ops.replace_cross_entropy():
        per_row = torch.func.vmap(torch.func.grad(F.cross_entropy))(z, t)
    expected = torch.func.vmap(torch.func.grad(TORCHS))(z, t)
    assert torch.equal(per_row, expected)


def test_errors_are_torchs_types() -> None:
    with disalign_ops.replace_cross_entropy():
        with pytest.raises(IndexError):
            F.cross_entropy(torch.zeros(3, 5), torch.full((3,), 5))
        with pytest.raises(TypeError):
            F.cross_entropy([1.0], torch.zeros(3).long())  # type: ignore[arg-type]
        with pytest.raises(RuntimeError):
            F.cross_entropy(torch.zeros(3, 5), torch.zeros(3).long(), torch.ones(4))


def test_a_training_loop_reaches_the_same_parameters() -> None:
    def train() -> torch.Tensor:
        torch.manual_seed(1)
        model = nn.Linear(6, 9).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            x = torch.randn(8, 6, dtype=torch.float64)
            criterion(model(x), torch.randint(0, 9, (8,))).backward()
            optimizer.step()
        return model.weight.detach()

    expected = train()
    with disalign_ops.replace_cross_entropy():
        actual = train()
    assert_close(actual, expected, torch.float64, "weights")
