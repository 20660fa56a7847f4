"""Backward makes the probabilities with the maximum and the sum that forward found.

They are probabilities only where both round a class's calibrated logit alike: a row whose target
stands alone has e^0 over a sum of 1, and one unit in the last place of a logit of 1e9 is 64. So
whatever the kernels do otherwise in the two passes, in a row's form or next to other rows, shows
here first.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops._ops import reference
from support.linear_cases import Problem
from support.tolerances import ROUNDING, assert_close

N, C, MASKED = 7, 83, 5
OFFSETS = (0.0, 1e4, 1e6, -1e6, -1e9)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sure(
    dtype: torch.dtype, offset: float, masked_scale: float, classes: int = C
) -> tuple[Tensor, ...]:
    """Logits behind an offset, the target's far above in every second row; a masked class.

    Scales of one sign, and of another for the masked class: its calibration is -inf or NaN.
    """
    target = torch.arange(N) * 9 + 7
    logits = torch.randn(N, classes, dtype=torch.float64) + offset
    logits[torch.arange(0, N, 2), target[::2]] += 40 + abs(offset) * 1e-2
    logits[1::3, MASKED] = float("-inf")
    scale = torch.rand(classes, dtype=torch.float64) * 0.3 + 0.01
    if offset < 0:
        scale = -scale  # the target stays above
    scale[MASKED] = masked_scale
    confidence, bias = (
        torch.randn(N, dtype=torch.float64),
        torch.randn(classes, dtype=torch.float64),
    )
    return target, *(t.to(dtype) for t in (logits, confidence, scale, bias))


def forward_makes(loss: Callable[..., Tensor], learned: list[Tensor]) -> Tensor:
    return torch.autograd.grad(loss(reduction="sum"), learned)[0]


def backward_makes_all(loss: Callable[..., Tensor], learned: list[Tensor]) -> Tensor:
    return torch.autograd.grad(loss(reduction="sum", gradient="backward"), learned)[0]


def backward_makes(loss: Callable[..., Tensor], learned: list[Tensor]) -> Tensor:
    return torch.autograd.grad(loss(reduction="none").sum(), learned)[0]


def backward_makes_it_alone(loss: Callable[..., Tensor], learned: list[Tensor]) -> Tensor:
    return torch.autograd.grad(loss(reduction="none").sum(), learned[:1])[0]


def backward_makes_it_again(loss: Callable[..., Tensor], learned: list[Tensor]) -> Tensor:
    total = loss(reduction="sum")
    torch.autograd.grad(total, learned, retain_graph=True)
    return torch.autograd.grad(total, learned)[0]


def backward_makes_it_again_alone(loss: Callable[..., Tensor], learned: list[Tensor]) -> Tensor:
    total = loss(reduction="sum")
    torch.autograd.grad(total, learned, retain_graph=True)
    return torch.autograd.grad(total, learned[:1])[0]


def in_place(loss: Callable[..., Tensor], learned: list[Tensor]) -> Tensor:
    return torch.autograd.grad(loss(reduction="sum", inplace_backward=True), learned)[0]


WAYS = (
    forward_makes, backward_makes_all, backward_makes, backward_makes_it_alone,
    backward_makes_it_again, backward_makes_it_again_alone, in_place,
)  # fmt: skip
EXTRAS = {"none": {}, "prior": {"prior": torch.randn(C)}, "margin": {"margin": 0.3}}


@pytest.mark.parametrize("dense", [False, True], ids=["rows", "dense"])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.__name__))
@pytest.mark.parametrize("masked_scale", [0.2, 0.0, -0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_gradient_by_its_calibrated_logits_sums_to_zero(
    dtype: torch.dtype, masked_scale: float, way: Callable[..., Tensor], extra: str, dense: bool
) -> None:
    for offset in OFFSETS:
        if abs(offset) > torch.finfo(dtype).max:
            continue
        target, z, confidence, scale, bias = sure(dtype, offset, masked_scale)
        if dense:  # the rows are the positions of one image
            target, z, confidence = target[None], z.t()[None].contiguous(), confidence[None]
        learned = [t.requires_grad_() for t in (z, confidence, scale, bias)]
        logits = learned[0] * 1.0  # no leaf, so that it may be overwritten
        learned[0] = logits

        def loss(**options: object) -> Tensor:
            return disalign_ops.disalign_cross_entropy(
                logits, target, confidence, scale, bias, form="residual", **EXTRAS[extra], **options  # noqa: B023
            )  # fmt: skip

        exact = [t.detach().double() for t in (confidence, scale)]
        gradient = way(loss, learned).double()
        q = gradient[0].t() if dense else gradient
        q = q / (1 + torch.sigmoid(exact[0]).reshape(N, 1) * exact[1])
        rounding = ROUNDING.get(dtype, 4e-6 if dtype == torch.float32 else 1e-13)
        what = f"{offset}: {q.sum(1).tolist()}"
        assert (q.sum(1).abs() <= rounding * q.abs().sum(1) + 1e-6).all(), what
        assert (q.abs() <= 1 + rounding).all(), what
        assert (q[1::3, MASKED] == 0).all()


def sure_head(offset: float) -> Problem:
    """A linear head whose features are next to the target's weights: p_t is next to 1."""
    n, d, c = 16, 32, 500
    p = Problem.of(torch.float32, n, d, c)
    t = p.tensors
    with torch.no_grad():
        p.target[:] = torch.randint(0, c, (n,))
        t["features"].copy_(t["linear_weight"][p.target] + 0.05 * torch.randn(n, d))
        t["scale"].copy_(0.3 * torch.rand(c))
        t["linear_bias"] += offset
    return p


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_linear_head_that_is_sure(offset: float) -> None:
    # Forward and backward go over a chunk's logits as over a shard of the classes.
    p = sure_head(offset)
    t, n = p.tensors, len(p.target)
    loss = p.loss(True, form="residual", reduction="none")
    (bias,) = torch.autograd.grad(loss.sum(), [t["bias"]])
    # sum_j q_j = 0 in each row, so that the bias's gradients have the sum 0 as well.
    assert abs(float(bias.sum())) <= 4e-6 * n


