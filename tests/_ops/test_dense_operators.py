"""The registered dense and upsampling operators: opcheck, and backstops against direct misuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import disalign_ops
from disalign_ops._ops.codes import CALIBRATION, DETAILS, LOGITS, STATISTICS
from support.dense_cases import dense

OPS = torch.ops.disalign_ops
EAGER_ONLY = ("test_schema", "test_faketensor")  # what eager mode alone calls, below autograd
NONE = {"reduction": 0, "wanted": 0}
UNCALIBRATED = {"scale": None, "bias": None, "confidence": None} | NONE | {"reduction": 2}
CHANGES = {"mean": {}, "none": NONE, "plain": UNCALIBRATED}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def forward_arguments(
    layout: str, dtype: torch.dtype = torch.float64, **changes: Any
) -> dict[str, Any]:
    upsample = layout == "upsample"
    d = dense((2, 19, 3, 4), (7, 9) if upsample else None, torch.float32).to(dtype)
    vectors = torch.float64 if dtype == torch.float64 else torch.float32

    def vector(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1).to(vectors).requires_grad_()

    arguments: dict[str, Any] = {
        "logits": d.logits if upsample else d.logits.detach().flatten(2).requires_grad_(),
        "target": d.target,
        "weight": torch.rand(19, dtype=vectors),
        "scale": vector(d.scale),
        "bias": vector(d.bias),
        "confidence": vector(d.confidence),
        "prior": None,
        "margin": None,
        "sample_weight": None,
        "denominator": None,
        "ignore_index": 255,
        "label_smoothing": 0.1,
        "focal_gamma": 0.0,
        **({"align_corners": False} if upsample else {}),
        "reduction": 1,
        "normalizer": 0,
        "wanted": CALIBRATION | STATISTICS,
    }
    return arguments | changes


def backward_arguments(layout: str, **changes: Any) -> dict[str, Any]:
    arguments = forward_arguments(layout)
    outputs = getattr(OPS, f"{layout}_forward")(**arguments)
    for name in ("denominator", "reduction", "normalizer"):
        arguments.pop(name)
    arguments |= {"grad_loss": torch.ones((), dtype=torch.float64)}
    arguments["wanted"] |= LOGITS
    arguments |= {"statistics": outputs[1], "denominator": outputs[2]}
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return detached | changes


@pytest.mark.parametrize("layout", ["dense", "upsample"])
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_forward(layout: str, dtype: torch.dtype, changes: str) -> None:
    operator = getattr(OPS, f"{layout}_forward").default
    arguments = forward_arguments(layout, dtype, **CHANGES[changes])
    torch.library.opcheck(operator, (), arguments, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck_details(reduction: int) -> None:
    changes = NONE | {"reduction": reduction, "wanted": DETAILS}
    arguments = forward_arguments("upsample", **changes)
    torch.library.opcheck(OPS.upsample_forward.default, (), arguments, test_utils=EAGER_ONLY)


@pytest.mark.parametrize("layout", ["dense", "upsample"])
def test_opcheck_forward_with_the_gradient_of_the_logits(layout: str) -> None:
    arguments = forward_arguments(layout, wanted=LOGITS | CALIBRATION)
    operator = getattr(OPS, f"{layout}_forward").default
    torch.library.opcheck(operator, (), arguments, test_utils=EAGER_ONLY)


@pytest.mark.parametrize("layout", ["dense", "upsample"])
def test_opcheck_backward(layout: str) -> None:
    torch.library.opcheck(
        getattr(OPS, f"{layout}_backward").default, (), backward_arguments(layout),
        test_utils=(*EAGER_ONLY, "test_aot_dispatch_dynamic"),
    )  # fmt: skip
    torch.library.opcheck(
        getattr(OPS, f"{layout}_backward_").default, (), backward_arguments(layout),
        test_utils=EAGER_ONLY,
    )  # fmt: skip


def test_opcheck_predict() -> None:
    a = forward_arguments("upsample")
    vectors = [a[name].detach() for name in ("scale", "bias", "confidence")]
    arguments = (a["logits"].detach(), *vectors, None, 8, 7, True)
    torch.library.opcheck(OPS.upsample_predict.default, arguments)
    plain = (a["logits"].detach(), None, None, None, torch.rand(19).double(), 3, 2, False)
    torch.library.opcheck(OPS.upsample_predict.default, plain)


MISUSE: list[tuple[str, dict[str, Any], str]] = [
    ("dense", {"logits": torch.zeros(2, 19)}, "logits has 2 dimensions, 3"),
    ("dense", {"logits": torch.zeros(2, 19, 12).long()}, "logits is not float64"),
    ("dense", {"logits": torch.zeros(2, 12, 19).double().mT}, "positions are not next to each"),
    ("dense", {"target": torch.zeros(2, 11).long()}, "not contiguous with an entry a position"),
    ("dense", {"target": torch.full((2, 3, 4), 19)}, "IndexError: Target 19 is out of bounds"),
    ("dense", {"confidence": torch.zeros(23).double()}, "confidence has 23 entries, 24"),
    ("upsample", {"logits": torch.zeros(2, 19, 12).double()}, "logits have 3 dimensions, 4"),
    ("upsample", {"logits": torch.zeros(2, 19, 3, 4)}, "weight has another dtype"),
    ("upsample", {"logits": torch.zeros(2, 19, 0, 4).double()}, "no positions to interpolate"),
    ("upsample", {"target": torch.zeros(2, 63).long()}, "target is not (images, height, width)"),
    ("upsample", {"target": torch.zeros(3, 7, 9).long()}, "target is not (images, height, width)"),
    ("upsample", {"target": torch.full((2, 7, 9), -1)}, "IndexError: Target -1 is out of bounds"),
    ("upsample", {"weight": torch.zeros(18).double()}, "weight has 18 entries, 19"),
    ("upsample", {"sample_weight": torch.zeros(24).double()}, "sample_weight has 24 entries, 126"),
    ("upsample", {"bias": None}, "given together or not at all"),
]


@pytest.mark.parametrize(("layout", "change", "message"), MISUSE)
def test_direct_misuse_raises(layout: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(OPS, f"{layout}_forward")(**forward_arguments(layout, **change))
    assert message in str(caught.value)


@pytest.mark.parametrize("layout", ["dense", "upsample"])
def test_backward_refuses_statistics_and_overlap(layout: str) -> None:
    backward, in_place = (getattr(OPS, f"{layout}_backward{suffix}") for suffix in ("", "_"))
    with pytest.raises(RuntimeError, match="statistics has 4 entries"):
        backward(**backward_arguments(layout, statistics=torch.zeros(4, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match="grad_loss has 3 entries"):
        backward(**backward_arguments(layout, grad_loss=torch.zeros(3, dtype=torch.float64)))
    logits = backward_arguments(layout)["logits"]
    with pytest.raises(RuntimeError, match="logits overlap in memory"):
        in_place(**backward_arguments(layout, logits=logits[:1].expand(logits.shape)))


@pytest.mark.parametrize("layout", ["dense", "channels_last", "upsample"])
def test_another_batch_or_image_size_compiles_nothing(layout: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    ratio = 4 if layout == "upsample" else 1

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def loss(z: Tensor, target: Tensor) -> Tensor:
        if layout == "upsample":
            value = disalign_ops.upsample_cross_entropy(z, target)
            assert isinstance(value, Tensor)
            return value
        return disalign_ops.cross_entropy(z, target, ignore_index=255)

    for n, h in ((2, 6), (3, 6), (5, 8), (4, 12)):
        z = torch.randn(n, 21, h, h + 1)
        if layout == "channels_last":
            z = z.contiguous(memory_format=torch.channels_last)
        target = torch.randint(0, 21, (n, h * ratio, (h + 1) * ratio))
        loss(z.requires_grad_(), target).backward()
    assert counter.frame_count == 1
