"""Every kernel that the public functions launch with Triton compiles for GPUs that are not here.

The functions are called on CPU tensors; what they would launch, with exactly these arguments (None
and alignment included), is compiled instead. By default each option is taken on its own, through
Triton's front end, which is where a kernel that is wrong for its arguments fails, and machine code
is made for reduction 'none' (for 'mean': test_triton.py). DISALIGN_OPS_TRITON_COMPILE=all takes
every two options together, to machine code for every target.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import disalign_ops
from disalign_ops._ops import backends
from support import triton_compile
from support.triton_compile import Launch

ALL = os.environ.get("DISALIGN_OPS_TRITON_COMPILE") == "all"
TARGETS = triton_compile.TARGETS
CLASSES = 5

# name -> values, the first of them the default.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "reduction": ("mean", "sum", "none"),
    "normalizer": ("weights", "valid", "count", 3.0),
    "weight": (False, True),
    "prior": (False, True),
    "margin": (False, True),
    "sample_weight": (False, True),
    "label_smoothing": (0.0, 0.1),
    "focal_gamma": (0.0, 2.0),
    "learned": ("all", "logits", "scale", "bias", "confidence", "nothing"),
    "calibrated": (True, False),
    "inplace_backward": (False, True),
    # float32: class probabilities, which have no margin, focal exponent or details.
    "target": (torch.int64, torch.uint8, torch.int16, torch.int32, torch.float32),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "aligned": (False, True),
}
UPSAMPLE: dict[str, tuple[Any, ...]] = {
    "align_corners": (False, True), "return_details": (False, True),
}  # fmt: skip
SHAPES = {
    "rows": (4, CLASSES), "wide rows": (2, 5001), "planes": (2, CLASSES, 3),
    "many planes": (1, 300, 3), "upsample": (1, CLASSES, 2, 3),
}  # fmt: skip


def choices(options: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """The defaults with each other value (ALL: each two), and each of these with 'none'."""
    default = {name: values[0] for name, values in options.items()}
    if ALL:
        for one, other in itertools.combinations(options, 2):
            for values in itertools.product(options[one], options[other]):
                yield default | dict(zip((one, other), values, strict=True))
    for reduction in ("mean", "none"):
        yield default | {"reduction": reduction}
        for name, values in options.items():
            for value in values[1:]:
                yield default | {"reduction": reduction} | {name: value}
    # Together: what one of them passes another may use.
    yield default | {
        name: values[1] for name, values in options.items() if name not in ("calibrated", "learned")
    }


def call(layout: str, chosen: dict[str, Any]) -> None:
    """A public function's forward and backward, with what was chosen."""
    chosen = dict(chosen)
    shape = SHAPES[layout]
    if chosen.pop("aligned"):
        shape = (16, 16 * shape[1], *(16 for _ in shape[2:]))
    dtype, kind = chosen.pop("dtype"), chosen.pop("target")
    if kind.is_floating_point:
        chosen |= {"margin": False, "focal_gamma": 0.0}
        chosen |= {"return_details": False} if layout == "upsample" else {}
    calibrated, learned = chosen.pop("calibrated"), chosen.pop("learned")
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    n, classes, *low = shape
    upsample = layout == "upsample"
    positions = (n, 8, 16) if upsample else (n, *low)

    def needs(name: str, tensor: Tensor) -> Tensor:
        return tensor.requires_grad_(learned in ("all", name))

    logits = needs("logits", torch.zeros(shape, dtype=dtype))
    for name in ("weight", "prior", "margin"):
        chosen[name] = torch.ones(classes, dtype=acc) if chosen[name] else None
    chosen["sample_weight"] = torch.ones(positions) if chosen["sample_weight"] else None
    if calibrated:
        chosen["scale"] = needs("scale", torch.ones(classes, dtype=acc))
        chosen["bias"] = needs("bias", torch.ones(classes, dtype=acc))
        conf = (n, 1, *low) if upsample else positions
        chosen["confidence"] = needs("confidence", torch.zeros(conf, dtype=acc))
    classed = (n, classes, *positions[1:]) if kind.is_floating_point else positions
    target = torch.zeros(classed, dtype=kind)
    z = logits * 1 if chosen["inplace_backward"] else logits
    if upsample:
        loss: Any = disalign_ops.upsample_cross_entropy(z, target, **chosen)
        loss = loss if isinstance(loss, Tensor) else loss.loss
    elif calibrated:
        loss = disalign_ops.disalign_cross_entropy(z, target, **chosen)
    else:
        loss = disalign_ops.cross_entropy(z, target, **chosen)
    if loss.requires_grad:
        loss.sum().backward()


def call_all(layout: str) -> None:
    """Every loss of a layout."""
    options = OPTIONS | (UPSAMPLE if layout == "upsample" else {})
    for chosen in choices(options):
        if chosen["inplace_backward"] and chosen["learned"] in ("scale", "bias", "nothing"):
            continue
        call(layout, chosen)


