"""Dense logits (N, C, d1, ...) against the reference: layouts, contents, dtypes, options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops._ops import layouts
from support.comparison import NAMES, compare, compare_held, memory_allocated, run, upstream_of
from support.dense_cases import CONTENTS, EXTRAS, SHAPES, Dense, combinations, dense
from support.tolerances import assert_close, assert_no_worse


def loss(d: Dense, calibrated: bool) -> Tensor:
    options = {"ignore_index": 255, **d.options}
    if not calibrated:
        return disalign_ops.cross_entropy(d.logits, d.target, **options)
    return disalign_ops.disalign_cross_entropy(
        d.logits, d.target, d.confidence, d.scale, d.bias, form="residual", **options
    )


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: str, calibrated: bool
) -> None:
    weight = torch.rand(shape[1], dtype=dtype) + 0.1
    d = dense(shape, dtype=dtype, reduction=reduction, weight=weight)
    compare(loss, d, calibrated, upstream_of(d, reduction))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("content", CONTENTS)
def test_contents(content: str, dtype: torch.dtype, reduction: str, calibrated: bool) -> None:
    d = CONTENTS[content][0](dense((3, 22, 9, 11), dtype=dtype, reduction=reduction))
    # float32 u carries a rounding of 1e4 * 2^-24 = 6e-4 at the offset, in any implementation.
    factor = 500.0 if content == "offset" and dtype == torch.float32 else 1.0
    compare(loss, d, calibrated, upstream_of(d, reduction), factor)


LAYOUTS = {
    "plain": "dense",
    "sliced": "dense",
    "expanded": "dense",
    "cropped": "dense",
    "channels_last": "row",
}


@pytest.mark.parametrize("content", LAYOUTS)
def test_layouts_go_where_they_are_read_without_a_copy(content: str) -> None:
    d = CONTENTS[content][0](dense((2, 5, 4, 6)))
    layout, flat, copied = layouts.flatten(d.logits)
    assert layout.name == LAYOUTS[content]
    assert copied == (content == "cropped")
    assert (flat.data_ptr() != d.logits.data_ptr()) == copied
    back = (
        flat.reshape(2, 4, 6, 5).movedim(-1, 1) if layout.name == "row" else flat.view(2, 5, 4, 6)
    )
    assert torch.equal(back, d.logits)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_combination_of_options(extra: str, reduction: str, calibrated: bool) -> None:
    for d in combinations((2, 18, 5, 4), None, extra, reduction):
        compare(loss, d, calibrated, upstream_of(d, reduction))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("width", [176, 177])
def test_a_gradient_beyond_the_cache(width: int, calibrated: bool) -> None:
    # More than 16 MiB is streamed past the cache, where the planes are aligned (176, not 177).
    d = dense((1, 150, 176, width), dtype=torch.float32)
    d.target[:, :3] = 255
    compare(loss, d, calibrated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_is_no_worse_than_the_same_dtype_composition(
    dtype: torch.dtype, calibrated: bool, reduction: str
) -> None:
    d = dense((2, 50, 6, 7), dtype=torch.float32, reduction=reduction).to(dtype)

    def composed(d: Dense, calibrated: bool) -> Tensor:
        z = d.logits
        if calibrated:
            c = torch.sigmoid(d.confidence)
            z = (1 + c * d.scale[:, None, None]) * z + c * d.bias[:, None, None]
        return torch.nn.functional.cross_entropy(z, d.target, reduction=reduction)

    with disalign_ops.set_backend("native"):
        actual = run(loss, d, calibrated)
    expected = run(composed, d.to(torch.float64), calibrated)
    for what, a, c, e in zip(
        ("loss", *NAMES), actual, run(composed, d, calibrated), expected, strict=False
    ):
        assert a.dtype == dtype
        assert_no_worse(a, c, e, dtype, what)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_masks_of_every_integer_type(backend: str, dtype: torch.dtype) -> None:
    z = torch.randn(2, 200, 6, 5)
    target = torch.randint(0, 200, (2, 6, 5))
    target[:, 0] = 255
    expected = torch.nn.functional.cross_entropy(z, target, ignore_index=255)
    actual = disalign_ops.cross_entropy(z, target.to(dtype), ignore_index=255)
    assert_close(actual, expected, torch.float32, "loss")


def test_confidence_with_and_without_the_class_dimension(backend: str) -> None:
    d = dense((2, 5, 3, 4))
    expected = loss(d, True)
    d.confidence = d.confidence.detach()[:, 0]
    assert torch.equal(loss(d, True), expected)


def test_nan_in_one_position_stays_there() -> None:
    d = dense((2, 9, 6, 5), dtype=torch.float32, reduction="none")
    with torch.no_grad():
        d.logits[1, 4, 3, 2] = float("nan")
    value, logits, confidence, _, _ = run(loss, d, True)
    assert value.isnan().nonzero().tolist() == [[1, 3, 2]]
    assert logits.isnan().any(1).nonzero().tolist() == [[1, 3, 2]]
    assert confidence.isnan().nonzero().tolist() == [[1, 0, 3, 2]]


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_position_of_masked_classes_alone_is_nan_as_in_pytorch(calibrated: bool) -> None:
    d = dense((1, 5, 2, 3), dtype=torch.float32, reduction="none")
    with torch.no_grad():
        d.logits[0, :, 1, 1] = float("-inf")
    assert loss(d, calibrated).isnan().nonzero().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("calibrated", [False, True])
def test_results_depend_on_nothing_but_the_number_of_threads(
    threads: None, calibrated: bool
) -> None:
    d = dense((2, 150, 33, 31), dtype=torch.float32, weight=torch.rand(150))
    results: dict[int, list[Tensor]] = {}
    for n in (1, 2):
        torch.set_num_threads(n)
        results[n] = run(loss, d, calibrated)
        for _ in range(3):
            for once, again in zip(results[n], run(loss, d, calibrated), strict=True):
                assert torch.equal(once, again)
    for what, one, two in zip(("loss", *NAMES), results[1], results[2], strict=False):
        assert_close(one, two, torch.float32, what)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [1, 2, 3], [0, 2]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_only_where_asked_for(wanted: list[int], reduction: str) -> None:
    d = dense((2, 7, 5, 4), reduction=reduction)
    everything = run(loss, d, True)[1:]
    for i, tensor in enumerate(d.learned):
        tensor.requires_grad_(i in wanted)
    loss(d, True).sum().backward()
    for i, tensor in enumerate(d.learned):
        if i in wanted:
            assert_close(tensor.grad, everything[i], torch.float64, NAMES[i])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("calibrated", [False, True])
def test_gradcheck(backend: str, calibrated: bool) -> None:
    d = dense((2, 3, 2, 2), reduction="none", label_smoothing=0.1)
    d.target[1, 1, 0] = 255

    def function(*learned: Tensor) -> Tensor:
        return loss(Dense(*learned[:1], d.target, *learned[1:], d.options), calibrated)

    learned = d.learned if calibrated else [d.logits, *(t.detach() for t in d.learned[1:])]
    assert torch.autograd.gradcheck(function, learned)
    assert torch.autograd.gradgradcheck(function, learned)


def test_one_graph_twice_differentiated_and_kept() -> None:
    d = dense((2, 6, 4, 5))
    value = loss(d, True)
    first = torch.autograd.grad(value, d.learned, retain_graph=True)
    again = torch.autograd.grad(value, d.learned, torch.tensor(2.0).double())
    for a, b in zip(first, again, strict=True):
        assert_close(b, 2 * a, torch.float64, "kept graph")


def test_in_place_writes_over_the_logits() -> None:
    d = dense((2, 21, 5, 7))
    expected = run(loss, d, True)
    logits = d.logits * 1.0
    d.options["inplace_backward"] = True
    value = loss(Dense(logits, d.target, *d.learned[1:], d.options), True)
    grads = torch.autograd.grad(value, [logits, *d.learned[1:]])
    assert grads[0].data_ptr() == logits.data_ptr()
    for what, a, e in zip(NAMES, grads, expected[1:], strict=True):
        assert_close(a, e, torch.float64, what)


def test_in_place_keeps_what_lies_between_sliced_planes() -> None:
    x = torch.randn(2, 10, 4, 4, requires_grad=True)
    whole = x * 1.0
    before = whole.detach().clone()
    disalign_ops.cross_entropy(
        whole[:, :6], torch.zeros(2, 4, 4).long(), inplace_backward=True
    ).backward()
    assert torch.equal(whole[:, 6:], before[:, 6:])
    assert not torch.equal(whole[:, :6], before[:, :6])


def test_a_target_that_is_no_class_is_named_with_its_place(backend: str) -> None:
    target = torch.zeros(2, 3, 4, dtype=torch.uint8)
    target[1, 2, 3] = 200
    with pytest.raises(IndexError, match=r"Target 200 is out of bounds: target\[1, 2, 3\], the"):
        disalign_ops.cross_entropy(torch.randn(2, 5, 3, 4), target, ignore_index=255)


@pytest.mark.parametrize("calibrated", [False, True])
def test_compiled_equals_eager(calibrated: bool) -> None:
    d = dense((2, 21, 6, 8), dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for what, a, e in zip(
        ("loss", *NAMES), run(compiled, d, calibrated), run(loss, d, calibrated), strict=False
    ):
        assert_close(a, e, torch.float32, what)


@pytest.mark.parametrize("calibrated", [False, True])
def test_nothing_of_the_logits_size_but_their_gradient(calibrated: bool) -> None:
    d = dense((2, 150, 64, 64), dtype=torch.float32)
    loss(d, calibrated)
    taken = memory_allocated(lambda: loss(d, calibrated).backward())
    logits = d.logits.numel() * 4
    assert logits <= taken < 1.2 * logits


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_an_ignored_position_holds_goes_no_further(frozen: bool, reduction: str) -> None:
    compare_held(dense((3, 18, 2, 5)), frozen, reduction)
