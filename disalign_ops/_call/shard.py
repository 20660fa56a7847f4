"""`Shard`, the option by which a loss takes one process's part of the classes, and the arguments
of such a loss as this process has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .._sharded.ranks import Ranks
from ..errors import ArgumentError, ArgumentTypeError
from .arguments import check_integer, is_dtensor
from .options import Calibration, Options

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """This process's part of the classes, where the processes of a group divide them.

    Every process has all rows and some of the classes: contiguous shards in the order of the
    ranks, of any sizes, 0 included. With `shard=`, `cross_entropy`, `disalign_cross_entropy`,
    `linear_cross_entropy` and `disalign_linear_cross_entropy` return on every rank the loss over
    all classes.

    Args:
        group: a torch.distributed process group; None: the default group. gloo for CPU tensors,
            NCCL for CUDA.
        offset: the first class of this process. None: the processes exchange the sizes of their
            shards in every call, which waits for the device. (Class probabilities with
            label_smoothing, which need the number of all classes, do so in any case.)

    Arguments of a loss with `shard=`:

    | argument | what a rank passes |
    |---|---|
    | input | its classes: (N, C_rank) or (C_rank,) |
    | linear_weight, linear_bias | its classes: (C_rank, D), (C_rank,) |
    | weight, prior, margin, scale, bias | its classes: (C_rank,); one number is every class's |
    | target | global class ids of all rows, the same on every rank |
    | target (a, b, lam) | a and b as class ids, and lam of all rows, the same on every rank |
    | target of class probabilities | its classes: (N, C_rank) or (C_rank,) |
    | confidence, sample_weight, features | all rows, the same on every rank |
    | other options | the same on every rank; each tensor passed on all ranks or on none |

    DTensors are taken by their local parts: those with one entry a class must be sharded over
    their classes by `group` and by nothing else, the others replicated. `Shard.of` makes the
    Shard of such a DTensor. A DTensor without `shard=` is refused: FSDP shards parameters
    in the same way while every process has rows of its own, and only the caller knows which of
    the two is meant.

    Gradients of what is sharded are the rank's own. Those of confidence and, in the linear losses,
    of features and cosine_scale come back summed over the ranks, the same on each. Every rank must
    call the loss, and its backward, with the same options.

    Refused with `shard=`:

    | what | why |
    |---|---|
    | input (N, C, d1, ...) | the kernels of shards are those of rows: pass (N d1 ..., C_rank) |
    | background | it would name a column of every rank, and the column is one rank's (below) |
    | inplace_backward where input is a DTensor | it does not notice a write to its local part |
    | `upsample_cross_entropy` | its kernels need all classes of a position |
    | `loss` of the layers in `disalign_ops.nn` | nothing sums the gradient of their x over ranks |
    | create_graph, is_grads_batched | the exchange has no second derivative (RuntimeError) |
    | torch.func, forward mode, torch.export, torch.jit.trace | no exchange in them (RuntimeError) |

    A background column takes part as a class that is not calibrated: its rank passes a scale of 1
    (in the residual form 0) and a bias of 0 for it, which no optimizer changes. Of a layer, pass
    the parameters to `disalign_linear_cross_entropy`.

    Raises, on the rank whose argument is wrong: ArgumentError or ArgumentTypeError. On every rank:
    IndexError where a target is no rank's class, or several ranks'; RuntimeError where a rank
    failed, or did not come within the group's timeout.

    `torch.distributed.tensor.Shard` is another class: the placement of a DTensor.
    """

    group: dist.ProcessGroup | None = None
    offset: int | None = None

    def __post_init__(self) -> None:
        if self.offset is None:
            return
        offset = check_integer("offset", self.offset)
        if offset < 0:
            raise ArgumentError(f"offset must be an integer >= 0, got {offset}")
        object.__setattr__(self, "offset", offset)

    @staticmethod
    def of(dtensor: DTensor, offset: int | None = None) -> Shard:
        """The Shard of the mesh dimension over which `dtensor` is sharded: of logits, of
        linear_weight or of another argument with one entry a class.
        """
        if not is_dtensor(dtensor):
            raise ArgumentTypeError(f"dtensor must be a DTensor, got a {type(dtensor).__name__}")
        return Shard(_sharded_over("dtensor", dtensor, None), offset)


def check_shard(shard: Shard, calibration: Calibration | None) -> None:
    """Refuses what is no Shard, and what a loss with one does not support."""
    if not isinstance(shard, Shard):
        is_group = dist.is_available() and isinstance(shard, dist.ProcessGroup)
        hint = "; pass Shard(group)" if is_group else ""
        raise ArgumentTypeError(
            f"shard must be a disalign_ops.Shard or None, got a {type(shard).__module__}."
            f"{type(shard).__name__}{hint}"
        )
    if calibration is not None and calibration.background is not None:
        raise ArgumentError(
            "background must be None where shard is given, since the column is one rank's, got "
            f"{calibration.background!r}; pass that column a scale of 1 (in the residual form 0) "
            "and a bias of 0 that no optimizer changes"
        )


def refuse_shard(shard: object, function: str, reason: str) -> None:
    """For functions that need all classes."""
    if shard is not None:
        raise ArgumentError(
            f"shard must be None for {function}, {reason}, got a {type(shard).__name__}"
        )


def ranks_of(shard: Shard, classes: int, device: torch.device) -> Ranks:
    """The processes, and this one's first class; without an offset by an exchange of sizes."""
    _check_initialized()
    group = shard.group
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if group is not None and not isinstance(group, dist.ProcessGroup) and group != outside:
        raise ArgumentTypeError(
            f"group must be a torch.distributed.ProcessGroup or None, got a {type(group).__name__}"
        )
    if dist.get_rank(group) < 0:
        raise ArgumentError("group must contain this process, got a group of other processes")
    if shard.offset is not None:
        return Ranks(group, shard.offset)
    return Ranks.exchange(group, classes, device)


