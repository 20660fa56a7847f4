"""Loss and gradients of a linear head without its logits: they are made a chunk at a time.

A chunk is some rows by some classes, a shard of these rows (shards.py). With a scalar reduction
the gradients are made in forward, while a chunk's logits are there, for an upstream gradient of 1;
backward multiplies them by the real one. Otherwise, in float16 (where they would flush to zero
before the loss scale is known), over processes, and in a second backward, the logits are made once
more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from .._ops import reference
from .._ops.codes import SHARD_VALUES
from . import shards
from .chunk_plan import Plan
from .parallel import Finished, finish
from .shards import Vectors

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Head:
    """A linear classifier: weight (C, D), bias (C,), or, of a cosine classifier, 1 / |w_j| (C,)."""

    weight: Tensor
    bias: Tensor | None
    inverse_norms: Tensor | None

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, cosine: bool, chunk_bytes: int) -> Head:
        if not cosine:
            return Head(weight, bias, None)
        dtype = reference.accumulate_dtype(weight.dtype)
        norms = weight.new_empty((len(weight),), dtype=dtype)
        for part in _weight_parts(weight, chunk_bytes):
            norms[part] = torch.linalg.vector_norm(weight[part], dim=1, dtype=dtype)
        return Head(weight, None, 1 / norms.clamp(min=smallest_norm(weight.dtype)))

    def logits(self, features: Tensor, part: slice, out: Tensor) -> Tensor:
        """Of the classes of `part`, written over `out`."""
        weight = self.weight[part]
        if self.bias is not None:
            torch.addmm(self.bias[part], features, weight.t(), out=out)
        else:
            torch.mm(features, weight.t(), out=out)
        if self.inverse_norms is not None:
            out.mul_(self.inverse_norms[part])
        return out


def _weight_parts(weight: Tensor, chunk_bytes: int) -> list[slice]:
    """So many classes that three float64 copies of their weight fit."""
    most = chunk_bytes // (3 * 8 * max(weight.shape[1], 1))
    return Plan(1, most).class_parts(len(weight))


def smallest_norm(dtype: torch.dtype) -> float:
    """Below it a vector is divided by this: F.normalize's eps, which would be 0 in float16."""
    # float16's smallest normal number, as a number: torch.jit.script has no torch.finfo.
    return 6.103515625e-05 if dtype == torch.float16 else 1e-12


@dataclass(frozen=True)
class Call(shards.Call):
    """plan: the chunks. cosine: of a cosine head. chunk_bytes: what the loss may take."""

    plan: Plan
    cosine: bool
    chunk_bytes: int


class _Gradients:
    """Sums over the chunks of the gradients of features, weight, bias, confidence, scale and
    calibration's bias; None where not wanted.
    """

    def __init__(
        self, tensors: tuple[Tensor | None, ...], need: tuple[bool, ...], call: Call
    ) -> None:
        features, weight = tensors[:2]
        assert features is not None
        assert weight is not None
        rows, classes = features.shape[0], weight.shape[0]
        half = features.dtype in _HALF
        # Half precision is summed over chunks in float32, unless that took too much memory.
        several = rows > call.plan.rows and half
        wide = several and weight.numel() * 4 <= call.chunk_bytes // 4
        self._dtypes = (features.dtype, weight.dtype)
        vector_dtype = reference.accumulate_dtype(features.dtype)

        def zeros(k: int, entries: int) -> Tensor | None:
            return features.new_zeros((entries,), dtype=vector_dtype) if need[k] else None

        self.features = torch.empty_like(features) if need[0] else None
        self.weight: Tensor | None = None
        if need[1]:
            self.weight = torch.empty_like(weight, dtype=torch.float32 if wide else weight.dtype)
            if not rows:
                self.weight.zero_()
        self.bias, self.confidence = zeros(2, classes), zeros(3, rows)
        self.scale, self.calibration_bias = zeros(4, classes), zeros(5, classes)
        self.of_logits = any(need[:3])
        self.need = need

    def add(self, head: Head, features: Tensor, grad_logits: Tensor, rows: slice, part: slice,
            sum_features: Tensor | None) -> None:  # fmt: skip
        """A chunk's share. sum_features: where that of the features is summed over parts."""
        if self.bias is not None:
            self.bias[part] += grad_logits.sum(0, dtype=self.bias.dtype)
        if head.inverse_norms is not None:
            grad_logits.mul_(head.inverse_norms[part])
        if sum_features is not None:
            _add_product(sum_features, grad_logits, head.weight[part], first=part.start == 0)
        if self.weight is not None:
            _add_product(self.weight[part], grad_logits.t(), features, first=rows.start == 0)

    def finish(self, head: Head, chunk_bytes: int) -> list[Tensor | None]:
        grad = self.weight
        if grad is not None and head.inverse_norms is not None:
            # Through 1 / |w_j|: what lies along w_j is taken off.
            for part in _weight_parts(grad, chunk_bytes):
                unit = head.weight[part] * head.inverse_norms[part, None]
                along = (grad[part] * unit).sum(1, keepdim=True)
                grad[part] -= (along * unit).to(grad.dtype)
        if grad is not None:
            grad = grad.to(self._dtypes[1])
        return [
            self.features, grad, self.bias, self.confidence, self.scale, self.calibration_bias,
        ]  # fmt: skip


