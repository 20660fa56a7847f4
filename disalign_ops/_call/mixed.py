"""Targets of two classes a position, as mixup and CutMix have them.

    lam CE(a) + (1 - lam) CE(b) = W (lse - u_t) + k (u_t - u_o)

where W is the sum of both terms' weights, t the class of the larger one, o the other and k its
weight. The first term is the loss of class indices t weighed by W, and takes one read of the
logits; the second is a few numbers a position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import composed, dispatch, reference
from .._ops.problem import Inputs, Problem
from ..errors import ArgumentError, ArgumentTypeError
from . import details
from .arguments import (
    check_class_indices,
    check_input,
    check_number,
    check_target,
    check_tensor,
    positions_shape,
    row_vector,
)
from .details import Found, LossDetails, ReturnDetails
from .options import (
    Calibration,
    Options,
    Validated,
    output,
    refuse_in_forward,
    validate_options,
)
from .two_classes import calibrated_at

_TWO_READS = (
    "where target is (a, b, lam) with a margin, focal_gamma, or weight and label_smoothing, or of "
    "upsampled logits"
)
Losses = Callable[[Tensor, Options], "Part"]
# Of a and b, their shares lam and 1 - lam, and the number of classes.
Terms = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int, "Validated"], "list[Term]"]
Validate = Callable[[Tensor, Tensor, Options, Calibration | None], tuple[Inputs, Problem] | None]


class Part(NamedTuple):
    """A loss in the accumulation dtype; what is known of its positions, None unless wanted."""

    loss: Tensor
    found: Found | None = None


class Term(NamedTuple):
    """Of a or b, flat: class indices, their share of the loss (w included, 0 where ignored), and
    which are not ignored.
    """

    target: Tensor
    share: Tensor
    valid: Tensor

    @staticmethod
    def of(indices: tuple[Tensor, Tensor], share: Tensor) -> Term:
        """indices: of reference.class_indices. share: w included, where ignored any."""
        t, valid = indices
        return Term(t, torch.where(valid, share, 0.0), valid)


class Split(NamedTuple):
    """Of every position, flat: class t, W and v (sample_weight) as one weight, o, and k v."""

    target: Tensor
    weight: Tensor
    other: Tensor
    share: Tensor

    @staticmethod
    def of(a: Term, b: Term, v: Tensor | None, smoothing: float) -> Split:
        # A class that is ignored has no weight; the other takes its place, whatever its own is.
        larger = ~a.valid | (b.valid & (b.share > a.share))
        t, o = torch.where(larger, b.target, a.target), torch.where(larger, a.target, b.target)
        k = torch.where(larger, a.share, b.share)
        k = torch.where(t == o, 0.0, k) * (1 - smoothing)
        weight = a.share + b.share
        if v is not None:
            k, weight = k * v, weight * v
        return Split(t, weight, o, k)

    def options(self, options: Options, positions: torch.Size) -> Options:
        """Those of the loss of class t."""
        return options._replace(weight=None, sample_weight=self.weight.reshape(positions))


def loss(
    input: Tensor, target: Any, options: Options, calibration: Calibration | None,
    validate: Validate, return_details: ReturnDetails = False,
) -> Tensor | LossDetails:  # fmt: skip
    """The loss for target (a, b, lam)."""
    if composed.is_tracing():
        raise ArgumentError(
            "target must be one tensor under torch.jit.trace, got a tuple: pass class "
            "probabilities, or torch.export the model"
        )
    classes = check_input(input)
    positions = positions_shape(input)

    def part(inputs: Inputs, problem: Problem) -> Part:
        if not return_details:
            return Part(dispatch.compute(inputs, problem)[0])
        return Part(*details.find(inputs, problem, return_details))

    def validated(indices: Tensor, each: Options) -> tuple[Inputs, Problem]:
        call = validate(input, indices.reshape(positions), each, calibration)
        assert call is not None
        return call

    def one_read(split: Split, given: Validated) -> Part:
        call = validated(split.target, split.options(options, positions))
        return _one_read(split, given, *call, part)

    def losses(indices: Tensor, each: Options) -> Part:
        return part(*validated(indices, each))

    return loss_of(input, classes, positions, target, options, losses, one_read)


def loss_of(
    like: Tensor, classes: int, positions: torch.Size, target: Any, options: Options,
    losses: Losses, one_read: Callable[[Split, Validated], Part] | None = None,
    terms: Terms | None = None,
) -> Tensor | LossDetails:  # fmt: skip
    """The loss of arguments that are to be checked, with details where the parts have some.

    losses(indices, options): of every position, flat, of one term. one_read: the reduced loss,
    where the terms differ in nothing but u_t and their weight. terms: where class weights are
    looked up, if not in the weight of all classes.
    """
    first, second, lam = check(like, target, positions)
    given = validate_options(like, classes, options)
    v = row_vector("sample_weight", options.sample_weight, like, positions, lam.dtype)
    a, b = (terms or _terms)((first, second), (lam, 1 - lam), classes, given)
    both = given.weight is not None and given.label_smoothing > 0
    if one_read is None or given.margin is not None or given.focal_gamma or both:
        loss, found = _two_reads((a, b), lam, v, positions, options, given, losses)
    else:
        loss, found = one_read(Split.of(a, b, v, given.label_smoothing), given)
    result = output(like, loss, positions if given.reduction == "none" else None)
    if found is None:
        return result
    # Of two targets neither is the one whose probability could be told.
    found = found._replace(target_logit=None, indices=(a.target, a.valid | b.valid))
    return details.assemble(result, positions, found)


def check_parts(target: tuple[Any, ...]) -> None:
    """That there are three."""
    if len(target) != 3:
        raise ArgumentError(
            f"target must have three parts, (a, b, lam), where it is a tuple, got {len(target)}"
        )


def check(input: Tensor, target: Any, positions: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """a and b of the positions' shape, and lam, flat or 0-d, of the accumulation dtype."""
    check_parts(target)
    first, second, share = target
    for name, indices in (("target[0]", first), ("target[1]", second)):
        check_class_indices(check_tensor(name, indices))
        check_target(input, indices, positions)
    dtype = reference.accumulate_dtype(input.dtype)
    compiling = torch.compiler.is_compiling()
    elsewhere = isinstance(share, Tensor) and share.is_cpu and not input.is_cpu
    if not isinstance(share, Tensor) or (elsewhere and not share.dim() and not compiling):
        number = check_number("target[2]", share, 0.0, 1.0)
        # A copy of a number, as torch.tensor makes it, would wait for the GPU.
        return first, second, torch.full((), number, dtype=dtype, device=input.device)
    if not check_tensor("target[2]", share).is_floating_point():
        # `loss_denominator` takes three tensors of indices as three targets.
        raise ArgumentTypeError(
            f"target[2] must be a number or have a floating dtype, got {share.dtype}"
        )
    if share.requires_grad:
        raise ArgumentError("target[2] must not require a gradient, got one that does")
    if share.dim() and share.shape != positions:
        raise ArgumentError(
            f"target[2] must be a number or have the positions' shape {tuple(positions)}, got "
            f"{tuple(share.shape)}"
        )
    share = share.detach()
    if share.is_cpu and not compiling:
        inside = (share >= 0) & (share <= 1)
        if not bool(inside.all()):
            raise ArgumentError("target[2] must be from 0 to 1, got an entry that is not")
    share = share.to(input.device, dtype)
    return first, second, share.reshape(-1) if share.dim() else share


