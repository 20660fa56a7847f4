"""Calls of the kernels module whose targets are class probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Problem

SMALL = 40 << 10  # shared memory into which the class vectors of no long row fit


def probabilities(*shape: int) -> Tensor:
    """Class probabilities over dimension 1: zeros, and sums up to 1."""
    y = torch.rand(shape) * (torch.rand(shape) < 0.5)
    return y / (y.sum(1, keepdim=True) + 0.1)


def everything(classes: int, positions: int) -> dict[str, Any]:
    """Options that take every branch of a kernel."""
    return {
        "weight": torch.rand(classes) + 0.1,
        "prior": torch.randn(classes),
        "sample_weight": torch.rand(positions) + 0.1,
        "label_smoothing": 0.1,
    }


def soft(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    wide: bool = False,
    offset: int = 0,
    alike: bool = False,
    all_options: bool = False,
    size: tuple[int, int] | None = None,
    **more: Any,
) -> Problem:
    """wide: probabilities of the arithmetic for logits of half precision. offset: elements between
    an aligned address and the logits; the probabilities are aligned, or alike.
    """
    spatial = size or shape[2:]
    logits = torch.empty(offset + torch.Size(shape).numel(), dtype=dtype)[offset:].view(shape)
    y = probabilities(shape[0], shape[1], *spatial)
    if dtype == torch.float64 or not wide:
        y = y.to(dtype)
    if alike:
        y = torch.empty(offset + y.numel(), dtype=y.dtype)[offset:].view(y.shape).copy_(y)
    if all_options:
        more["options"] = everything(shape[1], y[:, 0].numel())
    return Problem(logits.copy_(torch.randn(shape) * 3), y, size=size, **more)


def soft_calls() -> list[Call]:
    """Every kernel and tier, small enough for the sanitizers."""
    torch.manual_seed(5)
    half, float16, double = torch.bfloat16, torch.float16, torch.float64
    small: dict[str, Any] = {"shared_bytes": SMALL}
    cases: list[tuple[Problem, dict[str, Any]]] = [
        # Several rows a block, of every alignment; a row a block; tiles of a row.
        (soft(7, 19), {}),
        (soft(6, 3, dtype=float16, wide=True, calibrated=False), {"offset": 1}),
        (soft(19, 133, dtype=half, all_options=True), {}),
        (soft(9, 1203, dtype=half, wide=True), {}),
        (soft(5, 1203, dtype=half, wide=True, calibrated=False), {}),
        (soft(5, 1203, offset=1, all_options=True), {"offset": 2}),
        (soft(3, 1203, calibrated=False), {}),
        (soft(3, 301, dtype=double, all_options=True), {}),
        (soft(3, 9001, all_options=True), small),
        (soft(2, 20000, calibrated=False), small),
        # Without calibration: by a warp, by several of a block, by those of a cluster.
        (soft(9, 1203, calibrated=False, all_options=True), {}),
        (soft(37, 515, dtype=half, calibrated=False, all_options=True), {"offset": 1}),
        (soft(9, 1003, dtype=float16, wide=True, offset=1, alike=True, calibrated=False), {}),
        (soft(3, 2000, dtype=half, wide=True, calibrated=False, all_options=True), {}),
        (soft(3, 3001, calibrated=False), {"offset": 1}),
        (soft(5, 9001, calibrated=False, all_options=True), {"has_clusters": True}),
        (soft(3, 9003, dtype=half, calibrated=False), {"has_clusters": True}),
        # Calibrated: by a warp, whose blocks add up their class sums in clusters; by several warps
        # of a block and by those of a cluster.
        (soft(37, 1204, all_options=True), {"has_clusters": True}),
        (soft(37, 516, dtype=half, wide=True, offset=1, alike=True), {"has_clusters": True}),
        (soft(35, 2000, dtype=half, all_options=True), {"has_clusters": True}),
        (soft(5, 9001, dtype=float16, all_options=True), {"has_clusters": True}),
        # Planes of whole vectors, and of others; a tile that is read again.
        (soft(2, 5, 70), {}),
        (soft(1, 150, 40, dtype=half, wide=True, all_options=True), {}),
        (soft(2, 19, 64, dtype=float16, calibrated=False), {}),
        (soft(1, 19, 33, dtype=double, calibrated=False), {}),
        (soft(1, 40, 33, dtype=half, wide=True), {"offset": 1}),
        (soft(2, 300, 9, all_options=True), {"shared_bytes": 48 << 10, "multiprocessors": 1}),
        (soft(1, 900, 16, dtype=half), {"shared_bytes": 64 << 10, "multiprocessors": 1}),
    ]
    calls = []
    for problem, more in cases:
        limits = {k: v for k, v in more.items() if k != "offset"}
        calls += problem.calls(**limits) + problem.gradient_calls(**more)
        calls.append(replace(problem, details=True).calls(**limits)[0])
    upsampled = [
        soft(1, 5, 4, 5, size=(13, 17)),
        soft(1, 37, 3, 4, dtype=float16, wide=True, size=(9, 8), all_options=True),
        soft(1, 3, 6, 5, dtype=double, size=(2, 3)),
        soft(1, 19, 9, 5, size=(72, 40), all_options=True),
        soft(2, 6, 3, 4, dtype=half, size=(12, 9)),
        soft(1, 7, 3, 2, calibrated=False, size=(77, 35)),
    ]
    for problem in upsampled:
        calls += problem.calls()
    # Classes of the logits around a tile that come one part after another.
    return calls + soft(1, 500, 6, 8, size=(9, 13)).calls(shared_bytes=64 << 10)
