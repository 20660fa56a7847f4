"""The loss of rows whose classes are divided into shards: over memory (chunks.py), over processes
(parallel.py, ranks.py).

    sums of each shard -> combined -> losses, terms -> factors -> gradients of each shard

A row's sums and factors are the (5, N) tensors of `shard_reference.shard_sums` and
`shard_reference.shard_gradients`; everything between them is elementwise on rows. Gradients of the
class vectors and of the logits are a shard's own; those of the confidence are to be added up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._ops import dispatch, reference, shard_reference
from .._ops.codes import GRADIENTS, LOGITS, SHARD_VALUES
from .._ops.schemas import ROW
from .._ops.shard_reference import ELSEWHERE, IGNORED

if TYPE_CHECKING:
    from .known import Known
    from .pair import Pair
    from .ranks import Ranks

NO_DOUBLE_BACKWARD = (
    "a loss over several processes cannot be differentiated twice (create_graph=True), nor for a "
    "batch of upstream gradients (is_grads_batched=True)"
)


@dataclass(frozen=True)
class Vectors:
    """The class vectors of a shard; keep and share, 1 - e and e / C of label smoothing e."""

    weight: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    prior: Tensor | None
    margin: Tensor | None
    keep: float
    share: float

    def each(self, part: Callable[[Tensor], Tensor]) -> Vectors:
        """Of some of the classes: part(vector) of every vector that is given."""

        def of(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else part(vector)

        return Vectors(
            of(self.weight), of(self.scale), of(self.bias), of(self.prior), of(self.margin),
            self.keep, self.share,
        )  # fmt: skip

    def arguments(
        self, target: Tensor, confidence: Tensor | None
    ) -> tuple[Tensor | float | None, ...]:
        """In the operators' order."""
        # Without smoothing the weights are the target's alone, and not the operators' business.
        weight = self.weight if self.share or target.is_floating_point() else None
        vectors = (weight, self.scale, self.bias, confidence, self.prior, self.margin)
        return (*vectors, self.keep, self.share)

    def weight_sum(self, classes: int, like: Tensor) -> Tensor:
        """sum_j w_j over the shard, 0-d."""
        if self.weight is None:
            return like.new_full((), float(classes))
        return self.weight.sum()


def local_target(target: Tensor, first: int, classes: int, ignore_index: int) -> Tensor:
    """Targets (N,) as a shard of `classes` classes from `first` on has them: int64."""
    t, valid = reference.class_indices(target, ignore_index)
    local = t - first
    here = (local >= 0) & (local < classes)
    local = torch.where(here, local, ELSEWHERE)
    return torch.where(valid, local, IGNORED)


def target_weight(weight: Tensor | None, target: Tensor, like: Tensor) -> Tensor:
    """w_t where the shard has the target, else 0; target as from `local_target`."""
    here = target >= 0
    if weight is None:
        return here.to(like.dtype)
    if not weight.numel():
        return torch.zeros_like(target, dtype=like.dtype)
    return torch.where(here, weight[target.clamp(min=0)], 0.0)


def results_of(backend: str, logits: Tensor, target: Tensor, vectors: Vectors,
               confidence: Tensor | None, wanted: int) -> list[Tensor]:  # fmt: skip
    """A shard's sums (5, N), see shard_reference.shard_sums, and what else is wanted."""
    arguments = vectors.arguments(target, confidence)
    if not logits.shape[1]:
        dtype = reference.accumulate_dtype(logits.dtype)
        nothing = logits.new_zeros((SHARD_VALUES, logits.shape[0]), dtype=dtype)
        nothing[0].fill_(torch.finfo(dtype).min)
        if not target.is_floating_point():
            nothing[0].masked_fill_(target == IGNORED, 0.0)
        return [nothing]
    if backend == "reference":
        return [shard_reference.shard_sums(logits, target, *arguments)]  # type: ignore[arg-type]
    operator = dispatch.operators_of(ROW, backend).operator("shard_forward")
    results: list[Tensor] = operator(logits, target, *arguments, wanted)
    return results


def gradients_of(
    backend: str, factors: Tensor, logits: Tensor, target: Tensor, vectors: Vectors,
    confidence: Tensor | None, want: tuple[bool, bool, bool, bool], *, in_place: bool,
) -> list[Tensor | None]:  # fmt: skip
    """A shard's gradients of logits, scale, bias and confidence, None where not wanted.

    in_place: that of the logits is written over them, and they are returned.
    """
    arguments = vectors.arguments(target, confidence)
    if not logits.shape[1]:
        rows = factors.new_zeros((logits.shape[0],))
        vector = factors.new_zeros((0,))
        empty = (logits, vector, vector, rows)
        return [t if w else None for t, w in zip(empty, want, strict=True)]
    if backend == "reference":
        found = shard_reference.shard_gradients(factors, logits, target, *arguments)  # type: ignore[arg-type]
        if in_place and want[0]:
            found = (logits.copy_(found[0]), *found[1:])
    else:
        in_place = in_place and want[0]
        name = "shard_backward_" if in_place else "shard_backward"
        operator = dispatch.operators_of(ROW, backend).operator(name)
        bits = sum(bit for bit, w in zip(GRADIENTS, want, strict=True) if w)
        results = iter(operator(factors, logits, target, *arguments, bits))
        return [
            None if not w else logits if in_place and bit == LOGITS else next(results)
            for bit, w in zip(GRADIENTS, want, strict=True)
        ]
    return [t if w else None for t, w in zip(found, want, strict=True)]


