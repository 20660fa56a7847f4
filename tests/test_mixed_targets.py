"""Two classes a position, as mixup and CutMix have them: target=(a, b, lam)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import disalign_ops
from disalign_ops.errors import ArgumentError, ArgumentTypeError
from support.cases import Rows, rows
from support.comparison import memory_allocated
from support.dense_cases import Dense, dense
from support.tolerances import assert_close, assert_no_worse

NAMES = ("input", "confidence", "scale", "bias")


def two(p: Rows | Dense) -> tuple[Tensor, Tensor]:
    """Class indices; some alike, some ignored in one or in both."""
    classes = p.logits.shape[1]
    a, b = p.target, torch.randint(0, classes, p.target.shape)
    b.view(-1)[1] = a.view(-1)[1]
    a.view(-1)[2] = b.view(-1)[3] = -100
    a.view(-1)[4] = b.view(-1)[4] = -100
    return a, b


def formula(p: Rows | Dense, a: Tensor, b: Tensor, lam: Tensor, calibrated: bool) -> Tensor:
    """lam CE(a) + (1 - lam) CE(b), by two losses of the reference."""
    options = dict(p.options)
    reduction, normalizer = options.pop("reduction"), options.pop("normalizer", "weights")
    v = options.pop("sample_weight", None)
    v = torch.ones(a.shape, dtype=p.logits.dtype) if v is None else v
    losses: Any = 0
    weights = torch.zeros(a.shape, dtype=torch.float64)
    for target, share in ((a, lam), (b, 1 - lam)):
        given = options | {"sample_weight": v * share, "reduction": "none"}
        if calibrated:
            losses = losses + disalign_ops.disalign_cross_entropy(
                p.logits, target, p.confidence, p.scale, p.bias, **given
            )
        else:
            losses = losses + disalign_ops.cross_entropy(p.logits, target, **given)
        w = options.get("weight")
        of_class = torch.ones(()) if w is None else w[target.clamp(min=0)]
        weights += torch.where(target == -100, 0.0, v * share * of_class)
    if reduction == "none":
        return losses  # type: ignore[no-any-return]
    if reduction == "sum":
        return losses.sum()  # type: ignore[no-any-return]
    valid = ((a != -100) | (b != -100)).sum()
    divisor = {"weights": weights.sum(), "valid": valid, "count": a.numel()}.get(
        normalizer, normalizer
    )
    return losses.sum() / divisor  # type: ignore[no-any-return]


def gradients(loss: Tensor, p: Rows | Dense, calibrated: bool, upstream: Tensor) -> list[Tensor]:
    learned = p.learned if calibrated else [p.logits]
    return [loss.detach(), *torch.autograd.grad(loss, learned, upstream.to(loss.dtype))]


def compare(p: Any, lam: Tensor | float, calibrated: bool, backend: str = "native") -> None:
    dtype = p.logits.dtype
    a, b = two(p)
    each = p.options.setdefault("reduction", "mean") == "none"
    upstream = torch.randn(a.shape if each else (), dtype=torch.float64)
    with disalign_ops.set_backend(backend):
        if calibrated:
            loss = disalign_ops.disalign_cross_entropy(
                p.logits, (a, b, lam), p.confidence, p.scale, p.bias, **p.options
            )
        else:
            loss = disalign_ops.cross_entropy(p.logits, (a, b, lam), **p.options)
        found = gradients(loss, p, calibrated, upstream)
    exact = p.to(torch.float64)
    share = torch.as_tensor(lam, dtype=torch.float64).expand(a.shape)
    with disalign_ops.set_backend("reference"):
        expected = gradients(formula(exact, a, b, share, calibrated), exact, calibrated, upstream)
    for what, x, e in zip(("loss", *NAMES), found, expected, strict=False):
        assert_close(x, e, dtype, what)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("planes", [False, True])
def test_every_combination_of_options(
    planes: bool, reduction: str, calibrated: bool, backend: str
) -> None:
    shape = (3, 18, 2, 5) if planes else (9, 18)
    for weighted, smoothing, sampled, normalizer, extra in itertools.product(
        (False, True), (0.0, 0.1), (False, True), ("weights", "valid", "count", 7.5),
        ({}, {"prior": torch.linspace(-3, 3, 18, dtype=torch.float64)}, {"margin": 0.5},
         {"focal_gamma": 2.0}),
    ):  # fmt: skip
        p: Any = dense(shape) if planes else rows(*shape)
        p.options = {
            "weight": torch.rand(18, dtype=torch.float64) + 0.1 if weighted else None,
            "label_smoothing": smoothing,
            "sample_weight": torch.rand(p.target.shape, dtype=torch.float64) if sampled else None,
            "normalizer": normalizer, "reduction": reduction, **extra,
        }  # fmt: skip
        if p.options["sample_weight"] is None:
            del p.options["sample_weight"]
        lam = torch.rand(p.target.shape, dtype=torch.float64)
        compare(p, lam, calibrated, backend)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(9, 1203), (3, 21, 5, 7)], ids=str)
def test_float32(shape: tuple[int, ...], lam: float) -> None:
    p: Any = dense(shape, dtype=torch.float32) if len(shape) > 2 else rows(*shape, torch.float32)
    compare(p, lam, True)
    compare(p, lam, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype: torch.dtype) -> None:
    z = (torch.randn(9, 1203) * 3).to(dtype)
    a, b = torch.randint(0, 1203, (2, 9))
    results = []
    for ours, cast in ((True, dtype), (False, dtype), (False, torch.float64)):
        input = z.to(cast).requires_grad_()
        if ours:
            loss = disalign_ops.cross_entropy(input, (a, b, 0.7))
        else:
            loss = 0.7 * F.cross_entropy(input, a) + 0.3 * F.cross_entropy(input, b)
        results.append((loss.detach(), *torch.autograd.grad(loss, input)))
    for actual, composed, exact, what in zip(*results, ("loss", "input"), strict=True):
        assert_no_worse(actual, composed, exact, dtype, what)


def test_it_is_the_soft_form_without_weights() -> None:
    z = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    a, b = torch.randint(0, 11, (2, 7))
    lam = torch.rand(7, dtype=torch.float64)
    soft = lam[:, None] * F.one_hot(a, 11) + (1 - lam)[:, None] * F.one_hot(b, 11)
    for smoothing in (0.0, 0.1):
        pair = disalign_ops.cross_entropy(z, (a, b, lam), label_smoothing=smoothing)
        probabilities = disalign_ops.cross_entropy(z, soft, label_smoothing=smoothing)
        torchs = F.cross_entropy(z, soft, label_smoothing=smoothing)
        assert_close(pair.detach(), torchs.detach(), torch.float64, "loss")
        assert_close(probabilities.detach(), torchs.detach(), torch.float64, "soft")
        (found,), (expected,) = (torch.autograd.grad(x, z) for x in (pair, torchs))
        assert_close(found, expected, torch.float64, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 1000), (1, 1000, 8, 8)], ids=str)
def test_nothing_of_the_logits_size_beyond_one_loss(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    z = torch.randn(shape).to(dtype).requires_grad_()
    a, b = torch.randint(0, shape[1], (2, shape[0], *shape[2:]))
    lam = torch.rand(a.shape)

    def step(target: Any) -> None:
        z.grad = None
        disalign_ops.cross_entropy(z, target).backward()

    def allocated(target: Any) -> int:
        step(target)
        return memory_allocated(lambda: step(target))

    # Vectors of one entry a position are what it takes beside.
    assert allocated((a, b, lam)) < allocated(a) + 0.6 * z.numel() * dtype.itemsize


def test_in_place_twice_and_again() -> None:
    z = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    a, b = torch.randint(0, 11, (2, 7))
    made = z * 1
    disalign_ops.cross_entropy(made, (a, b, 0.4), inplace_backward=True).backward()
    assert z.grad is not None
    loss = disalign_ops.cross_entropy(z, (a, b, 0.4))
    (expected,) = torch.autograd.grad(loss, z, retain_graph=True)
    (again,) = torch.autograd.grad(loss, z)
    assert torch.equal(expected, again)
    assert torch.equal(made.detach(), z.grad)
    assert_close(z.grad, expected, torch.float64, "in place")
    assert torch.autograd.gradcheck(lambda x: disalign_ops.cross_entropy(x, (a, b, 0.4)), z)
    assert torch.autograd.gradgradcheck(lambda x: disalign_ops.cross_entropy(x, (a, b, 0.4)), z)


def test_compiled_and_transformed() -> None:
    z = torch.randn(7, 11, dtype=torch.float64)
    a, b = torch.randint(0, 11, (2, 7))

    def loss(z: Tensor) -> Tensor:
        return disalign_ops.cross_entropy(z, (a, b, 0.4))

    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(torch.func.grad(loss)(z), expected, torch.float64, "torch.func.grad")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(leaf), leaf)
    assert_close(found, expected, torch.float64, "torch.compile")


def test_what_an_ignored_row_holds_goes_no_further() -> None:
    r = rows(5, 7)
    a, b = two(r)
    with torch.no_grad():
        r.logits[4] = float("nan")
        r.logits[0, (int(a[0]) + 1) % 7] = float("-inf")
    b[0] = a[0]
    loss = disalign_ops.disalign_cross_entropy(
        r.logits, (a, b, 0.5), r.confidence, r.scale.abs(), r.bias, form="residual"
    )
    for grad in torch.autograd.grad(loss, r.learned):
        assert torch.isfinite(grad).all()


def test_weights_below_zero() -> None:
    """An ignored class, which weighs 0, is then the larger of the two."""
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([-1.0, 1.0, -0.5, 2.0, -2.0], dtype=torch.float64)
    a, b = torch.tensor([0, 1, 2, 4, 0, -100]), torch.tensor([-100, 0, 4, 4, 3, 2])
    loss = disalign_ops.cross_entropy(z, (a, b, 0.3), w, reduction="none")
    expected = 0.3 * F.cross_entropy(z, a, w, reduction="none")
    expected = expected + 0.7 * F.cross_entropy(z, b, w, reduction="none")
    assert_close(loss.detach(), expected.detach(), torch.float64, "loss")
    (found,), (exact,) = (torch.autograd.grad(x.sum(), z) for x in (loss, expected))
    assert_close(found, exact, torch.float64, "gradient")


def test_a_share_that_is_a_number_is_not_copied_to_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which would wait for a GPU."""
    z, (a, b) = torch.randn(4, 5), torch.randint(0, 5, (2, 4))
    expected = disalign_ops.cross_entropy(z, (a, b, 0.3))

    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(torch, "tensor", never)
    assert torch.equal(disalign_ops.cross_entropy(z, (a, b, 0.3)), expected)


