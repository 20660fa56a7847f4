"""The registered operators: opcheck, fakes, torch.compile, backstops against direct misuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import disalign_ops
from disalign_ops._ops import schemas
from disalign_ops._ops.codes import CALIBRATION, LOGITS, SCALE, STATISTICS
from support.cases import rows
from support.tolerances import assert_close

OPS = torch.ops.disalign_ops


def forward_arguments(
    n: int = 5, c: int = 19, dtype: torch.dtype = torch.float64, **changes: Any
) -> dict[str, Any]:
    r = rows(n, c, dtype)
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {
        "logits": r.logits,
        "target": r.target,
        "weight": torch.rand(c, dtype=vectors),
        "scale": r.scale.detach().to(vectors).requires_grad_(),
        "bias": r.bias.detach().to(vectors).requires_grad_(),
        "confidence": r.confidence.detach().to(vectors).requires_grad_(),
        "prior": None,
        "margin": None,
        "sample_weight": None,
        "denominator": None,
        "ignore_index": -100,
        "label_smoothing": 0.1,
        "focal_gamma": 0.0,
        "reduction": 1,
        "normalizer": 0,
        "wanted": CALIBRATION | STATISTICS,
    }
    return arguments | changes


def backward_arguments(**changes: Any) -> dict[str, Any]:
    arguments = forward_arguments()
    outputs = OPS.row_forward(**arguments)
    for name in ("denominator", "reduction", "normalizer"):
        arguments.pop(name)
    arguments |= {"grad_loss": torch.ones((), dtype=torch.float64)}
    arguments["wanted"] |= LOGITS
    arguments |= {"statistics": outputs[1], "denominator": outputs[2]}
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return detached | changes


def made_arguments(**changes: Any) -> dict[str, Any]:
    """Of row_backward_made; what forward made is told from what backward makes."""
    arguments = backward_arguments(wanted=LOGITS)
    return arguments | {"grad_logits": torch.full((5, 19), 7.0, dtype=torch.float64)} | changes


NONE = {"reduction": 0, "wanted": 0}
UNCALIBRATED = {"scale": None, "bias": None, "confidence": None} | NONE | {"reduction": 2}


@pytest.mark.parametrize("changes", [{}, NONE, UNCALIBRATED], ids=["mean", "none", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_row_forward(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    torch.library.opcheck(
        OPS.row_forward.default, (), forward_arguments(dtype=dtype, **changes), rtol=1e-2, atol=1e-2
    )


def test_opcheck_row_forward_with_the_gradient_of_the_logits() -> None:
    # Eager mode alone asks for it, below autograd.
    torch.library.opcheck(
        OPS.row_forward.default, (), forward_arguments(wanted=LOGITS | CALIBRATION),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_opcheck_row_backward() -> None:
    # An operator of the backward pass: its own gradient is the reference's, taken in autograd.
    torch.library.opcheck(
        OPS.row_backward.default, (), backward_arguments(),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
    torch.library.opcheck(
        OPS.row_backward_.default, (), backward_arguments(),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_opcheck_row_backward_made() -> None:
    for upstream in (1.0, 3.0):
        torch.library.opcheck(
            OPS.row_backward_made.default, (),
            made_arguments(grad_loss=torch.tensor(upstream, dtype=torch.float64)),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
    planes = {
        name: made_arguments()[name].t().contiguous().unsqueeze(0)
        for name in ("logits", "grad_logits")
    }
    torch.library.opcheck(
        OPS.dense_backward_made.default, (), made_arguments(**planes),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_opcheck_calibrate() -> None:
    a = forward_arguments()
    tensors = (a["logits"], a["scale"], a["bias"], a["confidence"])
    torch.library.opcheck(OPS.row_calibrate.default, tensors)
    detached = [t.detach() for t in tensors]
    torch.library.opcheck(
        OPS.row_calibrate_backward.default,
        (torch.randn(5, 19, dtype=torch.float64), *detached, LOGITS | CALIBRATION),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


BACKSTOPS: list[tuple[dict[str, Any], str]] = [
    ({"logits": torch.zeros(5)}, "logits has 1 dimensions, 2"),
    ({"logits": torch.zeros(5, 19).long()}, "logits is not float64"),
    ({"logits": torch.zeros(19, 5, dtype=torch.float64).t()}, "classes are not next to each other"),
    ({"target": torch.zeros(4).long()}, "target is not contiguous with an entry a position"),
    ({"target": torch.zeros(5).bool()}, "target is not uint8, int16, int32 or int64"),
    ({"target": torch.zeros(5, dtype=torch.float64)}, "class probabilities do not have an entry"),
    ({"target": torch.zeros(5, 18, dtype=torch.float64)}, "class probabilities do not have an"),
    ({"target": torch.zeros(5, 19)}, "class probabilities have neither the logits' dtype nor"),
    (
        {"target": torch.zeros(19, 5, dtype=torch.float64).t()},
        "the class probabilities' classes are not next to each other",
    ),
    (
        {"target": torch.zeros(5, 19, dtype=torch.float64), "focal_gamma": 1.0},
        "class probabilities have no one target",
    ),
    ({"target": torch.full((5,), 19)}, "IndexError: Target 19 is out of bounds"),
    ({"weight": torch.rand(18, dtype=torch.float64)}, "weight has 18 entries, 19 are needed"),
    ({"weight": torch.rand(19)}, "weight has another dtype"),
    ({"scale": torch.rand(38, dtype=torch.float64)[::2]}, "scale is not contiguous"),
    ({"scale": None}, "scale, bias and confidence are given together"),
    ({"confidence": torch.rand(4, dtype=torch.float64)}, "confidence has 4 entries, 5 are needed"),
    ({"reduction": 0}, "reduction 'none' has no gradients before its upstream"),
    ({"normalizer": 3}, "denominator is not given"),
    (UNCALIBRATED | {"wanted": SCALE}, "gradients are wanted of a calibration that is not"),
]


@pytest.mark.parametrize(("changes", "message"), BACKSTOPS, ids=lambda v: str(v)[:40])
def test_direct_misuse_raises_and_reads_nothing_out_of_bounds(
    changes: dict[str, Any], message: str
) -> None:
    arguments = forward_arguments(**changes)
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        OPS.row_forward(**detached)


def test_backward_refuses_statistics_of_other_rows() -> None:
    with pytest.raises(RuntimeError, match="statistics has 4 entries, 10 are needed"):
        OPS.row_backward(**backward_arguments(statistics=torch.zeros(4, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match="grad_loss has 3 entries, 5 are needed"):
        OPS.row_backward(**backward_arguments(grad_loss=torch.zeros(3, dtype=torch.float64)))
    overlapping = torch.randn(1, 19, dtype=torch.float64).expand(5, 19)
    with pytest.raises(RuntimeError, match="logits overlap in memory"):
        OPS.row_backward_(**backward_arguments(logits=overlapping))


@pytest.mark.parametrize("layout", ["row", "dense"])
@pytest.mark.parametrize("wanted", [LOGITS, LOGITS | CALIBRATION])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_what_forward_made_is_kept_where_the_upstream_gradient_is_one(
    upstream: float, wanted: int, layout: str
) -> None:
    arguments = backward_arguments(
        grad_loss=torch.tensor(upstream, dtype=torch.float64), wanted=wanted
    )
    if layout == "dense":  # planes of the rows
        arguments["logits"] = arguments["logits"].t().contiguous().unsqueeze(0)
    expected, *others = getattr(OPS, f"{layout}_backward")(**arguments)
    kept = torch.full_like(expected, 7.0)
    found = getattr(OPS, f"{layout}_backward_made")(**arguments, grad_logits=kept)
    assert torch.equal(kept, torch.full_like(kept, 7.0) if upstream == 1 else expected)
    for gradient, other in zip(found, others, strict=True):
        assert_close(gradient, other, torch.float64, "beside it")


def test_what_is_no_gradient_of_the_logits_is_refused() -> None:
    z = torch.zeros(5, 19, dtype=torch.float64)
    for other in (z[:4], z[:, :18], z.float(), z[0]):
        with pytest.raises(RuntimeError, match="grad_logits is not a tensor of the logits' shape"):
            OPS.row_backward_made(**made_arguments(grad_logits=other))
    for other, message in (
        (z.t().contiguous().t(), "grad_logits's classes are not next to each other"),
        (z[:1].expand(5, 19), "grad_logits's rows overlap in memory"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.row_backward_made(**made_arguments(grad_logits=other))
    planes = {n: made_arguments()[n].view(1, 19, 5) for n in ("logits", "grad_logits")}
    planes["grad_logits"] = planes["grad_logits"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="grad_logits is not contiguous"):
        OPS.dense_backward_made(**made_arguments(**planes))
    each = torch.ones(5, dtype=torch.float64)
    for changes in ({"grad_loss": each}, {"wanted": SCALE}):
        with pytest.raises(RuntimeError, match="that forward made has one upstream gradient"):
            OPS.row_backward_made(**made_arguments(**changes))


def step(z: Tensor, target: Tensor, confidence: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return disalign_ops.disalign_cross_entropy(
        z, target, confidence, scale, bias, torch.ones_like(bias), label_smoothing=0.1
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager(reduction: str) -> None:
    r = rows(6, 19, torch.float32)

    def loss(*learned: Tensor) -> Tensor:
        z = learned[0] * 2
        return disalign_ops.disalign_cross_entropy(
            z, r.target, *learned[1:], reduction=reduction
        ).sum()

    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(*r.learned), r.learned)
    actual = torch.autograd.grad(compiled(*r.learned), r.learned)
    for what, a, e in zip(("input", "confidence", "scale", "bias"), actual, expected, strict=True):
        assert_close(a, e, torch.float32, what)


def test_compiled_backward_twice_with_the_graph_kept() -> None:
    r = rows(6, 19, torch.float32)
    compiled = torch.compile(lambda *learned: step(learned[0] * 2, r.target, *learned[1:]))
    loss = compiled(*r.learned)
    first = [g.clone() for g in torch.autograd.grad(loss, r.learned, retain_graph=True)]
    for a, e in zip(torch.autograd.grad(3 * loss, r.learned), first, strict=True):
        assert_close(a, 3 * e, torch.float32, "second backward")


def test_a_new_batch_size_compiles_nothing() -> None:
    compilations = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    for n in (5, 8, 13, 31):
        r = rows(n, 19, torch.float32)
        loss = compiled(r.logits, r.target, *r.learned[1:])
        loss.backward()
        assert_close(
            loss.detach(), step(r.logits, r.target, *r.learned[1:]).detach(), torch.float32, str(n)
        )
    assert len(compilations) == 1


def test_compile_with_autocast_and_calibrate() -> None:
    r = rows(6, 19, torch.float32).to(torch.bfloat16)

    def loss(z: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            u = disalign_ops.calibrate(z, r.confidence, r.scale, r.bias)
            return disalign_ops.cross_entropy(u, r.target)

    actual = torch.compile(loss, fullgraph=True)(r.logits)
    assert actual.dtype == torch.float32
    assert_close(actual.detach(), loss(r.logits).detach(), torch.float32, "autocast")


def test_compiled_replacement() -> None:
    z, t = torch.randn(6, 19, requires_grad=True), torch.arange(6)
    with disalign_ops.replace_cross_entropy():
        loss = torch.compile(lambda z: F.cross_entropy(z, t), fullgraph=True)(z)
        loss.backward()
    leaf = z.detach().requires_grad_()
    F.cross_entropy(leaf, t).backward()
    assert z.grad is not None
    assert leaf.grad is not None
    assert_close(z.grad, leaf.grad, torch.float32, "gradient")


def test_the_loss_of_a_subclass_is_one() -> None:
    class Mine(Tensor):
        pass

    z, t, w = torch.randn(4, 9), torch.tensor([0, 1, 2, 3]), torch.rand(9)
    for z_, t_, w_ in (
        (z.as_subclass(Mine), t, w), (z, t.as_subclass(Mine), w), (z, t, w.as_subclass(Mine))
    ):  # fmt: skip
        assert type(disalign_ops.cross_entropy(z_, t_, w_)) is Mine
        assert type(F.cross_entropy(z_, t_, w_)) is Mine


def test_a_function_mode_sees_the_operator() -> None:
    class Names(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    z = torch.randn(4, 9, requires_grad=True)
    with Names():
        disalign_ops.cross_entropy(z, torch.tensor([0, 1, 2, 3])).backward()
    assert any("row_forward" in name for name in seen)


def test_without_torchs_private_call(monkeypatch: pytest.MonkeyPatch) -> None:
    z, t = torch.randn(4, 9), torch.tensor([0, 1, 2, 3])
    expected = disalign_ops.cross_entropy(z, t)
    known = dict(schemas._OPERATORS)
    assert schemas.BOXED["row_forward"] is not known["row_forward"]
    monkeypatch.setattr(schemas, "_call_boxed", None)
    monkeypatch.setattr(schemas, "_OPERATORS", {})
    monkeypatch.setattr(schemas, "BOXED", {})
    for name, operator in known.items():
        schemas.keep(name, operator)
    assert schemas.BOXED["row_forward"] is known["row_forward"]
    assert torch.equal(disalign_ops.cross_entropy(z, t), expected)