def _terms(
    targets: tuple[Tensor, Tensor], shares: tuple[Tensor, Tensor], classes: int, given: Validated
) -> list[Term]:
    found = []
    for k, (target, share) in enumerate(zip(targets, shares, strict=True)):
        dispatch.check_classes(
            target, classes, given.ignore_index, asserted=False, name=f"target[{k}]"
        )
        indices = reference.class_indices(target.reshape(-1), given.ignore_index)
        if given.weight is not None:
            share = share * given.weight[torch.where(indices[1], indices[0], 0)]
        found.append(Term.of(indices, share))
    return found


def _one_read(
    split: Split, given: Validated, inputs: Inputs, problem: Problem,
    part: Callable[[Inputs, Problem], Part],
) -> Part:  # fmt: skip
    t, weight, o, k = split
    logits, u_t, u_o = calibrated_at(inputs, problem, t, o, k)
    loss, found = part(inputs._replace(logits=logits), problem)
    # Where class t is masked the first term is infinite by itself.
    rest = torch.where((k == 0) | (u_t == float("-inf")), 0.0, k * (u_t - u_o))
    if found is not None:
        found = found._replace(losses=found.losses + rest.detach())
    if given.reduction == "none":
        return Part(loss + rest, found)
    divisor = reference.denominator(
        t, given.normalizer, sample_weight=weight, ignore_index=given.ignore_index
    )
    # "count": where nothing is left the rest adds 0, not a second NaN.
    return Part(loss + reference.reduce(rest, given.reduction, "count", divisor), found)


def _two_reads(
    terms: tuple[Term, Term], lam: Tensor, v: Tensor | None, positions: torch.Size,
    options: Options, given: Validated, losses: Losses,
) -> Part:  # fmt: skip
    """Each term as a loss of its own."""
    if given.in_place:
        raise ArgumentError(
            f"inplace_backward must be False {_TWO_READS}, got True: the logits are read twice"
        )
    if given.gradient == "forward":
        refuse_in_forward(_TWO_READS)
    total: Any = 0
    found: list[Found] = []
    for term, share in zip(terms, (lam, 1 - lam), strict=True):
        weight = share.expand(term.target.shape) if v is None else share * v
        each = options._replace(
            reduction="none", sample_weight=weight.reshape(positions), normalizer="count",
            gradient="auto",
        )  # fmt: skip
        part, known = losses(term.target, each)
        total = total + torch.where(weight == 0, 0.0, part)  # a masked class of no share: 0 * inf
        found += [] if known is None else [known]
    a, b = terms
    valid, shares = a.valid | b.valid, a.share + b.share
    divisor = reference.denominator_of(given.normalizer, valid, shares, v)
    loss = reference.reduce(total, given.reduction, given.normalizer, divisor)
    if not found:
        return Part(loss)
    # What is of the logits alone is known where a position is not ignored.
    first, second = found
    each_lse = torch.where(a.valid, first.log_sum_exp, second.log_sum_exp)
    entropy = first.entropy
    if entropy is not None and second.entropy is not None:
        entropy = torch.where(a.valid, entropy, second.entropy)
    known = first._replace(losses=total.detach(), log_sum_exp=each_lse, entropy=entropy)
    return Part(loss, known)
