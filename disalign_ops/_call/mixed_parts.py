"""(a, b, lam), two classes a row, of linear heads and of classes over processes; see mixed.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._sharded import shards
from .._sharded.pair import Pair
from .._sharded.ranks import Ranks
from . import mixed
from .arguments import positions_shape, row_vector
from .mixed import Split, Term
from .options import Options, Validated, output, validate_options
from .shard import Shard, local_rows, ranks_of

# The loss of class indices (N,), reduced as the options say, in the accumulation dtype.
Loss = Callable[[Tensor, Options, "Shard | None", "Pair | None"], Tensor]


def loss(
    like: Tensor, classes: int, target: Any, options: Options, shard: Shard | None, one: Loss
) -> Tensor:
    """The loss of rows whose classes are in parts: one read of them, or two where mixed.py says so.

    like, classes: see sharded.logits_like.
    """
    positions = positions_shape(like)
    first, second, lam = mixed.check(like, target, positions)
    given = validate_options(like, classes, options)
    v = row_vector("sample_weight", options.sample_weight, like, positions, lam.dtype)
    ranks = None
    if shard is not None:
        ranks = ranks_of(shard, classes, like.device)
        shard = replace(shard, offset=ranks.first)
    a, b = _terms((first, second), lam, classes, given, ranks)
    if mixed.one_read_serves(given):
        split = Split.of(a, b, v, given.label_smoothing)
        pair = Pair(split.other, split.share)
        found = one(split.target.reshape(positions), split.options(options, positions), shard, pair)
    else:
        found = mixed.two_reads(
            (a, b), lam, v, positions, options, given,
            lambda indices, each: one(indices.reshape(positions), each, shard, None),
        )  # fmt: skip
    return output(like, found, positions if given.reduction == "none" else None)


def _terms(
    targets: tuple[Tensor, Tensor], lam: Tensor, classes: int, given: Validated, ranks: Ranks | None
) -> list[Term]:
    shares = (lam, 1 - lam)
    if ranks is None:
        return [mixed.term(t, s, classes, given) for t, s in zip(targets, shares, strict=True)]
    indices = [t.reshape(-1).to(torch.int64) for t in targets]
    weights: Any = (1.0, 1.0)
    if given.weight is not None:
        # Of each class one rank has the weight. A target that is no rank's class raises with the
        # sums of the rows.
        local = [shards.local_target(t, ranks.first, classes, given.ignore_index) for t in indices]
        weights = torch.stack([shards.target_weight(given.weight, t, lam) for t in local])
        ranks.add(weights, "weights of the rows")
    return [
        Term.of(t, s * w, given.ignore_index)
        for t, s, w in zip(indices, shares, weights, strict=True)
    ]


def local_targets(target: Any) -> Any:
    """The local parts of DTensors in (a, b, lam)."""
    return tuple(local_rows(f"target[{k}]", t) for k, t in enumerate(target))
