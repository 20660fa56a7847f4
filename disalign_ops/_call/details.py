"""What a loss knows of every position besides its value: return_details."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import dispatch, reference
from .._ops.codes import DETAILS, ENTROPY, PREDICTION, REDUCTIONS
from .._ops.problem import Inputs, Problem, is_soft
from .arguments import positions_shape
from .mixed import calibrated_at
from .options import output

_LARGE_MARGIN = 40.0
_CHUNK_ENTRIES = 1 << 22  # of logits that the second read has in the arithmetic dtype at a time


class LossDetails(NamedTuple):
    """A loss, and of every position, in the positions' shape and without gradients:

    position_loss: its loss, sample_weight included; 0 where ignored.
    log_sum_exp: log sum_j exp(u_j) of the calibrated logits, prior included; 0 where ignored.
    probability: softmax of the target, margin not included; 0 where ignored. None with class
        probabilities as target.
    prediction: the most probable class, int64.
    correct: whether that is the target, False where ignored. None with class probabilities.
    entropy: -sum_j p_j log p_j, margin not included; 0 where ignored. None unless
        return_details="entropy".

    All come from the loss's own read of the logits on the CPU. On a GPU prediction and entropy take
    a second one, as everything but the loss does where no kernel of the library serves.
    """

    loss: Tensor
    position_loss: Tensor
    log_sum_exp: Tensor
    probability: Tensor | None
    prediction: Tensor
    correct: Tensor | None
    entropy: Tensor | None


def of(
    input: Tensor, inputs: Inputs, problem: Problem, entropy_wanted: bool,
    *promoting: Tensor | None,
) -> LossDetails:  # fmt: skip
    """The loss of a validated call, with its details."""
    shape = positions_shape(input)
    each = problem.reduction == REDUCTIONS["none"]
    bits = DETAILS
    if dispatch.predicts(problem.layout, inputs):
        bits |= PREDICTION | ENTROPY * entropy_wanted
    loss, *known = dispatch.compute(inputs, problem._replace(details=bits))
    result = output(input, loss, shape if each else None, *promoting)
    detached = _detached(inputs)
    with torch.no_grad():
        if known:
            losses = loss.detach() if each else known.pop(0)
            statistics = known.pop()
            lse = statistics[0] + statistics[1].log()
        else:
            none = problem._replace(reduction=REDUCTIONS["none"], in_place=False, gradient="auto")
            losses = dispatch.compute(detached, none)[0]
            lse = None
        prediction, entropy, of_second = (*known, None, None, None)[:3]
        if prediction is None:
            second = _second_read(detached, problem, entropy=entropy_wanted, lse=lse is None)
            prediction, entropy, of_second = second
        indices = u_t = margin = None
        if not is_soft(inputs):
            indices = reference.class_indices(inputs.target.reshape(-1), problem.numbers[0])
            t, valid = indices
            _, u_t, _ = calibrated_at(detached, problem, t, t, valid.to(losses.dtype))
            if lse is not None:  # of sums with the margin
                margin = margin_of(inputs.margin, indices)
        lse = of_second if lse is None else lse
        assert lse is not None
        return assemble(result, shape, losses, lse, u_t, prediction, indices, margin, entropy)


@torch.no_grad()
def assemble(
    loss: Tensor, shape: torch.Size, losses: Tensor, lse: Tensor, u_t: Tensor | None,
    prediction: Tensor, indices: tuple[Tensor, Tensor] | None, margin: Tensor | None,
    entropy: Tensor | None = None,
) -> LossDetails:  # fmt: skip
    """Details from flat vectors. indices: class indices and which of them count, None with class
    probabilities. u_t: without the margin. margin: that of each position's target, where lse is of
    sums with it.
    """
    probability = correct = None
    if indices is not None:
        t, valid = indices
        assert u_t is not None
        if margin is not None:
            lse = _without_margin(lse, u_t, margin)
        probability = torch.where(valid, (u_t - lse).exp(), 0.0)
        lse = torch.where(valid, lse, 0.0)
        entropy = None if entropy is None else torch.where(valid, entropy, 0.0)
        correct = (prediction == t) & valid
    parts = (losses, lse, probability, prediction, correct, entropy)
    return LossDetails(loss, *(None if p is None else p.reshape(shape) for p in parts))  # type: ignore[arg-type]


def margin_of(margin: Tensor | None, indices: tuple[Tensor, Tensor]) -> Tensor | None:
    """Of each position's target. margin: (C,) or None."""
    t, valid = indices
    return None if margin is None else margin[torch.where(valid, t, 0)]


def _detached(inputs: Inputs) -> Inputs:
    return Inputs(*(None if t is None else t.detach() for t in inputs))  # type: ignore[arg-type]


def _without_margin(lse: Tensor, u_t: Tensor, margin: Tensor) -> Tensor:
    """lse of sums in which the target's exponential lacks the margin."""
    share = (u_t - margin - lse).exp()  # the target's, of the sum
    found = lse + torch.log1p(share * torch.expm1(margin))
    # Beyond, exp(margin) may be infinite, and what the margin left of the target's is lost in it.
    return torch.where(margin < _LARGE_MARGIN, found, torch.logaddexp(lse, u_t))


def _second_read(
    inputs: Inputs, problem: Problem, *, entropy: bool, lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The most probable class, entropy and log-sum-exp of every position, flat, the last two None
    where not wanted: a part of the logits at a time.
    """
    z = inputs.logits
    scale, bias = problem.form.vectors(inputs.scale, inputs.bias)
    if scale is None and inputs.prior is None and not (entropy or lse):
        return z.argmax(1).reshape(-1), None, None
    n, classes = z.shape[:2]
    inner = z.shape[2] if z.dim() == 3 else 1  # -1 is ambiguous in an empty batch
    confidence = None if inputs.confidence is None else inputs.confidence.view(n, inner)
    step = max(_CHUNK_ENTRIES // max(classes * inner, 1), 1)
    if torch.compiler.is_compiling():
        step = max(n, 1)
    found = []
    for first in range(0, n, step):
        part = slice(first, first + step)
        u = reference.calibrated_logits(
            z[part], scale, bias,
            None if confidence is None else confidence[part].reshape(-1), inputs.prior,
        )  # fmt: skip
        of_part = [u.argmax(1).reshape(-1)]
        if entropy or lse:
            log_sum = u.logsumexp(1)
            p = (u - log_sum.unsqueeze(1)).exp()
            # p log p is 0 at p = 0, where log p is -inf.
            terms = torch.where(p > 0, p * (u - log_sum.unsqueeze(1)), 0.0)
            of_part += [-terms.sum(1).reshape(-1), log_sum.reshape(-1)]
        found.append(of_part)
    if not found:
        empty = z.new_empty(0, dtype=reference.accumulate_dtype(z.dtype))
        return empty.long(), empty if entropy else None, empty if lse else None
    whole = [torch.cat(parts) for parts in zip(*found, strict=True)]
    if len(whole) == 1:
        return whole[0], None, None
    return whole[0], whole[1] if entropy else None, whole[2]