@pytest.mark.parametrize("options", [{}, {"margin": 0.5}], ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_a_masked_class_is_infinite_unless_it_has_no_share(
    which: int, options: dict[str, Any]
) -> None:
    z = torch.randn(2, 5, dtype=torch.float64)
    z[:, which] = float("-inf")
    z.requires_grad_()
    a, b = torch.zeros(2).long(), torch.ones(2).long()
    lam = torch.tensor([0.4, float(which)], dtype=torch.float64)
    c = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(5, dtype=torch.float64, requires_grad=True)
    each = disalign_ops.disalign_cross_entropy(
        z, (a, b, lam), c, scale, torch.zeros(5, dtype=torch.float64), reduction="none", **options
    )
    assert each[0] == float("inf")
    assert torch.isfinite(each[1])
    for gradient in torch.autograd.grad(each[1], (z, c, scale)):
        assert torch.isfinite(gradient).all()


REFUSED: dict[str, tuple[Any, str]] = {
    "two parts": (lambda a: (a, a), "target must have three parts"),
    "a share of 2": (lambda a: (a, a, 2.0), r"target\[2\] must be"),
    "an entry of 2": (lambda a: (a, a, torch.full(a.shape, 2.0)), r"target\[2\] must be from 0 to"),
    "no number": (lambda a: (a, a, torch.full(a.shape, float("nan"))), r"target\[2\] must be from"),
    "a share an image": (lambda a: (a, a, torch.rand(2)), r"target\[2\] must be a number or have"),
    "probabilities": (lambda a: (a, torch.rand(4, 5), 0.5), "target must hold class indices"),
    "another shape": (lambda a: (a, a[1:], 0.5), "target must have shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    make, match = REFUSED[case]
    with pytest.raises(ArgumentError, match=f"^{match}"):
        disalign_ops.cross_entropy(torch.randn(4, 5), make(torch.zeros(4).long()))


@pytest.mark.parametrize("option", [{"gradient": "forward"}, {"inplace_backward": True}], ids=str)
@pytest.mark.parametrize(
    "twice",
    [{"margin": 0.5}, {"focal_gamma": 2.0}, {"weight": torch.ones(5), "label_smoothing": 0.1}],
    ids=lambda options: "+".join(options),
)
def test_what_two_reads_refuse(twice: dict[str, Any], option: dict[str, Any]) -> None:
    z, (a, b) = torch.randn(4, 5, requires_grad=True) * 1, torch.randint(0, 5, (2, 4))
    with pytest.raises(ArgumentError, match=f"^{next(iter(option))} must be"):
        disalign_ops.cross_entropy(z, (a, b, 0.5), **twice, **option)
    disalign_ops.cross_entropy(z, (a, b, 0.5), **option).backward()


def test_a_share_of_indices() -> None:
    """Which `loss_denominator` would take as a third target."""
    a = torch.zeros(4).long()
    for share in (a, torch.tensor(1)):
        with pytest.raises(ArgumentTypeError, match=r"^target\[2\] must be a number or have"):
            disalign_ops.cross_entropy(torch.randn(4, 5), (a, a, share))


@pytest.mark.parametrize("which", [0, 1])
def test_a_target_out_of_bounds(which: int) -> None:
    pair = torch.zeros(2, 4).long()
    pair[which, 2] = 5
    with pytest.raises(IndexError, match=rf"^Target 5 is out of bounds: target\[{which}\]\[2\],"):
        disalign_ops.cross_entropy(torch.randn(4, 5), (pair[0], pair[1], 0.5))
    planes = pair.view(2, 1, 2, 2)
    with pytest.raises(IndexError, match=rf"target\[{which}\]\[0, 1, 0\],"):
        disalign_ops.cross_entropy(torch.randn(1, 5, 2, 2), (planes[0], planes[1], 0.5))