def others(dtype: torch.dtype) -> None:
    """The functions beside the losses."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((4, CLASSES), (2, CLASSES, 3), (2, 5001)):
        z = torch.zeros(shape, dtype=dtype, requires_grad=True)
        vectors = [torch.zeros(k, dtype=acc, requires_grad=True) for k in (shape[1], shape[1])]
        conf = torch.zeros(shape[0], *shape[2:], dtype=acc, requires_grad=True)
        disalign_ops.calibrate(z, conf, *vectors).sum().backward()
    z = torch.zeros(1, CLASSES, 2, 3, dtype=dtype)
    vector = torch.zeros(CLASSES, dtype=acc)
    disalign_ops.upsample_predict(z, (4, 6))
    disalign_ops.upsample_predict(
        z, (4, 6), prior=vector, scale=vector, bias=vector, confidence=torch.zeros(1, 1, 2, 3)
    )
    x, head = torch.zeros(4, 3, dtype=dtype), torch.zeros(CLASSES, 3, dtype=dtype)
    for reduction, smoothing in itertools.product(("mean", "sum", "none"), (0.0, 0.1)):
        features, matrix = x.clone().requires_grad_(), head.clone().requires_grad_()
        targets = (torch.zeros(4, dtype=torch.int64), torch.zeros(4, CLASSES, dtype=dtype))
        for weight, target in itertools.product((None, vector), targets):
            disalign_ops.linear_cross_entropy(
                features, matrix, target, weight=weight, reduction=reduction,
                label_smoothing=smoothing,
            ).sum().backward()  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    monkeypatch.setattr(backends, "_why_not_triton", lambda device: None)
    with disalign_ops.set_backend("triton"), triton_compile.launches() as found:
        yield found


_seen: set[str] = set()


def compile_all(launched: list[Launch]) -> int:
    """Compiles what no test has compiled before."""
    fresh = {triton_compile.specialised(launch, 90)[1]: launch for launch in launched}
    fresh = {key: launch for key, launch in fresh.items() if key not in _seen}
    _seen.update(fresh)
    for key, launch in fresh.items():
        for target in TARGETS if ALL else (90,):
            try:
                (triton_compile.translate if ALL else triton_compile.front_end)(launch, target)
            except Exception as error:
                raise AssertionError(f"{key} does not compile for sm_{target}") from error
    return len(fresh)


@pytest.mark.parametrize("layout", SHAPES)
def test_every_loss_compiles(layout: str, launched: list[Launch]) -> None:
    call_all(layout)
    names = {launch.name for launch in launched}
    assert names >= {"forward_kernel", "loss_kernel", "backward_kernel", "sum_kernel"}
    compile_all(launched)


# Bytes that a thread spills of what has 255 registers: the most of any option.
SPILLS = {("wide rows", 120): 48, ("planes", 100): 16, ("many planes", 100): 16}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", SHAPES)
def test_every_option_has_machine_code_that_spills_what_is_known(
    layout: str, target: int, launched: list[Launch]
) -> None:
    call_all(layout)
    launches = {triton_compile.specialised(x, target)[1]: x for x in launched}
    found = {key: triton_compile.compile_launch(x, target) for key, x in launches.items()}
    most = max(found, key=lambda key: found[key].spilled)
    assert found[most].spilled == SPILLS.get((layout, target), 0), (most, found[most])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["rows", "upsample"])
def test_reduction_none_has_machine_code(layout: str, target: int, launched: list[Launch]) -> None:
    options = OPTIONS | (UPSAMPLE if layout == "upsample" else {})
    call(layout, {name: values[0] for name, values in options.items()} | {"reduction": "none"})
    for launch in launched:
        if launch.name in ("forward_kernel", "loss_kernel"):
            assert triton_compile.translate(launch, target).asm["cubin"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_other_function_compiles(dtype: torch.dtype, launched: list[Launch]) -> None:
    others(dtype)
    assert compile_all(launched) > 0


@pytest.mark.parametrize("architecture", triton_compile.ROCM)
def test_losses_compile_for_rocm_and_ask_for_no_registers(
    architecture: str, launched: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To code objects, by Triton's AMD back end, which needs no device."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for layout in ("rows", "wide rows", "planes"):
        default = {name: values[0] for name, values in OPTIONS.items()}
        call(layout, default | {"weight": True, "label_smoothing": 0.1})
    of_logits = [launch for launch in launched if launch.name not in ("loss_kernel", "sum_kernel")]
    assert {launch.name for launch in of_logits} == {"forward_kernel", "backward_kernel"}
    for launch in launched:
        assert "maxnreg" not in launch.options
        assert triton_compile.translate(launch, architecture).asm["hsaco"]
    monkeypatch.setattr(torch.version, "hip", None)
    launched.clear()
    call("rows", default)
    assert any("maxnreg" in launch.options for launch in launched)
