"""Exception types of this library.

`torch.nn.functional.cross_entropy` raises RuntimeError for many wrong arguments where Python's
convention is ValueError or TypeError. Ours are both, so a loop that catches either keeps working.
"""

from __future__ import annotations


class ArgumentError(ValueError, RuntimeError):
    """A value or shape that does not fit: "X must be B, got A"."""


class ArgumentTypeError(TypeError, RuntimeError):
    """A type or dtype that does not fit: "X must be B, got A"."""
