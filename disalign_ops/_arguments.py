"""Checks and conversions of arguments, used by functional.py and the modules around it.

Each check names the argument, what was given and what is needed.
"""

from __future__ import annotations

import math
import operator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError

Normalizer: TypeAlias = "str | float | Tensor"

LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def _shape(shape: torch.Size | tuple[int, ...]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        needed = ", ".join(repr(c) for c in choices)
        raise ArgumentError(f"{name} is {value!r}, needed is one of {needed}")


def check_number(name: str, value: float, low: float, high: float = math.inf) -> float:
    if type(value) is float and low <= value <= high:
        return value
    if isinstance(value, Tensor | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}, needed is a number")
    if not low <= value <= high:
        needed = f"a number from {low} to {high}" if high < math.inf else f"a number >= {low}"
        raise ArgumentError(f"{name} is {value}, needed is {needed}")
    return float(value)


def check_integer(name: str, value: int) -> int:
    if isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}, needed is an integer")
    if isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, Tensor) and (value.dtype == torch.bool or value.dim()):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ArgumentTypeError(
            f"{name} is a {type(value).__name__}, needed is an integer"
        ) from None


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}, needed is a torch.Tensor")
    return value


def check_dtype(name: str, value: Tensor) -> None:
    """One of the dtypes that logits, and what they are made of, can have."""
    if value.dtype not in LOGITS_DTYPES:
        raise ArgumentTypeError(
            f"{name} has dtype {value.dtype}, needed is float32, float64, bfloat16 or float16"
        )


def check_input(input: Tensor) -> int:
    """The number of classes of logits (C,), (N, C) or (N, C, d1, ...)."""
    check_tensor("input", input)
    check_dtype("input", input)
    shape = input.shape
    if not shape:
        raise ArgumentError("input has no dimensions, needed is (C,), (N, C) or (N, C, d1, ...)")
    classes = shape[0 if len(shape) == 1 else 1]
    if classes == 0:
        raise ArgumentError(f"input has shape {_shape(shape)}: it has no classes")
    return classes


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}, needed is a bool")


def check_image(input: Tensor) -> int:
    """The number of classes of logits (N, C, h, w) with at least one position an image."""
    classes = check_input(input)
    if input.dim() != 4 or 0 in input.shape[2:]:
        raise ArgumentError(
            f"input has shape {_shape(input.shape)}, needed is (N, C, h, w) with h and w above 0"
        )
    return classes


def check_size(size: object) -> tuple[int, int]:
    """(H, W), both above 0."""
    if isinstance(size, list | tuple) and len(size) == 2:
        height, width = size
        whole = all(isinstance(n, int | torch.SymInt) and n is not True for n in size)
        if whole and height > 0 and width > 0:
            return height, width
    raise ArgumentError(f"size is {size!r}, needed is (height, width), integers above 0")


def positions_shape(input: Tensor) -> torch.Size:
    """The shape of the positions: the input's without its class dimension."""
    shape = input.shape
    if len(shape) == 2:
        return torch.Size(shape[:1])
    return torch.Size((shape[0], *shape[2:])) if len(shape) > 2 else torch.Size(())


def check_class_indices(target: Tensor) -> None:
    """Class probabilities are refused."""
    if check_tensor("target", target).is_floating_point():
        raise ArgumentError(
            f"target holds class probabilities ({target.dtype}), needed are class indices"
        )


def check_target(input: Tensor, target: Tensor, shape: torch.Size) -> None:
    """Class indices of `shape`, the positions', or class probabilities of the input's shape."""
    check_tensor("target", target)
    if target.device != input.device:
        raise ArgumentError(
            f"target is on {target.device}, input on {input.device}: needed is one device"
        )
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ArgumentError(
                f"target holds class probabilities ({target.dtype}) of shape "
                f"{_shape(target.shape)}, needed is the input's shape {_shape(input.shape)}; "
                "class indices have an integer dtype"
            )
        return
    if target.dtype not in TARGET_DTYPES:
        raise ArgumentTypeError(
            f"target has dtype {target.dtype}, needed is int64, int32, int16 or uint8 (class "
            "indices), or a floating dtype (class probabilities)"
        )
    if target.shape != shape:
        raise ArgumentError(
            f"target has shape {_shape(target.shape)}, needed is {_shape(shape)} for an input of "
            f"shape {_shape(input.shape)}"
        )


