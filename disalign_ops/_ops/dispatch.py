"""Which backend an input goes to, and its operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .schemas import Stem


def serving_backend(input: Tensor) -> str:
    """The backend that this input goes to."""
    return "reference" if transformed() else backends.serving(input.device)


NO_TRANSFORMS = (
    "torch.func transforms, forward-mode differentiation, torch.export and torch.jit.trace are not "
    "supported with sample_rate or classes over several processes: leave the loss out of what is "
    "transformed, or leave out sample_rate"
)


def transformed() -> bool:
    """Whether plain PyTorch alone is right: registered operators know neither functorch transforms
    nor forward-mode tangents, which they would drop, and are none of ONNX's, nor torch.jit's.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def needs_logits() -> bool:
    """Whether a loss without logits must make them: its gradients are no part of a graph."""
    return transformed() or torch.compiler.is_exporting()


def composes(backend: str) -> bool:
    """Whether the loss is that of composed.py: no kernel serves, and nobody asked for the
    reference.
    """
    return backend == "reference" and backends.is_automatic() and not transformed()


def operators_of(stem: Stem, backend: str) -> Stem:
    """The stem's operators of a backend, "native" or "triton"."""
    if backend == "native":
        return stem
    from .triton import registration  # which imports triton

    return registration.stem_of(stem)
