"""Calls of the kernels module (kernels.cpp) and what they must yield.

A call is plain NumPy, so that a process without torch, under a sanitizer, can run and check it.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disalign_ops._ops import reference

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
TARGETS = {torch.uint8: 0, torch.int16: 1, torch.int32: 2, torch.int64: 3}
REDUCTIONS = {"mean": 1, "sum": 2}
NORMALIZERS = {"weights": 0, "valid": 1, "count": 2}
GIVEN = 3  # a normalizer that is a number, in memory
# Of the largest magnitude: one rounding to the storage, or sums of the arithmetic in another order.
TOLERANCE = {0: 1e-12, 1: 4e-6, 2: 2.0**-8, 3: 2.0**-11}
# Gradients of the calibration are kept in the arithmetic dtype.
ARITHMETIC = {0: 1e-12, 1: 4e-6, 2: 4e-6, 3: 4e-6}


@dataclass
class Call:
    """`getattr(kernels, operation)(fields)` writes `expected` into the fields of those names."""

    name: str
    operation: str
    fields: dict[str, Any]
    expected: dict[str, Array] = field(default_factory=dict)


def _raw(tensor: Tensor) -> Array:
    """The tensor's memory as NumPy knows it; bfloat16 as its bits."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return np.asarray(tensor.numpy())


