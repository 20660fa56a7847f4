"""Registers the Triton operators: `triton_row_forward` and so on, with the schemas, the fakes and
the autograd of the native operators.

Importing this module imports triton, which takes a second: _ops/backends.py decides when.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import autograd, schemas
from ..namespace import NAMESPACE
from ..schemas import Layout
from . import operators, upsample_operators

_PREFIX = "triton_"
_TYPES = {
    "Tensor": Tensor,
    "Optional[Tensor]": Tensor | None,
    "int": int,
    "float": float,
    "bool": bool,
}

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "upsample_predict": upsample_operators.predict,
    "row_shard_forward": operators.shard_forward,
    "row_shard_backward": operators.shard_backward,
    "row_shard_backward_": operators.shard_backward_in_place,
}
for _layout, _module in (
    (schemas.ROW, operators), (schemas.DENSE, operators), (schemas.UPSAMPLE, upsample_operators),
):  # fmt: skip
    _FUNCTIONS[f"{_layout.name}_forward"] = _module.forward
    _FUNCTIONS[f"{_layout.name}_backward"] = _module.backward
    _FUNCTIONS[f"{_layout.name}_backward_"] = _module.backward_in_place
for _layout in (schemas.ROW, schemas.DENSE):
    _FUNCTIONS[f"{_layout.name}_calibrate"] = operators.calibrate
    _FUNCTIONS[f"{_layout.name}_calibrate_backward"] = operators.calibrate_backward


def _typed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function with the signature of the native operator of this name, for triton_op."""
    schema = schemas._OPERATORS[name]._schema

    def operator(*arguments: Any) -> Any:
        return function(*arguments)

    parameters = [
        inspect.Parameter(
            argument.name, inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=_TYPES[str(argument.type)],
        )
        for argument in schema.arguments
    ]  # fmt: skip
    returns = Tensor if str(schema.returns[0].type) == "Tensor" else list[Tensor]
    operator.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return operator


for _name, _fake in schemas.fakes(native=False).items():
    _operator: Any = torch.library.triton_op(
        f"{NAMESPACE}::{_PREFIX}{_name}",
        _typed(_FUNCTIONS[_name], _name),
        mutates_args={"logits"} if _name.endswith("_backward_") else (),
    )
    _operator.register_fake(_fake)  # which launches nothing
    _registered = getattr(getattr(torch.ops, NAMESPACE), _PREFIX + _name)
    schemas.keep(_PREFIX + _name, _registered.default)

_LAYOUTS = {layout.name: dataclasses.replace(layout, prefix=_PREFIX) for layout in schemas.LAYOUTS}
for _layout in _LAYOUTS.values():
    autograd.register(_layout)


def layout_of(layout: Layout) -> Layout:
    """The Triton operators of a native layout."""
    return _LAYOUTS[layout.name]
