"""The published losses' arguments: what print shows, what is refused and when, and in whose words;
numbers of numpy and 0-d tensors; the classes and the functions of their names.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import nn as tnn
from torch.nn import functional as F

from disalign_ops import losses, nn
from disalign_ops.errors import ArgumentError, ArgumentTypeError

COUNTS = [500, 3, 120, 41, 3, 77, 1000]
C, N = len(COUNTS), 6
SHOWN = "counts=7 entries (min 3, max 1000, sum 1744)"
Make = Callable[..., nn.CrossEntropyLoss]

# Each loss by its function, its class, what its function made before there were classes, and print.
PUBLISHED: dict[str, tuple[Make, type, type, str]] = {
    "balanced_softmax": (
        lambda **o: losses.balanced_softmax(COUNTS, **o), losses.BalancedSoftmaxLoss,
        nn.CrossEntropyLoss, f"BalancedSoftmaxLoss({SHOWN})",
    ),
    "logit_adjusted": (
        lambda **o: losses.logit_adjusted(COUNTS, 1.5, **o), losses.LogitAdjustedLoss,
        nn.CrossEntropyLoss, f"LogitAdjustedLoss({SHOWN}, tau=1.5)",
    ),
    "class_balanced": (
        lambda **o: losses.class_balanced(COUNTS, 0.99, **o), losses.ClassBalancedLoss,
        nn.CrossEntropyLoss, f"ClassBalancedLoss({SHOWN}, beta=0.99)",
    ),
    "focal": (
        lambda **o: losses.focal(1.5, **o), losses.FocalLoss,
        nn.CrossEntropyLoss, "FocalLoss(gamma=1.5)",
    ),
    "ldam": (
        lambda **o: losses.ldam(COUNTS, **o), losses.LDAMLoss,
        losses.ScaledCrossEntropyLoss, f"LDAMLoss({SHOWN}, max_margin=0.5, scale=30.0)",
    ),
    "deferred ldam": (
        lambda **o: losses.ldam(COUNTS, deferred_until=3, **o), losses.LDAMLoss,
        losses.DeferredLoss,
        f"LDAMLoss({SHOWN}, max_margin=0.5, scale=30.0, beta=0.9999, deferred_until=3)",
    ),
    "cosface": (
        lambda **o: losses.cosface(**o), losses.CosFaceLoss,
        losses.ScaledCrossEntropyLoss, "CosFaceLoss(margin=0.35, scale=64.0)",
    ),
    "vs": (
        lambda **o: losses.vs(COUNTS, **o), losses.VSLoss,
        losses.ScaledCrossEntropyLoss, f"VSLoss({SHOWN}, gamma=0.3, tau=1.0)",
    ),
    "label_aware_smoothing": (
        lambda **o: losses.label_aware_smoothing(COUNTS, **o), losses.LabelAwareSmoothingLoss,
        nn.CrossEntropyLoss,
        f"LabelAwareSmoothingLoss({SHOWN}, smooth_head=0.3, smooth_tail=0.0, shape='concave')",
    ),
    "seesaw": (
        lambda **o: losses.seesaw(C, **o), losses.SeesawLoss,
        nn.CrossEntropyLoss, "SeesawLoss(classes=7, p=0.8, q=2.0, eps=0.01)",
    ),
}  # fmt: skip
OTHERS: dict[str, Make] = {
    "CrossEntropyLoss": nn.CrossEntropyLoss,
    "UpsampleCrossEntropyLoss": nn.UpsampleCrossEntropyLoss,
    "GRWCrossEntropyLoss": lambda **o: nn.GRWCrossEntropyLoss(COUNTS, 1.2, **o),
    "ScaledCrossEntropyLoss": lambda **o: losses.ScaledCrossEntropyLoss(2.0, **o),
    "DeferredLoss": lambda **o: losses.DeferredLoss(2.0, deferred_until=2, **o),
}
MAKE = OTHERS | {name: made[0] for name, made in PUBLISHED.items()}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(N, C, dtype=dtype), torch.arange(N)


# --- classes and functions


@pytest.mark.parametrize("name", PUBLISHED)
def test_functions_make_what_they_made(name: str) -> None:
    make, kind, before, _ = PUBLISHED[name]
    made = make()
    assert type(made) is kind
    assert kind.__module__ == "disalign_ops.losses"  # by which it is pickled
    assert isinstance(made, before)
    assert isinstance(made, tnn.CrossEntropyLoss)
    keys = {"deferred ldam": {"weight"}, "class_balanced": {"weight"},
            "seesaw": {"cumulative_samples"}}  # fmt: skip
    assert made.state_dict().keys() == keys.get(name, set())
    z, t = problem()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert repr(other) == repr(made)
        made.eval(), other.eval()
        assert torch.equal(other(z, t), made(z, t))


# --- print


@pytest.mark.parametrize("name", PUBLISHED)
def test_print_names_the_loss_and_its_arguments(name: str) -> None:
    make, _, _, shown = PUBLISHED[name]
    assert repr(make()) == shown
    changed = make(reduction="sum", ignore_index=255)
    assert repr(changed) == f"{shown[:-1]}, ignore_index=255, reduction='sum')"
    changed.reduction = "none"
    assert "reduction='none'" in repr(changed)


def test_print_of_the_other_losses() -> None:
    weight = torch.tensor([0.5, 2.0, 1.0])
    for loss, shown in (
        (nn.CrossEntropyLoss(), "CrossEntropyLoss()"),
        (nn.UpsampleCrossEntropyLoss(), "UpsampleCrossEntropyLoss()"),
        (
            nn.UpsampleCrossEntropyLoss(ignore_index=-100, align_corners=True),
            "UpsampleCrossEntropyLoss(ignore_index=-100, align_corners=True)",
        ),
        (
            nn.CrossEntropyLoss(weight, margin=0.2, normalizer=5, inplace_backward=True),
            "CrossEntropyLoss(weight=3 entries (min 0.5, max 2, sum 3.5), normalizer=5.0, "
            "margin=0.2, inplace_backward=True)",
        ),
        (nn.CrossEntropyLoss(gradient="backward"), "CrossEntropyLoss(gradient='backward')"),
        (nn.CrossEntropyLoss(normalizer=torch.tensor(7.0)), "CrossEntropyLoss(normalizer=7)"),
        (nn.CrossEntropyLoss(prior=weight).to("meta"), "CrossEntropyLoss(prior=3 entries)"),
        (
            nn.GRWCrossEntropyLoss([2, 0, 1], 0.5, background="last", empty="max"),
            "GRWCrossEntropyLoss(counts=3 entries (min 0, max 2, sum 3), rho=0.5, "
            "background='last', empty='max')",
        ),
        (losses.ScaledCrossEntropyLoss(2.0), "ScaledCrossEntropyLoss(gain=2.0)"),
        (
            losses.ldam(COUNTS, weight=torch.ones(C)),
            f"LDAMLoss({SHOWN}, max_margin=0.5, scale=30.0, "
            "weight=7 entries (min 1, max 1, sum 7))",
        ),
    ):  # fmt: skip
        assert repr(loss) == shown


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_runs_of_different_options_print_differently(data: st.DataObject) -> None:
    values: dict[str, Any] = {
        "ignore_index": st.integers(-(2**63), 2**63 - 1),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "normalizer": st.sampled_from(["weights", "valid", "count", 3.0, 7.0]),
        "margin": st.sampled_from([None, 0.1, 0.2]),
        "focal_gamma": st.sampled_from([0.0, 1.0, 2.0]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.2]),
    }
    options = st.fixed_dictionaries({}, optional=values)
    a, b = data.draw(options), data.draw(options)
    made = [nn.CrossEntropyLoss(**o) for o in (a, b)]
    same = all(getattr(made[0], name) == getattr(made[1], name) for name in values)
    assert (repr(made[0]) == repr(made[1])) == same


# --- what is refused when a loss is built

WRONG: dict[str, tuple[Any, type[Exception]]] = {
    "reduction": ("avg", ArgumentError),
    "ignore_index": (1.5, ArgumentTypeError),
    "ignore_index of no int64": (2**63, ArgumentError),
    "label_smoothing": (1.5, ArgumentError),
    "label_smoothing of text": ("0.1", ArgumentTypeError),
    "normalizer": ("batch", ArgumentError),
    "normalizer of 0": (0, ArgumentError),
    "normalizer a class": (torch.ones(C), ArgumentError),
    "inplace_backward": ("no", ArgumentTypeError),
    "inplace_backward a number": (1, ArgumentTypeError),
    "gradient": ("both", ArgumentError),
    "prior of integers": (torch.arange(C), ArgumentTypeError),
    "prior a list": ([0.0] * C, ArgumentTypeError),
    "margin": ("wide", ArgumentTypeError),
    "margin that is no number": (float("nan"), ArgumentError),
    "focal_gamma": (-1, ArgumentError),
    "weight of integers": (torch.ones(C, dtype=torch.int64), ArgumentTypeError),
    "weight a list": ([1.0] * C, ArgumentTypeError),
    "weight of two dimensions": (torch.ones(1, C), ArgumentError),
}


@pytest.mark.parametrize("name", MAKE)
def test_the_gradients_pass_is_chosen(name: str) -> None:
    criterion = MAKE[name](gradient="forward")
    z, t = problem()
    if isinstance(criterion, nn.UpsampleCrossEntropyLoss):
        z, t = z[..., None, None], t[:, None, None]
    criterion(z.requires_grad_(), t)
    criterion.reduction = "none"
    with pytest.raises(ArgumentError, match="gradient must be 'auto' or 'backward' where reduct"):
        criterion(z, t)


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", MAKE)
def test_a_wrong_option_is_refused_when_the_loss_is_built(name: str, what: str) -> None:
    option = what.split()[0]
    value, error = WRONG[what]
    # An option that a loss sets itself is refused whatever its value.
    with pytest.raises(
        error if name == "CrossEntropyLoss" else (ValueError, TypeError), match=option
    ):
        MAKE[name](**{option: value})


def test_arguments_of_the_published_losses_are_refused_when_they_are_built() -> None:
    for wrong, message in (
        (lambda: losses.logit_adjusted(COUNTS, "1"), "tau must be a number"),  # type: ignore[arg-type]
        (lambda: losses.class_balanced(COUNTS, 1.0), "beta must be at least 0 and below 1, got 1"),
        (lambda: losses.focal(-1), "gamma must be a number >= 0"),
        (lambda: losses.ldam(COUNTS, -0.5), "max_margin must be a finite number >= 0, got -0.5"),
        (lambda: losses.ldam(COUNTS, scale=-1), "scale must be a finite number above 0"),
        (lambda: losses.ldam(COUNTS, scale=0), "scale must be a finite number above 0"),
        (lambda: losses.ldam(COUNTS, deferred_until=1.5), "deferred_until must be an integer"),  # type: ignore[arg-type]
        (lambda: losses.ldam(COUNTS, deferred_until=1).set_epoch("1"), "epoch must be an integer"),  # type: ignore[arg-type]
        (lambda: losses.cosface(scale=float("inf")), "scale must be a finite number above 0"),
        (lambda: losses.cosface(-0.1), "margin must be a number >= 0"),
        (lambda: losses.vs(COUNTS, tau="1"), "tau must be a number"),  # type: ignore[arg-type]
        (lambda: losses.seesaw(2.5), "classes must be an integer"),  # type: ignore[arg-type]
        (lambda: losses.seesaw(3, eps=2), "eps must be a number from 0"),
        (lambda: losses.ScaledCrossEntropyLoss(torch.arange(3)), "gain must have a floating dtype"),
        (lambda: nn.GRWCrossEntropyLoss(COUNTS, "1"), "rho must be a number"),  # type: ignore[arg-type]
        (lambda: nn.UpsampleCrossEntropyLoss(align_corners="no"), "align_corners must be a bool"),  # type: ignore[arg-type]
        (
            lambda: nn.CrossEntropyLoss(torch.ones(3), prior=torch.ones(4)),
            "weight and prior must have one entry a class, got weight 3, prior 4",
        ),
        (
            lambda: losses.balanced_softmax(COUNTS, weight=torch.ones(3)),
            "weight and counts must have one entry a class",
        ),
        (
            lambda: losses.ScaledCrossEntropyLoss(torch.ones(3), torch.ones(4)),
            "weight and gain must have one entry a class",
        ),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            wrong()


# --- errors name what the user gave


@pytest.mark.parametrize("counts", [COUNTS[:3], [*COUNTS, 8]], ids=["too few", "too many"])
@pytest.mark.parametrize(
    "make",
    [
        losses.balanced_softmax, losses.logit_adjusted, losses.class_balanced, losses.ldam,
        losses.vs, losses.label_aware_smoothing, nn.GRWCrossEntropyLoss,
    ],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_another_number_of_counts_than_classes(make: Make, counts: list[int]) -> None:
    with pytest.raises(ArgumentError, match=f"counts must have .* 7 classes, got {len(counts)}"):
        make(counts)(*problem())


def test_counts_and_a_background() -> None:
    criterion = nn.GRWCrossEntropyLoss(COUNTS[1:], background="last")
    criterion(*problem())
    with pytest.raises(ArgumentError, match="7 classes but the background, got 7"):
        nn.GRWCrossEntropyLoss(COUNTS, background="last")(*problem())


def test_gain_of_another_number_of_classes() -> None:
    with pytest.raises(ArgumentError, match=r"gain must have one entry a class \(7\), got 3"):
        losses.ScaledCrossEntropyLoss(torch.ones(3))(*problem())


@pytest.mark.parametrize("name", ["focal", "ldam", "cosface", "label_aware_smoothing", "seesaw"])
def test_probabilities_as_target_are_the_targets_fault(name: str) -> None:
    z, _ = problem()
    with pytest.raises(
        ArgumentError, match="target must hold class indices, got class probabilities"
    ):
        MAKE[name]()(z, torch.softmax(z, 1))


@pytest.mark.parametrize("name", ["balanced_softmax", "logit_adjusted", "class_balanced", "vs"])
def test_probabilities_as_target_where_they_have_a_meaning(name: str) -> None:
    z, t = problem()
    y = F.one_hot(t, C).double()
    criterion = MAKE[name](reduction="none")
    torch.testing.assert_close(criterion(z, y), criterion(z, t))


# --- numbers


@pytest.mark.parametrize("name", [*PUBLISHED, "CrossEntropyLoss", "GRWCrossEntropyLoss"])
@pytest.mark.parametrize(
    "number", [np.float32, np.float64, torch.tensor], ids=lambda number: number.__name__
)
def test_numbers_of_numpy_and_tensors(name: str, number: Any) -> None:
    z, t = problem()
    t[0] = 255
    smooths = name != "label_aware_smoothing"
    found, expected = (
        MAKE[name](
            ignore_index=integer(255), normalizer=real(4.0),
            **({"label_smoothing": real(0.25)} if smooths else {}),
        )
        for integer, real in (
            (torch.tensor if number is torch.tensor else np.int64, number), (int, float),
        )
    )  # fmt: skip
    assert type(found.ignore_index) is int
    torch.testing.assert_close(found(z, t), expected(z, t))


@pytest.mark.parametrize(
    "number", [np.float32, np.float64, np.int64, torch.tensor], ids=lambda number: number.__name__
)
def test_arguments_as_numbers_of_numpy_and_tensors(number: Any) -> None:
    z, t = problem()
    for make, argument in (
        (lambda x: losses.logit_adjusted(COUNTS, x), 2),
        (lambda x: losses.class_balanced(COUNTS, x), 0),
        (losses.focal, 2),
        (lambda x: losses.ldam(COUNTS, max_margin=x), 1),
        (lambda x: losses.ldam(COUNTS, scale=x), 10),
        (lambda x: losses.cosface(x, 10), 1),
        (lambda x: losses.cosface(0.3, x), 10),
        (lambda x: losses.vs(COUNTS, x), 1),
        (lambda x: losses.vs(COUNTS, 0.2, x), 2),
        (lambda x: losses.label_aware_smoothing(COUNTS, x), 1),
        (lambda x: losses.seesaw(C, x), 1),
        (lambda x: losses.seesaw(C, eps=x), 1),
        (losses.ScaledCrossEntropyLoss, 3),
        (lambda x: nn.GRWCrossEntropyLoss(COUNTS, x), 1),
        (lambda x: nn.CrossEntropyLoss(margin=x, prior=None), 1),
        (lambda x: nn.CrossEntropyLoss(focal_gamma=x), 2),
    ):  # fmt: skip
        torch.testing.assert_close(make(number(argument))(z, t), make(argument)(z, t))  # type: ignore[operator]
