"""The operators of a shard, rows of which the logits are some of the classes, against reference.py.

`all_reduce_sums` in test_linear.py and test_class_parallel.py is what they are for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from disalign_ops._ops import reference, schemas, shard_reference
from disalign_ops._ops.codes import CALIBRATION, LOGITS
from support.cases import SHAPES
from support.tolerances import ROUNDING, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("logits", "scale", "bias", "confidence")


def forward(*arguments: Any) -> Tensor:
    (sums,) = schemas.ROW.operator("shard_forward")(*arguments, 0)
    assert isinstance(sums, Tensor)
    return sums


def backward(*arguments: Any, in_place: bool = False) -> list[Tensor]:
    name = "shard_backward_" if in_place else "shard_backward"
    found: list[Tensor] = schemas.ROW.operator(name)(*arguments)
    return found


@dataclass
class Shard:
    """The operators' arguments, in their order."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    confidence: Tensor | None = None
    prior: Tensor | None = None
    margin: Tensor | None = None
    keep: float = 1.0
    share: float = 0.0

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def exact(self) -> Shard:
        """In float64."""
        values = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
                  for t in self.arguments)  # fmt: skip
        return Shard(*values)

    @property
    def wanted(self) -> int:
        return LOGITS | (CALIBRATION if self.scale is not None else 0)

    def factors(self) -> Tensor:
        """As of rows whose other shards have about as much."""
        sums = shard_reference.shard_sums(*self.exact().arguments)
        factors = torch.rand(sums.shape, dtype=torch.float64)
        factors[0], factors[4] = sums[0] + 0.3, sums[3]
        return factors.to(reference.accumulate_dtype(self.logits.dtype))


def shard(n: int, c: int, dtype: torch.dtype, *given: str) -> Shard:
    """Targets of this shard, of others (-1) and of none (-2), whose logits are NaN."""
    acc = reference.accumulate_dtype(dtype)
    target = torch.randint(-2, c, (n,))
    target[1::3] = -1
    logits = (torch.randn(n, c, dtype=torch.float64) * 3).to(dtype)
    logits[target == -2] = float("nan")

    def vector(entries: int) -> Tensor:
        return torch.randn(entries, dtype=torch.float64).to(acc)

    made = Shard(logits, target, share=0.1 / c if "smoothing" in given else 0.0)
    if "calibration" in given:
        made.scale = (vector(c) * 0.3).clamp(min=-0.9)  # 1 + c a stays positive
        made.bias, made.confidence = vector(c), vector(n)
    if "weight" in given:
        made.weight = vector(c).abs()
    for name in ("prior", "margin"):
        if name in given:
            setattr(made, name, vector(c))
    return made


OPTIONS = {
    "plain": (),
    "calibrated": ("calibration",),
    "margin": ("margin",),
    "smoothing without weights": ("smoothing",),
    "weights without smoothing": ("weight", "calibration"),
    "shifted": ("prior", "margin", "weight", "smoothing"),
    "everything": ("calibration", "prior", "margin", "weight", "smoothing"),
}


def compare(s: Shard) -> None:
    dtype = s.logits.dtype
    arithmetic = reference.accumulate_dtype(dtype)
    exact = s.exact()
    sums = forward(*s.arguments)
    expected = shard_reference.shard_sums(*exact.arguments)
    for k, what in enumerate(("maximum", "rest", "target logit", "target slope", "smooth")):
        # smooth adds 8142 terms as large as 10 one after another.
        assert_close(sums[k], expected[k], arithmetic, what, factor=2.0)
    factors = s.factors()
    found = backward(factors, *s.arguments, s.wanted)
    gradients = shard_reference.shard_gradients(factors.double(), *exact.arguments)
    wanted = NAMES if s.scale is not None else NAMES[:1]
    assert len(found) == len(wanted)
    for what, actual, value in zip(wanted, found, gradients, strict=False):
        if what == "logits" and dtype != arithmetic:
            # One rounding; Triton's interpreter cuts bits off where GPUs round: twice as much.
            torch.testing.assert_close(
                actual.double(), value, rtol=2 * ROUNDING[dtype], atol=ROUNDING[dtype] * 1e-2
            )
        else:
            assert_close(actual, value, arithmetic, what, factor=4.0)
    over = replace(s, logits=s.logits.clone())
    in_place = backward(factors, *over.arguments, s.wanted, in_place=True)
    assert torch.equal(over.logits, found[0])
    # Where the rows lie otherwise than in the copy, CUDA adds in another order.
    for actual, value in zip(in_place, found[1:], strict=True):
        assert_close(actual, value, arithmetic, "in place", factor=4.0)


