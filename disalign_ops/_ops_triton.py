"""Registers the Triton operators: `triton_row_forward` and so on, with the fakes, the autograd and
the signatures of the native operators.

Importing this module imports triton, which takes a second: _backends.py decides when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from . import _autograd, _ops
from ._ops import Stem
from ._triton import operators, upsample_operators

_PREFIX = "triton_"

_FUNCTIONS: dict[str, Callable[..., Any]] = {}
for _name in (_ops.ROW.name, _ops.DENSE.name):
    _FUNCTIONS[f"{_name}_forward"] = operators.forward
    _FUNCTIONS[f"{_name}_backward"] = operators.backward
    _FUNCTIONS[f"{_name}_backward_"] = operators.backward_in_place
    _FUNCTIONS[f"{_name}_calibrate"] = operators.calibrate
    _FUNCTIONS[f"{_name}_calibrate_backward"] = operators.calibrate_backward

_FUNCTIONS["upsample_forward"] = upsample_operators.forward
_FUNCTIONS["upsample_backward"] = upsample_operators.backward
_FUNCTIONS["upsample_backward_"] = upsample_operators.backward_in_place
_FUNCTIONS["upsample_predict"] = upsample_operators.predict

_fakes = _ops.fakes()
for _name, _function in _FUNCTIONS.items():
    # triton_op makes the function itself the fake; ours launches nothing.
    _operator: Any = torch.library.triton_op(
        f"disalign_ops::{_PREFIX}{_name}",
        _function,
        mutates_args={"logits"} if _name.endswith("_backward_") else (),
    )
    _operator.register_fake(_fakes[_name])
    _ops._OPERATORS[_PREFIX + _name] = getattr(torch.ops.disalign_ops, _PREFIX + _name).default

_STEMS = {stem.name: dataclasses.replace(stem, prefix=_PREFIX) for stem in _ops.STEMS}
for _stem in _STEMS.values():
    _autograd.register(_stem)


def stem_of(stem: Stem) -> Stem:
    """The Triton operators of a native stem."""
    return _STEMS[stem.name]
