"""Checks and conversions of arguments, used by functional.py and the modules around it.

Each check's message says "X must be B, got A".
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError
from .types import Normalizer, ReductionName

LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def _shape(shape: torch.Size | tuple[int, ...]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        allowed = ", ".join(repr(c) for c in choices)
        raise ArgumentError(f"{name} must be one of {allowed}, got {value!r}")


def numpy_types() -> tuple[Any, ...]:
    """The types of numpy's arrays and numbers; () where nobody has imported it, so no value is one.

    disalign_ops imports numpy only where it reads arrays or files.
    """
    numpy = sys.modules.get("numpy")
    return (numpy.ndarray, numpy.generic) if numpy else ()


def python_number(name: str, value: Any, needed: str) -> Any:
    """`value` as an int or a float; numpy's numbers and 0-d tensors on the CPU are read.

    A tensor on another device is refused: reading it would wait for the device. Symbolic numbers
    are left as they are. A bool is not a number.
    """
    tensors: Any = (Tensor, *numpy_types())
    if isinstance(value, tensors):
        if value.ndim:
            raise ArgumentTypeError(
                f"{name} must be {needed}, got a {type(value).__name__} of shape "
                f"{_shape(value.shape)}"
            )
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                raise ArgumentError(
                    f"{name} must be {needed}, got a tensor on {value.device}: reading it waits "
                    f"for the device; pass {name}.item()"
                )
            _no_gradient(name, value)
        given, value = value, value.item()
    else:
        given = value
    if isinstance(value, bool) or not isinstance(
        value, int | float | torch.SymInt | torch.SymFloat
    ):
        raise ArgumentTypeError(f"{name} must be {needed}, got {_described(given)}")
    return value


def _described(value: object) -> str:
    """A value and its type, for messages; a value that takes many characters is left out."""
    arrays: Any = (Tensor, *numpy_types()[:1])
    dtype = f" of {value.dtype}" if isinstance(value, arrays) else ""
    text = repr(value)
    kind = f"a {type(value).__name__}{dtype}"
    return f"{text} ({kind})" if len(text) <= 60 and "\n" not in text else kind


def check_number(name: str, value: object, low: float, high: float = math.inf) -> float:
    """`value` as a float from low to high; see `python_number` for what is taken."""
    if type(value) is float and low <= value <= high:
        return value
    number = python_number(name, value, "a number")
    if not low <= number <= high:
        needed = f"a number from {low} to {high}" if high < math.inf else f"a number >= {low}"
        raise ArgumentError(f"{name} must be {needed}, got {number}")
    return torch.sym_float(number)  # type: ignore[no-any-return]


def check_integer(name: str, value: object) -> int:
    """`value` as an int that int64 holds; see `python_number` for what is taken."""
    number = value if type(value) is int else python_number(name, value, "an integer")
    if isinstance(number, torch.SymInt):
        return number  # type: ignore[return-value]
    if not isinstance(number, int):
        raise ArgumentTypeError(f"{name} must be an integer, got {_described(value)}")
    if not -(2**63) <= number < 2**63:
        raise ArgumentError(
            f"{name} must be in the range of int64, -2**63 to 2**63 - 1, got {number}"
        )
    return number


def check_reduction(value: object) -> ReductionName:
    """The reduction's name; a deprecated one of PyTorch's becomes today's."""
    if isinstance(value, str) and value == "elementwise_mean":
        torch.nn._reduction.get_enum(value)  # which warns
        return "mean"
    check_choice("reduction", value, ("mean", "sum", "none"))
    return cast(ReductionName, value)


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def is_dtensor(value: object) -> bool:
    if type(value) in _PLAIN_TENSORS or not isinstance(value, Tensor):
        return False
    # Importing the module takes a second; a DTensor exists only after something else imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_tensor(name: str, value: object) -> Tensor:
    """A tensor of this process; a DTensor is refused."""
    if not isinstance(value, Tensor):
        hint = ""
        if isinstance(value, Mapping):
            keys = [key for key in ("out", "logits") if isinstance(value.get(key), Tensor)]
            hint = f"; of this output pass [{keys[0]!r}]" if keys else ""
        raise ArgumentTypeError(
            f"{name} must be a torch.Tensor, got a {type(value).__name__}{hint}"
        )
    if is_dtensor(value):
        raise ArgumentTypeError(
            f"{name} must be a torch.Tensor, got a DTensor. Of a layer that FSDP shards, forward "
            "alone gathers the parameters: torch.distributed.fsdp.register_fsdp_forward_method("
            "layer, 'loss') makes another method do so too. Logits or heads whose classes are "
            f"sharded go with shard=Shard.of({name}). Where rows are divided (data parallelism), "
            f"pass {name}.to_local(), else {name}.full_tensor()"
        )
    return value