@pytest.mark.parametrize("given", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("shape", [*SHAPES, (3, 9001)], ids=str)
def test_shapes(shape: tuple[int, int], given: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    compare(shard(*shape, torch.float32, *given))


@pytest.mark.parametrize("given", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, given: tuple[str, ...]) -> None:
    torch.manual_seed(2)
    compare(shard(9, 133, dtype, *given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contents_masked_classes(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    s = shard(11, 40, dtype, "calibration", "prior")
    mask = torch.rand(11, 40) < 0.4
    mask[:, 0] = False
    mask[s.target == -2] = False
    s.logits[mask] = float("-inf")
    compare(s)


def test_contents_a_shard_of_masked_classes_adds_nothing() -> None:
    s = shard(3, 20, torch.float32, "calibration")
    s.logits[:], s.target[:] = float("-inf"), -1
    sums = forward(*s.arguments)
    assert torch.equal(sums[0], torch.full((3,), torch.finfo(torch.float32).min))
    assert torch.equal(sums[1:], torch.zeros(4, 3))
    gradients = backward(torch.ones(5, 3), *s.arguments, s.wanted)
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


SOFT_OPTIONS = {
    "plain": (),
    "calibrated": ("calibration",),
    "weights without smoothing": ("weight", "calibration"),
    "everything": ("calibration", "prior", "weight", "smoothing"),
}


@pytest.mark.parametrize("given", SOFT_OPTIONS.values(), ids=list(SOFT_OPTIONS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 133), (5, 1203), (3, 9001)], ids=str)
def test_class_probabilities(
    shape: tuple[int, int], dtype: torch.dtype, given: tuple[str, ...]
) -> None:
    torch.manual_seed(6)
    s = shard(*shape, dtype, *given)
    s.logits = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    s.target = (torch.rand(shape) ** 4 / shape[1]).to(dtype)
    s.keep = 1 - s.share * shape[1]
    compare(s)


def test_contents_strided_rows() -> None:
    torch.manual_seed(4)
    s = shard(7, 30, torch.float32, "calibration")
    wide = torch.zeros(7, 37)
    wide[:, 3:33] = s.logits
    narrow = replace(s, logits=wide[:, 3:33])
    assert torch.equal(forward(*s.arguments)[0], forward(*narrow.arguments)[0])
    compare(narrow)
    # In place, nothing beside the rows is written.
    backward(s.factors(), *narrow.arguments, s.wanted, in_place=True)
    assert torch.equal(wide[:, :3], torch.zeros(7, 3))
    assert torch.equal(wide[:, 33:], torch.zeros(7, 4))


def test_a_confident_row_keeps_its_small_loss_in_the_rest() -> None:
    """The target's term is not in `rest`, so what is beside it keeps its digits."""
    s = Shard(torch.tensor([[30.0, 0.0, -1.0]]), torch.tensor([0]))
    rest = forward(*s.arguments)[1]
    expected = torch.tensor([-30.0, -31.0], dtype=torch.float64).exp().sum()
    assert abs(float(rest) / float(expected) - 1) < 1e-5


@pytest.mark.parametrize("wrong", [-3, 40])
def test_a_target_out_of_range_raises(wrong: int) -> None:
    s = shard(5, 40, torch.float32)
    s.target[2] = wrong
    with pytest.raises(RuntimeError, match=f"Target {wrong} is out of bounds"):
        forward(*s.arguments)


def test_opcheck() -> None:
    s = shard(5, 40, torch.float32, *OPTIONS["everything"])
    every = (s.factors(), *s.arguments, s.wanted)
    checks = ("test_schema", "test_faketensor")
    for name, arguments in (
        ("row_shard_forward", (*s.arguments, 0)),
        ("row_shard_backward", every),
        ("row_shard_backward_", every),
    ):
        operator = getattr(torch.ops.disalign_ops, name).default
        torch.library.opcheck(operator, arguments, test_utils=checks)
