"""What return_details asks of rows whose classes are in parts; the loss fills it in on its way."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import reference
from .ranks import Ranks
from .shards import Vectors

_NO_CLASS = torch.iinfo(torch.int64).max


class Known:
    """Vectors (N,): losses, sample_weight included; log_sum_exp and target_logit (0 with class
    probabilities), both with the margin; prediction, the most probable of all classes.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        dtype = reference.accumulate_dtype(like.dtype)
        self.losses = like.new_zeros(rows, dtype=dtype)
        self.log_sum_exp, self.target_logit = (torch.zeros_like(self.losses) for _ in range(2))
        self.prediction = like.new_full((rows,), _NO_CLASS, dtype=torch.int64)
        self._largest = torch.full_like(self.losses, float("-inf"))

    def look(
        self, rows: slice, logits: Tensor, vectors: Vectors, confidence: Tensor | None, first: int
    ) -> None:
        """At the logits of some classes, from class `first` on."""
        if not logits.shape[1]:
            return
        u = logits
        if vectors.scale is not None or vectors.prior is not None:
            u = reference.calibrated_logits(
                logits, vectors.scale, vectors.bias, confidence, vectors.prior
            )
        value, at = u.max(1)
        value = value.to(self._largest.dtype)
        # A row of nothing but masked classes has a most probable one too: its first.
        none = self.prediction[rows] == _NO_CLASS
        larger = none | (value > self._largest[rows])
        self._largest[rows] = torch.where(larger, value, self._largest[rows])
        self.prediction[rows] = torch.where(larger, at + first, self.prediction[rows])

    def take(self, rows: slice, sums: Tensor, *, soft: bool) -> None:
        """The sums (5, n) of all classes; see shard_reference.shard_sums."""
        maximum, rest, target_logit = sums[:3]
        if not soft:
            rest = rest + (target_logit - maximum).exp()
            self.target_logit[rows] = target_logit
        self.log_sum_exp[rows] = maximum + rest.log()

    def exchange(self, ranks: Ranks) -> None:
        """Makes the prediction that over all ranks' classes."""
        largest = self._largest.clone()
        ranks.maximum(largest, "most probable classes")
        candidate = torch.where(self._largest == largest, self.prediction, _NO_CLASS)
        self.prediction = ranks.minimum(candidate, "most probable classes")
