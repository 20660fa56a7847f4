"""loss_denominator: the parts of a batch add up to the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import disalign_ops
from disalign_ops import loss_denominator
from disalign_ops.errors import ArgumentError, ArgumentTypeError
from support import ranks
from support.tolerances import assert_close

CLASSES = 7
CUTS = [5, 1, 4, 0, 2]  # micro-batches of 12 images; the second has ignored targets only
Batch = dict[str, Any]
# name: (size of the logits' planes, size of the target's, the loss, its ignore_index)
LOSSES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Any], int]] = {
    "rows": ((), (), disalign_ops.cross_entropy, -100),
    "planes": ((3, 2), (3, 2), disalign_ops.cross_entropy, -100),
    "upsampled": ((3, 2), (6, 5), disalign_ops.upsample_cross_entropy, 255),
}
OPTIONS = {
    "weights": ("weight",),
    "sample weights": ("sample_weight",),
    "both": ("weight", "sample_weight"),
    "class probabilities": ("soft", "weight"),
    "class probabilities, sample weights": ("soft", "sample_weight"),
}


def batch(loss: str, options: tuple[str, ...], dtype: torch.dtype = torch.float64) -> Batch:
    """Logits, target and weights of 12 images."""
    low, full, _, ignored = LOSSES[loss]
    torch.manual_seed(5)
    n = sum(CUTS)
    target = torch.randint(0, CLASSES, (n, *full))
    target[::4] = ignored
    target[CUTS[0] : CUTS[0] + CUTS[1]] = ignored
    if "soft" in options:
        target = torch.softmax(torch.randn(n, CLASSES, *full, dtype=dtype), 1)
    return {
        "input": torch.randn(n, CLASSES, *low, dtype=dtype),
        "target": target,
        "weight": torch.rand(CLASSES, dtype=dtype) * 5 if "weight" in options else None,
        "sample_weight": torch.rand(n, *full, dtype=dtype) if "sample_weight" in options else None,
    }


def split(value: Tensor | None, cuts: list[int] = CUTS) -> list[Any]:
    return [None] * len(cuts) if value is None else [*value.split(cuts)]


@pytest.mark.parametrize("normalizer", ["weights", "valid", "count"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_batch(loss: str, options: str, normalizer: str) -> None:
    whole = batch(loss, OPTIONS[options])
    call, ignored = LOSSES[loss][2], LOSSES[loss][3]
    logits = whole["input"].requires_grad_()
    expected = call(**whole, normalizer=normalizer)
    expected.backward()
    parts = {name: split(value) for name, value in whole.items() if name != "weight"}
    sample_weight = None if whole["sample_weight"] is None else parts["sample_weight"]
    one = loss_denominator(
        parts["target"], whole["weight"], sample_weight=sample_weight, ignore_index=ignored,
        normalizer=normalizer,  # type: ignore[arg-type]
    )  # fmt: skip
    assert one.shape == ()
    assert one.dtype == torch.float64
    found, grads = torch.zeros((), dtype=torch.float64), []
    for k in range(len(CUTS)):
        part = {name: values[k] for name, values in parts.items()}
        part["input"] = part["input"].detach().requires_grad_()
        part["weight"] = whole["weight"]
        mean = call(**part, normalizer=one)
        mean.backward()
        found += mean.detach()
        grads.append(part["input"].grad)
        if "soft" not in OPTIONS[options] and k in (1, 3):  # nothing counts: 0 and not NaN
            assert mean == 0
            assert (grads[-1] == 0).all()
    assert_close(found, expected.detach(), torch.float64, "loss")
    # A position's gradient is that of the batch but for the denominator's last bit.
    tolerance = {"rtol": 4 * torch.finfo(torch.float64).eps, "atol": 1e-18}
    if loss == "upsampled":  # whose gradients are sums
        tolerance = {"rtol": 1e-13, "atol": 1e-16}
    torch.testing.assert_close(torch.cat(grads), logits.grad, **tolerance)


def test_the_mean_of_means_is_another_gradient() -> None:
    """What the tests above would not see if all parts had the same sum of weights."""
    whole = batch("rows", OPTIONS["weights"])
    sums = [
        float(loss_denominator(t, whole["weight"])) for t in split(whole["target"]) if len(t) > 1
    ]
    assert max(sums) > 2 * min(sums)


@pytest.mark.parametrize("lam", [0.3, "one a position"])
@pytest.mark.parametrize("normalizer", ["weights", "valid", "count"])
@pytest.mark.parametrize("weighted", [False, True])
def test_two_classes_a_position(weighted: bool, normalizer: str, lam: Any) -> None:
    whole = batch("rows", OPTIONS["both"])
    cuts = [5, 1, 4, 2]
    other = whole["target"].roll(3)
    share = torch.rand(len(other), dtype=torch.float64) if isinstance(lam, str) else lam
    shares = split(share, cuts) if isinstance(lam, str) else [lam] * len(cuts)
    targets = [*zip(split(whole["target"], cuts), split(other, cuts), shares, strict=True)]
    weights = split(whole["sample_weight"], cuts)
    options = {"weight": whole["weight"] if weighted else None, "normalizer": normalizer}
    expected_z = whole["input"].requires_grad_()
    expected = disalign_ops.cross_entropy(
        expected_z, (whole["target"], other, share), sample_weight=whole["sample_weight"], **options
    )
    expected.backward()
    one = loss_denominator(targets, sample_weight=weights, **options)  # type: ignore[arg-type]
    grads = []
    for z, t, v in zip(split(whole["input"].detach(), cuts), targets, weights, strict=True):
        z.requires_grad_()
        disalign_ops.cross_entropy(
            z, t, options["weight"], sample_weight=v, normalizer=one
        ).backward()
        grads.append(z.grad)
    assert expected_z.grad is not None
    assert_close(torch.cat(grads), expected_z.grad, torch.float64, "gradients")
    alone = loss_denominator(
        (whole["target"], other, share),
        sample_weight=whole["sample_weight"],
        **options,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(alone, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_without_logits(dtype: torch.dtype) -> None:
    whole = batch("rows", OPTIONS["both"], dtype)
    head = torch.randn(9, CLASSES, dtype=dtype)
    options = {"weight": whole["weight"], "sample_weight": whole["sample_weight"]}
    features = whole["input"].requires_grad_()
    target = torch.where(whole["target"] >= 0, whole["target"] + 1, -100)
    options["weight"] = torch.rand(9, dtype=dtype)
    disalign_ops.linear_cross_entropy(features, head, target, **options).backward()
    one = loss_denominator(target, options["weight"], sample_weight=options["sample_weight"])
    grads = []
    for z, t, v in zip(*map(split, (features.detach(), target, options["sample_weight"]))):  # noqa: B905
        z.requires_grad_()
        disalign_ops.linear_cross_entropy(
            z, head, t, weight=options["weight"], sample_weight=v, normalizer=one
        ).backward()
        grads.append(z.grad)
    assert features.grad is not None
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.cat(grads), features.grad, rtol=4 * eps, atol=eps / 8)


def test_values() -> None:
    target = torch.tensor([2, 0, -100, 2], dtype=torch.int32)
    weight, v = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 1.0, 3.0, 2.0])
    assert loss_denominator(target, weight) == 9
    assert loss_denominator(target, weight, sample_weight=v) == 11
    assert loss_denominator(target, sample_weight=v) == 3.5
    assert loss_denominator(target, weight, sample_weight=v, normalizer="valid") == 3
    assert loss_denominator(target, weight, normalizer="count") == 4
    assert loss_denominator([target, target[:2]], weight) == 14
    assert loss_denominator(torch.tensor([255, 1], dtype=torch.uint8), ignore_index=255) == 1
    soft = torch.rand(2, 3, 4)
    assert loss_denominator(soft, weight) == 8
    assert loss_denominator([soft, soft[:, :, :1]], sample_weight=[v.expand(2, 1, 4), v[:2, None]])
    assert loss_denominator(torch.rand(3), weight) == 1
    assert loss_denominator((target, target * 0, 0.25), weight) == 5.25
    assert loss_denominator(torch.tensor([1, 1, 2]).split(1), weight) == 8  # three micro-batches
    assert loss_denominator(torch.full((3,), -100), weight) == 0
    assert loss_denominator(target[:0]) == 0


def test_nothing_counts_in_any_part() -> None:
    target = torch.full((4,), -100)
    one = loss_denominator([target, target], torch.rand(3))
    logits = torch.full((4, 3), torch.inf, requires_grad=True)
    loss = disalign_ops.cross_entropy(logits, target, torch.rand(3), normalizer=one)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_the_host_waits_for_nothing() -> None:
    """On the meta device there is no value to read: .item() raises."""
    target = torch.zeros(6, dtype=torch.int64, device="meta")
    weight = torch.ones(3, device="meta")
    for normalizer in ("weights", "valid", "count"):
        found = loss_denominator([target, target], weight, normalizer=normalizer)  # type: ignore[arg-type]
        assert found.device.type == "meta"
    found = loss_denominator(target.new_empty((6, 3), dtype=torch.float32), weight)
    assert found.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ArgumentError, "target must be a tensor, or at least one of a list, got none"),
        ((3,), ArgumentTypeError, "target must be a torch.Tensor, got a int"),
        ((torch.tensor([True]),), ArgumentTypeError, "target must have dtype int64.*torch.bool"),
        ((torch.tensor(0.5),), ArgumentError, r"target must have shape \(C,\) or \(N, C, ...\)"),
        ((torch.tensor([0]), torch.ones(2, 2)), ArgumentError, r"weight must have shape \(C,\)"),
        ((torch.tensor([0]), torch.ones(2).long()), ArgumentTypeError, "weight must have a float"),
        ((torch.tensor([0]), torch.ones(2, device="meta")), ArgumentError, "weight must be on"),
        (
            ((torch.tensor([0]), torch.tensor([0, 1]), 0.5),), ArgumentError,
            r"target\[1\] must have the shape and device of target\[0\], \(1,\) on cpu, got \(2,\)",
        ),
        (((*torch.tensor([[0], [1]]), 2.0),), ArgumentError, r"target\[2\] must be a number"),
        (
            ((*torch.tensor([[0], [1]]), torch.rand(2)),), ArgumentError,
            r"target\[2\] must be a number or have the positions' shape \(1,\), got \(2,\)",
        ),
        ((torch.tensor([2]), torch.ones(2)), IndexError, "Target 2 is out of bounds"),
        ((torch.tensor([-1]), torch.ones(2)), IndexError, "Target -1 is out of bounds"),
        (
            ([torch.tensor([0]), torch.tensor([0], device="meta")],),
            ArgumentError, "target must be on one device, got cpu and meta",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments: tuple[Any, ...], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        loss_denominator(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalizer": 3.0}, "normalizer must be one of 'weights', 'valid', 'count', got 3.0"),
        ({"ranks": "all"}, "ranks must be one of 'mean', 'sum', 'same', got 'all'"),
        (
            {"sample_weight": torch.ones(3)},
            r"sample_weight must have the positions' shape \(2,\), got \(3,\)",
        ),
        ({"sample_weight": [torch.ones(2)] * 2}, r"must be one tensor of each target \(1\), got 2"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        loss_denominator(torch.tensor([0, 1]), **options)


# --- several ranks


def _model() -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(CLASSES, CLASSES).double()


def _gradients(
    model: nn.Module, whole: Batch, cuts: list[int], mine: slice, normalizer: Any, sync: Any
) -> None:
    parts = {name: split(value, cuts)[mine] for name, value in whole.items() if name != "weight"}
    for k, part in enumerate(parts["input"]):
        last = k == len(parts["input"]) - 1
        with nullcontext() if last or sync is None else sync():
            disalign_ops.cross_entropy(
                model(part), parts["target"][k], whole["weight"], normalizer=normalizer,
                sample_weight=parts["sample_weight"][k],
            ).backward()  # fmt: skip


def _case_of_two_ranks(options: tuple[str, ...], ddp: bool, rank: int) -> None:
    """Rank 0 has the first three micro-batches, rank 1 the others; of "empty" none that counts."""
    whole = batch("rows", options)
    if "empty" in options:
        whole["target"][sum(CUTS[:3]) :] = -100
    expected = _model()
    _gradients(expected, whole, [sum(CUTS)], slice(None), "weights", None)
    model: nn.Module = _model()
    mine = slice(3, None) if rank else slice(3)
    v = None if whole["sample_weight"] is None else split(whole["sample_weight"])[mine]
    called: list[Tensor] = []
    plain = dist.all_reduce

    def count(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        called.append(tensor)
        return plain(tensor, *arguments, **options)

    dist.all_reduce = count
    one = loss_denominator(
        split(whole["target"])[mine], whole["weight"], sample_weight=v,
        ranks="mean" if ddp else "sum",
    )  # fmt: skip
    dist.all_reduce = plain
    assert len(called) == 1
    if ddp:
        model = nn.parallel.DistributedDataParallel(model)
        _gradients(model, whole, CUTS, mine, one, model.no_sync)
    else:
        _gradients(model, whole, CUTS, mine, one, None)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert_close(found.grad, wanted.grad, torch.float64, f"rank {rank}, {options}, {ddp}")


def _two_ranks(rank: int, world: int) -> None:
    """All cases, since processes take longer to start than the cases to run."""
    both = ("weight", "sample_weight")
    for options in (both, ("weight", "empty"), ("soft", *both)):
        for ddp in (False, True):
            _case_of_two_ranks(options, ddp, rank)
    _groups(rank, world)


def test_two_ranks_have_the_gradients_of_the_batch() -> None:
    ranks.run(_two_ranks, 2)


def _groups(rank: int, world: int) -> None:
    target = torch.arange(rank + 1)
    assert loss_denominator(target, ranks="sum") == 3
    assert loss_denominator(target, ranks="mean") == 1.5
    assert loss_denominator(target, ranks="same") == rank + 1
    alone = [dist.new_group([k]) for k in range(world)]
    assert loss_denominator(target, group=alone[rank]) == rank + 1
    with pytest.raises(ArgumentError, match="group must contain this process"):
        loss_denominator(target, group=alone[1 - rank])