def _no_gradient(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"{name} requires a gradient, and this loss has none for it: pass {name}.detach(); "
            "what is learned are input, confidence, scale and bias"
        )


def _same_device(name: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise ArgumentError(
            f"{name} is on {value.device}, input on {input.device}: needed is one device"
        )


def class_vector(
    name: str, value: object, classes: int, input: Tensor, dtype: torch.dtype,
    *, exact: bool = False, learned: bool = False,
) -> Tensor | None:  # fmt: skip
    """A (C,) vector of `dtype`. Unless `exact`, what broadcasts to (C,) is taken: (1,), (1, C)."""
    if value is None:
        return None
    if (
        isinstance(value, Tensor)
        and value.shape == (classes,)
        and value.dtype == dtype
        and value.device == input.device
        and value.is_contiguous()
        and (learned or not value.requires_grad)
    ):
        return value  # the common case, before every check that it passes
    if not exact and isinstance(value, int | float) and not isinstance(value, bool):
        return torch.full((classes,), float(value), dtype=dtype, device=input.device)
    vector = check_tensor(name, value)
    if not vector.is_floating_point():
        raise ArgumentTypeError(f"{name} has dtype {vector.dtype}, needed is a floating dtype")
    _same_device(name, vector, input)
    if not learned:
        _no_gradient(name, vector)
    entries = vector.numel()
    if (exact and vector.dim() != 1) or (entries != classes and (exact or entries != 1)):
        what = f"{entries} entries" if vector.dim() == 1 else f"shape {_shape(vector.shape)}"
        raise ArgumentError(f"{name} has {what}, the logits have {classes} classes")
    if vector.dim() > 1 and max(vector.shape) != entries:
        raise ArgumentError(
            f"{name} has shape {_shape(vector.shape)}, needed is ({classes},) or a shape with "
            "ones beside it"
        )
    if vector.dim() != 1:
        vector = vector.reshape(-1)
    if entries != classes:
        vector = vector.expand(classes)
    return vector.to(dtype).contiguous()


def row_vector(
    name: str, value: object, input: Tensor, shape: torch.Size, dtype: torch.dtype,
    *, learned: bool = False,
) -> Tensor | None:  # fmt: skip
    """One entry a position of `shape`, flat. A dimension of 1 may stand where the classes do."""
    if value is None:
        return None
    if (
        isinstance(value, Tensor)
        and value.dim() == 1
        and value.shape == shape
        and value.dtype == dtype
        and value.device == input.device
        and value.is_contiguous()
        and (learned or not value.requires_grad)
    ):
        return value  # the common case, before every check that it passes
    vector = check_tensor(name, value)
    if not vector.is_floating_point():
        raise ArgumentTypeError(f"{name} has dtype {vector.dtype}, needed is a floating dtype")
    _same_device(name, vector, input)
    if not learned:
        _no_gradient(name, vector)
    with_class = (1,) if input.dim() == 1 else (shape[0], 1, *shape[1:])
    if vector.shape != shape and vector.shape != with_class:
        raise ArgumentError(
            f"{name} has shape {_shape(vector.shape)}, needed is {_shape(shape)} or "
            f"{_shape(with_class)} for an input of shape {_shape(input.shape)}"
        )
    return vector.reshape(-1).to(dtype).contiguous()


def given_denominator(normalizer: Normalizer, input: Tensor) -> str | Tensor:
    """The name of a denominator, or the caller's number as a float64 0-d tensor."""
    if isinstance(normalizer, str):
        check_choice("normalizer", normalizer, ("weights", "valid", "count"))
        return normalizer
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ArgumentError(
                f"normalizer has shape {_shape(normalizer.shape)}, needed is a single number"
            )
        _same_device("normalizer", normalizer, input)
        _no_gradient("normalizer", normalizer)
        return normalizer.reshape(()).to(torch.float64)
    number = check_number("normalizer", normalizer, 0.0)
    if not 0 < number < math.inf:
        raise ArgumentError(f"normalizer is {number}, needed is a number > 0 or a name")
    return torch.full((), number, dtype=torch.float64, device=input.device)