@dataclass
class Problem:
    """A loss: logits of the storage dtype, all else as the operators take it.

    size: of the upsampled target, else None. Logits (N, C), (N, C, S) or (N, C, h, w), contiguous.
    target: class indices, or class probabilities of the logits' or the accumulation dtype, (N, C),
    (N, C, S) or (N, C, *size).
    normalizer: as `reference.cross_entropy` takes it.
    details: whether forward gives the positions' losses, predictions and entropies.
    """

    logits: Tensor
    target: Tensor
    calibrated: bool = True
    size: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    reduction: str = "mean"
    normalizer: str | Tensor = "weights"
    details: bool = False

    def __post_init__(self) -> None:
        n, classes, *spatial = self.logits.shape
        dtype = reference.accumulate_dtype(self.logits.dtype)
        low = n * int(np.prod(spatial))
        self.vectors: dict[str, Tensor] = {}
        if self.calibrated:
            self.vectors = {
                "scale": torch.randn(classes).to(dtype) * 0.3,
                "bias": torch.randn(classes).to(dtype),
                "confidence": torch.randn(low).to(dtype),
            }

    @property
    def layout(self) -> str:
        return "upsample" if self.size else "row" if self.logits.dim() == 2 else "dense"

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def operation(self) -> str:
        return f"soft_{self.layout}" if self.soft else self.layout

    def _loss(self, learned: dict[str, Tensor]) -> Tensor:
        options = {
            k: v.double() if isinstance(v, Tensor) else v for k, v in self.options.items()
        } | {"reduction": self.reduction, "normalizer": self.normalizer}
        vectors = {k: v for k, v in learned.items() if k != "logits"}
        z, target = learned["logits"], self.target.double() if self.soft else self.target
        if self.size:
            return reference.upsample_cross_entropy(z, target, False, **vectors, **options)
        if z.dim() == 3:
            return reference.dense_cross_entropy(z, target, **vectors, **options)
        return reference.cross_entropy(z, target, **vectors, **options)

    def calls(self, class_gradients: bool = True, **limits: int) -> list[Call]:
        """Forward with the class sums, where the layout makes them there, and backward with all.

        To be run in this order: backward reads what forward writes. class_gradients: whether the
        gradients of scale and bias are wanted, of those of the calibration.
        """
        z = self.logits
        learned = {"logits": z.double()} | {k: v.double() for k, v in self.vectors.items()}
        learned = {k: v.requires_grad_() for k, v in learned.items()}
        loss = self._loss(learned)
        grads = dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))
        fields = self._fields() | limits
        dtype = reference.accumulate_dtype(z.dtype)

        def empty(*size: int, of: torch.dtype = dtype) -> Array:
            return _raw(torch.full(size, float("nan"), dtype=of))

        positions = self.target.numel() // (z.shape[1] if self.soft else 1)
        class_gradients = class_gradients and self.calibrated
        wanted = list(self.vectors) if class_gradients else list(self.vectors)[2:]
        sums = {f"grad_{k}": empty(*self.vectors[k].shape) for k in wanted}
        sums_expected = {f"grad_{k}": _raw(grads[k]) for k in wanted}
        statistics = {
            "row_shift": empty(positions), "row_sum": empty(positions),
            "denominator": empty(1, of=torch.float64),
        }  # fmt: skip
        if self.soft:
            statistics["row_total"] = empty(positions)
        in_forward = not self.size
        forward = fields | statistics | {
            "reduced_loss": empty(1), "reduction": REDUCTIONS[self.reduction],
            "class_gradients": class_gradients and in_forward, **(sums if in_forward else {}),
        }  # fmt: skip
        if isinstance(self.normalizer, Tensor):
            number = _raw(self.normalizer.double().reshape(1))
            forward |= {"normalizer": GIVEN, "given_denominator": number}
        else:
            forward["normalizer"] = NORMALIZERS[self.normalizer]
        backward = fields | statistics | {
            "upstream": _raw(torch.ones(1).to(dtype)), "upstream_stride": 0,
            "class_gradients": class_gradients, "grad_logits": empty(*z.shape, of=z.dtype),
            **{k: v.copy() for k, v in sums.items()},
        }  # fmt: skip
        loss_expected = {"reduced_loss": _raw(loss.reshape(1))}
        if self.details:
            known = self._details()
            loss_expected |= {k: _raw(v) for k, v in known.items()}
            forward |= {
                "loss": empty(positions), "entropy": empty(positions),
                "prediction": np.full(positions, -1),
            }  # fmt: skip
        name = f"{self.layout} {tuple(z.shape)} {z.dtype}".replace("torch.", "")
        return [
            Call(name, f"{self.operation}_forward", forward,
                 loss_expected | (sums_expected if in_forward else {})),
            Call(name, f"{self.operation}_backward", backward,
                 sums_expected | {"grad_logits": _raw(grads["logits"])}),
        ]  # fmt: skip

    def _details(self) -> dict[str, Tensor]:
        z, vectors = self.logits.double(), {k: v.double() for k, v in self.vectors.items()}
        prior = self.options.get("prior")
        u = reference.calibrated_logits(
            z, *(vectors.get(k) for k in ("scale", "bias", "confidence")),
            None if prior is None else prior.double(),
        )  # fmt: skip
        each = replace(self, reduction="none")
        each.vectors = self.vectors
        entropy = reference.entropy(u, u.logsumexp(1)).reshape(-1)
        valid = torch.ones_like(entropy, dtype=torch.bool)
        if not self.soft:
            _, valid = reference.class_indices(
                self.target.reshape(-1), self.options.get("ignore_index", -100)
            )
        return {
            "loss": each._loss({"logits": z} | vectors).reshape(-1),
            "prediction": u.argmax(1).reshape(-1),
            "entropy": torch.where(valid, entropy, 0.0),
        }

    def gradient_calls(
        self, class_gradients: bool = True, offset: int = 0, **limits: int
    ) -> list[Call]:
        """Forward that makes the gradient of the logits too, and two backwards after it.

        The first backward has an upstream gradient of 1, and must not write to the memory of the
        gradient. The second one has 1/3, and must overwrite that memory with the gradient.
        offset: elements between an aligned address and the memory.
        """
        forward, backward = self.calls(class_gradients, **limits)
        gradient = backward.expected["grad_logits"]

        def filled(value: float) -> Array:
            memory = torch.full((offset + self.logits.numel(),), value, dtype=self.logits.dtype)
            return _raw(memory[offset:].view(self.logits.shape))

        forward.fields["grad_logits"] = filled(float("nan"))
        forward.expected["grad_logits"] = gradient
        sums = ("grad_scale", "grad_bias", "grad_confidence")
        fields = {k: v for k, v in backward.fields.items() if k not in sums}
        fields |= {"gradient_made": True, "class_gradients": False}
        made = [
            Call(forward.name, backward.operation,
                 fields | {"upstream": fields["upstream"] * upstream, "grad_logits": filled(7)},
                 {"grad_logits": expected})
            for upstream, expected in ((1, np.full_like(gradient, 7)), (1 / 3, gradient / 3))
        ]  # fmt: skip
        return [forward, *made]

    def calibrate_calls(self) -> list[Call]:
        """The calibrated logits, and their backward with all gradients."""
        z = self.logits
        learned = {"logits": z.double()} | {k: v.double() for k, v in self.vectors.items()}
        learned = {k: v.requires_grad_() for k, v in learned.items()}
        u = reference.calibrate(*learned.values())
        upstream = torch.randn(u.shape).to(z.dtype)
        grads = torch.autograd.grad(u, list(learned.values()), upstream.double())
        dtype = reference.accumulate_dtype(z.dtype)
        nan = float("nan")
        out = _raw(torch.full(z.shape, nan, dtype=z.dtype))
        sums = {f"grad_{k}": _raw(torch.full(v.shape, nan, dtype=dtype))
                for k, v in self.vectors.items()}  # fmt: skip
        forward = self._fields() | {"output": out}
        backward = self._fields() | sums | {
            "grad_logits": out.copy(), "grad_output": _raw(upstream), "class_gradients": True,
        }  # fmt: skip
        expected = {f"grad_{k}": _raw(g) for k, g in zip(learned, grads, strict=True)}
        name = f"{self.layout} {tuple(z.shape)} {z.dtype}".replace("torch.", "")
        return [
            Call(name, f"{self.layout}_calibrate", forward, {"output": _raw(u)}),
            Call(name, f"{self.layout}_calibrate_backward", backward, expected),
        ]

    def _fields(self) -> dict[str, Any]:
        z = self.logits
        n, classes, *spatial = z.shape
        dtype = reference.accumulate_dtype(z.dtype)
        fields: dict[str, Any] = {
            "dtype": DTYPES[z.dtype], "outer": n, "classes": classes, "logits": _raw(z),
            "inner": int(np.prod(spatial)), "outer_stride": z.stride(0),
            "class_stride": z.stride(1), "grad_outer_stride": z.stride(0),
            "grad_class_stride": z.stride(1),
        }  # fmt: skip
        if self.soft:
            smoothing = self.options.get("label_smoothing", 0.0)
            fields |= {
                "target_type": 0, "probabilities": _raw(self.target),
                "probabilities_of_a": self.target.dtype == dtype,
                "probability_outer_stride": self.target.stride(0),
                "probability_class_stride": self.target.stride(1),
                "keep": 1 - smoothing, "share": smoothing / classes,
            }  # fmt: skip
        else:
            fields |= {"target": _raw(self.target), "target_type": TARGETS[self.target.dtype]}
        if self.size:
            fields |= {
                "inner": self.size[0] * self.size[1], "y_in": z.shape[2], "x_in": z.shape[3],
                "y_out": self.size[0], "x_out": self.size[1], "y_stride": z.stride(2),
                "x_stride": z.stride(3), "align_corners": False,
            }  # fmt: skip
        given = self.vectors | {k: v for k, v in self.options.items() if isinstance(v, Tensor)}
        fields |= {k: _raw(v.to(dtype)) for k, v in given.items()}
        numbers = ("ignore_index", "label_smoothing", "focal_gamma")
        return fields | {k: self.options[k] for k in numbers if k in self.options}


def _numbers(found: Array, dtype: int) -> Array:
    if dtype == DTYPES[torch.bfloat16] and found.dtype == np.int16:
        return (found.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return found


def check(kernels: ModuleType, call: Call) -> None:
    """Runs a call; AssertionError where it does not yield what is expected."""
    getattr(kernels, call.operation)(call.fields)
    dtype = call.fields["dtype"]
    for name, expected in call.expected.items():
        actual = _numbers(call.fields[name], dtype).astype(np.float64).reshape(expected.shape)
        largest = max(float(np.abs(expected).max(initial=0)), 1e-2)
        if name == "prediction":
            assert (actual == expected).all(), f"{call.name} {call.operation} {name}"
            continue
        if name == "entropy":  # its terms u - maximum may be that large, and are rounded so
            largest = max(largest, 16.0)
        table = TOLERANCE if name in ("grad_logits", "output") else ARITHMETIC
        error = float(np.abs(actual - expected).max(initial=0))  # NaN: never written
        assert error <= table[dtype] * largest, f"{call.name} {call.operation} {name}: {error:.3g}"


def save(calls: list[Call], path: Path) -> None:
    path.write_bytes(pickle.dumps([vars(call) for call in calls]))
