"""What forward makes for backward, by device, kernels and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .codes import CALIBRATION, LOGITS, REDUCTIONS, STATISTICS
from .problem import Inputs, Problem
from .schemas import LAYOUTS, MADE_LAYOUTS, UPSAMPLE, Layout

_NONE = REDUCTIONS["none"]


class Kernels(NamedTuple):
    """What a device's kernels make in forward.

    layouts: those whose gradient of the logits they can make. dtypes: for which gradient="auto" has
    them make it. upsampled_calibration: whether they make that of an upsampled calibration; on a
    GPU it costs backward the low-resolution logits once more, and forward every output position.
    finished_by_operator: whether backward leaves the upstream gradient to `backward_made`, so that
    the host does not wait for it.
    """

    layouts: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    upsampled_calibration: bool = False
    finished_by_operator: bool = False


# Not float16, which flushes to zero where it is made before GradScaler's factor, nor bfloat16 where
# backward would round it a second time. (Tests that run other kernels on the CPU change this.)
NATIVE = {
    "cpu": Kernels(
        tuple(layout.name for layout in LAYOUTS),
        (torch.float32, torch.float64),
        upsampled_calibration=True,
    ),
    "cuda": Kernels(
        tuple(layout.name for layout in MADE_LAYOUTS),
        (torch.float32, torch.float64, torch.bfloat16),
        finished_by_operator=True,
    ),
}
TRITON = Kernels()


def kernels_of(layout: Layout, logits: Tensor) -> Kernels:
    """The kernels that a layout's operators run for these logits."""
    return TRITON if layout.prefix else NATIVE["cpu" if logits.is_cpu else "cuda"]


def wanted(inputs: Inputs, problem: Problem, need: int, compiling: bool) -> int:
    """What forward makes: of the gradients that are needed, the problem's details, and the
    statistics where backward reads them, or details the log-sum-exp.
    """
    layout, logits, details = problem.layout, inputs.logits, problem.details
    kernels = kernels_of(layout, logits)
    made = 0
    if problem.reduction != _NONE:
        if kernels.upsampled_calibration or layout.name != UPSAMPLE.name:
            made = need & CALIBRATION
        if need & LOGITS and not (
            compiling or problem.in_place or layout.name not in kernels.layouts
        ):
            if problem.gradient == "auto":
                if logits.dtype in kernels.dtypes and not (
                    kernels.finished_by_operator and _scales_gradients(logits.device.type)
                ):
                    made |= LOGITS
            elif problem.gradient == "forward":
                made |= LOGITS
    if (
        need != made
        or (made & LOGITS and kernels.finished_by_operator)
        or (details and layout.name != UPSAMPLE.name)  # by the log-sum-exp, too
    ):
        return made | details | STATISTICS
    return made | details


def _scales_gradients(device: str) -> bool:
    """Whether the upstream gradient will be GradScaler's: under float16 autocast."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