def rescale_sums(sums: Tensor, weight_sum: Tensor, maximum: Tensor) -> Tensor:
    """The sums relative to a maximum not below their own. weight_sum: sum_j w_j of the shard."""
    own, rest, target_logit, target_du_dc, smooth = sums
    # Without classes, or without smoothing's weights, 0 and not 0 * infinity.
    lost = torch.where(weight_sum == 0, 0.0, weight_sum * (own - maximum))
    ratio = (own - maximum).exp()
    return torch.stack((maximum, rest * ratio, target_logit, target_du_dc, smooth + lost))


def merge_sums(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor) -> Tensor:
    """The sums of two shards; those of both, with a_weight + b_weight."""
    maximum = torch.maximum(a[0], b[0])
    both = rescale_sums(a, a_weight, maximum) + rescale_sums(b, b_weight, maximum)
    both[0] = maximum
    return both


def soft_terms_of(sums: Tensor) -> tuple[Tensor, Tensor]:
    """As `terms_of`, of class probabilities: sum_j b_j (lse - u_j), whose gradient by u_j is
    b_sum softmax_j - b_j.
    """
    maximum, total, b_sum, _, smooth = sums
    losses = b_sum * total.log() - smooth
    one, nothing = torch.ones_like(total), torch.zeros_like(total)
    return losses, torch.stack((maximum, b_sum / total, one, nothing))


