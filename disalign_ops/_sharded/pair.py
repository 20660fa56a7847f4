"""The second class of a position, of rows whose classes are in parts.

With two classes a position, (a, b, lam), the loss is that of class t with both terms' weights, and
k (u_t - u_o) (_call/mixed.py). What the second adds is gathered from the parts of the logits as
they are made, and its gradient is added to theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import reference
from .._ops.entries import add_entries, add_in_order
from .ranks import Ranks, check_owners
from .shards import Vectors


class _Entry(NamedTuple):
    """Of every row one class of a part: whether the part has it and it counts; its place, z (N, 1),
    u (N,) and d = a z + b (N,), 0 where not.
    """

    here: Tensor
    at: Tensor
    z: Tensor
    u: Tensor
    d: Tensor


class Pair:
    """other: class o, global ids (N,). share: k (N,), v included; 0 where o does not count.

    rest: k (u_t - u_o) of every row, once `finish` has run.
    """

    def __init__(self, other: Tensor, share: Tensor) -> None:
        self.other, self.share = other, share
        self.rest = torch.zeros_like(share)
        self._logit = torch.zeros_like(share)

    def look(
        self, rows: slice, logits: Tensor, target: Tensor, vectors: Vectors,
        confidence: Tensor | None,
    ) -> None:  # fmt: skip
        """At the logits of some classes. target: o, as shards.local_target has it."""
        if logits.shape[1]:
            self._logit[rows] += self._at(rows, logits, target, vectors, confidence).u

    def exchange(self, ranks: Ranks, target: Tensor, valid: Tensor) -> None:
        """Makes u_o that of the rank that has the class. target: as this rank has it.

        Raises IndexError where a row has no rank, or several, whose class o is.
        """
        named = (target >= 0).sum().to(self._logit.dtype)
        message = torch.cat((self._logit, named[None]))
        ranks.add(message, "second logits of the rows")
        self._logit = message[:-1]
        check_owners(message[-1], valid)

    def finish(self, rows: slice, target_logit: Tensor) -> None:
        """target_logit: u_t over all classes."""
        # Where class t is masked the loss of t is infinite by itself.
        none = (self.share[rows] == 0) | (target_logit == float("-inf"))
        self.share[rows] = torch.where(none, 0.0, self.share[rows])
        lost = target_logit - self._logit[rows]
        self.rest[rows] = torch.where(none, 0.0, self.share[rows] * lost)

    def gradients(
        self, rows: slice, logits: Tensor, targets: tuple[Tensor, Tensor],
        vectors: Vectors, confidence: Tensor | None, upstream: Tensor,
    ) -> PairGradients:  # fmt: skip
        """Of some classes, to be made before their logits are overwritten.

        targets: t and o, as shards.local_target has them. upstream: of every row's loss.
        """
        share = self.share[rows]
        amount = torch.where(share == 0, 0.0, upstream * share)
        entries = [self._at(rows, logits, t, vectors, confidence) for t in targets]
        return PairGradients(entries, amount, vectors, confidence)

    def of_logits(
        self, logits: Tensor, target: Tensor, vectors: Vectors, confidence: Tensor | None
    ) -> Tensor:
        """`rest` of the logits of all classes, differentiable. target: t, (N,)."""
        none = self.share[:, None] == 0
        index = torch.where(none, 0, torch.stack((target, self.other), 1))
        z = torch.where(none, 0.0, logits.gather(1, index))
        scale, bias, prior = (
            None if v is None else v[index] for v in (vectors.scale, vectors.bias, vectors.prior)
        )
        u = reference.calibrated_logits(z, scale, bias, confidence, prior)
        return torch.where(none[:, 0], 0.0, self.share * (u[:, 0] - u[:, 1]))

    def _at(
        self, rows: slice, logits: Tensor, target: Tensor, vectors: Vectors,
        confidence: Tensor | None,
    ) -> _Entry:  # fmt: skip
        here = (target >= 0) & (self.share[rows] != 0)
        index = torch.where(here, target, 0)
        z = logits.gather(1, index[:, None]).to(self.share.dtype)
        z = torch.where(here[:, None], z, 0.0)
        # A row a position, of one class.
        scale, bias, prior = (
            None if v is None else v[index, None]
            for v in (vectors.scale, vectors.bias, vectors.prior)
        )
        u = reference.calibrated_logits(z, scale, bias, confidence, prior)
        d = z if scale is None or bias is None else scale * z + bias
        u, d = (torch.where(here, t[:, 0], 0.0) for t in (u, d))
        return _Entry(here, index, z, u, torch.where(d.isfinite(), d, 0.0))


class PairGradients:
    """What k (u_t - u_o) adds to the gradients of some classes; see Pair.gradients."""

    def __init__(
        self, entries: list[_Entry], amount: Tensor, vectors: Vectors, confidence: Tensor | None
    ) -> None:
        self._entries, self._amount, self._vectors = entries, amount, vectors
        self._c = None if confidence is None else torch.sigmoid(confidence)

    def add(
        self, grad_logits: Tensor | None, grad_scale: Tensor | None, grad_bias: Tensor | None,
        grad_confidence: Tensor | None,
    ) -> None:  # fmt: skip
        c, scale = self._c, self._vectors.scale
        for entry, amount in zip(self._entries, (self._amount, -self._amount), strict=True):
            here, at, z, _, d = entry
            q = torch.where(here, amount, 0.0)
            if grad_logits is not None:
                slope = q if c is None or scale is None else q * (1 + c * scale[at])
                add_entries(grad_logits, at[:, None], slope[:, None])
            if c is None:
                continue
            if grad_scale is not None:
                z = torch.where(z == float("-inf"), 0.0, z)[:, 0]
                add_in_order(grad_scale, at, q * c * z)
            if grad_bias is not None:
                add_in_order(grad_bias, at, q * c)
            if grad_confidence is not None:
                grad_confidence += q * c * (1 - c) * d
