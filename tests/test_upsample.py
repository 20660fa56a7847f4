"""The upsampling loss against calibrate -> F.interpolate -> cross_entropy."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops import upsample_cross_entropy, upsample_predict
from disalign_ops.errors import ArgumentError
from support.comparison import NAMES, compare, memory_held, run, upstream_of
from support.dense_cases import CONTENTS, EXTRAS, Dense, combinations, dense
from support.tolerances import assert_close, assert_no_worse

# (h, w) -> (H, W), and why.
SIZES = {
    ((4, 5), (32, 40)): "ratio 8",
    ((5, 4), (20, 16)): "ratio 4",
    ((6, 5), (12, 10)): "ratio 2",
    ((7, 6), (7, 6)): "ratio 1",
    ((4, 6), (10, 15)): "ratio 2.5",
    ((8, 6), (4, 3)): "downscaling by two: rows that no output lies on",
    ((9, 7), (5, 11)): "down and up, odd sizes",
    ((1, 7), (9, 21)): "one row",
    ((6, 1), (13, 5)): "one column",
    ((1, 1), (6, 19)): "one cell, a strip and a rest",
    ((3, 4), (1, 1)): "one output position",
}
CLASSES = {
    1: "one class",
    2: "binary",
    21: "Pascal VOC",
    150: "ADE20K",
    847: "ADE20K-full",
}


def loss(d: Dense, calibrated: bool) -> Tensor:
    options = dict(d.options)
    if d.logits.shape[1] > 255:
        options.setdefault("ignore_index", -1)
    if calibrated:
        options |= {"confidence": d.confidence, "scale": d.scale, "bias": d.bias}
        options.setdefault("form", "residual")
    value = upsample_cross_entropy(d.logits, d.target, **options)
    assert isinstance(value, Tensor)
    return value


def composition(d: Dense, calibrated: bool) -> Tensor:
    """What users write today, in the logits' dtype."""
    options = dict(d.options)
    align_corners = options.pop("align_corners", False)
    options.setdefault("ignore_index", 255)
    z = d.logits
    if calibrated:
        c = torch.sigmoid(d.confidence)
        z = (1 + c * d.scale[:, None, None]) * z + c * d.bias[:, None, None]
    u = torch.nn.functional.interpolate(
        z, d.target.shape[1:], mode="bilinear", align_corners=align_corners
    )
    return torch.nn.functional.cross_entropy(u, d.target, **options)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_against_the_composition(
    backend: str, size: tuple[tuple[int, int], ...], align_corners: bool, calibrated: bool
) -> None:
    low, high = size
    for reduction in ("mean", "none"):
        d = dense(
            (2, 17, *low), high, reduction=reduction, align_corners=align_corners,
            weight=torch.rand(17, dtype=torch.float64) + 0.1,
        )  # fmt: skip
        upstream = upstream_of(d, reduction)
        actual = run(loss, d, calibrated, upstream)
        expected = run(composition, d, calibrated, upstream)
        for what, a, e in zip(("loss", *NAMES), actual, expected, strict=False):
            assert_close(a, e, torch.float64, f"{what} {reduction}")


SIZE = st.integers(1, 24)