def test_the_gradients_of_a_linear_head_that_is_sure() -> None:
    p = sure_head(0.0)
    e = p.to(torch.float64)
    options = {"form": "residual", "reduction": "sum"}
    found = torch.autograd.grad(p.loss(True, **options), p.learned(True))
    expected = torch.autograd.grad(e.unfused(True, **options), e.learned(True))
    for k, (actual, value) in enumerate(zip(found, expected, strict=True)):
        assert_close(actual, value, torch.float32, f"gradient {k}", 4.0)


@pytest.mark.parametrize("learned", [(), (0,), (1,), (0, 1, 2, 3)], ids=str)
def test_a_scale_that_takes_the_calibration_beyond_the_largest_number(
    learned: tuple[int, ...],
) -> None:
    # a z overflows to -inf, z + c a z does not: the class stands above all others.
    z = torch.randn(5, 33)
    z[2, 3], scale = 2e38, torch.zeros(33)
    scale[3] = -2.0
    given = [z, torch.full((5,), -3.0), scale, torch.zeros(33)]
    for k in learned:
        given[k].requires_grad_()
    target = torch.arange(5)
    loss = disalign_ops.disalign_cross_entropy(
        given[0], target, *given[1:], form="residual", reduction="none"
    )
    z, confidence, scale, bias = (t.detach().double() for t in given)
    exact = reference.calibrate(z, scale, bias, confidence)
    expected = torch.nn.functional.cross_entropy(exact, target, reduction="none")
    for row in range(5):
        assert_close(loss[row].detach(), expected[row], torch.float32, f"row {row}")


def test_a_row_is_the_same_next_to_any_other() -> None:
    """Masked classes, a guess that is corrected, NaN and ignored rows are each row's own."""
    # 96: on a GPU, too, a row's sums are made in one order wherever 16-byte units divide it alike.
    target, z, confidence, scale, bias = sure(torch.float32, 0.0, -0.2, classes=96)
    z[3, 60], z[4, 2] = 300.0, float("nan")
    given = [t.requires_grad_() for t in (z, confidence, scale, bias)]

    def run(rows: list[int]) -> list[Tensor]:
        loss = disalign_ops.disalign_cross_entropy(
            given[0][rows], target[rows], given[1][rows], *given[2:],
            form="residual", reduction="none",
        )  # fmt: skip
        grads = torch.autograd.grad(loss.sum(), given[:2])
        return [loss.detach(), *(g[rows] for g in grads)]

    alone = [run([i]) for i in range(N)]
    for order in (list(range(N)), [6, 0, 2, 5, 1, 3, 4], [4, 1, 0, 6]):
        together = run(order)
        for k, i in enumerate(order):
            for one, several in zip(alone[i], together, strict=True):
                assert torch.equal(one[0].nan_to_num(7.0), several[k].nan_to_num(7.0)), (order, i)
