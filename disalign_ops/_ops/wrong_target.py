"""The IndexError of a target that is no class."""

from __future__ import annotations

import re

import torch
from torch import Tensor


def raise_for_target(error: RuntimeError, target: Tensor) -> None:
    """An operator's error about a target that is no class, as the IndexError of F.cross_entropy:
    the stable ABI throws nothing but RuntimeError.
    """
    message = str(error)
    if message.startswith("IndexError: "):
        message = _name_position(message.removeprefix("IndexError: "), target.shape)
        raise IndexError(message) from None


def _name_position(message: str, shape: torch.Size) -> str:
    """An error's flat `target[i]` as indices into a target of `shape`: `target[n, y, x]`."""
    return re.sub(r"(?<=target\[)\d+", lambda i: indices(int(i[0]), shape), message, count=1)


def indices(position: int, shape: torch.Size) -> str:
    """A flat position as indices into a tensor of that shape."""
    if len(shape) <= 1:
        return str(position)
    found = torch.unravel_index(torch.tensor(position, device="cpu"), shape)
    return ", ".join(str(int(i)) for i in found)
