"""Native against reference, for the dense and upsampling losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import disalign_ops
from support.cases import Rows
from support.dense_cases import Dense
from support.tolerances import assert_close

NAMES = ("input", "confidence", "scale", "bias")
Loss = Callable[[Dense, bool], Tensor]


def run(loss: Loss, d: Dense, calibrated: bool, upstream: Tensor | None = None) -> list[Tensor]:
    """Loss, then the gradients of what is learned."""
    value = loss(d, calibrated)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    learned = d.learned if calibrated else [d.logits]
    return [value.detach(), *torch.autograd.grad(value, learned, upstream)]


def compare(
    loss: Loss, d: Dense, calibrated: bool, upstream: Tensor | None = None, factor: float = 1.0
) -> None:
    """Native in the case's dtype against the reference in float64."""
    dtype = d.logits.dtype
    with disalign_ops.set_backend("native"):
        actual = run(loss, d, calibrated, upstream)
    with disalign_ops.set_backend("reference"):
        exact = d.to(torch.float64) if dtype == torch.float32 else d
        expected = run(loss, exact, calibrated, upstream)
    for what, a, e in zip(("loss", *NAMES), actual, expected, strict=False):
        assert_close(a, e, dtype, what, factor)


def compare_held(p: Rows | Dense, frozen: bool, reduction: str) -> None:
    """NaN in the logits of ignored positions reaches no gradient, of the classes' sums neither."""
    ignored = torch.zeros(p.target.shape, dtype=torch.bool)
    ignored.view(-1)[1::3] = True
    p.target[ignored] = -100
    results = []
    for held in (0.0, float("nan")):
        z = p.logits.detach().clone()
        z.movedim(1, -1)[ignored] = held
        learned = [t.detach().clone().requires_grad_() for t in p.learned[1:]]
        loss = disalign_ops.disalign_cross_entropy(
            z.requires_grad_(not frozen), p.target, *learned, reduction=reduction
        )
        inputs = learned if frozen else [z, *learned]
        results.append([loss, *torch.autograd.grad(loss, inputs, torch.ones_like(loss))])
    for clean, found in zip(*results, strict=True):
        assert torch.isfinite(found).all()
        assert_close(found.detach(), clean.detach(), torch.float64, "with NaN")


def upstream_of(d: Dense, reduction: str) -> Tensor:
    """A random upstream gradient, one a position for 'none'."""
    return torch.randn(d.target.shape if reduction == "none" else (), dtype=torch.float64)


def _memory_events(function: Callable[[], object]) -> list[int]:
    """Sizes of what PyTorch's allocator hands out, and of what it takes back below 0, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def memory_allocated(function: Callable[[], object]) -> int:
    """Bytes that PyTorch hands out while `function` runs, frees not taken off."""
    return sum(max(size, 0) for size in _memory_events(function))


def memory_held(function: Callable[[], object]) -> int:
    """The most bytes alive at once, while `function` runs, beyond those alive at its start."""
    alive = peak = 0
    for size in _memory_events(function):
        alive += size
        peak = max(peak, alive)
    return peak
