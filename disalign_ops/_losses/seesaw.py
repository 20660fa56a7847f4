"""The Seesaw loss, whose terms depend on the samples seen so far."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._call.arguments import (
    check_input,
    check_integer,
    check_number,
    check_target,
    positions_shape,
)
from .._ops.dispatch import check_classes, transformed
from .._ops.reference import accumulate_dtype, class_indices
from ..errors import ArgumentError
from ..nn import CrossEntropyLoss

# A pass that torch.utils.checkpoint repeats is found among so many before it.
_FIRST_PASSES = 64


class SeesawLoss(CrossEntropyLoss):
    """-log e^{z_t} / (e^{z_t} + sum_{j != t} S_tj e^{z_j}), S_tj = M_tj C_tj, both constant in
    backward:

        M_tj = min(1, N_j / N_t)^p       N: samples seen so far, counted in training mode
        C_tj = max(1, p_j / max(p_t, eps))^q

    Logits (N, C). Takes at most two tensors of their size beyond the gradient. The buffer
    cumulative_samples (C,), int64, is N and part of the state_dict; `reset_parameters` sets it to
    0. A call that raises counts nothing. Neither does a forward pass within backward, as
    torch.utils.checkpoint makes: it takes the N that the first pass had. (Compiled code does not
    know that it is run again.)

    Source: Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021, eq. 3 to 7;
    eps as in its released code, whose objectness branch is not here.
    """

    __module__ = "disalign_ops.losses"  # where it is imported from, and pickled by

    cumulative_samples: Tensor
    _needs_indices = True

    def __init__(
        self, classes: int, p: float = 0.8, q: float = 2.0, eps: float = 1e-2, **options: Any
    ) -> None:
        super().__init__(**options)
        classes = check_integer("classes", classes)
        if classes < 1:
            raise ArgumentError(f"classes must be 1 or more, got {classes}")
        self.p, self.q = check_number("p", p, 0.0), check_number("q", q, 0.0)
        self.eps = check_number("eps", eps, 0.0, 1.0)
        # Integers stay exact in a model that is cast to half precision. On the CPU also within
        # `torch.device("meta")`, where they would have no values.
        none = torch.zeros(classes, dtype=torch.int64, device="cpu")
        self.register_buffer("cumulative_samples", none)
        # Of passes that may be repeated: their losses of the target, by which they are recognised,
        # and N.
        self._first_passes: deque[tuple[Tensor, Tensor]] = deque(maxlen=_FIRST_PASSES)
        self._keep(classes=classes, p=self.p, q=self.q, eps=self.eps)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Of a criterion that version 0.1.0 pickled whole.
        self.__dict__.setdefault("_first_passes", deque(maxlen=_FIRST_PASSES))

    def reset_parameters(self) -> None:
        self.cumulative_samples.zero_()

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        self._check_call(input, target)
        classes = len(self.cumulative_samples)
        check_input(input)
        if input.dim() != 2 or input.shape[1] != classes:
            raise ArgumentError(f"input must have shape (N, {classes}), got {tuple(input.shape)}")
        check_target(input, target, positions_shape(input))
        check_classes(target, classes, self.ignore_index)
        t, valid = class_indices(target, self.ignore_index)
        t = torch.where(valid, t, 0)
        counting = self.training and not _in_backward()
        keeping = counting and _may_be_repeated()
        z = input.detach()  # torch.jit.trace records no no_grad
        with torch.no_grad():
            # log p_j - log max(p_t, eps), from the loss of the target: no softmax is made.
            nll = functional.cross_entropy(z, t, reduction="none")
            seen = self.cumulative_samples
            if counting:
                seen = seen.index_add(0, t, valid.to(seen.dtype))
                if keeping:
                    self._first_passes.append((nll, seen))
            elif self.training:
                seen = self._seen_before(nll)
            own = (-nll).clamp(min=math.log(self.eps)) if self.eps else -nll
            z_t = z.gather(1, t[:, None])
            factor = (z - (z_t + (nll + own)[:, None])).clamp_(min=0.0).mul_(self.q)
            # float16 ends at 65504.
            log_n = seen.clamp(min=1).to(accumulate_dtype(nll.dtype)).log()
            factor += (log_n - log_n[t][:, None]).clamp_(max=0.0).mul_(self.p)
            factor.scatter_(1, t[:, None], 0.0)
        loss = super().forward(factor.add_(input), target, sample_weight=sample_weight)
        if counting:  # last: what raises does not count
            self.cumulative_samples.copy_(seen)
        return loss

    def _seen_before(self, nll: Tensor) -> Tensor:
        """The counts that the first pass with these losses (N,) had; without one, today's.

        It is the nearest one, so that sums in another order do no harm, and is chosen on the
        device, without a synchronisation.
        """
        known = [
            (losses, seen) for losses, seen in self._first_passes
            if losses.shape == nll.shape and losses.device == nll.device
        ]  # fmt: skip
        if not known:
            return self.cumulative_samples
        apart = (torch.stack([losses for losses, _ in known]) - nll).abs().nan_to_num_().sum(1)
        return torch.stack([seen for _, seen in known])[apart.argmin()]


def _in_backward() -> bool:
    """Whether autograd runs backward, within which torch.utils.checkpoint repeats a pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _may_be_repeated() -> bool:
    """Whether torch.utils.checkpoint may run this pass: without gradients, or with hooks on what
    autograd saves.
    """
    if torch.compiler.is_compiling() or transformed():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or not torch.is_grad_enabled()