def check_dtype(name: str, value: Tensor) -> None:
    """One of the dtypes that logits, and what they are made of, can have."""
    if value.dtype not in LOGITS_DTYPES:
        raise ArgumentTypeError(
            f"{name} must have dtype float32, float64, bfloat16 or float16, got {value.dtype}"
        )


def check_input(input: Tensor) -> int:
    """The number of classes of logits (C,), (N, C) or (N, C, d1, ...)."""
    check_tensor("input", input)
    check_dtype("input", input)
    shape = input.shape
    if not shape:
        raise ArgumentError("input must have shape (C,), (N, C) or (N, C, d1, ...), got ()")
    classes = shape[0 if len(shape) == 1 else 1]
    if classes == 0:
        raise ArgumentError(f"input must have at least one class, got shape {_shape(shape)}")
    return classes


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be a bool, got a {type(value).__name__}")


def check_image(input: Tensor) -> int:
    """The number of classes of logits (N, C, h, w) with at least one position an image."""
    classes = check_input(input)
    if input.dim() != 4 or 0 in input.shape[2:]:
        raise ArgumentError(
            f"input must have shape (N, C, h, w) with h and w above 0, got {_shape(input.shape)}"
        )
    return classes


def check_size(size: object) -> tuple[int, int]:
    """(H, W), both above 0."""
    kinds = (Sequence, *numpy_types()[:1])
    if isinstance(size, kinds) and not isinstance(size, str) and len(size) == 2:
        try:
            height, width = (check_integer("size", n) for n in size)
        except ArgumentTypeError:  # say what the whole of it is
            height = width = 0
        if height > 0 and width > 0:
            return height, width
    raise ArgumentError(f"size must be (height, width), integers above 0, got {size!r}")


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
            f"target must hold class indices, got class probabilities ({target.dtype})"
        )


def check_target(input: Tensor, target: Tensor, shape: torch.Size) -> None:
    """Class indices of `shape`, the positions', or class probabilities of the input's shape."""
    same_device("target", check_tensor("target", target), input)
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ArgumentError(
                f"target must have the input's shape {_shape(input.shape)} where it holds class "
                f"probabilities ({target.dtype}), got {_shape(target.shape)}; class indices have "
                "an integer dtype, as target.long() has"
            )
        return
    if target.dtype not in TARGET_DTYPES:
        raise ArgumentTypeError(
            "target must have dtype int64, int32, int16 or uint8 (class indices), or a floating "
            f"dtype (class probabilities), got {target.dtype}"
        )
    if target.shape != shape:
        raise ArgumentError(
            f"target must have shape {_shape(shape)} for an input of shape {_shape(input.shape)}, "
            f"got {_shape(target.shape)}{target_hint(input, target)}"
        )


def target_hint(input: Tensor, target: Tensor) -> str:
    """What a target of the wrong shape may have been meant as, and the way out; or nothing."""
    shape, classes = target.shape, input.shape[0 if input.dim() == 1 else 1]
    if input.dim() > 2 and shape == input.shape[:-1]:
        return "; where the input's classes are its last dimension, pass input.movedim(-1, 1)"
    if input.dim() == 1 or target.dim() != input.dim() or shape[0] != input.shape[0]:
        return ""
    for dim, entries in ((1, shape[1]), (-1, shape[-1])):
        if entries == 1:
            return f"; of a mask with a dimension of its channel pass target.squeeze({dim})"
        if entries == classes:
            return f"; of a one-hot target pass target.argmax({dim})"
    return ""


def _no_gradient(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"{name} must not require a gradient, which this loss does not compute for it: pass "
            f"{name}.detach(); what is learned are input, confidence, scale and bias"
        )


