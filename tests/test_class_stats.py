"""class_stats against values worked out by hand, its properties, and its errors."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disalign_ops import class_stats
from disalign_ops.class_stats import class_balanced_weights, grw_weights, ldam_margins, log_prior

F64 = torch.float64
FUNCTIONS = [grw_weights, class_balanced_weights, log_prior, ldam_margins]
WEIGHTS = [grw_weights, class_balanced_weights]

count_lists = st.lists(st.integers(1, 10**7), min_size=1, max_size=40)


def close(actual: torch.Tensor, expected: list[float], rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=F64), rtol=rtol, atol=0)


# --- values


def test_grw_weights_by_hand() -> None:
    inverse = [1 / (10 / 15), 1 / (4 / 15), 1 / (1 / 15)]
    total = sum(inverse)
    close(grw_weights([10, 4, 1], dtype=F64), [3 * w / total for w in inverse])
    close(grw_weights([10, 4, 1], normalize="sum_to_one", dtype=F64), [w / total for w in inverse])


def test_grw_weights_rho_is_the_exponent() -> None:
    inverse = [(n / 15) ** -1.2 for n in (10, 4, 1)]
    expected = [3 * w / sum(inverse) for w in inverse]
    close(grw_weights([10, 4, 1], rho=1.2, dtype=F64), expected)
    close(grw_weights([10, 4, 1], rho=0, dtype=F64), [1.0, 1.0, 1.0])


def test_grw_weights_equal_the_released_formula() -> None:
    rng = np.random.default_rng(0)
    shots = rng.integers(1, 2000, size=1203)
    ratio = shots / np.sum(shots)
    weights = 1 / (ratio**0.8)
    weights = weights / np.sum(weights) * 1203
    close(grw_weights(shots, rho=0.8, background="last", dtype=F64), [*weights.tolist(), 1.0])


def test_grw_weights_survive_an_exponent_that_overflows() -> None:
    # 1e6^60 is past float64; the rarest class takes everything.
    close(grw_weights([10**6, 1], rho=60, dtype=F64), [2 * 1e6**-30 * 1e6**-30, 2.0])


@pytest.mark.parametrize("function", WEIGHTS)
def test_background_has_weight_one_beside_foreground_that_sums_to_k(function) -> None:
    foreground = function([10, 4, 1], dtype=F64)
    first = function([10, 4, 1], background="first", dtype=F64)
    last = function([10, 4, 1], background="last", dtype=F64)
    assert foreground.sum().item() == pytest.approx(3, rel=1e-12)
    assert first.tolist() == [1.0, *foreground.tolist()]
    assert last.tolist() == [*foreground.tolist(), 1.0]


def test_class_balanced_weights_by_hand() -> None:
    beta = 0.9
    effective = [(1 - beta) / (1 - beta**n) for n in (10, 4, 1)]
    expected = [3 * w / sum(effective) for w in effective]
    close(class_balanced_weights([10, 4, 1], beta, dtype=F64), expected)
    close(class_balanced_weights([10, 4, 1], 0, dtype=F64), [1.0, 1.0, 1.0])


def test_class_balanced_weights_are_accurate_for_huge_counts_and_beta_near_one() -> None:
    # Exact rational arithmetic; 1 - beta**n in float64 would have lost all but a few digits.
    beta = 1 - 2.0**-45
    exact = [1 / (1 - Fraction(beta) ** n) for n in (1, 1000)]
    expected = [float(2 * w / sum(exact)) for w in exact]
    close(class_balanced_weights([1, 1000], beta, dtype=F64), expected)
    # n so large that beta^n is 0: the weights saturate at equal.
    close(class_balanced_weights([10**18, 10**17], 0.9999, dtype=F64), [1.0, 1.0])


def test_log_prior_by_hand() -> None:
    expected = [math.log(10 / 15), math.log(4 / 15), math.log(1 / 15)]
    close(log_prior([10, 4, 1], dtype=F64), expected)
    close(log_prior([10, 4, 1], tau=-1.5, dtype=F64), [-1.5 * o for o in expected])


def test_ldam_margins_by_hand() -> None:
    # 16^-1/4 = 1/2, 81^-1/4 = 1/3, 1^-1/4 = 1
    close(ldam_margins([16, 81, 1], dtype=F64), [0.5 / 2, 0.5 / 3, 0.5 / 1])
    # without a class of one sample the largest is still max_margin
    close(ldam_margins([16, 81], max_margin=0.3, dtype=F64), [0.3, 0.3 * (1 / 3) / (1 / 2)])


# --- classes without samples


def test_empty_zero_leaves_the_other_weights_as_they_are_without_the_class() -> None:
    for function in WEIGHTS:
        without = function([10, 4], dtype=F64).tolist()
        assert function([10, 0, 4], empty="zero", dtype=F64).tolist() == [
            without[0],
            0.0,
            without[1],
        ]
    assert grw_weights([10, 0, 4], rho=0, empty="zero").tolist() == [1.0, 0.0, 1.0]
    one = grw_weights([10, 0, 4], empty="zero", normalize="sum_to_one", dtype=F64)
    close(one, [4 / 14, 0.0, 10 / 14])


def test_empty_max_gives_the_weight_of_the_rarest_class() -> None:
    for function in WEIGHTS:
        as_rarest = function([10, 4, 4], dtype=F64)
        assert torch.equal(function([10, 0, 4], empty="max", dtype=F64), as_rarest)
        assert as_rarest.sum().item() == pytest.approx(3, rel=1e-12)
    close(ldam_margins([16, 0, 81], empty="max", dtype=F64), [0.5, 0.5, 0.5 * 2 / 3])


def test_empty_min_gives_the_prior_of_the_rarest_class_and_keeps_the_others() -> None:
    expected = [math.log(10 / 14), math.log(4 / 14), math.log(4 / 14)]
    close(log_prior([10, 0, 4], empty="min", dtype=F64), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_empty_class_is_an_error_that_names_it(function) -> None:
    with pytest.raises(
        ValueError, match=r"counts must have a sample of every class .*, got 0 for class 1"
    ):
        function([10, 0, 4])
    many = r"got 0 for classes 0, 1, 2, 3, 4, \.\.\. \(60 classes\)"
    with pytest.raises(ValueError, match=many):
        function([0] * 60 + [1])
    with pytest.raises(ValueError, match=r"got 0 for classes 0, 2 \(2 classes\)"):
        function([0, 1, 0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_policy_helps_where_every_class_is_empty(function) -> None:
    policy = {log_prior: "min", ldam_margins: "max"}.get(function, "zero")
    with pytest.raises(
        ValueError, match="counts must have a class with samples, got 0 for all 3 classes"
    ):
        function([0, 0, 0], empty=policy)


# --- inputs and outputs


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_kind_of_counts_gives_the_same_float32_cpu_tensor(function) -> None:
    expected = function([10, 4, 1])
    assert expected.dtype == torch.float32
    assert expected.shape == (3,)
    assert expected.device.type == "cpu"
    for counts in (
        (10, 4, 1),
        [10.0, 4.0, 1.0],
        np.array([10, 4, 1], dtype=np.uint16),
        torch.tensor([10, 4, 1], dtype=torch.uint8),
        torch.tensor([10.0, 4.0, 1.0], requires_grad=True),
    ):
        result = function(counts)
        assert torch.equal(result, expected)
        assert not result.requires_grad
    assert function([10, 4, 1], dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_counts_are_not_written_to(function) -> None:
    counts = torch.tensor([10.0, 4.0, 1.0], dtype=F64)
    function(counts).zero_()
    assert counts.tolist() == [10.0, 4.0, 1.0]


def test_read_counts_is_found_here() -> None:
    from disalign_ops.count_files import read_counts

    assert class_stats.read_counts is read_counts


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([], ValueError, "counts must have one number per class, got no entries"),
        ([[1, 2]], ValueError, r"counts must have one number per class .*, got shape \(1, 2\)"),
        (torch.tensor(3), ValueError, r"counts must have one number per class .*, got shape \(\)"),
        ([[1], [1, 2]], ValueError, "counts must have one number per class, got a ragged list"),
        ([1, float("nan")], ValueError, r"not finite for class 1 \(counts\[1\] = nan\)"),
        ([1, float("inf")], ValueError, r"not finite for class 1 \(counts\[1\] = inf\)"),
        (
            [3, -2, 1],
            ValueError,
            r"counts must be finite .*, got negative for class 1 \(counts\[1\] = -2.0\)",
        ),
        (
            ["10", "4"],
            TypeError,
            "counts must be a 1-D tensor, array or list of numbers, got list of <U2",
        ),
        ({"cat": 3}, ValueError, "counts must have the class indices 0 to C - 1, got 'cat'"),
        ([True, False], TypeError, "counts must be a 1-D tensor.*, got list of bool"),
        (
            torch.tensor([True]),
            TypeError,
            "counts must have a dtype of integers or real.*, got torch.bool",
        ),
        (
            torch.tensor([1j]),
            TypeError,
            "counts must have a dtype of integers or.*, got torch.complex64",
        ),
    ],
)
def test_wrong_counts(function, counts, error, message) -> None:
    with pytest.raises(error, match=message):
        function(counts)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: grw_weights([1], rho=-1),
            ValueError,
            "rho must be a finite number >= 0, got -1.0",
        ),
        (
            lambda: grw_weights([1], rho=math.nan),
            ValueError,
            "rho must be a finite number >= 0, got nan",
        ),
        (lambda: grw_weights([1], rho="1"), TypeError, r"rho must be a number, got '1' \(a str\)"),
        (lambda: grw_weights([1], rho=True), TypeError, "rho must be a number, got True"),
        (
            lambda: grw_weights([1], normalize="sum"),
            ValueError,
            "normalize must be one of 'sum_to_classes', 'sum_to_one', got 'sum'",
        ),
        (
            lambda: grw_weights([1], empty="min"),
            ValueError,
            "empty must be one of 'error', 'zero', 'max', got 'min'",
        ),
        (
            lambda: grw_weights([1], background=0),
            ValueError,
            "background must be one of 'first', 'last', got 0",
        ),
        (
            lambda: grw_weights([1], background="last", normalize="sum_to_one"),
            ValueError,
            "normalize must be 'sum_to_classes' with background='last', .*, got 'sum_to_one'",
        ),
        (
            lambda: grw_weights([1], dtype=torch.int64),
            TypeError,
            "dtype must be a floating torch dtype, got torch.int64",
        ),
        (
            lambda: grw_weights([1], dtype=float),
            TypeError,
            "dtype must be a floating.*, got <class 'float'>",
        ),
        (
            lambda: class_balanced_weights([1], beta=1),
            ValueError,
            "beta must be at least 0 and below 1, got 1.0",
        ),
        (
            lambda: class_balanced_weights([1], beta=-0.1),
            ValueError,
            "beta must be at least 0 .*, got -0.1",
        ),
        (
            lambda: class_balanced_weights([1], beta=math.nan),
            ValueError,
            "beta must be at least 0 .*, got nan",
        ),
        (
            lambda: class_balanced_weights([1], empty="min"),
            ValueError,
            "empty must be .*, got 'min'",
        ),
        (
            lambda: class_balanced_weights([1], background="left"),
            ValueError,
            "background must be one of 'first', 'last', got 'left'",
        ),
        (lambda: log_prior([1], tau=math.inf), ValueError, "tau must be a finite number, got inf"),
        (lambda: log_prior([1], tau=None), TypeError, "tau must be a number, got None"),
        (
            lambda: log_prior([1], empty="zero"),
            ValueError,
            "empty must be one of 'error', 'min', got 'zero'",
        ),
        (
            lambda: ldam_margins([1], max_margin=-0.5),
            ValueError,
            "max_margin must be a finite number >= 0, got -0.5",
        ),
        (
            lambda: ldam_margins([1], empty="min"),
            ValueError,
            "empty must be one of 'error', 'max', got 'min'",
        ),
    ],
)
def test_wrong_options(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


# --- properties


@settings(max_examples=60, deadline=None)
@given(count_lists, st.floats(0, 3), st.floats(0, 0.999999))
def test_weights_sum_to_the_number_of_classes(counts, rho, beta) -> None:
    for weights in (
        grw_weights(counts, rho, dtype=F64),
        class_balanced_weights(counts, beta, dtype=F64),
    ):
        assert weights.sum().item() == pytest.approx(len(counts), rel=1e-12)
        assert torch.isfinite(weights).all()
        assert (weights > 0).all()
    one = grw_weights(counts, rho, normalize="sum_to_one", dtype=F64)
    assert one.sum().item() == pytest.approx(1, rel=1e-12)
    assert log_prior(counts, dtype=F64).exp().sum().item() == pytest.approx(1, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(count_lists, st.integers(2, 1000))
def test_scaling_all_counts_changes_neither_weights_nor_priors_nor_margins(counts, factor) -> None:
    scaled = [factor * n for n in counts]
    for function in (grw_weights, log_prior, ldam_margins):
        torch.testing.assert_close(
            function(scaled, dtype=F64), function(counts, dtype=F64), rtol=1e-11, atol=1e-12
        )


@settings(max_examples=60, deadline=None)
@given(count_lists, st.randoms(use_true_random=False))
def test_permuting_the_classes_permutes_the_result(counts, random) -> None:
    order = list(range(len(counts)))
    random.shuffle(order)
    for function in FUNCTIONS:
        torch.testing.assert_close(
            function([counts[i] for i in order], dtype=F64),
            function(counts, dtype=F64)[order],
            rtol=1e-12,
            atol=0,
        )


@settings(max_examples=60, deadline=None)
@given(count_lists)
def test_a_rarer_class_never_has_less_weight_or_margin_nor_more_prior(counts) -> None:
    ascending = sorted(counts)
    for function in (grw_weights, class_balanced_weights, ldam_margins):
        assert (function(ascending, dtype=F64).diff() <= 1e-12).all()
    assert (log_prior(ascending, dtype=F64).diff() >= 0).all()
    assert ldam_margins(counts, 0.5, dtype=F64).max().item() == 0.5
