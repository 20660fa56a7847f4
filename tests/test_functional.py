"""`cross_entropy` in the place of F.cross_entropy: shapes, dtypes, errors; other layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import disalign_ops
from disalign_ops.errors import ArgumentError, ArgumentTypeError
from support.tolerances import assert_close

SHAPES = [(5,), (3, 5), (2, 5, 4), (2, 5, 3, 4), (2, 5, 2, 3, 2), (0, 5), (2, 5, 0)]


def indices(shape: tuple[int, ...]) -> Tensor:
    positions = () if len(shape) == 1 else (shape[0], *shape[2:])
    return torch.randint(0, 5, positions)


def gradient(function: Any, z: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    loss = function(z, *args, **options)
    (grad,) = torch.autograd.grad(loss, z, torch.ones_like(loss))
    return loss.detach(), grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_pytorch(backend: str, shape: tuple[int, ...], reduction: str) -> None:
    z, t = torch.randn(shape), indices(shape)
    weight = torch.rand(5)
    for actual, expected in zip(
        gradient(disalign_ops.cross_entropy, z, t, weight, reduction=reduction),
        gradient(F.cross_entropy, z, t, weight, reduction=reduction),
        strict=True,
    ):
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, torch.float32, str(shape))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 5, 3, 4)], ids=str)
def test_class_probabilities(shape: tuple[int, ...], reduction: str) -> None:
    z, y = torch.randn(shape), torch.rand(shape)
    options = {"weight": torch.rand(5), "label_smoothing": 0.1, "reduction": reduction}
    for actual, expected in zip(
        gradient(disalign_ops.cross_entropy, z, y, **options),
        gradient(F.cross_entropy, z, y, **options),
        strict=True,
    ):
        assert_close(actual, expected, torch.float32, str(shape))


HALF_TO_DOUBLE = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("logits", HALF_TO_DOUBLE)
@pytest.mark.parametrize("probabilities", HALF_TO_DOUBLE)
@pytest.mark.parametrize("weighted", [None, *HALF_TO_DOUBLE])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_probabilities_promote_as_pytorchs(
    logits: torch.dtype, probabilities: torch.dtype, weighted: torch.dtype | None, reduction: Any
) -> None:
    z = torch.randn(4, 5).to(logits).requires_grad_()
    y = torch.softmax(torch.randn(4, 5), 1).to(probabilities)
    weight = None if weighted is None else torch.rand(5).to(weighted)
    exact = F.cross_entropy(
        z.double(), y.double(), None if weight is None else weight.double(), reduction=reduction
    )
    for autocast in (True, False):
        with torch.autocast("cpu", enabled=autocast):
            found = disalign_ops.cross_entropy(z, y, weight, reduction=reduction)
            theirs = F.cross_entropy(z, y, weight, reduction=reduction)
        assert found.dtype == theirs.dtype
        # What half logits are computed with is float32: only a half loss rounds.
        near = 0.01 if found.dtype in (torch.bfloat16, torch.float16) else 1e-5
        torch.testing.assert_close(found.double(), exact, rtol=near, atol=near)
    (grad,) = torch.autograd.grad(found.sum(), z)
    assert grad.dtype == logits


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_traced_class_probabilities_promote_too(reduction: Any) -> None:
    z, y = torch.randn(4, 5, dtype=torch.bfloat16), torch.softmax(torch.randn(4, 5), 1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return disalign_ops.cross_entropy(z, y, reduction=reduction)

    traced = torch.jit.trace(loss, (z, y))(z, y)
    assert traced.dtype == torch.float32
    torch.testing.assert_close(traced, loss(z, y))


def test_class_probabilities_get_a_gradient_too() -> None:
    z = torch.randn(3, 5, dtype=torch.float64)
    y = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(disalign_ops.cross_entropy(z, y), y)
    (expected,) = torch.autograd.grad(F.cross_entropy(z, y), y)
    assert_close(actual, expected, torch.float64, "target")


@pytest.mark.parametrize("function", [disalign_ops.cross_entropy, F.cross_entropy])
def test_arguments_stand_in_pytorchs_order(function: Any) -> None:
    z, t, w = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.rand(5)
    loss = function(z, t, w, None, 2, None, "sum", 0.1)
    named = F.cross_entropy(z, t, w, ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert_close(loss, named, torch.float32, "positional")


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize(("size_average", "reduce"), [(False, None), (None, False), (True, True)])
def test_deprecated_reductions(size_average: bool | None, reduce: bool | None) -> None:
    z, t = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    actual = disalign_ops.cross_entropy(z, t, None, size_average, -100, reduce)
    expected = F.cross_entropy(z, t, None, size_average, -100, reduce)
    assert_close(actual, expected, torch.float32, "deprecated")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_losss_dtype_is_the_inputs(backend: str, dtype: torch.dtype) -> None:
    z, t = torch.randn(4, 5).to(dtype), torch.tensor([0, 1, 2, 3])
    loss, grad = gradient(disalign_ops.cross_entropy, z, t)
    assert loss.dtype == dtype
    assert grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_yields_float32_without_a_copy_of_half_logits(dtype: torch.dtype) -> None:
    z = torch.randn(4, 5).to(dtype).requires_grad_()
    t = torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = disalign_ops.cross_entropy(z, t)
        expected = F.cross_entropy(z, t)
    assert loss.dtype == expected.dtype == torch.float32
    assert_close(loss.detach(), expected.detach(), torch.float32, "autocast")
    assert loss.grad_fn.saved_tensors[0].data_ptr() == z.data_ptr()  # type: ignore[union-attr]
    loss.backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype


def test_channels_last_is_rows_without_a_copy() -> None:
    z = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    loss = disalign_ops.cross_entropy(z, torch.randint(0, 5, (2, 3, 4)))
    assert loss.grad_fn.saved_tensors[0].data_ptr() == z.data_ptr()  # type: ignore[union-attr]


def test_dense_confidence_of_both_shapes(backend: str) -> None:
    z, t = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    confidence, scale, bias = torch.randn(2, 1, 3, 4), torch.rand(1, 5, 1, 1), torch.randn(5)
    with_class = disalign_ops.disalign_cross_entropy(z, t, confidence, scale, bias)
    without = disalign_ops.disalign_cross_entropy(z, t, confidence[:, 0], scale, bias)
    c = torch.sigmoid(confidence)
    u = c * (scale * z + bias[:, None, None]) + (1 - c) * z
    assert_close(with_class, F.cross_entropy(u, t), torch.float32, "(N, 1, H, W)")
    assert torch.equal(with_class, without)


def test_one_number_may_stand_for_all_classes() -> None:
    z, t, confidence = torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.randn(3)
    scale, bias = torch.tensor(1.5, requires_grad=True), torch.tensor([0.2], requires_grad=True)
    loss = disalign_ops.disalign_cross_entropy(z, t, confidence, scale, bias)
    c = torch.sigmoid(confidence)[:, None]
    expected = F.cross_entropy(c * (scale * z + bias) + (1 - c) * z, t)
    assert_close(loss.detach(), expected.detach(), torch.float32, "loss")
    learned = [scale, bias]
    for a, e in zip(
        torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True
    ):
        assert_close(a, e, torch.float32, "gradient")


def test_another_device_goes_through_the_reference() -> None:
    z = torch.zeros(3, 5, device="meta", requires_grad=True)
    loss = disalign_ops.cross_entropy(z, torch.zeros(3, device="meta").long(), reduction="none")
    assert loss.shape == (3,)
    assert loss.device.type == "meta"
    loss.sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize("shape", [(0, 7), (0, 7, 3), (2, 7, 0)], ids=str)
def test_an_empty_batch_of_any_strides(backend: str, shape: tuple[int, ...]) -> None:
    """PyTorch calls it contiguous, so nothing on the way makes another of it."""
    z = torch.empty(shape[::-1]).permute(*range(len(shape))[::-1]).requires_grad_()
    assert z.stride() != torch.empty(shape).stride()
    assert z.is_contiguous()
    target = torch.empty(shape[:1] + shape[2:], dtype=torch.int64)
    vectors = [t.requires_grad_() for t in (torch.randn(target.shape), *torch.randn(2, 7))]
    loss = disalign_ops.cross_entropy(z, target, reduction="sum")
    calibrated = disalign_ops.disalign_cross_entropy(z, target, *vectors, reduction="sum")
    out = disalign_ops.calibrate(z, *vectors)
    assert (loss.item(), calibrated.item(), out.shape) == (0.0, 0.0, shape)
    assert torch.autograd.grad(loss, z)[0].shape == shape
    for result in (calibrated, (0.0 * out).sum()):  # the gradient of a sum has strides of 0
        grads = torch.autograd.grad(result, (z, *vectors))
        assert all(not grad.any() for grad in grads)


def test_nothing_left_is_nan_or_zero_with_zero_gradients(backend: str) -> None:
    z, t = torch.randn(3, 5), torch.full((3,), -100)
    for normalizer, expected in (("weights", "nan"), ("valid", "0.0"), (2.0, "0.0")):
        loss, grad = gradient(disalign_ops.cross_entropy, z, t, normalizer=normalizer)
        assert str(float(loss)) == expected
        assert (grad == 0).all()


def test_a_callers_denominator_may_be_a_tensor(backend: str) -> None:
    z, t = torch.randn(3, 5), torch.tensor([0, 1, 2])
    for number in (4.0, torch.tensor(4.0), torch.tensor([4])):
        loss = disalign_ops.cross_entropy(z, t, normalizer=number)
        expected = F.cross_entropy(z, t, reduction="sum") / 4
        assert_close(loss, expected, torch.float32, "avg_factor")


Z, T = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
CONF, A, B = torch.zeros(3), torch.ones(5), torch.zeros(5)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, ArgumentTypeError, "input must be a torch.Tensor, got a list"),
    ({"input": Z.long()}, ArgumentTypeError, "input must have dtype float32.*, got torch.int64"),
    ({"input": torch.zeros(())}, ArgumentError, r"input must have shape \(C,\), .*, got \(\)"),
    ({"input": torch.zeros(3, 0)}, ArgumentError, r"at least one class, got shape \(3, 0\)"),
    ({"target": 1}, ArgumentTypeError, "target must be a torch.Tensor, got a int"),
    ({"target": T.bool()}, ArgumentTypeError, "target must have dtype int64.*, got torch.bool"),
    ({"target": T[:2]}, ArgumentError, r"target must have shape \(3,\) for .*, got \(2,\)"),
    ({"target": torch.zeros(3, 4)}, ArgumentError, r"the input's shape \(3, 5\) .*, got \(3, 4\)"),
    ({"target": T + 5}, IndexError, r"Target 5 is out of bounds: target\[0\], the logits have 5"),
    ({"target": T - 1}, IndexError, r"Target -1 is out of bounds: target\[0\]"),
    ({"weight": torch.ones(4)}, ArgumentError, r"weight must have one entry a class \(5\), got 4"),
    ({"weight": torch.ones(1, 5)}, ArgumentError, r"one entry a class \(5\), got shape \(1, 5\)"),
    ({"weight": T}, ArgumentTypeError, "weight must have a floating dtype, got torch.int64"),
    ({"reduction": "avg"}, ArgumentError, "reduction must be one of 'mean', 'sum'.*, got 'avg'"),
    ({"label_smoothing": 1.5}, ArgumentError, "label_smoothing must be a number from 0.0 to 1"),
    ({"label_smoothing": None}, ArgumentTypeError, "label_smoothing must be a number, got None"),
    ({"ignore_index": None}, ArgumentTypeError, "ignore_index must be an integer, got None"),
    ({"focal_gamma": -1.0}, ArgumentError, "focal_gamma must be a number >= 0.0, got -1.0"),
    (
        {"sample_weight": torch.ones(2)},
        ArgumentError,
        r"sample_weight must have shape .*, got \(2,\)",
    ),
    (
        {"sample_weight": T},
        ArgumentTypeError,
        "sample_weight must have a floating .*, got torch.int64",
    ),
    ({"normalizer": "all"}, ArgumentError, "normalizer must be one of 'weights', .*, got 'all'"),
    (
        {"normalizer": 0},
        ArgumentError,
        "normalizer must be a finite number > 0, or a name, got 0.0",
    ),
    ({"normalizer": torch.ones(2)}, ArgumentError, r"normalizer must be a single .* \(2,\)"),
    ({"prior": torch.ones(4)}, ArgumentError, r"prior must have one entry a class \(5\), got 4"),
    ({"prior": torch.ones(5, 5)}, ArgumentError, r"prior must have .*, got shape \(5, 5\)"),
    ({"margin": torch.ones(4)}, ArgumentError, r"margin must have one entry a class \(5\), got 4"),
    *(
        (
            {name: torch.ones(n, requires_grad=True)},
            ArgumentError,
            f"{name} must not require a grad",
        )
        for name, n in (("weight", 5), ("prior", 5), ("margin", 5), ("sample_weight", 3))
    ),
    (
        {"normalizer": torch.ones((), requires_grad=True)},
        ArgumentError,
        "normalizer must not require a gradient",
    ),
    *(
        (
            {"target": torch.rand(3, 5), **given},
            ArgumentError,
            "where target holds class probabilities",
        )
        for given in (
            {"margin": 0.5},
            {"focal_gamma": 1.0},
            {"ignore_index": 0},
        )
    ),
]
CALIBRATION_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"form": "both"}, ArgumentError, "form must be one of 'interpolated', .*, got 'both'"),
    ({"background": 0}, ArgumentError, "background must be one of None, 'first', 'last', got 0"),
    (
        {"background": "last"},
        ArgumentError,
        r"scale must have one entry a calibrated class \(4: background='last' leaves out one of "
        r"5\), got 5",
    ),
    ({"scale": torch.ones(4)}, ArgumentError, r"scale must have one entry a class \(5\), got 4"),
    ({"scale": None}, ArgumentError, "scale must be a tensor, got None"),
    ({"bias": torch.ones(2, 5)}, ArgumentError, r"one entry a class \(5\), got shape \(2, 5\)"),
    ({"confidence": torch.ones(2)}, ArgumentError, r"confidence must have shape \(3.*, got \(2,\)"),
    ({"confidence": 0.5}, ArgumentTypeError, "confidence must be a torch.Tensor, got a float"),
]


@pytest.mark.parametrize(("given", "kind", "message"), ERRORS, ids=lambda v: str(v)[:40])
def test_errors_name_the_argument(
    backend: str, given: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        disalign_ops.cross_entropy(**({"input": Z, "target": T} | given))


@pytest.mark.parametrize(
    ("given", "kind", "message"), CALIBRATION_ERRORS, ids=lambda v: str(v)[:40]
)
def test_errors_of_the_calibration(
    given: dict[str, Any], kind: type[Exception], message: str
) -> None:
    calibration = {"confidence": CONF, "scale": A, "bias": B}
    with pytest.raises(kind, match=message):
        disalign_ops.disalign_cross_entropy(Z, T, **(calibration | given))
    with pytest.raises(kind, match=message):
        disalign_ops.calibrate(Z, **(calibration | given))


PYTORCH_REFUSES: list[dict[str, Any]] = [
    {"target": T[:2]},
    {"target": T + 5},
    {"target": torch.zeros(3, 4)},
    {"target": torch.zeros(3)},
    {"target": torch.zeros(3, 5).long()},
    {"weight": torch.ones(4)},
    {"weight": torch.ones(1, 5)},
    {"reduction": "avg"},
    {"label_smoothing": 1.5},
    {"target": torch.rand(3, 5), "ignore_index": 0},
]


@pytest.mark.parametrize("given", PYTORCH_REFUSES, ids=lambda v: str(v)[:40])
def test_what_pytorch_refuses_is_refused_with_its_exception_type(given: dict[str, Any]) -> None:
    arguments = {"input": Z, "target": T} | given
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - its type is what is asked for
        F.cross_entropy(**arguments)
    with pytest.raises(type(theirs.value)):
        disalign_ops.cross_entropy(**arguments)


@pytest.mark.parametrize("input", [torch.zeros(()), Z.long()], ids=["no dimensions", "integers"])
def test_what_pytorch_refuses_with_types_of_its_own(input: Tensor) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        F.cross_entropy(input, T)
    with pytest.raises((ValueError, TypeError)):
        disalign_ops.cross_entropy(input, T)


def test_devices_must_agree() -> None:
    with pytest.raises(ArgumentError, match="target must be on the input's device, cpu, got meta"):
        disalign_ops.cross_entropy(Z, T.to("meta"))
    with pytest.raises(ArgumentError, match="weight must be on the input's device, cpu, got meta"):
        disalign_ops.cross_entropy(Z, T, torch.ones(5, device="meta"))


def test_no_gradient_is_needed_for_a_learnable_weight_without_grad_mode() -> None:
    with torch.no_grad():
        disalign_ops.cross_entropy(Z, T, torch.ones(5, requires_grad=True))
