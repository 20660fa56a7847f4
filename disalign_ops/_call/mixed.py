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

from .._ops import autograd, composed, dispatch, reference
from .._ops.entries import add_entries
from .._ops.problem import Inputs, Problem
from ..errors import ArgumentError, ArgumentTypeError
from .arguments import (
    check_class_indices,
    check_input,
    check_number,
    check_target,
    check_tensor,
    positions_shape,
    row_vector,
)
from .options import (
    Calibration,
    Options,
    Validated,
    output,
    refuse_in_forward,
    validate_options,
)

_TWO_READS = (
    "where target is (a, b, lam) with a margin, focal_gamma, or weight and label_smoothing, or of "
    "upsampled logits"
)
Losses = Callable[[Tensor, Options], Tensor]
# Of a and b, their shares lam and 1 - lam, and the number of classes.
Terms = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int, "Validated"], "list[Term]"]
Validate = Callable[[Tensor, Tensor, Options, Calibration | None], tuple[Inputs, Problem] | None]


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
    validate: Validate,
) -> Tensor:  # fmt: skip
    """The loss for target (a, b, lam)."""
    if composed.is_tracing():
        raise ArgumentError(
            "target must be one tensor under torch.jit.trace, got a tuple: pass class "
            "probabilities, or torch.export the model"
        )
    classes = check_input(input)
    positions = positions_shape(input)

    def one_read(split: Split, given: Validated) -> Tensor:
        return _one_read(input, split, options, given, calibration, validate)

    def losses(indices: Tensor, each: Options) -> Tensor:
        call = validate(input, indices.reshape(positions), each, calibration)
        assert call is not None
        return dispatch.compute(*call)[0]

    return loss_of(input, classes, positions, target, options, losses, one_read)


def loss_of(
    like: Tensor, classes: int, positions: torch.Size, target: Any, options: Options,
    losses: Losses, one_read: Callable[[Split, Validated], Tensor] | None = None,
    terms: Terms | None = None,
) -> Tensor:  # fmt: skip
    """The loss of arguments that are to be checked.

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
        found = _two_reads((a, b), lam, v, positions, options, given, losses)
    else:
        found = one_read(Split.of(a, b, v, given.label_smoothing), given)
    return output(like, found, positions if given.reduction == "none" else None)


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
    input: Tensor, split: Split, options: Options, given: Validated,
    calibration: Calibration | None, validate: Validate,
) -> Tensor:  # fmt: skip
    t, weight, o, k = split
    positions = positions_shape(input)
    call = validate(input, t.reshape(positions), split.options(options, positions), calibration)
    assert call is not None
    inputs, problem = call
    logits, u_t, u_o = calibrated_at(inputs, problem, t, o, k)
    found = dispatch.compute(inputs._replace(logits=logits), problem)[0]
    # Where class t is masked the first term is infinite by itself.
    rest = torch.where((k == 0) | (u_t == float("-inf")), 0.0, k * (u_t - u_o))
    if given.reduction == "none":
        return found + rest
    divisor = reference.denominator(
        t, given.normalizer, sample_weight=weight, ignore_index=given.ignore_index
    )
    # "count": where nothing is left the rest adds 0, not a second NaN.
    return found + reference.reduce(rest, given.reduction, "count", divisor)


def _two_reads(
    terms: tuple[Term, Term], lam: Tensor, v: Tensor | None, positions: torch.Size,
    options: Options, given: Validated, losses: Losses,
) -> Tensor:  # fmt: skip
    """Each term as a loss of its own."""
    if given.in_place:
        raise ArgumentError(
            f"inplace_backward must be False {_TWO_READS}, got True: the logits are read twice"
        )
    if given.gradient == "forward":
        refuse_in_forward(_TWO_READS)
    total: Any = 0
    for term, share in zip(terms, (lam, 1 - lam), strict=True):
        weight = share.expand(term.target.shape) if v is None else share * v
        each = options._replace(
            reduction="none", sample_weight=weight.reshape(positions), normalizer="count",
            gradient="auto",
        )  # fmt: skip
        part = losses(term.target, each)
        total = total + torch.where(weight == 0, 0.0, part)  # a masked class of no share: 0 * inf
    a, b = terms
    valid, shares = a.valid | b.valid, a.share + b.share
    divisor = reference.denominator_of(given.normalizer, valid, shares, v)
    return reference.reduce(total, given.reduction, given.normalizer, divisor)


def calibrated_at(
    inputs: Inputs, problem: Problem, t: Tensor, o: Tensor, k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, to be used in place of the inputs', and u_t and u_o, flat. 0 where k is 0."""
    logits = inputs.logits
    classes = torch.stack((t, o)).clamp(min=0)
    classes = torch.where(k == 0, 0, classes)
    positions = logits.shape[2] if logits.dim() == 3 else 1  # -1 is ambiguous in an empty batch
    index = classes.view(2, logits.shape[0], positions).transpose(0, 1).contiguous()  # (N, 2, S)
    if logits.dim() == 2:
        index = index[..., 0]
    of_graph = dispatch.serving_backend(logits) == "reference" or torch.compiler.is_compiling()
    if of_graph or not (logits.requires_grad and torch.is_grad_enabled()):
        z = logits.gather(1, index).to(k.dtype)
    else:
        logits, z = _Entries.apply(logits, index, k.dtype)  # type: ignore[no-untyped-call]
    z = z.unsqueeze(-1) if logits.dim() == 2 else z
    z = z.transpose(0, 1).reshape(classes.shape)
    scale, bias = problem.form.vectors(inputs.scale, inputs.bias)
    # A row a position, of its two classes.
    a, b, prior = (
        None if vector is None else _pick(vector, classes).t()
        for vector in (scale, bias, inputs.prior)
    )
    u = torch.where(k == 0, 0.0, z).t()
    u = reference.calibrated_logits(u, a, b, inputs.confidence, prior)
    return logits, u[:, 0], u[:, 1]


def _pick(vector: Tensor, classes: Tensor) -> Tensor:
    """Entries of a class vector, whose gradient is summed in the same order on every run."""
    if vector.is_cpu:
        return vector.gather(0, classes.reshape(-1)).view(classes.shape)
    return vector[classes]


class _Entries(torch.autograd.Function):
    """The logits, and two of each position's in the arithmetic dtype.

    Their gradient is added to that of the logits where it lies: nothing of the logits' size is made
    for it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, dtype: torch.dtype) -> Any:
        ctx.save_for_backward(index)
        return logits.view_as(logits), logits.gather(1, index).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_entries: Tensor) -> Any:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        if torch.is_grad_enabled() or type(grad) is not Tensor or autograd.is_batched(grad):
            return grad.scatter_add(1, index, of_entries.to(grad.dtype)), None, None
        # Both entries are one where their gradients are 0: either may be written.
        add_entries(grad, index, of_entries)
        return grad, None, None
