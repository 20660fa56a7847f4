"""What a loss knows of a position besides its value, where no kernel serves, and where a margin
hides it: a second look at the logits, by plain PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference

_ENTRIES = 1 << 20  # of logits that are had in the arithmetic dtype at a time


class Look(NamedTuple):
    """Of every position, flat: the most probable class, entropy and log-sum-exp of the calibrated
    logits, the last two None where not wanted.
    """

    prediction: Tensor
    entropy: Tensor | None
    log_sum_exp: Tensor | None


def look(
    logits: Tensor, scale: Tensor | None, bias: Tensor | None, confidence: Tensor | None,
    prior: Tensor | None, *, entropy: bool, log_sum_exp: bool,
) -> Look:  # fmt: skip
    """At logits (N, C) or (N, C, S); class and row vectors as in reference.calibrated_logits."""
    if scale is None and prior is None and not (entropy or log_sum_exp):
        return Look(logits.argmax(1).reshape(-1), None, None)
    n, classes = logits.shape[:2]
    inner = logits.shape[2] if logits.dim() == 3 else 1  # -1 is ambiguous in an empty batch
    by_image = None if confidence is None else confidence.view(n, inner)
    step = max(_ENTRIES // max(classes * inner, 1), 1)
    if torch.compiler.is_compiling():
        step = max(n, 1)
    found = []
    for first in range(0, n, step):
        part = slice(first, first + step)
        c = None if by_image is None else by_image[part].reshape(-1)
        u = reference.calibrated_logits(logits[part], scale, bias, c, prior)
        of_part = [u.argmax(1).reshape(-1)]
        if entropy or log_sum_exp:
            log_sum = u.logsumexp(1)
            of_part += [reference.entropy(u, log_sum).reshape(-1), log_sum.reshape(-1)]
        found.append(of_part)
    if not found:
        empty = logits.new_empty(0, dtype=reference.accumulate_dtype(logits.dtype))
        return Look(empty.long(), empty if entropy else None, empty if log_sum_exp else None)
    prediction, *rest = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not rest:
        return Look(prediction, None, None)
    return Look(prediction, rest[0] if entropy else None, rest[1] if log_sum_exp else None)


def hides_classes(margin: Tensor | None) -> bool:
    """Whether a margin may raise the target's logit so far that the kernels' sums, which include
    it, hold too few digits of the other classes, or none. Where asking would wait or break a graph,
    one is taken to.
    """
    if margin is None:
        return False
    recorded = torch._C._len_torch_dispatch_stack() > 0  # by make_fx, perhaps
    if recorded or not margin.is_cpu or torch.compiler.is_compiling() or dispatch.transformed():
        return True
    return bool((margin < 0).any())