def _check_initialized() -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError(
            "shard must have a process group, got none: call "
            "torch.distributed.init_process_group before"
        )


def local_options(options: Options, shard: Shard) -> Options:
    return options._replace(
        weight=local_classes("weight", options.weight, shard),
        prior=local_classes("prior", options.prior, shard),
        margin=local_classes("margin", options.margin, shard),
        sample_weight=local_rows("sample_weight", options.sample_weight),
        normalizer=local_rows("normalizer", options.normalizer),
    )


def local_calibration(calibration: Calibration | None, shard: Shard) -> Calibration | None:
    if calibration is None:
        return None
    return calibration._replace(
        confidence=local_rows("confidence", calibration.confidence),
        scale=local_classes("scale", calibration.scale, shard),
        bias=local_classes("bias", calibration.bias, shard),
    )


def local_classes(name: str, value: Any, shard: Shard, dim: int | None = None) -> Any:
    """The local part of a DTensor that the shard's group divides; anything else unchanged.

    dim: of the classes; None: any.
    """
    if not is_dtensor(value):
        return value
    _check_initialized()
    ranks = dist.get_process_group_ranks(_sharded_over(name, value, dim))
    expected = dist.get_process_group_ranks(shard.group or dist.group.WORLD)
    if ranks != expected:
        raise ArgumentError(
            f"{name} must be sharded over the group of shard, ranks {expected}, got a DTensor "
            f"sharded over ranks {ranks}"
        )
    return value.to_local()


def local_rows(name: str, value: Any) -> Any:
    """The local part of a DTensor that is replicated; anything else unchanged."""
    if not is_dtensor(value):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise ArgumentError(
            f"{name} must be replicated where shard is given, got a DTensor with placements "
            f"{value.placements}"
        )
    return value.to_local()


def _sharded_over(name: str, value: Any, dim: int | None) -> dist.ProcessGroup:
    """The group over which a DTensor is sharded, once, on `dim` (None: on any dimension)."""
    placements = value.placements
    sharded = [k for k, placed in enumerate(placements) if placed.is_shard(dim)]
    others = [placed for k, placed in enumerate(placements) if k not in sharded]
    if len(sharded) != 1 or not all(placed.is_replicate() for placed in others):
        placement = "a Shard placement" if dim is None else f"Shard({dim})"
        raise ArgumentError(
            f"{name} must be a DTensor with {placement} over its classes once and Replicate() "
            f"otherwise, got placements {placements}"
        )
    group: dist.ProcessGroup = value.device_mesh.get_group(sharded[0])
    return group
