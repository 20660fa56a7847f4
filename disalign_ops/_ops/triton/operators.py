"""The operators of rows and class planes: what is launched for them, with what memory.

Arguments: call.py. `row_*` and `dense_*` are the same functions: they differ in how a logit is
found (LogitsView).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..codes import CALIBRATION, CONFIDENCE, DETAILS, ENTROPY, LOGITS, PREDICTION, SHARD_VALUES
from ..new_gradient import new_gradient
from ..reference import accumulate_dtype, class_indices
from ..shard_reference import IGNORED
from .calibrate import calibrate_backward_kernel, calibrate_kernel
from .call import Backward, CalibrationSums, Forward, Given, Loss, vector, without_margin
from .loss import forward_kernel
from .loss_backward import backward_kernel
from .soft import soft_forward_kernel
from .soft_backward import soft_backward_kernel
from .views import CLASS_SUMS, LogitsView


def forward(*arguments: Any) -> list[Tensor]:
    """Loss, statistics, denominator, the gradients of the calibration for an upstream of 1, and
    where details are wanted every position's loss, unless that is the first, prediction and
    entropy.

    That of the logits is backward's: autograd.py never asks for it here.
    """
    call = Forward.of(arguments)
    given, logits = call.given, call.given.logits
    class_sums = call.wanted & CLASS_SUMS
    view = LogitsView.of(logits, call.wanted & CALIBRATION, given.target)
    # Where one tile has not all classes, their sums are backward's.
    later = class_sums and view.tile.tiled
    here = call.wanted & (CONFIDENCE if later else CALIBRATION)
    if later:
        view = LogitsView.of(logits, here, given.target)
    n = view.positions
    loss = Loss(call, n, view.programs(1))
    sums = CalibrationSums.of(logits, here, n, loss.programs, 1, n)
    details = [vector(logits, n)] if call.wanted & DETAILS and not call.each else []
    losses = loss.value if call.each else details[0] if details else None
    made = (losses, *loss.statistics, loss.block_sums, sums.classes, sums.confidence, None)
    known = _known(logits, n, call.wanted)
    details += [t for t in known if t is not None]
    made = (*made, *known, *view.sizes)
    if given.soft:
        kernel, arguments = soft_forward_kernel, (*given.soft_tensors, *made, *given.soft_numbers)
    else:
        kernel = forward_kernel
        arguments = (*given.tensors, given.weights, *made, *given.numbers)
    view.start(kernel, (loss.programs,), (*arguments, call.by_weights))
    results = loss.finish()
    if later:
        # For an upstream gradient of 1, not yet divided.
        again = Backward(given, None, loss.statistics, None, (), class_sums)
        sums = CalibrationSums(_gradients(again, None, None).classes, sums.confidence)
    return results + sums.gradients(loss.denominator, call.wanted) + details


def _known(logits: Tensor, positions: int, wanted: int) -> tuple[Tensor | None, Tensor | None]:
    """Places of the positions' predictions and entropies, None where not wanted."""
    prediction = logits.new_empty((positions,), dtype=torch.int64) if wanted & PREDICTION else None
    return prediction, vector(logits, positions) if wanted & ENTROPY else None


def _gradients(
    call: Backward, grad_logits: Tensor | None, target_logits: Tensor | None
) -> CalibrationSums:
    """Fills in grad_logits, unless None, and returns what sums there are over programs."""
    given, logits = call.given, call.given.logits
    view = LogitsView.of(logits, call.wanted, given.target)
    programs, n = view.programs(view.parts), view.positions
    sums = CalibrationSums.of(logits, call.wanted, n, programs, view.parts, n)
    made = (
        None, grad_logits, sums.classes, sums.confidence, *view.sizes, call.upstream_stride,
        *view.strides_of(grad_logits),
    )  # fmt: skip
    known = call.grad_loss, *call.statistics, call.denominator
    grid = programs, view.parts
    if given.soft:
        arguments = (*given.soft_tensors, *known, *made, *given.soft_numbers)
        view.start(soft_backward_kernel, grid, arguments)
    else:
        known = *given.tensors, given.weights, *known, target_logits
        view.start(backward_kernel, grid, (*known, *made, *given.numbers))
    return sums


def _new_gradient(logits: Tensor, wanted: int) -> list[Tensor]:
    """That of the logits, if it is wanted."""
    return [new_gradient(logits)] if wanted & LOGITS else []


def _target_logits(given: Given) -> Tensor:
    """z_t of every position; for a backward that writes over the logits, where not every program
    that needs it has read it.
    """
    logits = given.logits
    t, valid = class_indices(given.target.reshape(-1), given.ignore_index)
    t = torch.where(valid, t, 0)
    if logits.dim() == 2:
        z = logits.gather(1, t[:, None])
    else:
        z = logits.gather(1, t.view(logits.shape[0], 1, logits.shape[2]))
    return z.reshape(-1).to(accumulate_dtype(logits.dtype))