def _add_product(to: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """to += a b; `first`: what is in `to` does not count."""
    if to.dtype == a.dtype:
        torch.addmm(to, a, b, beta=0 if first else 1, out=to)
    elif first:
        to.copy_(a @ b)
    else:
        to.add_(a @ b)


class _Chunks:
    """Goes over the chunks of a call."""

    def __init__(self, call: Call, tensors: tuple[Tensor | None, ...]) -> None:
        features, weight, bias, confidence, scale, calibration_bias = tensors
        assert features is not None
        assert weight is not None
        self.call, self.features, self.confidence = call, features, confidence
        self.head = Head.of(weight, bias, call.cosine, call.chunk_bytes)
        self.vectors = replace(call.vectors, scale=scale, bias=calibration_bias)
        self.classes = weight.shape[0]
        self.parts = call.plan.class_parts(self.classes)
        entries = min(call.plan.rows, len(features)) * min(call.plan.classes, self.classes)
        self._buffer = features.new_empty((entries,))

    def _logits(self, rows: slice, part: slice) -> Tensor:
        shape = (rows.stop - rows.start, part.stop - part.start)
        out = self._buffer[: shape[0] * shape[1]].view(shape)
        return self.head.logits(self.features[rows], part, out)

    def _shard(self, rows: slice, part: slice) -> tuple[Tensor, Vectors, Tensor | None]:
        """Target, class vectors and confidence of a chunk."""
        target = self.call.local_target(rows, part)
        confidence = None if self.confidence is None else self.confidence[rows]
        return target, self.vectors.each(lambda vector: vector[part]), confidence

    def sums(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """The sums of these rows, and their logits where one chunk holds all of them."""
        total = weight_sum = logits = None
        for part in self.parts or [slice(0, 0)]:
            logits = self._logits(rows, part)
            target, vectors, confidence = self._shard(rows, part)
            sums = self.call.sums(logits, target, vectors, confidence, rows, part)
            weight = self.call.weight_sum(vectors, part.stop - part.start, sums)
            if total is None or weight_sum is None:
                total, weight_sum = sums, weight
            else:
                total = shards.merge_sums(total, weight_sum, sums, weight)
                weight_sum = weight_sum + weight
        assert total is not None
        return total, logits if len(self.parts) <= 1 else None

    def gradients(
        self, rows: slice, factors: Tensor, logits: Tensor | None, out: _Gradients,
        upstream: Tensor,
    ) -> None:  # fmt: skip
        """Adds these rows' share to `out`. logits: as from `sums`, overwritten. upstream: of the
        rows' losses with their sample_weight.
        """
        features = self.features[rows]
        want = (out.of_logits, out.need[4], out.need[5], out.need[3])
        sum_features = None if out.features is None else out.features[rows]
        several = sum_features is not None and len(self.parts) > 1 and features.dtype in _HALF
        if several:
            sum_features = torch.empty_like(features, dtype=torch.float32)
        for part in self.parts:
            chunk = self._logits(rows, part) if logits is None else logits
            target, vectors, confidence = self._shard(rows, part)
            grad, scale, bias, of_confidence = shards.gradients_with_pair(
                self.call, factors, chunk, target, vectors, confidence, want, rows, part, upstream,
                in_place=True,
            )  # fmt: skip
            for to, found, at in (
                (out.scale, scale, part), (out.calibration_bias, bias, part),
                (out.confidence, of_confidence, rows),
            ):  # fmt: skip
                if to is not None and found is not None:
                    to[at] += found
            if grad is not None:
                out.add(self.head, features, grad, rows, part, sum_features)
        if several and out.features is not None and sum_features is not None:
            out.features[rows] = sum_features
        if out.features is not None and not self.parts:
            out.features[rows] = 0

    def finish(self, made: _Gradients | None) -> Finished:
        """The losses of all rows. made: also adds their gradients there, for grad_loss = 1."""
        call, rows = self.call, len(self.features)
        like = self.features.new_empty((0,), dtype=reference.accumulate_dtype(self.features.dtype))
        w_t = call.target_weight(self.classes, like)
        weight_sum = call.vectors.weight_sum(self.classes, like)
        valid = call.valid
        divisor = call.reduction.divisor(w_t, valid)
        upstream = call.reduction.upstream(None, divisor, like).expand(rows)
        of_reduced = call.reduction.of_reduced(None, divisor, like).expand(rows)
        terms, losses, target_du_dc = (
            like.new_empty(shape) for shape in ((4, rows), (rows,), (rows,))
        )
        for part in call.plan.row_parts(rows):
            sums, logits = self.sums(part)
            losses[part], terms[:, part] = call.terms_of(
                sums, w_t[part], weight_sum, self.classes, valid[part]
            )
            target_du_dc[part] = sums[3]
            if call.known is not None:
                call.known.take(part, sums, soft=call.soft)
            if call.pair is not None:
                call.pair.finish(part, sums[2])
            if made is not None:
                factors = shards.factors_of(terms[:, part], sums[3], upstream[part])
                self.gradients(part, factors, logits, made, of_reduced[part])
        return Finished(losses, terms, target_du_dc, divisor)


class _LinearLoss(torch.autograd.Function):
    """Of features, weight, bias, confidence, scale and the calibration's bias."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, call = arguments[:6], arguments[6]
        features = tensors[0]
        rows = len(features)
        need = tuple(ctx.needs_input_grad[:6])
        chunks = _Chunks(call, tensors)
        scalar = call.reduction.reduction != "none"
        made = None
        if any(need) and scalar and call.ranks is None and features.dtype != torch.float16:
            made = _Gradients(tensors, need, call)
        if call.ranks is None:
            done = chunks.finish(made)
        else:
            dtype = reference.accumulate_dtype(features.dtype)
            sums = features.new_empty((SHARD_VALUES, rows), dtype=dtype)
            for part in call.plan.row_parts(rows):
                sums[:, part], _ = chunks.sums(part)
            done = finish(call, sums, chunks.classes, du_dc=tensors[4] is not None)
        ctx.call = call
        ctx.made = None if made is None else made.finish(chunks.head, call.chunk_bytes)
        if any(need):
            ctx.save_for_backward(*tensors, done.terms, done.target_du_dc, done.divisor)
        reduced: Tensor = call.reduction.loss(done.losses, done.divisor, call.known, call.pair)
        return reduced

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: Call = ctx.call
        need = tuple(ctx.needs_input_grad[:6])
        *tensors, terms, target_du_dc, divisor = ctx.saved_tensors
        batched = torch._C._functorch.is_legacy_batchedtensor(grad_loss)  # is_grads_batched
        if torch.is_grad_enabled() or (batched and ctx.made is None):
            return (*_through_logits(call, tensors, need, grad_loss, divisor), None)
        if batched:
            return (*(None if t is None else t * grad_loss for t in ctx.made), None)
        made, ctx.made = ctx.made, None  # given away: a second backward makes them anew
        if made is not None:
            # Without looking at it: on a GPU that would wait for the device.
            one = grad_loss.device.type == "cpu" and grad_loss.item() == 1
            return (*(t if one or t is None else t.mul_(grad_loss) for t in made), None)
        chunks = _Chunks(call, tuple(tensors))
        out = _Gradients(tuple(tensors), need, call)
        upstream = call.reduction.upstream(grad_loss, divisor, terms).expand(target_du_dc.shape)
        of_reduced = call.reduction.of_reduced(grad_loss, divisor, terms).expand(len(tensors[0]))
        for part in call.plan.row_parts(len(tensors[0])):
            factors = shards.factors_of(terms[:, part], target_du_dc[part], upstream[part])
            chunks.gradients(part, factors, None, out, of_reduced[part])
        if call.ranks is not None:
            for replicated in (out.features, out.confidence):
                if replicated is not None:
                    call.ranks.add(replicated, "gradients")
        return (*out.finish(chunks.head, call.chunk_bytes), None)


def _through_logits(
    call: Call, tensors: list[Any], need: tuple[bool, ...], grad_loss: Tensor, divisor: Tensor
) -> list[Tensor | None]:
    """The same gradients through the reference and the whole logits: to be differentiated again, or
    for a batch of upstream gradients.
    """
    if call.ranks is not None:
        raise RuntimeError(shards.NO_DOUBLE_BACKWARD)
    features, weight, bias, confidence, scale, calibration_bias = tensors
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        w = F.normalize(weight, dim=1, eps=smallest_norm(weight.dtype)) if call.cosine else weight
        logits = F.linear(features, w, bias)
        loss = reference.cross_entropy(
            logits, call.target, weight=call.vectors.weight, scale=scale,
            bias=calibration_bias, confidence=confidence, prior=call.vectors.prior,
            margin=call.vectors.margin, sample_weight=call.reduction.sample_weight,
            ignore_index=call.ignore_index, label_smoothing=call.label_smoothing,
            focal_gamma=call.focal_gamma, reduction=call.reduction.reduction,
            normalizer=call.reduction.normalizer,
        )  # fmt: skip
        if call.pair is not None:
            vectors = replace(call.vectors, scale=scale, bias=calibration_bias)
            t = reference.class_indices(call.target, call.ignore_index)[0]
            rest = call.pair.of_logits(logits, t, vectors, confidence)
            # "count": where nothing is left the rest adds 0, not a second NaN.
            loss = loss + reference.reduce(rest, call.reduction.reduction, "count", divisor)
    inputs = [t for t, n in zip(tensors, need, strict=True) if n]
    found = iter(torch.autograd.grad(loss, inputs, grad_loss, create_graph=again))
    return [next(found) if n else None for n in need]


@_disable_dynamo  # torch.compiler.disable, without importing dynamo
def loss(call: Call, *tensors: Tensor | None) -> Tensor:
    """In the accumulation dtype, of features (N, D), weight (C, D), bias (C,), confidence (N,),
    scale and the calibration's bias (C,), each None where there is none.
    """
    found: Tensor = _LinearLoss.apply(*tensors, call)  # type: ignore[no-untyped-call]
    return found