def terms_of(
    sums: Tensor, target_weight: Tensor, weight_sum: Tensor, classes: Tensor | int,
    valid: Tensor, smoothing: float, gamma: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses (N,), 0 where not valid, and terms (4, N): maximum, and those of
    q_j = softmax exp(u_j - M) - smooth w_j - target [j = t]; docs/math.md.

    sums, target_weight and weight_sum: over all shards. classes: of all shards.
    """
    maximum, rest, target_logit, _, smooth = sums
    total = rest + (target_logit - maximum).exp()
    log_sum = total.log()
    # log1p: a small loss keeps its digits. inf - inf is NaN, as in PyTorch, where the target's
    # logit is infinite.
    at_maximum = target_logit == maximum
    nll = (maximum - target_logit) + torch.where(at_maximum, rest.log1p(), log_sum)
    value, focal_grad_factor = _focal(nll, gamma)
    losses = (1 - smoothing) * target_weight * value
    target = (1 - smoothing) * target_weight * focal_grad_factor
    softmax, share = target, torch.zeros_like(target)
    if smoothing > 0:
        share = share + smoothing / classes
        losses = losses + share * (weight_sum * log_sum - smooth)
        softmax = target + share * weight_sum
    terms = torch.stack((maximum, softmax / total, share, target))
    return torch.where(valid, losses, 0.0), terms


def _focal(nll: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(1 - p)^gamma nll, and its derivative by u_t divided by p - 1; at p = 1 the limit 0."""
    if gamma == 0:
        return nll, torch.ones_like(nll)
    sure = nll <= 0
    positive = torch.where(sure, 1.0, nll)
    p, rest = (-positive).exp(), -torch.expm1(-positive)
    p_nll = torch.where(p == 0, 0.0, p * positive)  # p log p -> 0, not 0 * inf
    focal_grad_factor = rest**gamma + gamma * rest ** (gamma - 1) * p_nll
    return torch.where(sure, 0.0, rest**gamma * positive), torch.where(sure, 0.0, focal_grad_factor)


@dataclass(frozen=True)
class Reduction:
    """How the rows' losses become one: what `sample_weight`, `reduction` and `normalizer` say."""

    sample_weight: Tensor | None
    reduction: str
    normalizer: str | Tensor

    def divisor(self, target_weight: Tensor, valid: Tensor) -> Tensor:
        """What the summed loss is divided by, a float64 0-d tensor; see reference.denominator."""
        if self.reduction != "mean":
            return torch.ones((), dtype=torch.float64, device=valid.device)
        return reference.denominator_of(self.normalizer, valid, target_weight, self.sample_weight)

    def loss(
        self, losses: Tensor, divisor: Tensor, known: Known | None, pair: Pair | None
    ) -> Tensor:
        """losses: those of `terms_of`. known: gets them, sample_weight included."""
        if self.sample_weight is not None:
            losses = losses * self.sample_weight
        if pair is not None:
            losses = losses + pair.rest
        if known is not None:
            known.losses = losses
        return reference.reduce(losses, self.reduction, self.normalizer, divisor)

    def upstream(self, grad_loss: Tensor | None, divisor: Tensor, like: Tensor) -> Tensor:
        """Of each row's loss before its sample_weight, (N,) or 0-d.

        grad_loss: of the reduced loss; None: 1.
        """
        upstream = self.of_reduced(grad_loss, divisor, like)
        return upstream if self.sample_weight is None else upstream * self.sample_weight

    @staticmethod
    def of_reduced(grad_loss: Tensor | None, divisor: Tensor, like: Tensor) -> Tensor:
        """The same of each row's loss with its sample_weight."""
        inverse = torch.where(divisor == 0, 0.0, 1.0 / torch.where(divisor == 0, 1.0, divisor))
        upstream = inverse.to(like.dtype)
        if grad_loss is not None:
            upstream = upstream * grad_loss.to(like.dtype)
        return upstream


def factors_of(terms: Tensor, target_du_dc: Tensor, upstream: Tensor) -> Tensor:
    """(5, N), for `gradients_of`. upstream: (N,) or 0-d, everything included."""
    maximum, softmax, smooth, target = terms
    g = upstream.expand(maximum.shape)
    # Denominator 0 (no valid position): gradients are 0, whatever the numerator.
    scaled = (torch.where(g == 0, 0.0, g * t) for t in (softmax, smooth, target))
    return torch.stack((maximum, *scaled, target_du_dc))


@dataclass(frozen=True)
class Call:
    """What a loss is given beside the tensors that it can differentiate.

    vectors: without scale and bias, which are differentiable. ranks: the processes that share the
    classes, or None. known: where details are wanted, to be filled in. pair: of two classes a
    position, the second one's part.
    """

    backend: str
    target: Tensor
    ignore_index: int
    label_smoothing: float
    focal_gamma: float
    vectors: Vectors
    reduction: Reduction
    ranks: Ranks | None
    known: Known | None
    pair: Pair | None

    @property
    def soft(self) -> bool:
        """Whether the target is class probabilities, (N, C) of this process's classes."""
        return self.target.is_floating_point()

    @property
    def valid(self) -> Tensor:
        """Which rows count."""
        if self.soft:
            return self.target.new_ones(self.target.shape[0], dtype=torch.bool)
        return reference.class_indices(self.target, self.ignore_index)[1]

    def local_target(self, rows: slice, part: slice) -> Tensor:
        """Of some of this process's classes, as the operators take it."""
        if self.soft:
            return self.target[rows, part]
        return self._of_part(self.target[rows], part)

    def local_other(self, rows: slice, part: slice) -> Tensor:
        """The same of the second class."""
        assert self.pair is not None
        return self._of_part(self.pair.other[rows], part)

    def sums(
        self, logits: Tensor, target: Tensor, vectors: Vectors, confidence: Tensor | None,
        rows: slice, part: slice,
    ) -> Tensor:  # fmt: skip
        """A shard's sums (5, n); what else is asked of these logits is taken from them on the way.

        rows, part: whose logits these are. target: of `local_target`.
        """
        wanted = 0 if self.known is None else self.known.wanted(logits)
        results = results_of(self.backend, logits, target, vectors, confidence, wanted)
        if self.known is not None:
            first = self._first_of(part)
            self.known.look(rows, logits, target, vectors, confidence, results, first)
        if self.pair is not None:
            other = self.local_other(rows, part)
            self.pair.look(rows, logits, other, vectors, confidence)
        return results[0]

    def _first_of(self, part: slice) -> int:
        first: int = (self.ranks.first if self.ranks else 0) + part.start
        return first

    def _of_part(self, target: Tensor, part: slice) -> Tensor:
        return local_target(target, self._first_of(part), part.stop - part.start, self.ignore_index)

    def target_weight(self, classes: int, like: Tensor) -> Tensor:
        """w_t of every row whose target is among this process's classes, else 0; of class
        probabilities 1.
        """
        if self.soft:
            return like.new_ones(self.target.shape[0])
        local = self.local_target(slice(None), slice(0, classes))
        return target_weight(self.vectors.weight, local, like)

    def weight_sum(self, vectors: Vectors, classes: int, sums: Tensor) -> Tensor:
        """What goes with the last of a shard's sums where their maximum changes."""
        return sums[2] if self.soft else vectors.weight_sum(classes, sums)

    def terms_of(
        self, sums: Tensor, target_weight: Tensor, weight_sum: Tensor, classes: Tensor | int,
        valid: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self.soft:
            return soft_terms_of(sums)
        return terms_of(
            sums, target_weight, weight_sum, classes, valid, self.label_smoothing, self.focal_gamma
        )


def gradients_with_pair(
    call: Call, factors: Tensor, logits: Tensor, target: Tensor, vectors: Vectors,
    confidence: Tensor | None, want: tuple[bool, bool, bool, bool], rows: slice, part: slice,
    upstream: Tensor, *, in_place: bool,
) -> list[Tensor | None]:  # fmt: skip
    """`gradients_of`, with what a second class a position adds.

    rows, part: whose logits these are. upstream: of the rows' losses with their sample_weight.
    """
    of_pair = None
    if call.pair is not None and logits.shape[1]:
        targets = target, call.local_other(rows, part)
        of_pair = call.pair.gradients(rows, logits, targets, vectors, confidence, upstream)
    found = gradients_of(
        call.backend, factors, logits, target, vectors, confidence, want, in_place=in_place
    )
    if of_pair is not None:
        of_pair.add(*found)
    return found
