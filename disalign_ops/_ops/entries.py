"""A few entries of a tensor, read and written without another of its size."""

from __future__ import annotations

import torch
from torch import Tensor


def add_entries(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Adds values (N, K, ...) where index says, along dimension 1 of a tensor (N, C, ...).

    The indices of a row name different entries, or one whose values are equal.
    """
    sums = tensor.gather(1, index).to(values.dtype) + values
    _as_bits(tensor).scatter_(1, index, _as_bits(sums.to(tensor.dtype)))


def _as_bits(tensor: Tensor) -> Tensor:
    """Half precision as int16: scatter_ on the CPU would take it through a copy in float32."""
    return tensor.view(torch.int16) if tensor.element_size() == 2 else tensor


def add_in_order(vector: Tensor, index: Tensor, values: Tensor) -> None:
    """Adds values (N,) to the entries (N,) of a vector, in the same order on every run."""
    if vector.is_cpu:
        vector.index_add_(0, index, values)
    else:
        vector.index_put_((index,), values, accumulate=True)  # sorts the indices first
