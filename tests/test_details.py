"""return_details: what a loss knows of every position besides its value."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops import LossDetails
from disalign_ops._ops import in_forward, reference
from disalign_ops.errors import ArgumentError
from support import ranks
from support.cases import rows
from support.dense_cases import dense
from support.linear_cases import C, N, Problem
from support.sharded_cases import SHARDS, Whole, options_of, shard_of
from support.tolerances import assert_close


def found(p: Any, calibrated: bool, which: Any = True, target: Any = None) -> LossDetails:
    target = p.target if target is None else target
    if calibrated:
        return disalign_ops.disalign_cross_entropy(
            p.logits, target, p.confidence, p.scale, p.bias, form="residual", **p.options,
            return_details=which,
        )  # fmt: skip
    return disalign_ops.cross_entropy(p.logits, target, **p.options, return_details=which)


def plain(p: Any, calibrated: bool, **others: Any) -> Tensor:
    options = {**p.options, **others}
    with disalign_ops.set_backend("reference"):
        if calibrated:
            return disalign_ops.disalign_cross_entropy(
                p.logits, p.target, p.confidence, p.scale, p.bias, form="residual", **options
            )
        return disalign_ops.cross_entropy(p.logits, p.target, **options)


@pytest.mark.parametrize("backend", ["native", "reference", "auto"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_field(dtype: torch.dtype, planes: bool, calibrated: bool, backend: str) -> None:
    shape = (3, 18, 2, 5) if planes else (9, 18)
    for reduction, margin, prior, sampled in itertools.product(
        ("mean", "none"), (None, 0.7), (False, True), (False, True)
    ):
        p: Any = dense(shape, dtype=dtype) if planes else rows(*shape, dtype)
        p.target.view(-1)[::4] = -100
        p.options = {
            "reduction": reduction, "margin": margin, "label_smoothing": 0.1,
            "weight": torch.rand(18).to(dtype) + 0.1,
            "prior": torch.linspace(-3, 3, 18).to(dtype) if prior else None,
            "sample_weight": torch.rand(p.target.shape).to(dtype) if sampled else None,
        }  # fmt: skip
        with disalign_ops.set_backend(backend):
            details = found(p, calibrated, "entropy")
        z = p.logits.detach().movedim(1, -1).reshape(-1, 18)
        a = (p.scale, p.bias, p.confidence.reshape(-1)) if calibrated else (None, None, None)
        u = reference.calibrated_logits(z, *a, p.options["prior"]).detach()
        target = p.target.reshape(-1)
        valid = target != -100
        log_p = u.log_softmax(1)
        t = torch.where(valid, target, 0)[:, None]
        expected = {
            "position_loss": plain(p, calibrated, reduction="none").detach().reshape(-1),
            "log_sum_exp": torch.where(valid, u.logsumexp(1), 0.0),
            "probability": torch.where(valid, log_p.gather(1, t)[:, 0].exp(), 0.0),
            "entropy": torch.where(valid, -(log_p.exp() * log_p).sum(1), 0.0),
        }
        for name, value in expected.items():
            given = getattr(details, name)
            assert given.shape == p.target.shape
            assert not given.requires_grad
            assert_close(given.reshape(-1), value, dtype, name)
        assert torch.equal(details.prediction.reshape(-1), u.argmax(1))
        assert details.correct is not None
        assert torch.equal(details.correct.reshape(-1), (u.argmax(1) == target) & valid)
        assert_close(details.loss.detach(), plain(p, calibrated).detach(), dtype, "loss")


def hard_logits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Ties of the largest logit, masked classes and rows, infinite logits, NaN, which argmax takes
    for the largest, and logits so near to each other that their exponentials are equal.
    """
    z = torch.randn(shape, generator=torch.Generator().manual_seed(11)).to(dtype)
    classes = z.movedim(1, -1).reshape(-1, shape[1])
    classes[0, ::3] = classes[0].max()
    classes[1, : shape[1] // 2] = float("-inf")
    classes[2] = float("-inf")
    classes[3, 5] = classes[3, -1] = float("inf")
    classes[4] = 0.1
    classes[4, -1] = torch.nextafter(torch.tensor(0.1), torch.tensor(1.0))  # above 0.1 in float32
    classes[5] = 7.0
    classes[6, 0] = 100.0
    classes[7, 3] = classes[7, -2] = float("nan")
    classes[8, 1], classes[8, 4], classes[8, 5] = float("inf"), float("nan"), float("inf")
    classes[9:12, 2] = float("nan")
    classes[11, 3] = 300.0
    return classes.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


@pytest.mark.parametrize("ignore_index", [-100, 255, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(23, 5 * 16 + 7), (23, 6), (2, 6, 5, 7), (1, 67, 3, 41)], ids=str
)
def test_the_most_probable_class(
    shape: tuple[int, ...], dtype: torch.dtype, ignore_index: int
) -> None:
    """The very class that argmax has, the first of several."""
    z = hard_logits(shape, dtype)
    expected = z.float().argmax(1) if dtype is not torch.float64 else z.argmax(1)
    positions = (shape[0], *shape[2:])
    indices = torch.randint(0, shape[1], positions, generator=torch.Generator().manual_seed(2))
    indices.view(-1)[:3] = indices.view(-1)[-9:] = ignore_index
    probabilities = torch.rand(shape)
    for target, margin, prior, smoothing in (
        (indices, None, None, 0.0), (indices, 0.5, None, 0.0), (indices, None, 0.25, 0.1),
        (probabilities, None, None, 0.1),
    ):  # fmt: skip
        given = -100 if target is probabilities else ignore_index
        details = disalign_ops.cross_entropy(
            z, target, ignore_index=given, label_smoothing=smoothing, margin=margin,
            prior=None if prior is None else torch.full((shape[1],), prior), return_details=True,
        )  # fmt: skip
        assert torch.equal(details.prediction, expected)


@pytest.mark.parametrize("shape", [(23, 87), (2, 6, 5, 7)], ids=str)
def test_nan_reaches_the_entropy(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape)
    z[0, 3] = float("nan")
    z[1, 2] = float("-inf")
    t = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    details = disalign_ops.cross_entropy(z, t, return_details="entropy")
    assert details.entropy is not None
    assert details.entropy[0].isnan().all()
    assert details.entropy[1:].isfinite().all()


@pytest.mark.parametrize("ignored", ["some", "all"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_an_ignored_position_holds_stays_there(calibrated: bool, ignored: str) -> None:
    """Its prediction is looked at; its logits, of NaN and infinity here, reach nothing else."""
    p: Any = dense((2, 6, 5, 7))
    p.target[:, 1:4] = -100
    if ignored == "all":
        p.target[1] = -100
    with torch.no_grad():
        p.logits.movedim(1, -1)[p.target == -100] = float("nan")
        p.logits[:, 4, 3] = float("inf")
        p.confidence.view(p.target.shape)[p.target == -100] = float("inf")
    p.options = {"label_smoothing": 0.1}
    details = found(p, calibrated, "entropy")
    learned = p.learned if calibrated else [p.logits]
    gradients = torch.autograd.grad(details.loss, learned)
    expected = plain(p, calibrated)
    assert_close(details.loss.detach(), expected.detach(), torch.float64, "loss")
    for a, e in zip(gradients, torch.autograd.grad(expected, learned), strict=True):
        assert_close(a, e, torch.float64, "gradient")
    assert torch.equal(details.prediction[:, 3], torch.zeros(2, 7, dtype=torch.int64))  # NaN


@pytest.mark.parametrize("margin", [None, 0.7, 30.0, 60.0, 200.0, -30.0])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", [(23, 87), (2, 6, 5, 7)], ids=str)
def test_the_entropy(shape: tuple[int, ...], calibrated: bool, margin: float | None) -> None:
    p: Any = dense(shape) if len(shape) > 2 else rows(*shape)
    with torch.no_grad():
        p.logits.movedim(1, -1)[0, ..., ::2] = float("-inf")
        p.logits.movedim(1, -1)[1] *= 40  # all but one of a softmax are next to 0
        p.target[0] = 1
    p.options = {"margin": margin}
    details = found(p, calibrated, "entropy")
    with disalign_ops.set_backend("reference"):
        expected = found(p, calibrated, "entropy")
    assert_close(details.entropy, expected.entropy, torch.float64, "entropy")
    assert torch.equal(details.prediction, expected.prediction)


@pytest.mark.parametrize(
    ("shape", "operator"), [((64, 100), "row"), ((2, 100, 4, 5), "dense")], ids=["rows", "planes"]
)
@pytest.mark.parametrize("soft", [False, True])
def test_the_logits_are_read_once(shape: tuple[int, ...], operator: str, soft: bool) -> None:
    """Nothing looks at them again: no operator but the loss, and an entry of each position."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            of_logits = [isinstance(t, Tensor) and t.data_ptr() == at for t in (*args, result)]
            if any(of_logits[:-1]) and not of_logits[-1]:  # no view
                seen.add(func._opname)
            return result

    kernels = in_forward.NATIVE["cpu"]  # which tests of other kernels change
    if kernels is in_forward.TRITON:
        pytest.skip("a Triton operator is seen as what it is made of: test_triton.py")
    z = torch.randn(shape)
    at = z.data_ptr()
    t = torch.rand(shape) if soft else torch.randint(0, 100, (shape[0], *shape[2:]))
    with Record():
        disalign_ops.cross_entropy(z, t, return_details="entropy")
    forward = f"{operator}_forward"
    assert seen == ({forward} if soft else {forward, "gather"})


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_loss_keeps_its_gradients(calibrated: bool) -> None:
    r = rows(9, 67)
    learned = r.learned if calibrated else [r.logits]
    details = found(r, calibrated)
    assert details.entropy is None
    gradients = torch.autograd.grad(details.loss, learned)
    expected = torch.autograd.grad(plain(r, calibrated), learned)
    for a, e in zip(gradients, expected, strict=True):
        assert_close(a, e, torch.float64, "gradient")


def test_class_probabilities_have_no_one_target() -> None:
    z = torch.randn(4, 5, requires_grad=True)
    details = disalign_ops.cross_entropy(z, torch.rand(4, 5), return_details=True)
    assert details.probability is None
    assert details.correct is None
    assert torch.equal(details.prediction, z.argmax(1))
    assert_close(details.log_sum_exp, z.detach().logsumexp(1), torch.float32, "log_sum_exp")


def test_compiled() -> None:
    z, t = torch.randn(4, 5, requires_grad=True), torch.tensor([1, 2, 3, -100])

    def both(z: Tensor) -> Any:
        return disalign_ops.cross_entropy(z, t, return_details=True)

    eager = both(z)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(z)
    for name in ("loss", "position_loss", "log_sum_exp", "probability", "prediction", "correct"):
        assert torch.equal(getattr(compiled, name), getattr(eager, name)), name


@pytest.mark.parametrize("which", [True, "entropy"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 4), (2, 5, 0)], ids=str)
def test_an_empty_batch(shape: tuple[int, ...], which: Any) -> None:
    z = torch.empty(shape, dtype=torch.bfloat16)
    positions = (shape[0], *shape[2:])
    t, v = torch.empty(positions, dtype=torch.int64), torch.empty(positions)
    prior, vector = torch.zeros(5), torch.ones(5)
    for details in (
        disalign_ops.cross_entropy(z, t, reduction="sum", return_details=which),
        disalign_ops.cross_entropy(z, t, reduction="sum", prior=prior, return_details=which),
        disalign_ops.disalign_cross_entropy(
            z, t, v, vector, vector, reduction="sum", return_details=which
        ),
    ):
        assert details.loss == 0
        for value in details[1:]:
            assert value is None or value.shape == positions
        assert which is True or details.entropy.dtype is torch.float32  # as of other batches


@pytest.mark.parametrize("margin", [0.5, 30.0, 60.0, 100.0, -8.0, -20.0, -60.0, -200.0])
@pytest.mark.parametrize("planes", [False, True])
def test_a_margin_beyond_the_range_of_exp(planes: bool, margin: float) -> None:
    """Negative ones leave the sums with the target's exponential nothing of the others."""
    z, t = torch.randn(7, 11), torch.arange(7)
    margins = torch.full((11,), 0.5)
    margins[::2] = margin
    of, target = (z[..., None], t[:, None]) if planes else (z, t)
    details = disalign_ops.cross_entropy(of, target, margin=margins, return_details="entropy")
    details = disalign_ops.LossDetails(
        details.loss,
        *(None if d is None else d.reshape(7) for d in details[1:]),  # type: ignore[arg-type]
    )
    assert details.probability is not None
    assert details.entropy is not None
    entropy = torch.distributions.Categorical(logits=z).entropy()
    assert_close(details.entropy, entropy, torch.float32, "entropy")
    assert_close(details.log_sum_exp, z.logsumexp(1), torch.float32, "log_sum_exp")
    expected = z.softmax(1).gather(1, t[:, None])[:, 0]
    assert_close(details.probability, expected, torch.float32, "probability")


def test_a_margin_where_every_class_is_masked() -> None:
    z = torch.full((2, 5), float("-inf"))
    for margin in (None, 0.5, 60.0, -0.5):
        details = disalign_ops.cross_entropy(
            z, torch.tensor([1, -100]), margin=margin, return_details=True
        )
        assert details.log_sum_exp.tolist() == [float("-inf"), 0.0]


@pytest.mark.parametrize("chunk_bytes", [1 << 9, 1 << 26], ids=["chunks of classes", "one"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_linear_head(calibrated: bool, chunk_bytes: int) -> None:
    p = Problem.of(torch.float64)
    for margin, soft, reduction in itertools.product(
        (None, 0.7, -60.0), (False, True), ("mean", "none")
    ):
        if soft and margin:
            continue
        q = Problem(p.tensors, torch.rand(N, C, dtype=torch.float64) if soft else p.target)
        options: dict[str, Any] = {
            "margin": margin, "label_smoothing": 0.1, "reduction": reduction,
            "prior": torch.linspace(-3, 3, C, dtype=torch.float64),
            "sample_weight": torch.rand(N, dtype=torch.float64), "return_details": "entropy",
        }  # fmt: skip
        given: Any = q.loss(calibrated, chunk_bytes=chunk_bytes, **options)
        expected: Any = q.unfused(calibrated, **options)
        compare_details(given, expected)
        (found,) = torch.autograd.grad(given.loss.sum(), p.tensors["features"], retain_graph=True)
        (wanted,) = torch.autograd.grad(expected.loss.sum(), p.tensors["features"])
        assert_close(found, wanted, torch.float64, "gradient")


def compare_details(found: Any, expected: LossDetails) -> None:
    for name, value in expected._asdict().items():
        given = getattr(found, name)
        if value is None or not value.is_floating_point():
            assert given is None if value is None else torch.equal(given, value), name
        else:
            assert_close(given.detach(), value.detach(), torch.float64, name)


def _over_ranks(rank: int, world: int) -> None:
    torch.manual_seed(0)
    for sizes in SHARDS[world]:
        for soft, margin in (
            (False, {}), (True, {}), (False, {"margin": "class"}), (False, {"margin": -60.0}),
        ):  # fmt: skip
            whole = Whole(torch.float64, {"weight": "class", "prior": "class", **margin})
            target = torch.rand(len(whole.target), sum(sizes)).double() if soft else whole.target
            a, b = (shard_of(t, rank, sizes) for t in (whole.scale, whole.bias))
            found = disalign_ops.disalign_cross_entropy(
                shard_of(whole.logits, rank, sizes, 1),
                target.split(sizes, 1)[rank] if soft else target,
                whole.confidence, a, b, **options_of(whole, rank, sizes),
                shard=disalign_ops.Shard(), return_details="entropy",
            )  # fmt: skip
            expected = disalign_ops.disalign_cross_entropy(
                whole.logits, target, whole.confidence, whole.scale, whole.bias, **whole.options,
                return_details="entropy",
            )  # fmt: skip
            compare_details(found, expected)
        z = hard_logits((23, sum(sizes)), torch.float32)
        found = disalign_ops.cross_entropy(
            shard_of(z, rank, sizes, 1), torch.arange(23) % sum(sizes), shard=disalign_ops.Shard(),
            return_details=True,
        )  # fmt: skip
        assert torch.equal(found.prediction, z.argmax(1))


def test_over_processes() -> None:
    ranks.run(_over_ranks, 2)


def test_a_sample_of_the_classes_has_none() -> None:
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ArgumentError, match=r"^return_details must be False where sample_rate"):
        disalign_ops.linear_cross_entropy(x, w, TARGET, sample_rate=0.5, return_details=True)


TARGET = torch.zeros(4, dtype=torch.int64)
REFUSED: dict[str, dict[str, Any]] = {
    "a word": {"return_details": "all"},
    "a number": {"return_details": 2},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    given = {"target": TARGET, **REFUSED[case]}
    with pytest.raises(ArgumentError, match=r"^return_details must be False"):
        disalign_ops.cross_entropy(torch.randn(4, 5), **given)
