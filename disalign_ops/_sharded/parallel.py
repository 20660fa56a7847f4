"""Loss and gradients of logits of which every process has some classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .._ops import reference
from . import shards
from .shards import Call


@dataclass(frozen=True)
class Finished:
    """Of the rows: losses (N,), terms (4, N) and d_t (N,), see shards.terms_of; the divisor."""

    losses: Tensor
    terms: Tensor
    target_du_dc: Tensor
    divisor: Tensor


def finish(call: Call, sums: Tensor, classes: int, *, du_dc: bool) -> Finished:
    """From this rank's sums (5, N), by an exchange with the others. du_dc: d_t is wanted."""
    assert call.ranks is not None
    valid = call.valid
    if call.soft:
        global_sums = call.ranks.all_reduce_soft_sums(sums)
    else:
        local = call.local_target(slice(None), slice(0, classes))
        global_sums = call.ranks.all_reduce_sums(
            sums, call.target_weight(classes, sums), call.vectors.weight_sum(classes, sums),
            classes, local, valid, du_dc=du_dc, weighted=call.vectors.weight is not None,
            smoothing=call.label_smoothing > 0,
        )  # fmt: skip
    losses, terms = call.terms_of(*global_sums, valid)
    if call.known is not None:
        call.known.take(slice(None), global_sums.sums, soft=call.soft, ranks=call.ranks)
    if call.pair is not None:
        other = call.local_other(slice(None), slice(0, classes))
        other_valid = reference.class_indices(call.pair.other, call.ignore_index)[1]
        call.pair.exchange(call.ranks, other, other_valid)
        call.pair.finish(slice(None), global_sums.sums[2])
    divisor = call.reduction.divisor(global_sums.target_weight, valid)
    return Finished(losses, terms, global_sums.sums[3], divisor)


class _ParallelLoss(torch.autograd.Function):
    """Of logits, confidence, scale and the calibration's bias."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        logits, confidence, scale, bias, call, in_place = arguments
        vectors = replace(call.vectors, scale=scale, bias=bias)
        classes = logits.shape[1]
        local = call.local_target(slice(None), slice(0, classes))
        whole = slice(None), slice(0, classes)
        sums = call.sums(logits, local, vectors, confidence, *whole)
        done = finish(call, sums, classes, du_dc=scale is not None)
        ctx.call, ctx.in_place = call, in_place
        if any(ctx.needs_input_grad[:4]):
            ctx.save_for_backward(
                logits, confidence, scale, bias, local, done.terms, done.target_du_dc, done.divisor
            )
        loss: Tensor = call.reduction.loss(done.losses, done.divisor, call.known, call.pair)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad_loss):
            raise RuntimeError(shards.NO_DOUBLE_BACKWARD)
        call: Call = ctx.call
        logits, confidence, scale, bias, local, terms, target_du_dc, divisor = ctx.saved_tensors
        of_logits, of_confidence, of_scale, of_bias = ctx.needs_input_grad[:4]
        factors = shards.factors_of(
            terms, target_du_dc, call.reduction.upstream(grad_loss, divisor, terms)
        )
        vectors = replace(call.vectors, scale=scale, bias=bias)
        want = (of_logits, of_scale, of_bias, of_confidence)
        over = logits.data if ctx.in_place else logits
        grads = shards.gradients_with_pair(
            call, factors, over, local, vectors, confidence, want, slice(None),
            slice(0, logits.shape[1]), call.reduction.of_reduced(grad_loss, divisor, terms),
            in_place=ctx.in_place,
        )  # fmt: skip
        if ctx.in_place and of_logits:
            torch.autograd.graph.increment_version(logits)
        if grads[3] is not None:
            assert call.ranks is not None
            call.ranks.add(grads[3], "gradient of the confidence")
        return grads[0], grads[3], grads[1], grads[2], None, None


@_disable_dynamo  # torch.compiler.disable, without importing dynamo
def loss(
    call: Call, logits: Tensor, confidence: Tensor | None, scale: Tensor | None,
    bias: Tensor | None, *, in_place: bool,
) -> Tensor:  # fmt: skip
    """In the accumulation dtype, of this rank's logits (N, C), neighbouring classes."""
    found: Tensor = _ParallelLoss.apply(  # type: ignore[no-untyped-call]
        logits, confidence, scale, bias, call, in_place
    )
    return found
