"""What a loss knows of every position besides its value: return_details."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._ops import dispatch, reference, second_look
from .._ops.codes import DETAILS, ENTROPY, PREDICTION, REDUCTIONS
from .._ops.problem import Inputs, Problem, is_soft
from ..errors import ArgumentError
from .arguments import positions_shape
from .options import output
from .two_classes import calibrated_at

ReturnDetails = bool | Literal["entropy"]
_LARGE_MARGIN = 40.0


class LossDetails(NamedTuple):
    """A loss, and of every position, in the positions' shape and without gradients:

    position_loss: its loss, sample_weight included; 0 where ignored.
    log_sum_exp: log sum_j exp(u_j) of the calibrated logits, prior included; 0 where ignored.
    probability: softmax of the target, margin not included; 0 where ignored. None where the target
        is class probabilities or two classes a position.
    prediction: the most probable class, int64.
    correct: whether that is the target, False where ignored. None where probability is.
    entropy: -sum_j p_j log p_j, margin not included; 0 where ignored. None unless
        return_details="entropy".

    All come from the loss's own read of the logits. A second one is taken for log_sum_exp and
    entropy with a margin below 0, or, on a GPU, any margin; and for all but the loss where no
    kernel of the library serves.
    """

    loss: Tensor
    position_loss: Tensor
    log_sum_exp: Tensor
    probability: Tensor | None
    prediction: Tensor
    correct: Tensor | None
    entropy: Tensor | None


class Found(NamedTuple):
    """Of every position, flat, in the accumulation dtype and without gradients.

    losses: sample_weight included. log_sum_exp, entropy: anything where ignored. target_logit: u_t.
    None of these has the margin. indices: class indices and which of them count. entropy is None
    unless wanted, target_logit where there is no one target, indices with class probabilities.
    """

    losses: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    entropy: Tensor | None
    target_logit: Tensor | None
    indices: tuple[Tensor, Tensor] | None


def check_return_details(given: ReturnDetails) -> None:
    if type(given) is not bool and given != "entropy":
        raise ArgumentError(f"return_details must be False, True or 'entropy', got {given!r}")


def of(
    input: Tensor, inputs: Inputs, problem: Problem, return_details: ReturnDetails,
    *promoting: Tensor | None,
) -> LossDetails:  # fmt: skip
    """The loss of a validated call, with its details."""
    shape = positions_shape(input)
    loss, found = find(inputs, problem, return_details)
    each = problem.reduction == REDUCTIONS["none"]
    return assemble(output(input, loss, shape if each else None, *promoting), shape, found)


def find(inputs: Inputs, problem: Problem, return_details: ReturnDetails) -> tuple[Tensor, Found]:
    """The loss of a validated call, in the accumulation dtype, and what is known beside it."""
    entropy_wanted = return_details == "entropy"
    each = problem.reduction == REDUCTIONS["none"]
    bits = DETAILS
    again = second_look.hides_classes(inputs.margin)
    if dispatch.predicts(problem.layout, inputs.logits):
        bits |= PREDICTION | ENTROPY * (entropy_wanted and not again)
    loss, *known = dispatch.compute(inputs, problem._replace(details=bits))
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
        prediction, entropy = (*known, None, None)[:2]
        if prediction is None or again:
            look = second_look.look(
                inputs.logits.detach(), *problem.form.vectors(detached.scale, detached.bias),
                detached.confidence, inputs.prior, entropy=entropy_wanted,
                log_sum_exp=again or lse is None,
            )  # fmt: skip
            prediction = look.prediction if prediction is None else prediction
            entropy = look.entropy
            lse = look.log_sum_exp if again else lse
        u_t = indices = None
        if not is_soft(inputs):
            indices = reference.class_indices(inputs.target.reshape(-1), problem.numbers[0])
            t, valid = indices
            _, u_t, _ = calibrated_at(detached, problem, t, t, valid.to(losses.dtype))
            if lse is not None and inputs.margin is not None and not again:
                margin = inputs.margin[torch.where(valid, t, 0)]
                lse = _without_margin(lse, u_t, margin)
        lse = look.log_sum_exp if lse is None else lse
        assert lse is not None
        return loss, Found(losses, lse, prediction, entropy, u_t, indices)


@torch.no_grad()
def assemble(loss: Tensor, shape: torch.Size, found: Found) -> LossDetails:
    """Details in the positions' shape."""
    losses, lse, prediction, entropy, u_t, indices = found
    probability = correct = None
    if indices is not None:
        t, valid = indices
        if u_t is not None:
            probability = torch.where(valid, (u_t - lse).exp(), 0.0)
            correct = (prediction == t) & valid
        lse = torch.where(valid, lse, 0.0)
        entropy = None if entropy is None else torch.where(valid, entropy, 0.0)
    parts = (losses, lse, probability, prediction, correct, entropy)
    return LossDetails(loss, *(None if p is None else p.reshape(shape) for p in parts))  # type: ignore[arg-type]


def _detached(inputs: Inputs) -> Inputs:
    return Inputs(*(None if t is None else t.detach() for t in inputs))  # type: ignore[arg-type]


def _without_margin(lse: Tensor, u_t: Tensor, margin: Tensor) -> Tensor:
    """lse of sums in which the target's exponential lacks the margin, which is not negative."""
    share = (u_t - margin - lse).exp()  # the target's, of the sum
    found = lse + torch.log1p(share * torch.expm1(margin))
    # Beyond, exp(margin) may be infinite, and what the margin left of the target's is lost in it.
    beyond = (margin >= _LARGE_MARGIN) | (lse == float("-inf"))  # or every class is masked
    return torch.where(beyond, torch.logaddexp(lse, u_t), found)
