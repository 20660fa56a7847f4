"""replace_cross_entropy: an existing loop gains, and what is not covered stays torch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import disalign_ops
from support.tolerances import assert_close

TORCHS = F.cross_entropy


def is_ours(loss: torch.Tensor) -> bool:
    return type(loss.grad_fn).__name__ == "_LossBackward"


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
    "class probabilities that learn": (torch.randn(3, 5), torch.rand(3, 5, requires_grad=True)),
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


DENSE = {
    "images": torch.randn(2, 5, 3, 3),
    "images, channels last": torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last),
    "sequences": torch.randn(2, 5, 7),
    "volumes": torch.randn(2, 5, 2, 3, 2),
    "a slice": torch.randn(2, 5, 6, 3)[:, :, ::2],
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_logits_are_ours(case: str) -> None:
    z = DENSE[case].detach().requires_grad_()
    t = torch.randint(0, 5, (2, *z.shape[2:]))
    t.flatten()[0] = -100
    weight = torch.rand(5)
    expected = TORCHS(z, t, weight, label_smoothing=0.1)
    expected_grad = torch.autograd.grad(expected, z)[0]
    with disalign_ops.replace_cross_entropy():
        loss = F.cross_entropy(z, t, weight, label_smoothing=0.1)
    assert is_ours(loss)
    assert_close(loss.detach(), expected.detach(), torch.float32, "loss")
    assert_close(torch.autograd.grad(loss, z)[0], expected_grad, torch.float32, "gradient")


@pytest.mark.parametrize(
    "given",
    [
        {"ignore_index": np.int64(3)},
        {"ignore_index": np.array(3)},
        {"ignore_index": torch.tensor(3)},
        {"label_smoothing": np.float32(0.1)},
        {"label_smoothing": torch.tensor(0.1)},
    ],
    ids=str,
)
def test_numbers_as_torch_takes_them(given: dict[str, Any]) -> None:
    z, t = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 3, 2, 3])
    module = nn.CrossEntropyLoss(**given)
    with disalign_ops.replace_cross_entropy():
        ours = module(z, t)
    assert is_ours(ours)
    assert_close(ours.detach(), module(z, t).detach(), torch.float32, "loss")


def test_a_number_on_another_device_is_read_by_torch() -> None:
    z, t = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 3, 2, 3])
    with (
        disalign_ops.replace_cross_entropy(),
        pytest.raises(RuntimeError, match="meta"),  # in its own words: there is no value to read
    ):
        F.cross_entropy(z, t, ignore_index=torch.tensor(3, device="meta"))  # type: ignore[arg-type]


def test_a_numpy_number_in_a_compiled_loop() -> None:
    z, t = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 3, 2, 3])
    module = nn.CrossEntropyLoss(ignore_index=np.int64(3))  # type: ignore[arg-type]
    with disalign_ops.replace_cross_entropy():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert_close(compiled(z, t).detach(), module(z, t).detach(), torch.float32, "loss")


def test_a_deprecated_reduction() -> None:
    z, t = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 3, 2, 3])
    with (
        disalign_ops.replace_cross_entropy(),
        pytest.warns(UserWarning, match="elementwise_mean"),
    ):
        loss = nn.CrossEntropyLoss(reduction="elementwise_mean")(z, t)
    assert is_ours(loss)
    assert_close(loss.detach(), TORCHS(z, t).detach(), torch.float32, "loss")


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_dtensors_go_to_torch(mesh: Any, compiled: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def loss(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z, t, label_smoothing=0.1)

    z, t = torch.randn(4, 9), torch.tensor([0, 3, 2, 3])
    for placement in (Shard(0), Replicate()):
        # torch 2.13 fails to compile the backward of its own function after an earlier group.
        z_d = distribute_tensor(z, mesh, [placement]).requires_grad_(not compiled)
        t_d = distribute_tensor(t, mesh, [placement])
        with disalign_ops.replace_cross_entropy():
            function = torch.compile(loss, backend="aot_eager") if compiled else loss
            found = function(z_d, t_d)
        assert_close(found.full_tensor().detach(), loss(z, t), torch.float32, "loss")
        if compiled:
            continue
        found.backward()
        expected = torch.func.grad(loss)(z, t)
        assert_close(z_d.grad.full_tensor(), expected, torch.float32, "gradient")


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


def test_calls_are_counted_by_who_served_them() -> None:
    z, t = torch.randn(4, 9), torch.tensor([0, 1, 2, 3])
    with disalign_ops.replace_cross_entropy() as outer:
        assert (outer.served, outer.not_served) == (0, {})
        F.cross_entropy(z, t)
        nn.CrossEntropyLoss()(z, t)
        with disalign_ops.replace_cross_entropy() as inner:
            F.cross_entropy(z, z.detach().softmax(1))
            F.cross_entropy(z, z.softmax(1).requires_grad_())
            with pytest.raises(RuntimeError, match="not differentiable"):
                F.cross_entropy(z, t, torch.rand(9, requires_grad=True))
            F.cross_entropy(z, t, torch.rand(9))
            torch.func.grad(F.cross_entropy)(z, t)
            for _ in range(2):
                with disalign_ops.set_backend("reference"):
                    F.cross_entropy(z, t)
            with pytest.raises(TypeError):
                F.cross_entropy([1.0], t)  # type: ignore[arg-type]
        F.cross_entropy(z, t)
    F.cross_entropy(z, t)
    assert (outer.served, inner.served) == (5, 2)
    assert inner.not_served == outer.not_served
    assert inner.not_served == {
        "class probabilities that require a gradient": 1,
        "weight that requires a gradient": 1,
        "torch.func transform, forward-mode differentiation or torch.jit.trace": 1,
        "no kernels for the device, or backend 'reference': see backend_info()": 2,
        "input, target or weight is no tensor": 1,
    }


def test_an_override_that_calls_again_counts_once(mesh: Any) -> None:
    class Mine(torch.Tensor):
        pass

    z, t = torch.randn(4, 9), torch.tensor([0, 1, 2, 3])
    with disalign_ops.replace_cross_entropy() as replaced:
        with torch.device("cpu"):
            F.cross_entropy(z, t)
        F.cross_entropy(z.as_subclass(Mine), t)
        assert (replaced.served, replaced.not_served) == (2, {})
        from torch.distributed.tensor import Replicate, distribute_tensor

        F.cross_entropy(*(distribute_tensor(x, mesh, [Replicate()]) for x in (z, t)))
    assert replaced.not_served == {"wrapper of tensors (DTensor)": 1}


def test_a_compiled_call_is_counted_when_it_is_traced() -> None:
    compiled = torch.compile(
        lambda z, t: F.cross_entropy(z, t), backend="aot_eager", fullgraph=True
    )
    z, t = torch.randn(4, 9), torch.tensor([0, 1, 2, 3])
    with disalign_ops.replace_cross_entropy() as replaced:
        compiled(z, t)
        traced = replaced.served
        assert traced > 0
        assert not replaced.not_served
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                compiled(z, t)
    assert replaced.served == traced


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
