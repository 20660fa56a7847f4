"""The calls that most training loops make are validated early, and give what they give with every
check; nothing else is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import disalign_ops
from disalign_ops._call import entry
from disalign_ops._call.options import Calibration, Options


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every call that the checks behind the early return see."""
    asked: list[Any] = []
    check_input = entry.check_input
    monkeypatch.setattr(entry, "check_input", lambda z: asked.append(z) or check_input(z))
    return asked


def is_early(monkeypatch: pytest.MonkeyPatch, **given: Any) -> bool:
    """Whether a call is validated early."""
    asked = watch(monkeypatch)
    input, target, calibration = (given.pop(n, None) for n in ("input", "target", "calibration"))
    try:
        entry.validate(input, target, Options(**given), calibration)
    except (ValueError, TypeError, IndexError):
        assert asked
    return not asked


CALIBRATIONS: dict[str, dict[str, Any]] = {
    "interpolated": {},
    "residual": {"form": "residual", "column": True},
    "background": {"background": "first", "parameters": True},
    "residual, background": {"form": "residual", "background": "last"},
}


@pytest.mark.parametrize("calibration", [None, *CALIBRATIONS])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_common_call_gives_what_the_general_way_gives(
    dtype: torch.dtype,
    smoothing: float,
    weighted: bool,
    calibration: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned = [torch.randn(9, 17, dtype=dtype)]
    target = torch.randint(0, 17, (9,))
    target[3] = 5
    options: dict[str, Any] = {"ignore_index": 5, "label_smoothing": smoothing}
    options["weight"] = torch.rand(17, dtype=dtype) if weighted else None
    if calibration is not None:
        options |= CALIBRATIONS[calibration]
        classes = 17 - ("background" in options)
        rows = (9, 1) if options.pop("column", False) else (9,)
        learned += [torch.randn(shape, dtype=dtype) for shape in (rows, (classes,), (classes,))]
        if options.pop("parameters", False):
            learned[2:] = [torch.nn.Parameter(t) for t in learned[2:]]
    for tensor in learned:
        tensor.requires_grad_()

    def call() -> list[torch.Tensor]:
        of = disalign_ops.cross_entropy if calibration is None else (
            disalign_ops.disalign_cross_entropy)  # fmt: skip
        loss = of(learned[0], target, *learned[1:], **options)
        upstream = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        grad = torch.autograd.grad
        batch = (torch.linspace(-1, 2, 4, dtype=dtype),)
        made = [
            *grad(loss, learned, batch, retain_graph=True, is_grads_batched=True),
            *grad(loss, learned, upstream, retain_graph=True),  # made in forward
            *grad(loss, learned, upstream, retain_graph=True),  # again
        ]
        twice = grad(loss, learned, upstream, create_graph=True)
        squares = torch.stack([(t**2).sum() for t in twice]).sum()
        made += [*(t.detach() for t in twice), *grad(squares, (*learned, upstream))]
        grad(loss, learned)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            grad(loss, learned)
        return [loss.detach(), *made]

    asked = watch(monkeypatch)
    early = call()
    assert not asked
    monkeypatch.setattr(entry, "_ARITHMETIC", {})
    with_every_check = call()
    assert asked
    for a, e in zip(early, with_every_check, strict=True):
        assert torch.equal(a, e)


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "a strided target": {"target": torch.zeros(6, dtype=torch.int64)[::2]},
    "int32": {"target": torch.zeros(3, dtype=torch.int32)},
    "a target of another shape": {"target": torch.zeros(4, dtype=torch.int64)},
    "classes that are not neighbours": {"input": torch.randn(5, 3).t()},
    "integers": {"input": torch.zeros(3, 5, dtype=torch.int64)},
    "planes": {"input": torch.randn(3, 5, 1)},
    "a parameter": {"input": torch.nn.Parameter(torch.randn(3, 5))},
    "a weight that is learned": {"weight": torch.ones(5, requires_grad=True)},
    "a weight of another dtype": {"weight": torch.ones(5, dtype=torch.float64)},
    "too few weights": {"weight": torch.ones(4)},
    "a smoothing above 1": {"label_smoothing": 1.5},
    "a smoothing that is no float": {"label_smoothing": True},
    "an ignore_index that is no integer": {"ignore_index": 1.0},
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_whatever_needs_a_check_or_a_conversion_has_it(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {
        "input": torch.randn(3, 5),
        "target": torch.zeros(3, dtype=torch.int64),
        "weight": torch.ones(5),
        "ignore_index": -100,
        "label_smoothing": 0.0,
    }
    assert is_early(monkeypatch, **plain)
    assert not is_early(monkeypatch, **(plain | NOT_PLAIN[what]))


def test_half_precision_is_validated_early(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        z, t = torch.randn(3, 5).to(dtype), torch.zeros(3, dtype=torch.int64)
        assert is_early(monkeypatch, input=z, target=t, weight=torch.ones(5))
        assert not is_early(monkeypatch, input=z, target=t, weight=torch.ones(5, dtype=dtype))


NO_PLAIN_CALIBRATION: dict[str, dict[str, Any]] = {
    "another form": {"form": "additive"},
    "another background": {"background": "middle"},
    "a scale of one entry": {"scale": torch.ones(1)},
    "a scale of the background too": {"scale": torch.ones(5), "background": "first"},
    "a scale with ones beside it": {"scale": torch.ones(1, 5)},
    "a bias of another dtype": {"bias": torch.zeros(5, dtype=torch.float64)},
    "a bias with a stride": {"bias": torch.zeros(10)[::2]},
    "too many confidences": {"confidence": torch.zeros(4)},
    "a confidence of each class": {"confidence": torch.zeros(3, 5)},
    "no confidence": {"confidence": None},
}


@pytest.mark.parametrize("what", NO_PLAIN_CALIBRATION)
def test_a_calibration_that_needs_a_check_has_it(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Calibration(torch.zeros(3), torch.ones(5), torch.zeros(5), "residual", None)
    given: dict[str, Any] = {
        "input": torch.randn(3, 5),
        "target": torch.zeros(3, dtype=torch.int64),
    }
    assert is_early(monkeypatch, **given, calibration=plain)
    other = plain._replace(**NO_PLAIN_CALIBRATION[what])
    assert not is_early(monkeypatch, **given, calibration=other)


NO_DEFAULTS: dict[str, Any] = {
    "reduction": "sum",
    "sample_weight": torch.ones(3),
    "normalizer": torch.tensor(3.0),
    "prior": torch.zeros(5),
    "margin": 0.0,
    "focal_gamma": 1,
    "inplace_backward": True,
    "gradient": "backward",
}


@pytest.mark.parametrize("option", NO_DEFAULTS)
def test_an_option_is_checked(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"input": torch.randn(3, 5), "target": torch.zeros(3, dtype=torch.int64)}
    assert is_early(monkeypatch, **given)
    assert not is_early(monkeypatch, **given, **{option: NO_DEFAULTS[option]})
