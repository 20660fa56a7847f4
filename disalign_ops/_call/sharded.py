"""Validates losses of rows whose classes are divided, over processes or over chunks of a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops import dispatch, layouts, reference
from .._ops.schemas import ROW
from .._sharded import parallel
from .._sharded.known import Known
from .._sharded.pair import Pair
from .._sharded.shards import Call, Reduction, Vectors
from ..errors import ArgumentError
from . import details, mixed_parts
from .arguments import (
    check_dtype,
    check_target,
    check_tensor,
    is_dtensor,
    positions_shape,
    row_vector,
)
from .details import Found, LossDetails, ReturnDetails
from .mixed import Part
from .options import (
    Calibration,
    Options,
    calibration_vectors,
    check_probability_options,
    output,
    refuse_in_forward,
    validate_options,
)
from .shard import (
    Shard,
    check_shard,
    local_calibration,
    local_classes,
    local_options,
    local_rows,
    ranks_of,
)
from .types import Target


def loss(
    input: Tensor,
    target: Target,
    options: Options,
    calibration: Calibration | None,
    shard: Shard,
    return_details: ReturnDetails = False,
) -> Tensor | LossDetails:
    """The loss over all ranks' classes of logits (N, C_rank) or (C_rank,)."""
    check_shard(shard, calibration)
    if is_dtensor(input) and options.inplace_backward is True:
        raise ArgumentError("inplace_backward must be False where input is a DTensor, got True")
    dim = input.dim() - 1 if isinstance(input, Tensor) else 0
    input = check_tensor("input", local_classes("input", input, shard, dim))
    if options.gradient == "forward":
        refuse_in_forward("where shard is given")
    target = local_target(target, shard)
    options, calibration = local_options(options, shard), local_calibration(calibration, shard)
    if input.dim() not in (1, 2):
        raise ArgumentError(
            "input must have shape (N, C_rank) or (C_rank,) where shard is given, got "
            f"{tuple(input.shape)}"
        )
    check_dtype("input", input)
    classes, like = input.shape[-1], logits_like(input, input.shape[-1])
    if not isinstance(target, tuple):
        check_rows(like, classes, target)
    rows = input.unsqueeze(0) if input.dim() == 1 else input
    copied = rows.stride(1) != 1 and classes > 1
    flat = rows.contiguous() if copied else rows
    in_place = options.inplace_backward is True and layouts.check_in_place(input, flat, copied)
    if dispatch.needs_logits():
        raise RuntimeError(dispatch.NO_TRANSFORMS)

    def one(
        target: Tensor, options: Options, shard: Shard | None, pair: Pair | None
    ) -> tuple[Call, Tensor]:
        call, a, b, c = validate(
            like, classes, target, options, calibration, shard, return_details, pair
        )
        return call, parallel.loss(call, flat, c, a, b, in_place=in_place)

    return of_parts(like, classes, target, options, calibration, shard, one)


def of_parts(
    like: Tensor,
    classes: int,
    target: Target,
    options: Options,
    calibration: Calibration | None,
    shard: Shard | None,
    one: Callable[[Tensor, Options, Shard | None, Pair | None], tuple[Call, Tensor]],
) -> Tensor | LossDetails:
    """The loss of a target in any of its forms. one: the call and loss of one tensor."""
    if isinstance(target, tuple):

        def part(*given: Any) -> Part:
            call, loss = one(*given)
            return Part(loss, found(call))

        return mixed_parts.loss(like, classes, target, options, calibration, shard, part)
    call, loss = one(target, options, shard, None)
    shape = positions_shape(like)
    promoting = (target, options.weight) if call.soft else ()
    each = call.reduction.reduction == "none"
    result = output(like, loss, shape if each else None, *promoting)
    known = found(call)
    return result if known is None else details.assemble(result, shape, known)


def found(call: Call) -> Found | None:
    """What is known of a call's rows, where that is wanted."""
    known = call.known
    if known is None:
        return None
    indices = None
    if not call.soft:
        indices = reference.class_indices(call.target, call.ignore_index)
    return Found(
        known.losses.detach(), known.log_sum_exp, known.prediction, known.entropy,
        None if call.soft else known.target_logit, indices,
    )  # fmt: skip


def local_target(target: Any, shard: Shard) -> Any:
    """The local part of a DTensor: of class probabilities this rank's classes."""
    if isinstance(target, tuple):
        return mixed_parts.local_targets(target)
    if isinstance(target, Tensor) and target.is_floating_point():
        return local_classes("target", target, shard, target.dim() - 1)
    return local_rows("target", target)


def logits_like(rows: Tensor, classes: int) -> Tensor:
    """Stands for logits where other arguments are checked against them: their shape, dtype and
    device, no memory. A shard without classes has one here. rows: (N, K) or (K,) for any K.
    """
    stand_in = rows.detach().new_empty((1,) * rows.dim())
    return stand_in.expand(*rows.shape[:-1], max(classes, 1))


def check_rows(like: Tensor, classes: int, target: Tensor) -> None:
    """Class indices (N,), or class probabilities (N, C), of a rank's classes."""
    if not check_tensor("target", target).is_floating_point():
        check_target(like, target, positions_shape(like))
        return
    # The stand-in has a class where a rank has none.
    logits = like[..., :classes]
    check_target(logits, target, logits.shape)
    if target.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            "target must not require a gradient where logits are made in parts: call .detach() on "
            "it, or make the logits and use cross_entropy"
        )


def validate(
    like: Tensor,
    classes: int,
    target: Tensor,
    options: Options,
    calibration: Calibration | None,
    shard: Shard | None,
    return_details: ReturnDetails,
    pair: Pair | None = None,
) -> tuple[Call, Tensor | None, Tensor | None, Tensor | None]:
    """A call with a target that `check_rows` has passed, and scale, bias (C,) and confidence (N,)
    in u = (1 + c scale) z + c bias. The exchange between processes, if there is one, comes last: a
    wrong argument raises before it.
    """
    given = validate_options(like, classes, options)
    backend = dispatch.serving_backend(like)
    soft = target.is_floating_point()
    if soft:
        check_probability_options(options, given)
        target = layouts.probabilities(ROW, like, target)
    a, b, c = calibration_vectors(like, classes, calibration)
    ignore_index, smoothing, gamma = given.numbers
    sample_weight = row_vector(
        "sample_weight", options.sample_weight, like, positions_shape(like),
        reference.accumulate_dtype(like.dtype),
    )  # fmt: skip
    ranks = None if shard is None else ranks_of(shard, classes, like.device)
    everyone = classes
    if soft and ranks is not None and smoothing:
        everyone = int(ranks.sizes(classes, like.device).sum())
    if shard is None and not soft:
        dispatch.check_classes(target, classes, ignore_index, asserted=False)
    known = None
    if return_details:
        known = Known(
            positions_shape(like).numel(), like,
            entropy=return_details == "entropy", margin=given.margin is not None,
        )  # fmt: skip
    call = Call(
        backend=backend,
        target=target if soft else target.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        focal_gamma=gamma,
        vectors=Vectors(
            given.weight,
            None,
            None,
            given.prior,
            given.margin,
            1 - smoothing,
            smoothing / max(everyone, 1),
        ),
        reduction=Reduction(sample_weight, given.reduction, given.normalizer),
        ranks=ranks,
        known=known,
        pair=pair,
    )
    return call, a, b, c