def backward(*arguments: Any) -> list[Tensor]:
    """The gradients that are wanted of logits, scale, bias and confidence."""
    call = Backward.of(arguments)
    whole = _new_gradient(call.given.logits, call.wanted)
    sums = _gradients(call, whole[0] if whole else None, None)
    return whole + sums.gradients(None, call.wanted)


def backward_in_place(*arguments: Any) -> list[Tensor]:
    """The same, that of the logits written over them, and no result."""
    call = Backward.of(arguments)
    given, wanted = call.given, call.wanted
    target_logits = None
    if wanted & LOGITS and not given.soft and (given.focal_gamma > 0 or wanted & CONFIDENCE):
        target_logits = _target_logits(given)
    sums = _gradients(call, given.logits if wanted & LOGITS else None, target_logits)
    return sums.gradients(None, wanted)


def _shard_numbers(share: float) -> tuple[int, float, float]:
    """As the kernels take them: ignore_index, label_smoothing, focal_gamma."""
    return IGNORED, float(share > 0), 0.0


def shard_forward(logits: Tensor, target: Tensor, *rest: Any) -> list[Tensor]:
    """The sums of a shard's rows; arguments as in shard_reference.shard_sums, then which details
    are wanted.
    """
    *vectors, keep, share, wanted = rest
    known = _known(logits, logits.shape[0], wanted)
    details = [t for t in known if t is not None]
    if target.is_floating_point():
        view = LogitsView.of(logits, 0, target)
        sums = vector(logits, SHARD_VALUES * view.positions).view(SHARD_VALUES, -1)
        tensors = without_margin((logits, target, *vectors, None))
        made = (*(None,) * 7, sums, *known)  # no loss, statistics, sums of programs
        view.start(
            soft_forward_kernel, (view.programs(1),),
            (*tensors, *made, *view.sizes, keep, share, 0),
        )  # fmt: skip
        return [sums, *details]
    scale = vectors[1]
    view = LogitsView.of(logits, 0 if scale is None else CONFIDENCE)  # whose sums are among them
    sums = vector(logits, SHARD_VALUES * view.positions).view(SHARD_VALUES, -1)
    nothing = (None,) * 6
    view.start(
        forward_kernel, (view.programs(1),),
        (
            logits, target, *vectors, None, None, *nothing, sums, *known, *view.sizes,
            *_shard_numbers(share), 0,
        ),
    )  # fmt: skip
    return [sums, *details]


def _shard_gradients(
    arguments: tuple[Any, ...], wanted: int, grad_logits: Tensor | None
) -> list[Tensor]:
    factors, logits, target, *vectors, keep, share = arguments
    view = LogitsView.of(logits, wanted, target)
    programs, n = view.programs(view.parts), view.positions
    sums = CalibrationSums.of(logits, wanted, n, programs, view.parts, n)
    tensors = (logits, target, *vectors, None)
    made = (
        factors, grad_logits, sums.classes, sums.confidence, *view.sizes, 0,
        *view.strides_of(grad_logits),
    )  # fmt: skip
    grid, nothing = (programs, view.parts), (None,) * 5
    if target.is_floating_point():
        arguments = (*without_margin(tensors), *nothing, *made, keep, share)
        view.start(soft_backward_kernel, grid, arguments)
    else:
        arguments = (*tensors, None, *nothing, *made, *_shard_numbers(share))
        view.start(backward_kernel, grid, arguments)
    return sums.gradients(None, wanted)


def shard_backward(*arguments: Any) -> list[Tensor]:
    """A shard's gradients; arguments as in shard_reference.shard_gradients, then what is wanted."""
    *given, wanted = arguments
    whole = _new_gradient(arguments[1], wanted)
    return whole + _shard_gradients(tuple(given), wanted, whole[0] if whole else None)


def shard_backward_in_place(*arguments: Any) -> list[Tensor]:
    *given, wanted = arguments
    return _shard_gradients(tuple(given), wanted, arguments[1] if wanted & LOGITS else None)


def calibrate(logits: Tensor, scale: Tensor, bias: Tensor, confidence: Tensor) -> Tensor:
    out = logits.new_empty(logits.shape)
    view = LogitsView.of(logits, CLASS_SUMS)
    view.start(
        calibrate_kernel, (view.programs(view.parts), view.parts),
        (logits, scale, bias, confidence, out, *view.sizes, *view.strides_of(out)),
    )  # fmt: skip
    return out


def calibrate_backward(
    grad_output: Tensor,
    logits: Tensor,
    scale: Tensor,
    bias: Tensor,
    confidence: Tensor,
    wanted: int,
) -> list[Tensor]:
    view = LogitsView.of(logits, CLASS_SUMS)
    programs, n = view.programs(view.parts), view.positions
    whole = _new_gradient(logits, wanted)
    sums = CalibrationSums.of(logits, wanted, n, programs, view.parts, n)
    view.start(
        calibrate_backward_kernel, (programs, view.parts),
        (
            grad_output, logits, scale, bias, confidence, whole[0] if whole else None,
            sums.classes, sums.confidence, *view.sizes, *view.strides_of(grad_output),
            *view.strides_of(whole[0] if whole else None),
        ),
    )  # fmt: skip
    return whole + sums.gradients(None, wanted)
