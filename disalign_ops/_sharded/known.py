"""What return_details asks of rows whose classes are in parts; the loss fills it in on its way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import dispatch, reference, second_look
from .._ops.codes import ENTROPY, PREDICTION
from .._ops.schemas import ROW
from .ranks import Ranks
from .shards import Vectors

_NO_CLASS = torch.iinfo(torch.int64).max


class _Part(NamedTuple):
    """Of every row and some classes: the most probable one by its global id, its u, log-sum-exp and
    entropy (None where that is not wanted), all without the margin.
    """

    prediction: Tensor
    largest: Tensor
    log_sum_exp: Tensor
    entropy: Tensor | None


class Known:
    """Vectors (N,): losses, sample_weight included; log_sum_exp and target_logit (0 with class
    probabilities), without the margin; prediction, the most probable of all classes; entropy, or
    None.
    """

    def __init__(self, rows: int, like: Tensor, *, entropy: bool, margin: bool) -> None:
        """entropy: is wanted. margin: is given."""
        dtype = reference.accumulate_dtype(like.dtype)
        self.losses = like.new_zeros(rows, dtype=dtype)
        self.log_sum_exp, self.target_logit = (torch.zeros_like(self.losses) for _ in range(2))
        self.prediction = like.new_full((rows,), _NO_CLASS, dtype=torch.int64)
        self.entropy = torch.zeros_like(self.losses) if entropy else None
        self._margin = torch.zeros_like(self.losses) if margin else None
        self._largest, self._of_parts = (
            torch.full_like(self.losses, float("-inf")) for _ in range(2)
        )

    def wanted(self, logits: Tensor) -> int:
        """What the operator is to give of these logits."""
        if not dispatch.predicts(ROW, logits):
            return 0
        return PREDICTION | ENTROPY * (self.entropy is not None)

    def look(
        self, rows: slice, logits: Tensor, target: Tensor, vectors: Vectors,
        confidence: Tensor | None, results: list[Tensor], first: int,
    ) -> None:  # fmt: skip
        """At some classes, from class `first` on. target: as shards.local_target has it. results:
        the operator's, sums (5, n) and what was wanted.
        """
        if not logits.shape[1]:
            return
        sums, *details = results
        here = None if target.is_floating_point() else target >= 0
        margin = None
        if self._margin is not None and vectors.margin is not None and here is not None:
            margin = torch.where(here, vectors.margin[target.clamp(min=0)], 0.0)
            self._margin[rows] += margin
        prediction, entropy = (*details, None, None)[:2]
        log_sum = _log_sum_exp(sums, here, margin)
        again = second_look.hides_classes(vectors.margin)
        if prediction is None or again:
            look = second_look.look(
                logits, vectors.scale, vectors.bias, confidence, vectors.prior,
                entropy=self.entropy is not None, log_sum_exp=again,
            )  # fmt: skip
            prediction, entropy = look.prediction, look.entropy
            log_sum = log_sum if look.log_sum_exp is None else look.log_sum_exp
        # Of its logit, and not its place in memory: equal ones are equal in every part.
        z = logits.gather(1, prediction[:, None])
        scale, bias, prior = (
            None if v is None else v[prediction, None]
            for v in (vectors.scale, vectors.bias, vectors.prior)
        )
        largest = reference.calibrated_logits(z, scale, bias, confidence, prior)[:, 0]
        self._merge(rows, _Part(prediction + first, largest, log_sum, entropy))

    def _merge(self, rows: slice, part: _Part) -> None:
        # A row of nothing but masked classes has a most probable one too: its first.
        before = self._largest[rows]
        larger = (self.prediction[rows] == _NO_CLASS) | (part.largest > before)
        larger |= part.largest.isnan() & ~before.isnan()  # the largest, to argmax
        self._largest[rows] = torch.where(larger, part.largest, before)
        self.prediction[rows] = torch.where(larger, part.prediction, self.prediction[rows])
        before = self._of_parts[rows]
        both = torch.logaddexp(before, part.log_sum_exp)
        if self.entropy is not None and part.entropy is not None:
            self.entropy[rows] = _share(self.entropy[rows], before, both) + _share(
                part.entropy, part.log_sum_exp, both
            )
        self._of_parts[rows] = both

    def take(self, rows: slice, sums: Tensor, *, soft: bool, ranks: Ranks | None = None) -> None:
        """The sums (5, n) of all classes; see shard_reference.shard_sums. ranks: whose classes are
        not these rows' own; then everything else becomes that over all of them, too.
        """
        if not soft:
            self.target_logit[rows] = sums[2]
        if self._margin is None:
            here = None if soft else torch.ones_like(sums[0], dtype=torch.bool)
            self.log_sum_exp[rows] = _log_sum_exp(sums, here, None)
        else:  # it is in the sums
            if ranks is not None:
                ranks.add(self._margin, "margins of the rows")
            self.target_logit[rows] += self._margin[rows]
            of_parts = self._of_parts[rows]
            self.log_sum_exp[rows] = of_parts if ranks is None else ranks.log_sum_exp(of_parts)
        if ranks is None:
            return
        # NaN is the largest to argmax, and to no all-reduce.
        nan = self._largest.isnan()
        own = torch.stack((torch.where(nan, 0.0, self._largest), nan.to(sums.dtype)))
        value, any_nan = largest = own.clone()
        ranks.maximum(largest, "most probable classes")
        is_largest = torch.where(any_nan > 0, nan, self._largest == value)
        candidate = torch.where(is_largest, self.prediction, _NO_CLASS)
        self.prediction = ranks.minimum(candidate, "most probable classes")
        if self.entropy is not None:
            self.entropy = _share(self.entropy, self._of_parts, self.log_sum_exp)
            ranks.add(self.entropy, "entropies of the rows")


def _share(entropy: Tensor, log_sum_exp: Tensor, of_all: Tensor) -> Tensor:
    """What a part with this entropy and log-sum-exp adds to the entropy of all classes."""
    below = log_sum_exp - of_all
    masked = log_sum_exp == float("-inf")
    return torch.where(masked, 0.0, below.exp() * (entropy - below))


def _log_sum_exp(sums: Tensor, here: Tensor | None, margin: Tensor | None) -> Tensor:
    """Of a shard's sums (5, n), without the margin. here: which rows have their target in it; None
    with class probabilities. margin: of the targets.
    """
    maximum, rest, target_logit = sums[:3]
    others: Tensor = (
        maximum + rest.clamp(min=0).log()
    )  # what rounding left of nothing may be below 0
    if here is None:
        return others
    target_logit = target_logit if margin is None else target_logit + margin
    return torch.where(here, torch.logaddexp(others, target_logit), others)