@hypothesis.given(
    st.integers(1, 3), st.integers(1, 40), SIZE, SIZE, SIZE, SIZE, st.booleans(), st.integers(1, 5)
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_any_size_and_any_number_of_threads(
    n: int, classes: int, h: int, w: int, height: int, width: int, align_corners: bool, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        d = dense((n, classes, h, w), (height, width), align_corners=align_corners)
        d.target[torch.rand(d.target.shape) < 0.2] = 255
        for what, a, e in zip(
            ("loss", *NAMES), run(loss, d, True), run(composition, d, True), strict=True
        ):
            assert_close(a, e, torch.float64, what)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", CLASSES)
def test_classes(classes: int, dtype: torch.dtype, calibrated: bool) -> None:
    for reduction in ("mean", "none"):
        d = dense((2, classes, 4, 3), (14, 23), dtype, reduction=reduction, label_smoothing=0.1)
        if classes == 1:  # every gradient is 0; smoothing would leave the roundings of its terms
            d.options["label_smoothing"] = 0.0
        compare(loss, d, calibrated, upstream_of(d, reduction))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("content", CONTENTS)
def test_contents(content: str, dtype: torch.dtype, reduction: str, calibrated: bool) -> None:
    d = CONTENTS[content][0](dense((3, 22, 5, 4), (17, 19), dtype, reduction=reduction))
    # float32 u carries a rounding of 1e4 * 2^-24 = 6e-4 at the offset, in any implementation.
    factor = 500.0 if content == "offset" and dtype == torch.float32 else 1.0
    compare(loss, d, calibrated, upstream_of(d, reduction), factor)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_combination_of_options(extra: str, reduction: str, calibrated: bool) -> None:
    for d in combinations((2, 18, 3, 2), (8, 7), extra, reduction):
        compare(loss, d, calibrated, upstream_of(d, reduction))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_is_no_worse_than_the_same_dtype_composition(
    dtype: torch.dtype, calibrated: bool, reduction: str
) -> None:
    d = dense((2, 50, 4, 5), (16, 20), torch.float32, reduction=reduction).to(dtype)
    actual = run(loss, d, calibrated)
    expected = run(composition, d.to(torch.float64), calibrated)
    composed = run(composition, d, calibrated)
    for what, a, c, e in zip(("loss", *NAMES), actual, composed, expected, strict=False):
        assert a.dtype == dtype
        assert_no_worse(a, c, e, dtype, what)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_masks_of_every_integer_type(backend: str, dtype: torch.dtype) -> None:
    d = dense((2, 200, 3, 4), (12, 16))
    d.target[:, :3] = 255
    expected = composition(d, False)
    d.target = d.target.to(dtype)
    assert_close(loss(d, False), expected, torch.float64, "loss")


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradcheck(backend: str, calibrated: bool, align_corners: bool) -> None:
    d = dense((2, 3, 2, 3), (5, 4), reduction="none", align_corners=align_corners)
    d.options["label_smoothing"] = 0.1
    d.target[1, 1, 0] = 255

    def function(*learned: Tensor) -> Tensor:
        return loss(Dense(learned[0], d.target, *learned[1:], d.options), calibrated)

    learned = d.learned if calibrated else [d.logits, *(t.detach() for t in d.learned[1:])]
    assert torch.autograd.gradcheck(function, learned)
    assert torch.autograd.gradgradcheck(function, learned)


@pytest.mark.parametrize("calibrated", [False, True])
def test_results_depend_on_nothing_but_the_number_of_threads(
    threads: None, calibrated: bool
) -> None:
    d = dense((1, 150, 9, 7), (36, 28), torch.float32, weight=torch.rand(150))
    results: dict[int, list[Tensor]] = {}
    for n in (1, 2, 3):  # three: a chunk begins and ends inside the image
        torch.set_num_threads(n)
        results[n] = run(loss, d, calibrated)
        for _ in range(3):
            for once, again in zip(results[n], run(loss, d, calibrated), strict=True):
                assert torch.equal(once, again)
    for n in (2, 3):
        for what, one, more in zip(("loss", *NAMES), results[1], results[n], strict=False):
            assert_close(one, more, torch.float32, what)


def test_more_threads_than_rows_of_an_image(threads: None) -> None:
    torch.set_num_threads(8)
    d = dense((3, 40, 3, 20), (60, 100))
    compare(loss, d, True)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [1, 2, 3], [0, 2]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_only_where_asked_for(wanted: list[int], reduction: str) -> None:
    d = dense((2, 7, 3, 2), (8, 9), reduction=reduction)
    everything = run(loss, d, True)[1:]
    for i, tensor in enumerate(d.learned):
        tensor.requires_grad_(i in wanted)
    loss(d, True).sum().backward()
    for i, tensor in enumerate(d.learned):
        if i in wanted:
            assert_close(tensor.grad, everything[i], torch.float64, NAMES[i])
        else:
            assert tensor.grad is None


def test_the_graph_may_be_kept_and_the_upstream_gradient_is_not_1() -> None:
    d = dense((2, 6, 3, 2), (9, 8))
    value = loss(d, True)
    first = torch.autograd.grad(value, d.learned, retain_graph=True)
    again = torch.autograd.grad(value, d.learned, torch.tensor(2.0).double())
    for a, b in zip(first, again, strict=True):
        assert_close(b, 2 * a, torch.float64, "kept graph")


@pytest.mark.parametrize("channels_last", [False, True])
def test_in_place_writes_over_the_low_resolution_logits(channels_last: bool) -> None:
    d = dense((2, 21, 5, 7), (20, 28))
    expected = run(loss, d, True)
    logits = d.logits * 1.0
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    d.options["inplace_backward"] = True
    value = loss(Dense(logits, d.target, *d.learned[1:], d.options), True)
    grads = torch.autograd.grad(value, [logits, *d.learned[1:]])
    assert grads[0].data_ptr() == logits.data_ptr()
    for what, a, e in zip(NAMES, grads, expected[1:], strict=True):
        assert_close(a, e, torch.float64, what)
    with pytest.raises(ArgumentError, match="got a leaf"):
        loss(d, True)


@pytest.mark.parametrize("margin", [0.5, 40.0, -3.0])
def test_the_targets_probability_is_without_the_margin(backend: str, margin: float) -> None:
    d = dense((1, 19, 4, 5), (15, 21))
    given, plain = (
        upsample_cross_entropy(d.logits, d.target, margin=m, return_details=True)
        for m in (margin, None)
    )
    assert isinstance(given, disalign_ops.UpsampleDetails)
    assert isinstance(plain, disalign_ops.UpsampleDetails)
    assert_close(given.probability, plain.probability, torch.float64, "probability")
    assert torch.equal(given.prediction, plain.prediction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_details_are_those_of_the_composition(backend: str, reduction: str) -> None:
    d = dense((2, 19, 4, 5), (15, 21), reduction=reduction)
    d.target[0, :4] = 255
    v = torch.rand(2, 15, 21, dtype=torch.float64)
    found = upsample_cross_entropy(
        d.logits, d.target, reduction=reduction, sample_weight=v, return_details=True
    )
    assert isinstance(found, disalign_ops.UpsampleDetails)
    u = torch.nn.functional.interpolate(d.logits, (15, 21), mode="bilinear")
    each = torch.nn.functional.cross_entropy(u, d.target, reduction="none", ignore_index=255) * v
    valid = d.target != 255
    p = torch.softmax(u, 1).gather(1, torch.where(valid, d.target, 0)[:, None])[:, 0]
    assert_close(found.position_loss, each.detach(), torch.float64, "position_loss")
    assert_close(found.probability, torch.where(valid, p, 0.0), torch.float64, "probability")
    assert torch.equal(found.prediction, u.argmax(1))
    details = (found.position_loss, found.probability, found.prediction)
    assert not any(t.requires_grad for t in details)
    total = each.sum() if reduction == "none" else each.sum() / v[valid].sum()
    actual, expected = (
        torch.autograd.grad(value, d.logits)[0] for value in (found.loss.sum(), total)
    )
    assert_close(actual, expected, torch.float64, "gradient")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_details_have_the_accumulation_dtype(backend: str, reduction: str) -> None:
    d = dense((2, 19, 4, 5), (15, 21), dtype=torch.bfloat16)
    found = upsample_cross_entropy(d.logits, d.target, reduction=reduction, return_details=True)
    assert found.loss.dtype is torch.bfloat16
    assert found.position_loss.dtype is found.probability.dtype is torch.float32


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_predict_is_the_argmax_of_upsampled_logits(
    backend: str, size: tuple[tuple[int, int], ...], calibrated: bool
) -> None:
    low, high = size
    d = dense((2, 33, *low), high)
    prior = torch.randn(33, dtype=torch.float64)
    z = d.logits
    calibration: dict[str, Any] = {}
    if calibrated:
        calibration = {"confidence": d.confidence, "scale": d.scale, "bias": d.bias}
        z = disalign_ops.calibrate(z, d.confidence, d.scale, d.bias)
    u = torch.nn.functional.interpolate(z + prior[:, None, None], high, mode="bilinear")
    found = upsample_predict(d.logits, high, prior=prior, **calibration)
    assert found.dtype == torch.int64
    assert torch.equal(found, u.argmax(1))


def test_masked_classes_stay_masked_between_columns(backend: str) -> None:
    # Right of the last column F.interpolate multiplies -inf by 0.
    d = CONTENTS["masked"][0](dense((1, 9, 3, 3), (12, 12), torch.float32))
    value, grad = run(loss, d, False)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert (grad[:, 1::3] == 0).all()
    d.logits = torch.full((1, 9, 3, 3), float("-inf"), requires_grad=True)
    assert run(loss, d, False)[0].isnan()


def test_nan_reaches_what_is_interpolated_from_it_and_nothing_else() -> None:
    d = dense((1, 9, 5, 5), (20, 20), torch.float32, reduction="none")
    with torch.no_grad():
        d.logits[0, 4, 2, 2] = float("nan")
    value, grad = run(loss, d, False)
    u = torch.nn.functional.interpolate(d.logits, (20, 20), mode="bilinear")
    assert torch.equal(value.isnan(), u.isnan().any(1))
    assert not grad[0, :, :, [0, 4]].isnan().any()


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_an_ignored_position_takes_nothing_from_its_logits(backend: str, odd: float) -> None:
    d = dense((1, 9, 5, 5), (20, 20), torch.float32)
    with torch.no_grad():
        d.logits[0, 4, 1, 2] = odd
    d.target[0, :12] = 255
    value, grad = run(loss, d, False)
    assert value.isfinite()
    assert (grad[0, :, :2] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager(calibrated: bool, reduction: str) -> None:
    d = dense((2, 21, 3, 4), (12, 17), torch.float32, reduction=reduction)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    upstream = upstream_of(d, reduction)
    actual, expected = (run(f, d, calibrated, upstream) for f in (compiled, loss))
    for what, a, e in zip(("loss", *NAMES), actual, expected, strict=False):
        assert_close(a, e, torch.float32, what)


def test_autocast_gives_float32_without_a_copy_of_the_logits() -> None:
    d = dense((2, 21, 3, 4), (12, 16), torch.float32).to(torch.bfloat16)
    assert loss(d, False).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(d, True).dtype == torch.float32


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_of_positions_and_low_resolution_rows(
    threads: None, dtype: torch.dtype, calibrated: bool
) -> None:
    torch.set_num_threads(2)
    n, classes, h, size = 2, 150, 16, 128
    d = dense((n, classes, h, h), (size, size), torch.float32).to(dtype)
    gradients = sum(t.numel() * t.element_size() for t in d.learned[: 4 if calibrated else 1])
    taken = memory_held(lambda: loss(d, calibrated).backward()) - gradients
    position_bytes = 3 * 4  # maximum, sum, and a rest for what else is of a position's order
    rows = 2 * 9 * 160 * h * 4  # threads, rows in scratch with the strip, padded classes, columns
    assert taken < n * size * size * position_bytes + rows + 2 * 2 * 160 * 8 + 10_000
    assert taken < n * size * size * classes * 4 / 30


def test_a_mask_value_that_is_no_class_is_named_with_its_place(backend: str) -> None:
    target = torch.zeros(2, 7, 9, dtype=torch.uint8)
    target[0, 0, 0] = 255
    target[1, 3, 8] = 19
    with pytest.raises(IndexError, match=r"Target 19 is out of bounds: target\[1, 3, 8\], the log"):
        upsample_cross_entropy(torch.randn(2, 19, 3, 4), target)
