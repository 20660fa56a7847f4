"""Arguments as people hold them: numbers of numpy and tensors, shapes of other conventions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import disalign_ops
from disalign_ops import class_stats, losses, metrics, plots, segmentation_metrics
from disalign_ops import nn as dnn
from disalign_ops._call.arguments import check_integer, check_number, check_size
from disalign_ops.errors import ArgumentError, ArgumentTypeError

INTEGERS: list[Callable[[int], Any]] = [
    int,
    *(np.dtype(name).type for name in ("int8", "int16", "int32", "int64", "uint8", "uint64")),
    lambda n: np.array(n),
    lambda n: torch.tensor(n),
    lambda n: torch.tensor(n, dtype=torch.int16),
    lambda n: torch.tensor(n, dtype=torch.uint8),
]
FLOATS: list[Callable[[float], Any]] = [
    float,
    *(np.dtype(name).type for name in ("float16", "float32", "float64")),
    lambda x: np.array(x),
    lambda x: torch.tensor(x),
    lambda x: torch.tensor(x, dtype=torch.bfloat16),
]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 127), st.sampled_from(INTEGERS))
def test_integers_become_pythons(n: int, kind: Callable[[int], Any]) -> None:
    found = check_integer("n", kind(n))
    assert type(found) is int
    assert found == n
    number = check_number("n", kind(n), 0.0)
    assert type(number) is float
    assert number == n


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 16), st.sampled_from(FLOATS))
def test_floats_become_pythons(sixteenths: int, kind: Callable[[float], Any]) -> None:
    found = check_number("x", kind(sixteenths / 16), 0.0, 1.0)
    assert type(found) is float
    assert found == sixteenths / 16
    with pytest.raises(ArgumentTypeError, match="x must be an integer, got"):
        check_integer("x", kind(sixteenths / 16))


@settings(max_examples=30, deadline=None)
@given(st.integers(-(2**70), 2**70))
def test_integers_have_int64s_range(n: int) -> None:
    if -(2**63) <= n < 2**63:
        assert check_integer("n", n) == n
    else:
        with pytest.raises(ArgumentError, match=r"n must be in the range of int64, .* got -?\d+"):
            check_integer("n", n)


NO_NUMBERS = [
    True, np.bool_(True), torch.tensor(True), "1", None, [1], 1j, np.complex64(1), torch.tensor(1j),
    np.ones(1), np.ones((1, 1)), torch.ones(1), np.array("1"), np.str_("1"),
]  # fmt: skip


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="x must be a number, got"):
        check_number("x", value, 0.0)
    with pytest.raises(ArgumentTypeError, match="x must be an integer, got"):
        check_integer("x", value)


def test_a_tensor_elsewhere_is_not_waited_for() -> None:
    with pytest.raises(ArgumentError, match=r"got a tensor on meta: .*; pass k\.item\(\)"):
        check_integer("k", torch.tensor(3, device="meta"))
    with pytest.raises(ArgumentError, match="gamma must not require a gradient"):
        check_number("gamma", torch.tensor(2.0, requires_grad=True), 0.0)


Z, T = torch.randn(6, 5), torch.tensor([0, 4, 3, 1, 2, 3])
HEAD = torch.randn(5, 5)
CONFIDENCE, SCALE, BIAS = torch.randn(6), torch.randn(5), torch.randn(5)
IMAGE, MASK = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 8, 8))
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": lambda **k: disalign_ops.cross_entropy(Z, T, **k),
    "disalign": lambda **k: disalign_ops.disalign_cross_entropy(
        Z, T, CONFIDENCE, SCALE, BIAS, **k
    ),
    "linear": lambda **k: disalign_ops.linear_cross_entropy(Z, HEAD, T, **k),
    "upsample": lambda **k: disalign_ops.upsample_cross_entropy(IMAGE, MASK, **k),
    "dense": lambda **k: disalign_ops.cross_entropy(
        IMAGE, MASK[:, ::2, ::2].contiguous(), **k
    ),
}  # fmt: skip
OPTIONS: dict[str, float] = {
    "ignore_index": 3, "label_smoothing": 0.25, "focal_gamma": 2.0, "margin": 0.5,
    "normalizer": 4.0,
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_number_of_every_loss(loss: str, option: str) -> None:
    value = OPTIONS[option]
    wanted = LOSSES[loss](**{option: value})
    for kind in INTEGERS if isinstance(value, int) else FLOATS:
        torch.testing.assert_close(LOSSES[loss](**{option: kind(value)}), wanted)
    with pytest.raises((TypeError, ValueError), match=option):
        LOSSES[loss](**{option: "three"})


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_integers_stand_for_numbers(backend: str) -> None:
    with disalign_ops.set_backend(backend):
        for option in ("margin", "normalizer", "focal_gamma"):
            wanted = disalign_ops.cross_entropy(Z, T, **{option: 2.0})  # type: ignore[arg-type]
            for two in (2, np.int64(2), torch.tensor(2), np.array(2)):
                found = disalign_ops.cross_entropy(Z, T, **{option: two})  # type: ignore[arg-type]
                torch.testing.assert_close(found, wanted)


def test_numbers_of_logits_elsewhere() -> None:
    """What is a number needs not be where the logits are: it is read, and nothing waits."""
    z, t = torch.randn(6, 5, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    for options in ({"margin": torch.tensor(0.5)}, {"normalizer": torch.tensor(4.0)}):
        assert disalign_ops.cross_entropy(z, t, **options).is_meta  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="margin must be on the input's device, meta, got cpu"):
        disalign_ops.cross_entropy(z, t, margin=torch.rand(5))


def test_an_ignore_index_that_int64_does_not_hold() -> None:
    for loss in LOSSES.values():
        with pytest.raises(ArgumentError, match="ignore_index must be in the range of int64"):
            loss(ignore_index=2**70)


def test_numbers_of_linear_heads() -> None:
    for option, values in {
        "chunk_bytes": (4096, np.int32(4096), torch.tensor(4096)),
        "cosine_scale": (8.0, np.float32(8.0), np.array(8.0), torch.tensor(8.0)),
        "sample_rate": (1.0, np.float32(1.0), torch.tensor(1.0)),
    }.items():
        found = [disalign_ops.linear_cross_entropy(Z, HEAD, T, **{option: v}) for v in values]  # type: ignore[arg-type]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])


def test_numbers_beside_the_losses() -> None:
    counts = [50, 20, 5]
    four, three = np.int64(4), torch.tensor(3)
    for kind in (np.float32, torch.tensor):
        half: Any = kind(0.5)
        for function in (class_stats.grw_weights, class_stats.log_prior, class_stats.ldam_margins):
            torch.testing.assert_close(function(counts, half), function(counts, 0.5))
    for topk in (np.int64(2), torch.tensor(2), np.array([1, 2]), torch.tensor([2]), {2}, 2):
        assert metrics.LongTailAccuracy(counts, topk=topk)._tally.ks == (1, 2)
    assert segmentation_metrics.SegmentationIoU(three, ignore_index=np.uint8(255))._num_classes == 3  # type: ignore[arg-type]
    assert dnn.DisAlignLinear(four, three)(torch.randn(2, 4)).shape == (2, 3)  # type: ignore[arg-type]
    assert dnn.DisAlignSegHead(four, three).num_classes == 3  # type: ignore[arg-type]
    p = torch.softmax(torch.randn(6, 3), 1)
    target = T.clamp(max=2)
    assert plots.calibration_error(p, target, np.int64(4)) == plots.calibration_error(p, target, 4)  # type: ignore[arg-type]
    torch.testing.assert_close(
        losses.focal(np.float32(2.0))(Z, T), losses.focal(2.0)(Z, T)  # type: ignore[arg-type]
    )  # fmt: skip


SIZES = [
    (6, 7), [6, 7], torch.Size((6, 7)), np.array([6, 7]), (np.int64(6), torch.tensor(7)),
    torch.zeros(6, 7).shape,
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_sizes(size: Any) -> None:
    assert check_size(size) == (6, 7)
    found = disalign_ops.upsample_predict(IMAGE, size)
    assert torch.equal(found, disalign_ops.upsample_predict(IMAGE, (6, 7)))


@pytest.mark.parametrize("size", [6, (6,), (6, 7, 8), (6.0, 7.0), (0, 7), (6, True), "67", None])
def test_no_sizes(size: Any) -> None:
    with pytest.raises(ArgumentError, match=r"size must be \(height, width\), .*, got "):
        check_size(size)


def test_a_deprecated_reduction_is_the_mean() -> None:
    for loss in LOSSES.values():
        with pytest.warns(UserWarning, match="elementwise_mean"):
            found = loss(reduction="elementwise_mean")
        torch.testing.assert_close(found, loss())


@pytest.mark.parametrize("value", ["no", "", 0, 1, None, np.True_])
def test_inplace_backward_is_a_bool(value: Any) -> None:
    for name in ("cross_entropy", "disalign", "upsample"):
        with pytest.raises(ArgumentTypeError, match=r"inplace_backward must be a bool, got a "):
            LOSSES[name](inplace_backward=value)


# --- hints

ONE_HOT = F.one_hot(MASK[:, ::2, ::2], 5)  # (N, H, W, C)
SMALL = MASK[:, ::2, ::2]
MISTAKES: dict[str, tuple[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor], str]] = {
    "channels last": (
        IMAGE.movedim(1, -1), SMALL, lambda: disalign_ops.cross_entropy(IMAGE, SMALL),
        r"input\.movedim\(-1, 1\)",
    ),
    "a mask's channel": (
        IMAGE, SMALL[:, None], lambda: SMALL[:, None].squeeze(1), r"target\.squeeze\(1\)",
    ),
    "a mask's last channel": (
        IMAGE, SMALL[..., None], lambda: SMALL[..., None].squeeze(-1), r"target\.squeeze\(-1\)",
    ),
    "a column of labels": (Z, T[:, None], lambda: T[:, None].squeeze(1), r"target\.squeeze\(1\)"),
    "one-hot rows": (Z, F.one_hot(T, 5), lambda: F.one_hot(T, 5).argmax(1), r"target\.argmax\(1\)"),
    "one-hot planes": (
        IMAGE, ONE_HOT.movedim(-1, 1), lambda: ONE_HOT.movedim(-1, 1).argmax(1),
        r"target\.argmax\(1\)",
    ),
    "one-hot, classes last": (
        IMAGE, ONE_HOT, lambda: ONE_HOT.argmax(-1), r"target\.argmax\(-1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_shape_of_another_convention_gets_a_hint(mistake: str) -> None:
    input, target, mended, hint = MISTAKES[mistake]
    with pytest.raises(ArgumentError, match=rf"target must have shape .*, got .*; .* pass {hint}"):
        disalign_ops.cross_entropy(input, target)
    if mistake != "channels last":
        assert torch.equal(mended(), T if input is Z else SMALL)
    if input is IMAGE:
        with pytest.raises(
            ArgumentError, match=rf"target must have shape .*, got .*; .* pass {hint}"
        ):
            disalign_ops.upsample_cross_entropy(input, target)


@pytest.mark.parametrize("shape", [(6, 2), (6, 2, 2), (3, 5), (2, 1), (5, 6)])
def test_other_shapes_get_no_hint(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"for an input of shape \(6, 5\), got \S+( \S+)*\)$"):
        disalign_ops.cross_entropy(Z, torch.zeros(shape, dtype=torch.int64))


def test_a_dict_of_outputs_gets_a_hint() -> None:
    output = OrderedDict(out=IMAGE, aux=IMAGE)
    hint = r"input must be a torch.Tensor, got a OrderedDict; of this output pass \['out'\]"
    with pytest.raises(ArgumentTypeError, match=hint):
        disalign_ops.cross_entropy(output, SMALL)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=hint):
        disalign_ops.upsample_cross_entropy(output, MASK)  # type: ignore[call-overload]
    with pytest.raises(ArgumentTypeError, match=r"pass \['logits'\]"):
        disalign_ops.cross_entropy({"logits": Z}, T)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"must be a torch.Tensor, got a dict$"):
        disalign_ops.cross_entropy({"boxes": Z}, T)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_of_a_sigmoid_is_no_confidence(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    raw = torch.randn(shape, requires_grad=True)
    z, p = Z.to(dtype), torch.sigmoid(raw)
    for confidence in (p, p.reshape(-1), p.reshape(6, 1), p.to(dtype)):
        with pytest.raises(ArgumentError, match=r"got the output of a sigmoid.*torch\.logit\(p\)"):
            disalign_ops.disalign_cross_entropy(z, T, confidence, SCALE, BIAS)
    wanted = disalign_ops.disalign_cross_entropy(z, T, raw, SCALE, BIAS)
    found = disalign_ops.disalign_cross_entropy(z, T, torch.logit(p), SCALE, BIAS)
    torch.testing.assert_close(found, wanted)
    disalign_ops.disalign_cross_entropy(z, T, 2 * p - 1, SCALE, BIAS)  # a value like another


def test_one_scale_too_many_for_a_background() -> None:
    for background in ("first", "last"):
        match = rf"class \(4: background='{background}' leaves out one of 5\), got 5"
        with pytest.raises(ArgumentError, match="scale must have one entry a calibrated " + match):
            LOSSES["disalign"](background=background)
