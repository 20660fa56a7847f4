"""What the seesaw loss counts, and when: refused calls, repeated passes, half precision."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from disalign_ops import losses
from disalign_ops.losses import SeesawLoss

C, D = 5, 4


def counts_of(criterion: SeesawLoss) -> list[int]:
    found: list[int] = criterion.cumulative_samples.tolist()
    return found


Z, T = torch.linspace(-2, 2, 4 * C).reshape(4, C), torch.tensor([0, 3, 3, 1])

REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "a target that is no class": ((Z, torch.tensor([0, 1, 9, 1])), {}),
    "a target that another ignore_index does not cover": ((Z, torch.tensor([0, 1, -100, 1])), {}),
    "a target of another shape": ((Z, T[:3]), {}),
    "probabilities": ((Z, torch.full((4, C), 0.2)), {}),
    "too few classes": ((Z[:, :3], T), {}),
    "images": ((Z[None], T[None]), {}),
    "no logits": ((Z.long(), T), {}),
    "a sample weight of another shape": ((Z, T), {"sample_weight": torch.ones(3)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_counts_nothing(name: str) -> None:
    criterion = losses.seesaw(C, ignore_index=3)
    criterion(Z, T)
    arguments, options = REFUSED[name]
    with pytest.raises((ValueError, TypeError, IndexError)):
        criterion(*arguments, **options)
    assert counts_of(criterion) == [1, 1, 0, 0, 0]


def test_an_option_that_is_changed_for_the_worse_counts_nothing() -> None:
    criterion = losses.seesaw(C)
    criterion.reduction = "average"
    with pytest.raises(ValueError, match="reduction"):
        criterion(Z, T)
    assert counts_of(criterion) == [0] * C


# --- a pass that torch.utils.checkpoint repeats


def _batches() -> list[tuple[Tensor, Tensor]]:
    targets = torch.randint(0, C, (4, 6))
    targets[2] = targets[1]  # one target, with other logits
    return [(torch.randn(6, D), t) for t in targets]


def _own_target(layer: nn.Module, criterion: SeesawLoss, x: Tensor, t: Tensor) -> Tensor:
    found: Tensor = criterion(layer(x), t)
    return found


def _target_made_within(layer: nn.Module, criterion: SeesawLoss, x: Tensor, t: Tensor) -> Tensor:
    found: Tensor = criterion(layer(x), (t + 1) % C)
    return found


def _one_by_one(each: list[Callable[[], Tensor]]) -> None:
    for loss in each:
        loss().backward()


def _accumulated(each: list[Callable[[], Tensor]]) -> None:
    torch.stack([loss() for loss in each]).square().sum().backward()


def _last_first(each: list[Callable[[], Tensor]]) -> None:
    for loss in reversed([loss() for loss in each]):
        loss.backward()


def _twice_backward(each: list[Callable[[], Tensor]]) -> None:
    for loss in [loss() for loss in each]:
        loss.backward(retain_graph=True)
        loss.backward()


@pytest.mark.parametrize("function", [_own_target, _target_made_within])
@pytest.mark.parametrize("step", [_one_by_one, _accumulated, _last_first, _twice_backward])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_repeated_pass_is_the_first_again(reentrant: bool, step: Any, function: Any) -> None:
    if reentrant and step is _twice_backward:
        pytest.skip("torch frees what a reentrant checkpoint needs")
    layer, batches = nn.Linear(D, C).double(), _batches()
    found = []
    for wrapped in (False, True):
        criterion = losses.seesaw(C, p=3.0)  # strong, so that other counts would show
        x = [x.double().requires_grad_() for x, _ in batches]

        def loss(k: int, wrapped: bool = wrapped, x: Any = x, criterion: Any = criterion) -> Tensor:
            t = batches[k][1]
            if not wrapped:
                return function(layer, criterion, x[k], t)  # type: ignore[no-any-return]
            return checkpoint(  # type: ignore[no-any-return]
                function, layer, criterion, x[k], t, use_reentrant=reentrant
            )

        layer.zero_grad()
        step([lambda k=k, loss=loss: loss(k) for k in range(len(batches))])  # type: ignore[misc]
        found.append([counts_of(criterion), *(z.grad for z in x), layer.weight.grad])
    assert found[0][0] == found[1][0]
    assert sum(found[0][0]) == 24
    for plain, repeated in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(repeated, plain, rtol=1e-12, atol=1e-12)


def test_plain_passes_leave_nothing_behind() -> None:
    criterion = losses.seesaw(C)
    for _ in range(3):
        criterion(Z.clone().requires_grad_(), T).backward()
    assert not criterion._first_passes
    for _ in range(200):
        with torch.no_grad():
            criterion(Z, T)
    assert len(criterion._first_passes) <= 64
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert counts_of(other) == counts_of(criterion)


def test_evaluation_within_a_checkpoint_takes_the_counts_that_there_are() -> None:
    criterion = losses.seesaw(C)
    with torch.no_grad():
        criterion(Z, T)
    criterion.cumulative_samples.copy_(torch.tensor([100, 50, 10, 5, 1]))
    criterion.eval()
    z = Z.clone().requires_grad_()
    expected = torch.autograd.grad(criterion(z, T), z)[0]
    found = checkpoint(criterion, z, T, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], expected)


# --- casts, export, meta devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_stay_exact_in_half_precision(dtype: torch.dtype) -> None:
    criterion = losses.seesaw(C).to(dtype)
    z, t = torch.randn(500, C).to(dtype).requires_grad_(), torch.arange(500) % 2
    for _ in range(10):
        loss = criterion(z, t)
    assert counts_of(criterion) == [2500, 2500, 0, 0, 0]
    assert loss.dtype == dtype
    exact = losses.seesaw(C).eval()
    exact.cumulative_samples.copy_(criterion.cumulative_samples)
    torch.testing.assert_close(
        loss.double(), exact(z.double(), t), rtol=16 * torch.finfo(dtype).eps, atol=0
    )
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_more_samples_than_float16_counts() -> None:
    criterion = losses.seesaw(3).eval()
    criterion.cumulative_samples.copy_(torch.tensor([100_000, 400_000, 10]))
    z, t = torch.randn(6, 3), torch.arange(6) % 3
    half = z.half().requires_grad_()
    loss = criterion(half, t)
    torch.testing.assert_close(loss.double(), criterion(z.double(), t), rtol=0.01, atol=0)
    assert torch.autograd.grad(loss, half)[0].isfinite().all()


def test_counts_of_an_older_state_dict() -> None:
    criterion = losses.seesaw(3)
    criterion.load_state_dict({"cumulative_samples": torch.tensor([4.0, 0.0, 7.0]).double()})
    criterion(torch.randn(2, 3), torch.tensor([0, 1]))
    assert counts_of(criterion) == [5, 1, 7]
    state = {"cumulative_samples": torch.tensor([4.0, 0.0, 7.0])}
    criterion.load_state_dict(state, assign=True)
    criterion(torch.randn(2, 3), torch.tensor([0, 1]))
    assert counts_of(criterion) == [5, 1, 7]


@pytest.mark.parametrize("training", [True, False])
def test_export(training: bool) -> None:
    criterion = losses.seesaw(C).train(training)
    criterion.cumulative_samples.copy_(torch.tensor([100, 50, 10, 5, 1]))
    rows = torch.export.Dim("rows")
    program = torch.export.export(criterion, (Z, T), dynamic_shapes=({0: rows}, {0: rows}))
    criterion = copy.deepcopy(criterion)  # the program has the buffer itself
    exported = program.module()
    z, t = torch.randn(7, C), torch.randint(0, C, (7,))
    torch.testing.assert_close(exported(z, t), criterion(z, t))
    if training:
        counted: Any = exported.cumulative_samples
        assert counted.tolist() == counts_of(criterion) != [100, 50, 10, 5, 1]


def test_compile() -> None:
    criterion, compiled = losses.seesaw(C), losses.seesaw(C)
    step = torch.compile(compiled, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(step(Z, T), criterion(Z, T))
    assert counts_of(compiled) == counts_of(criterion)


def test_a_meta_device() -> None:
    with torch.device("meta"):
        criterion = losses.seesaw(C)
    assert counts_of(criterion) == [0] * C
    criterion.cumulative_samples.fill_(777)  # as memory that to_empty does not clear
    criterion.reset_parameters()
    assert counts_of(criterion) == [0] * C


@pytest.mark.parametrize("training", [False, True])
def test_a_traced_loss_has_the_same_gradient(training: bool) -> None:
    criterion = losses.seesaw(5).train(training)
    criterion.cumulative_samples.copy_(torch.tensor([50, 20, 9, 3, 1]))
    z, t = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 4, 2, 1, 3, 2])
    state = copy.deepcopy(criterion.state_dict())
    traced = torch.jit.trace(criterion, (z, t), check_trace=False)
    found = []
    for call in (criterion, traced):
        criterion.load_state_dict(state)
        loss = call(z, t)
        found.append((loss, *torch.autograd.grad(loss, z)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_criterion_pickled_whole_by_an_older_version_trains() -> None:
    criterion = losses.seesaw(5)
    state = {k: v for k, v in criterion.__dict__.items() if k != "_first_passes"}
    old = SeesawLoss.__new__(SeesawLoss)
    old.__setstate__(copy.deepcopy(state))
    with torch.no_grad():
        assert old(torch.randn(6, 5), torch.tensor([0, 4, 2, 1, 3, 2])).isfinite()
