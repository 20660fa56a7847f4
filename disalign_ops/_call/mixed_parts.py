"""(a, b, lam), two classes a row, of linear heads and of classes over processes; see mixed.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._ops import reference
from .._sharded import shards
from .._sharded.pair import Pair
from .._sharded.ranks import Ranks
from . import mixed
from .arguments import positions_shape
from .details import LossDetails
from .mixed import Part, Split, Term
from .options import Calibration, Options, Validated, calibration_vectors
from .shard import Shard, local_rows, ranks_of

# Of class indices (N,); the loss is reduced as the options say.
Loss = Callable[[Tensor, Options, "Shard | None", "Pair | None"], Part]


def loss(
    like: Tensor, classes: int, target: Any, options: Options, calibration: Calibration | None,
    shard: Shard | None, one: Loss,
) -> Tensor | LossDetails:  # fmt: skip
    """The loss of rows whose classes are in parts. like, classes: see sharded.logits_like."""
    positions = positions_shape(like)

    def terms(
        targets: tuple[Tensor, Tensor], shares: tuple[Tensor, Tensor], classes: int,
        given: Validated,
    ) -> list[Term]:  # fmt: skip
        nonlocal shard
        assert shard is not None
        calibration_vectors(like, classes, calibration)  # which raises before ranks wait
        ranks = ranks_of(shard, classes, like.device)
        shard = replace(shard, offset=ranks.first)
        return _terms(targets, shares, given, ranks)

    def one_read(split: Split, given: Validated) -> Part:
        pair = Pair(split.other, split.share)
        each = split.options(options, positions)
        return one(split.target.reshape(positions), each, shard, pair)

    def losses(indices: Tensor, each: Options) -> Part:
        return one(indices.reshape(positions), each, shard, None)

    return mixed.loss_of(
        like, classes, positions, target, options, losses, one_read,
        None if shard is None else terms,
    )  # fmt: skip


def _terms(
    targets: tuple[Tensor, Tensor], shares: tuple[Tensor, Tensor], given: Validated, ranks: Ranks
) -> list[Term]:
    """Of each class one rank has the weight. A target that is no rank's class raises with the sums
    of the rows.
    """
    indices = [reference.class_indices(t.reshape(-1), given.ignore_index) for t in targets]
    if given.weight is not None:
        local = [
            shards.local_target(t, ranks.first, len(given.weight), given.ignore_index)
            for t, _ in indices
        ]
        weights = torch.stack([shards.target_weight(given.weight, t, shares[0]) for t in local])
        ranks.add(weights, "weights of the rows")
        shares = shares[0] * weights[0], shares[1] * weights[1]
    return [Term.of(i, share) for i, share in zip(indices, shares, strict=True)]


def local_targets(target: Any) -> Any:
    """The local parts of DTensors in (a, b, lam)."""
    return tuple(local_rows(f"target[{k}]", t) for k, t in enumerate(target))