def same_device(name: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise ArgumentError(
            f"{name} must be on the input's device, {input.device}, got {value.device}"
        )


def _is_number(value: object, input: Tensor) -> bool:
    """Whether a value is to be read, and not computed with where it is."""
    if isinstance(value, Tensor):
        elsewhere = value.device != input.device
        return not value.dim() and value.is_cpu and (elsewhere or not value.is_floating_point())
    if isinstance(value, numpy_types()):
        return not cast(Any, value).ndim
    return isinstance(value, int | float)


def class_vector(
    name: str, value: object, classes: int, input: Tensor, dtype: torch.dtype,
    *, exact: bool = False, learned: bool = False, background: str | None = None,
) -> Tensor | None:  # fmt: skip
    """A (C,) vector of `dtype`. Unless `exact`, what broadcasts to (C,) is taken: (1,), (1, C).

    background: of the calibration that has one entry a class but for that column.
    """
    if value is None:
        return None
    if (
        type(value) in _PLAIN_TENSORS
        and isinstance(value, Tensor)
        and value.shape == (classes,)
        and value.dtype == dtype
        and value.device == input.device
        and value.is_contiguous()
        and (learned or not value.requires_grad)
    ):
        return value  # the common case, before every check that it passes
    if not exact and _is_number(value, input):
        number = check_number(name, value, -math.inf)
        return torch.full((classes,), number, dtype=dtype, device=input.device)
    vector = check_tensor(name, value)
    if not vector.is_floating_point():
        raise ArgumentTypeError(f"{name} must have a floating dtype, got {vector.dtype}")
    same_device(name, vector, input)
    if not learned:
        _no_gradient(name, vector)
    entries = vector.numel()
    if (exact and vector.dim() != 1) or (entries != classes and (exact or entries != 1)):
        what = f"{entries}" if vector.dim() == 1 else f"shape {_shape(vector.shape)}"
        if background is not None:
            raise ArgumentError(
                f"{name} must have one entry a calibrated class ({classes}: background="
                f"{background!r} leaves out one of {classes + 1}), got {what}"
            )
        raise ArgumentError(f"{name} must have one entry a class ({classes}), got {what}")
    if vector.dim() > 1 and max(vector.shape) != entries:
        raise ArgumentError(
            f"{name} must have shape ({classes},), or that with dimensions of 1 beside it, got "
            f"{_shape(vector.shape)}"
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
        type(value) in _PLAIN_TENSORS
        and isinstance(value, Tensor)
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
        raise ArgumentTypeError(f"{name} must have a floating dtype, got {vector.dtype}")
    same_device(name, vector, input)
    if not learned:
        _no_gradient(name, vector)
    with_class = (1,) if input.dim() == 1 else (shape[0], 1, *shape[1:])
    if vector.shape != shape and vector.shape != with_class:
        raise ArgumentError(
            f"{name} must have shape {_shape(shape)} or {_shape(with_class)} for an input of shape "
            f"{_shape(input.shape)}, got {_shape(vector.shape)}"
        )
    return vector.reshape(-1).to(dtype).contiguous()


_VIEWS = ("Squeeze", "Unsqueeze", "View", "Reshape", "UnsafeView", "Select", "ToCopy", "Clone")


def is_probability(confidence: Tensor) -> bool:
    """Whether a sigmoid is the last that made it, which the graph of a tensor with gradients tells.

    Values do not tell, and reading them would wait for the device.
    """
    if torch.compiler.is_compiling():
        return False
    made_by = confidence.grad_fn
    while made_by is not None and type(made_by).__name__.startswith(_VIEWS):
        made_by = made_by.next_functions[0][0]
    return type(made_by).__name__ == "SigmoidBackward0"


def check_normalizer(normalizer: Normalizer, input: Tensor) -> str | Tensor:
    """The name of a denominator, or the caller's number as a float64 0-d tensor."""
    if isinstance(normalizer, str):
        check_choice("normalizer", normalizer, ("weights", "valid", "count"))
        return normalizer
    if isinstance(normalizer, Tensor) and not _is_number(normalizer, input):
        if normalizer.numel() != 1:
            raise ArgumentError(
                "normalizer must be a single number, got a tensor of shape "
                f"{_shape(normalizer.shape)}"
            )
        same_device("normalizer", normalizer, input)
        _no_gradient("normalizer", normalizer)
        return normalizer.reshape(()).to(torch.float64)
    number = check_number("normalizer", normalizer, 0.0)
    if not 0 < number < math.inf:
        raise ArgumentError(f"normalizer must be a finite number > 0, or a name, got {number}")
    return torch.full((), number, dtype=torch.float64, device=input.device)
