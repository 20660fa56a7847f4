"""A target's dtype changes no loss: class indices and ignore_index are compared as numbers, and
none of them wraps around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import disalign_ops as ops
from disalign_ops import losses, metrics
from disalign_ops import nn as dnn
from disalign_ops._ops.dispatch import check_classes
from disalign_ops.nn import CrossEntropyLoss

N, D = 6, 2
NOTHING = -(10**6)  # an ignore_index that no target has
DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
Loss = Callable[..., Tensor]

# Of logits (N, C), a target (N,), ignore_index and reduction.
LOSSES: dict[str, Loss] = {}


def loss(function: Loss) -> Loss:
    LOSSES[function.__name__.replace("_", " ")] = function
    return function


def _calibration(z: Tensor) -> tuple[Tensor, ...]:
    c = z.shape[1]
    line = torch.linspace(-1, 1, c, dtype=z.dtype)
    return torch.linspace(-1, 1, len(z), dtype=z.dtype), 1 + 0.3 * line, line.flip(0)


def _counts(z: Tensor) -> list[int]:
    return [1 + (37 * j) % 500 for j in range(z.shape[1])]


def _head(z: Tensor) -> tuple[Tensor, Tensor]:
    """Features and a weight whose product are the logits."""
    return torch.eye(len(z), dtype=z.dtype), z.t()


@loss
def rows(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.cross_entropy(z, t, label_smoothing=0.1, **options)


@loss
def dense(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.cross_entropy(z.t()[None], t[None], **options).squeeze(0)


@loss
def calibrated(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.disalign_cross_entropy(z, t, *_calibration(z), **options)


@loss
def upsampled(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    image = z.t().reshape(1, z.shape[1], 1, len(z))
    return ops.upsample_cross_entropy(image, t.reshape(1, 1, len(z)), **options).reshape(  # type: ignore[union-attr]
        (-1,) if options["reduction"] == "none" else ()
    )


@loss
def linear(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.linear_cross_entropy(*_head(z), t, chunk_bytes=1000, **options)


@loss
def linear_with_all_classes_sampled(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.linear_cross_entropy(*_head(z), t, sample_rate=1.0, **options)


@loss
def disalign_linear(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.disalign_linear_cross_entropy(*_head(z), t, *_calibration(z), **options)


@loss
def class_parallel(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.cross_entropy(z, t, shard=ops.Shard(), **options)


@loss
def class_parallel_disalign(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.disalign_cross_entropy(z, t, *_calibration(z), shard=ops.Shard(), **options)


@loss
def class_parallel_linear(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.linear_cross_entropy(*_head(z), t, shard=ops.Shard(), **options)


@loss
def class_parallel_sampled(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.linear_cross_entropy(*_head(z), t, sample_rate=1.0, shard=ops.Shard(), **options)


@loss
def class_parallel_disalign_linear(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.disalign_linear_cross_entropy(
        *_head(z), t, *_calibration(z), shard=ops.Shard(), **options
    )


def _layer_loss(layer: Any, z: Tensor, t: Tensor, chunk_bytes: int, options: Any) -> Tensor:
    torch.manual_seed(0)
    layer = layer(len(z), z.shape[1], dtype=z.dtype)
    del layer.weight
    layer.weight = z.t()
    x = torch.eye(len(z), dtype=z.dtype)
    loss: Tensor = layer.loss(x, t, chunk_bytes=chunk_bytes, **options)
    return loss


@loss
def a_layers_loss(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return _layer_loss(dnn.DisAlignLinear, z, t, 1 << 20, options)


@loss
def a_layers_loss_in_chunks(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return _layer_loss(dnn.DisAlignLinear, z, t, 1000, options)


@loss
def a_cosine_layers_loss_in_chunks(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return _layer_loss(dnn.DisAlignCosineLinear, z, t, 1000, options)


def _of(make: Callable[[Tensor, Any], CrossEntropyLoss]) -> Loss:
    def function(z: Tensor, t: Tensor, **options: Any) -> Tensor:
        criterion = make(z, options)
        if isinstance(criterion, losses.SeesawLoss):
            criterion.eval().cumulative_samples.copy_(torch.tensor(_counts(z)))
        found: Tensor = criterion(z, t)
        return found

    return function


LOSSES |= {
    "CrossEntropyLoss": _of(lambda z, o: CrossEntropyLoss(**o)),
    "GRWCrossEntropyLoss": _of(
        lambda z, o: dnn.GRWCrossEntropyLoss(_counts(z), normalizer="valid", **o)
    ),
    "balanced_softmax": _of(lambda z, o: losses.balanced_softmax(_counts(z), **o)),
    "logit_adjusted": _of(lambda z, o: losses.logit_adjusted(_counts(z), 0.5, **o)),
    "class_balanced": _of(
        lambda z, o: losses.class_balanced(_counts(z), normalizer="valid", **o)
    ),
    "focal": _of(lambda z, o: losses.focal(**o)),
    "ldam": _of(lambda z, o: losses.ldam(_counts(z), **o)),
    "cosface": _of(lambda z, o: losses.cosface(**o)),
    "vs": _of(lambda z, o: losses.vs(_counts(z), **o)),
    "label_aware_smoothing": _of(lambda z, o: losses.label_aware_smoothing(_counts(z), **o)),
    "seesaw": _of(lambda z, o: losses.seesaw(z.shape[1], **o)),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@st.composite
def targets(draw: st.DrawFn) -> tuple[int, Tensor, int]:
    """The number of classes, a target and an ignore_index, often one that the dtype wraps to a
    class of the target.
    """
    dtype = draw(st.sampled_from(DTYPES))
    classes = draw(st.integers(150, 300))
    a_class = st.integers(0, min(classes - 1, torch.iinfo(dtype).max))
    t = torch.tensor(draw(st.lists(a_class, min_size=N, max_size=N)), dtype=dtype)
    one = int(t[draw(st.integers(0, N - 1))])
    size = 2 ** torch.iinfo(dtype).bits
    wraps = st.sampled_from([k * size for k in (-2, -1, 1, 2)]).map(
        lambda by: max(min(one + by, 2**63 - 1), -(2**63))
    )
    ignore_index = draw(st.one_of(wraps, st.just(one), st.sampled_from([-100, 255, 300, -1])))
    if torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max and draw(st.booleans()):
        t[0] = ignore_index
    return classes, t, ignore_index


def value_and_gradient(
    function: Loss, z: Tensor, t: Tensor, ignore_index: int, reduction: str,
    only: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """only: the positions whose loss is taken; the others have 0."""
    z = z.clone().requires_grad_()
    found = function(z, t, ignore_index=ignore_index, reduction=reduction)
    if only is not None:
        found = torch.where(only, found, 0.0)
    return found.detach(), torch.autograd.grad(found.sum(), z)[0]


@pytest.mark.filterwarnings("ignore:ignore_index is 255")
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=8, deadline=None)
@given(case=targets())
def test_a_loss_is_that_of_the_positions_that_count(
    name: str, case: tuple[int, Tensor, int]
) -> None:
    classes, t, ignore_index = case
    numbers = t.tolist()  # Python's integers, which do not wrap
    counts = torch.tensor([k != ignore_index for k in numbers])
    plain = torch.tensor([k if k != ignore_index else 0 for k in numbers])
    z = torch.sin(torch.arange(N * classes, dtype=torch.float64)).reshape(N, classes)
    function = LOSSES[name]
    each, gradient = value_and_gradient(function, z, plain, NOTHING, "none", only=counts)
    found = value_and_gradient(function, z, t, ignore_index, "none")
    torch.testing.assert_close(found, (each, gradient))
    if counts.any():
        mean = value_and_gradient(function, z, t, ignore_index, "mean")
        expected = (each.sum() / counts.sum(), gradient / counts.sum())
        torch.testing.assert_close(mean, expected)


@pytest.mark.filterwarnings("ignore:ignore_index is 255")
@pytest.mark.parametrize("ignore_index", [-100, 2**40])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_class_is_refused(name: str, dtype: torch.dtype, ignore_index: int) -> None:
    t = torch.tensor([0, 1, 156, 1, 0, 1], dtype=dtype)
    with pytest.raises(IndexError, match="out of bounds"):
        LOSSES[name](torch.randn(N, 5), t, ignore_index=ignore_index, reduction="mean")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_sampled_classes_keep_the_target_that_a_byte_confuses(backend: str) -> None:
    x, w = torch.ones(3, D), torch.zeros(157, D)
    t = torch.tensor([156, 0, 156], dtype=torch.uint8)
    with ops.set_backend(backend):
        found = ops.linear_cross_entropy(x, w, t, sample_rate=0.5)
        whole = ops.linear_cross_entropy(x, w, t)
    torch.testing.assert_close(found, torch.tensor(79.0).log())
    torch.testing.assert_close(whole, torch.tensor(157.0).log())


def test_an_int64_target_is_not_copied() -> None:
    from support.comparison import memory_held

    t = torch.zeros(100_000, dtype=torch.int64)
    assert memory_held(lambda: check_classes(t, 5, -100)) < t.numel() * t.element_size()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_counts_class_156(dtype: torch.dtype) -> None:
    metric = metrics.LongTailAccuracy([1] * 157)
    t = torch.tensor([156, 3], dtype=dtype)
    metric.update(t, t)
    assert metric.compute()["overall"] == 1.0


class Step(torch.nn.Module):
    """Losses of one target: rows, class planes, by name, and of a head without its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(D, 200)
        self.named = losses.label_aware_smoothing(range(1, 201))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        z = self.head(x)
        return (
            ops.cross_entropy(z, t)
            + ops.cross_entropy(z.t()[None].contiguous(), t[None])
            + self.named(z, t)
            + ops.linear_cross_entropy(x, self.head.weight, t)
        )


def test_one_compiled_step_takes_all_integer_dtypes_in_turn() -> None:
    step, x, t = Step(), torch.randn(N, D), torch.tensor([156, 3, 156, 10, 199, 0])
    compiled = torch.compile(step, backend="aot_eager")
    parameters = list(step.parameters())
    wanted = torch.autograd.grad(step(x, t), parameters)
    for dtype in (*DTYPES, *DTYPES[::-1]):
        found = torch.autograd.grad(compiled(x, t.to(dtype)), parameters)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exported_step_takes_the_integer_dtype_it_was_exported_with(dtype: torch.dtype) -> None:
    step, x, t = Step(), torch.randn(N, D), torch.tensor([156, 3, 156, 10, 199, 0])
    rows_ = torch.export.Dim("rows")
    program = torch.export.export(step, (x, t.to(dtype)), dynamic_shapes=({0: rows_}, {0: rows_}))
    x, t = torch.randn(9, D), torch.randint(0, 200, (9,))
    torch.testing.assert_close(program.module()(x, t.to(dtype)), step(x, t))
