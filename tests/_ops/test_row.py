"""Native rows against the reference: shapes, contents, dtypes, every combination of options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from support.cases import CONTENTS, SHAPES, Rows, rows
from support.comparison import compare_held
from support.tolerances import assert_close, assert_no_worse

NAMES = ("input", "confidence", "scale", "bias")


def run(r: Rows, calibrated: bool, upstream: Tensor | None = None) -> list[Tensor]:
    """Loss, then the gradients of what is learned."""
    options = dict(r.options)
    if calibrated:
        form = options.pop("form", "residual")
        loss = disalign_ops.disalign_cross_entropy(
            r.logits, r.target, r.confidence, r.scale, r.bias, form=form, **options
        )
        learned = r.learned
    else:
        loss = disalign_ops.cross_entropy(r.logits, r.target, **options)
        learned = [r.logits]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, learned, upstream)]


def compare(r: Rows, calibrated: bool, upstream: Tensor | None = None, factor: float = 1.0) -> None:
    dtype = r.logits.dtype
    with disalign_ops.set_backend("native"):
        actual = run(r, calibrated, upstream)
    with disalign_ops.set_backend("reference"):
        expected = run(r.to(torch.float64) if dtype == torch.float32 else r, calibrated, upstream)
    for what, a, e in zip(("loss", *NAMES), actual, expected, strict=False):
        assert_close(a, e, dtype, what, factor)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(
    shape: tuple[int, int], dtype: torch.dtype, reduction: str, calibrated: bool
) -> None:
    r = rows(*shape, dtype, reduction=reduction, weight=torch.rand(shape[1], dtype=dtype) + 0.1)
    upstream = torch.randn(shape[0] if reduction == "none" else ())
    compare(r, calibrated, upstream)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(  # on a GPU, rows of groups and, in float32, of warps
    ("classes", "dtype"), [(67, torch.float64), (67, torch.float32), (530, torch.float32)]
)
def test_contents(
    classes: int, content: str, dtype: torch.dtype, reduction: str, calibrated: bool
) -> None:
    r = CONTENTS[content][0](rows(11, classes, dtype, reduction=reduction))
    # float32 u carries a rounding of 1e4 * 2^-24 = 6e-4 at the offset, in any implementation.
    factor = 500.0 if content == "offset" and dtype == torch.float32 else 1.0
    compare(r, calibrated, torch.randn(11 if reduction == "none" else ()), factor)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", [17, 1203])
def test_a_gradient_beyond_the_cache(classes: int, dtype: torch.dtype, calibrated: bool) -> None:
    # 16 MiB: rows that begin and end within a register, and hundreds of blocks of rows in each
    # thread's class sums.
    n = (16 << 20) // (classes * dtype.itemsize) + 3
    r = rows(n, classes, dtype, weight=torch.rand(classes, dtype=dtype) + 0.1)
    r.target[::7] = -100
    compare(r, calibrated)


WEIGHTS = (False, True)
SMOOTHING = (0.0, 0.1, 1.0)
SAMPLE_WEIGHTS = (False, True)
NORMALIZERS = ("weights", "valid", "count", 7.5)
EXTRAS: dict[str, dict[str, Any]] = {
    "none": {},
    "prior": {"prior": torch.linspace(-3, 3, 37, dtype=torch.float64)},
    "margin": {"margin": torch.linspace(0.1, 4, 37, dtype=torch.float64)},
    "negative margin": {"margin": -30.0},
    "focal": {"focal_gamma": 2.0},
    "focal below one": {"focal_gamma": 0.5, "margin": 0.3},
}


# How far a class lies above the others, and why.
PEAKS = {
    9.0: "within the headroom of the number taken off before the exponential is made",
    22.0: "about as far as a GPU's kernel goes without the maximum",
    40.0: "beyond it: the row is done again",
    300.0: "beyond what an exponential in float32 can hold",
    1e30: "beyond any integer that it is made with",
    -1e30: "far below: it takes no part",
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize(("classes", "step"), [(530, 3), (1500, 31)])
def test_a_class_far_above_the_others(
    classes: int, step: int, peak: float, dtype: torch.dtype, smoothing: float, calibrated: bool
) -> None:
    # A row for each place of the peak: it may be among the classes looked at first, or not, or in
    # the rest of a register; and next to rows of its block that have none. On a GPU, a warp's rows
    # and those of several warps.
    places = torch.arange(0, classes, step)
    r = rows(2 * len(places), classes, dtype, label_smoothing=smoothing, reduction="none")
    with torch.no_grad():
        r.logits[torch.arange(len(places)) * 2, places] = peak
        r.scale[places] = r.scale[places].abs()  # 1 + c a > 0: the peak stays one
    compare(r, calibrated)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_combination_of_options(extra: str, reduction: str, calibrated: bool) -> None:
    for weighted, smoothing, sampled, normalizer in itertools.product(
        WEIGHTS, SMOOTHING, SAMPLE_WEIGHTS, NORMALIZERS
    ):
        r = rows(
            6,
            37,
            weight=torch.rand(37, dtype=torch.float64) + 0.1 if weighted else None,
            label_smoothing=smoothing,
            sample_weight=torch.rand(6, dtype=torch.float64) if sampled else None,
            normalizer=normalizer,
            reduction=reduction,
            **EXTRAS[extra],
        )
        r.target[2] = -100
        compare(r, calibrated, torch.randn(6 if reduction == "none" else ()).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_is_no_worse_than_the_same_dtype_composition(
    dtype: torch.dtype, calibrated: bool, reduction: str
) -> None:
    for shape in ((5, 17), (9, 1203), (3, 8142)):
        half = rows(*shape, torch.float32, reduction=reduction).to(dtype)
        half.options["label_smoothing"] = 0.1
        exact = half.to(torch.float64)
        with disalign_ops.set_backend("native"):
            actual = run(half, calibrated)
        with disalign_ops.set_backend("reference"):
            expected = run(exact, calibrated)
        composed = run_composition(half, calibrated)
        for what, a, c, e in zip(("loss", *NAMES), actual, composed, expected, strict=False):
            assert a.dtype == dtype
            assert_no_worse(a, c, e, dtype, f"{what} {shape}")


def run_composition(r: Rows, calibrated: bool) -> list[Tensor]:
    """What a user writes with PyTorch's functions in the logits' own dtype (residual form)."""
    z = r.logits
    if calibrated:
        c = torch.sigmoid(r.confidence)[:, None]
        z = (1 + c * r.scale) * z + c * r.bias
    loss = torch.nn.functional.cross_entropy(z, r.target, **r.options)
    learned = r.learned if calibrated else [r.logits]
    return [loss.detach(), *torch.autograd.grad(loss, learned, torch.ones_like(loss))]


def test_class_vectors_may_have_another_dtype_than_the_logits() -> None:
    half = rows(5, 33, torch.bfloat16)
    wide = half.to(torch.float32)
    loss = disalign_ops.disalign_cross_entropy(
        half.logits, half.target, half.confidence, wide.scale, wide.bias,
        weight=torch.rand(33, dtype=torch.float64), prior=torch.rand(33),
    )  # fmt: skip
    loss.backward()
    assert loss.dtype == torch.bfloat16
    assert half.logits.grad is not None
    assert half.logits.grad.dtype == torch.bfloat16
    assert wide.scale.grad is not None
    assert wide.scale.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_targets_of_every_integer_type(backend: str, dtype: torch.dtype) -> None:
    z = torch.randn(300, 200)
    target = torch.arange(300) % 200
    expected = torch.nn.functional.cross_entropy(z, target, reduction="none", ignore_index=156)
    # 156 is what -100 would be in uint8: neither may be taken for the other.
    actual = disalign_ops.cross_entropy(z, target.to(dtype), reduction="none", ignore_index=156)
    assert_close(actual, expected, torch.float32, "ignore_index 156")
    everything = disalign_ops.cross_entropy(z, target.to(dtype), reduction="none")
    full = torch.nn.functional.cross_entropy(z, target, reduction="none")
    assert_close(everything, full, torch.float32, "ignore_index -100")


@pytest.mark.parametrize("calibrated", [False, True])
def test_nan_in_one_row_stays_in_that_row(calibrated: bool) -> None:
    r = rows(9, 37, torch.float32, reduction="none")
    with torch.no_grad():
        r.logits[4, 7] = float("nan")
    loss, *grads = run(r, calibrated)
    assert loss.isnan().nonzero().flatten().tolist() == [4]
    assert grads[0].isnan().any(1).nonzero().flatten().tolist() == [4]
    if calibrated:
        assert grads[1].isnan().nonzero().flatten().tolist() == [4]


def test_an_ignored_row_may_hold_anything(backend: str) -> None:
    r = rows(5, 21, torch.float32)
    with torch.no_grad():
        r.logits[1] = float("nan")
        r.logits[3] = float("inf")
    r.target[[1, 3]] = -100
    for calibrated in (False, True):
        for value in run(r, calibrated):
            assert value.isfinite().all()
        assert (run(r, calibrated)[1][[1, 3]] == 0).all()


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_row_of_masked_classes_alone_is_nan_as_in_pytorch(backend: str, calibrated: bool) -> None:
    r = rows(3, 5, torch.float32, reduction="none")
    with torch.no_grad():
        r.logits[1] = float("-inf")
    loss = run(r, calibrated)[0]
    assert loss.isnan().tolist() == [False, True, False]


def test_masked_classes_get_probability_and_gradient_zero() -> None:
    r = CONTENTS["masked"][0](rows(8, 50, torch.float32))
    _, logits, _, scale, bias = run(r, True)
    assert (logits[r.logits == float("-inf")] == 0).all()
    assert scale.isfinite().all()
    assert bias.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_lowest_number_masks_as_minus_infinity_does(reduction: str) -> None:
    # Masks of finfo.min: a scale above 1 sends them to -inf on the way, and 0 * inf is NaN.
    r = rows(8, 50, torch.float32, reduction=reduction)
    z = r.logits.detach().clone()
    z[:, 40:] = torch.finfo(torch.float32).min
    r.target[:] = torch.arange(8)
    r.logits, r.scale = z.requires_grad_(), torch.full((50,), 1.7, requires_grad=True)
    compare(r, True, torch.randn(8 if reduction == "none" else ()))


def test_a_small_loss_keeps_its_digits_behind_an_offset() -> None:
    z = torch.zeros(4, 10, dtype=torch.float32) + 4096.0
    z[:, 3] += 12.0
    expected = torch.log1p(9 * torch.exp(torch.tensor(-12.0, dtype=torch.float64)))
    loss = disalign_ops.cross_entropy(z, torch.full((4,), 3))
    assert abs(float(loss) - float(expected)) < 1e-7


@pytest.mark.parametrize("calibrated", [False, True])
def test_results_depend_on_nothing_but_the_number_of_threads(
    threads: None, calibrated: bool
) -> None:
    r = rows(257, 1203, torch.float32, weight=torch.rand(1203))
    results: dict[int, list[Tensor]] = {}
    for n in (1, 2):
        torch.set_num_threads(n)
        results[n] = run(r, calibrated)
        for _ in range(3):
            for once, again in zip(results[n], run(r, calibrated), strict=True):
                assert torch.equal(once, again)
    for what, one, two in zip(("loss", *NAMES), results[1], results[2], strict=False):
        assert_close(one, two, torch.float32, what)


def test_two_forms_of_the_calibration_are_one() -> None:
    r = rows(6, 19)
    residual = run(r, True)
    shifted = rows(6, 19)
    shifted = Rows(
        r.logits, r.target, r.confidence, (r.scale.detach() + 1).requires_grad_(), r.bias
    )
    shifted.options["form"] = "interpolated"
    for a, e in zip(run(shifted, True), residual, strict=True):
        assert_close(a, e, torch.float64, "interpolated")


@pytest.mark.parametrize("background", ["first", "last"])
def test_background_is_not_calibrated(backend: str, background: str) -> None:
    r = rows(6, 19)
    scale, bias = (t.detach()[:18].requires_grad_() for t in (r.scale, r.bias))
    loss = disalign_ops.disalign_cross_entropy(
        r.logits, r.target, r.confidence, scale, bias, form="residual", background=background
    )
    c = torch.sigmoid(r.confidence)[:, None]
    front = slice(1, None) if background == "first" else slice(0, 18)
    u = r.logits.clone()
    u[:, front] = (1 + c * scale) * r.logits[:, front] + c * bias
    expected = torch.nn.functional.cross_entropy(u, r.target)
    learned = [r.logits, r.confidence, scale, bias]
    assert_close(loss, expected, torch.float64, "loss")
    for a, e in zip(
        torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True
    ):
        assert_close(a, e, torch.float64, "gradient")


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [1, 2, 3], [0, 2]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_only_where_asked_for(wanted: list[int], reduction: str) -> None:
    r = rows(5, 21, reduction=reduction)
    everything = run(r, True)[1:]
    for i, tensor in enumerate(r.learned):
        tensor.requires_grad_(i in wanted)
    loss = disalign_ops.disalign_cross_entropy(
        r.logits, r.target, r.confidence, r.scale, r.bias, form="residual", reduction=reduction
    )
    loss.sum().backward()
    for i, tensor in enumerate(r.learned):
        if i in wanted:
            assert_close(tensor.grad, everything[i], torch.float64, NAMES[i])
        else:
            assert tensor.grad is None


def test_sums_over_many_classes_keep_their_digits() -> None:
    # Lanes of float32 alone would lose two digits of the confidence's gradient here.
    # It is what terms of order 1 leave when they cancel, hence the factor.
    compare(rows(2, 300_000, torch.float32, label_smoothing=0.1), True, factor=10.0)


def test_smoothing_keeps_its_digits_at_an_offset() -> None:
    z = torch.randn(5, 1203) + 1e4
    exact = torch.nn.functional.cross_entropy(z.double(), torch.arange(5), label_smoothing=0.5)
    loss = disalign_ops.cross_entropy(z, torch.arange(5), label_smoothing=0.5)
    assert_close(loss, exact, torch.float32, "loss")


# Why nothing is left of four rows of three classes.
NOTHING_LEFT = {
    "weights of 0 at the targets": {"weight": torch.tensor([0.0, 0.0, 2.0])},
    "sample weights of 0": {"sample_weight": torch.zeros(4)},
    "no row": {"ignore_index": 0},
    "zero given": {"normalizer": torch.tensor(0.0)},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("smoothing", "gamma"), [(0.0, 0.0), (0.1, 0.0), (0.1, 2.0), (1.0, 0.0)])
@pytest.mark.parametrize("case", NOTHING_LEFT)
@pytest.mark.parametrize("layout", ["row", "dense", "upsample"])
def test_a_denominator_of_0(
    backend: str, layout: str, case: str, smoothing: float, gamma: float, masked: bool
) -> None:
    """'weights' gives NaN, as PyTorch; a count or a number 0; and no gradient, whatever the sum."""
    options: dict[str, Any] = {"label_smoothing": smoothing, "focal_gamma": gamma, "margin": 0.3}
    options |= {"ignore_index": -100, "normalizer": "weights"} | NOTHING_LEFT[case]
    z = torch.randn(4, 3)
    if masked:
        z[0, 0] = float("-inf")  # the target's: its row's loss is infinite
    t = torch.tensor([0, 1, 0, 1])
    if case == "no row":
        t[:] = 0
    if layout != "row":
        z, t = z.T.reshape(1, 3, 2, 2).contiguous(), t.reshape(1, 2, 2)
        if "sample_weight" in options:
            options["sample_weight"] = options["sample_weight"].reshape(1, 2, 2)
    if case == "no row":
        names: list[Any] = ["weights", "valid"]
    else:
        names = [options["normalizer"]]
    function = (
        disalign_ops.upsample_cross_entropy if layout == "upsample" else disalign_ops.cross_entropy
    )
    for name in names:
        logits = z.clone().requires_grad_()
        loss = function(logits, t, **options | {"normalizer": name})
        assert isinstance(loss, Tensor)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isnan() if name == "weights" else float(loss.detach()) == 0
        assert (grad == 0).all()


@pytest.mark.parametrize("normalizer", ["valid", "count"])
def test_a_count_divides_weights_of_0(backend: str, normalizer: str) -> None:
    z, t = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    options: dict[str, Any] = {"weight": torch.tensor([0.0, 0.0, 2.0]), "label_smoothing": 0.3}
    total = disalign_ops.cross_entropy(z, t, reduction="sum", **options)
    mean = disalign_ops.cross_entropy(z, t, normalizer=normalizer, **options)
    assert float(total) > 0
    assert_close(mean, total / 4, torch.float32, "loss")


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_of_a_masked_target(backend: str, gamma: float) -> None:
    # p_t = 0: the loss is infinite and its gradient that of the plain loss.
    z = torch.tensor([[float("-inf"), 1.0, 2.0], [0.5, 1.0, 2.0]], requires_grad=True)
    loss = disalign_ops.cross_entropy(z, torch.tensor([0, 2]), focal_gamma=gamma, reduction="none")
    (grad,) = torch.autograd.grad(loss[0], z)
    assert loss[0] == float("inf")
    plain = torch.softmax(z.detach(), 1)[0] - torch.tensor([1.0, 0.0, 0.0])
    assert_close(grad[0], plain, torch.float32, "gradient")


@pytest.mark.parametrize("target_masked", [False, True])
@pytest.mark.parametrize(("smoothing", "gamma"), [(0.0, 0.0), (0.2, 0.0), (0.0, 2.0), (0.2, 2.0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["row", "dense"])
def test_all_gradients_of_masked_classes(
    layout: str, reduction: str, smoothing: float, gamma: float, target_masked: bool
) -> None:
    """d_j = 0 for a masked class, and p_t = 0 for a masked target, in what is learned too."""
    z, t = torch.randn(4, 5), torch.tensor([0, 1, 3, 4])
    z[1:, 2] = float("-inf")
    if target_masked:
        t[2] = 2
    confidence = torch.randn(4)
    if layout == "dense":
        z, t = z.T.reshape(1, 5, 2, 2).contiguous(), t.reshape(1, 2, 2)
        confidence = confidence.reshape(1, 2, 2)
    vectors = (confidence, torch.rand(5) + 0.5, torch.randn(5))
    found = []
    for name in ("native", "reference"):
        learned = [v.clone().requires_grad_() for v in (z, *vectors)]
        with disalign_ops.set_backend(name):
            loss = disalign_ops.disalign_cross_entropy(
                learned[0], t, *learned[1:], form="residual", reduction=reduction,
                label_smoothing=smoothing, focal_gamma=gamma,
            )  # fmt: skip
            found.append(torch.autograd.grad(loss, learned, torch.ones_like(loss)))
    for what, a, e in zip(NAMES, *found, strict=True):
        assert_close(a, e, torch.float32, what)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_an_ignored_row_holds_goes_no_further(frozen: bool, reduction: str) -> None:
    compare_held(rows(9, 18), frozen, reduction)
