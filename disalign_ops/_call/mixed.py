"""Targets of two classes a position, as mixup and CutMix have them.

    lam CE(a) + (1 - lam) CE(b) = W (lse - u_t) + k (u_t - u_o)

where W is the sum of both terms' weights, t the class of the larger one, o the other and k its
weight. The first term is the loss of class indices t weighed by W, and takes one read of the
logits; the second is a few numbers a position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import composed, dispatch, reference
from .._ops.problem import Inputs, Problem
from ..errors import ArgumentError, ArgumentTypeError
from .arguments import (
    check_class_indices,
    check_input,
    check_number,
    check_target,
    check_tensor,
    positions_shape,
    row_vector,
)
from .options import (
    Calibration,
    Options,
    Validated,
    output,
    refuse_in_forward,
    validate_options,
)

Validate = Callable[[Tensor, Tensor, Options, Calibration | None], tuple[Inputs, Problem] | None]


class Mixed(NamedTuple):
    """Flat: class indices a and b, their shares of the loss (w_a and w_b included, 0 where ignored)
    and which positions have at least one class.
    """

    first: Tensor
    second: Tensor
    first_share: Tensor
    second_share: Tensor
    valid: Tensor


def loss(
    input: Tensor, target: Any, options: Options, calibration: Calibration | None,
    validate: Validate,
) -> Tensor:  # fmt: skip
    """The loss for target (a, b, lam)."""
    if composed.is_tracing():
        raise ArgumentError(
            "target must be one tensor under torch.jit.trace, got a tuple: pass class "
            "probabilities, or torch.export the model"
        )
    classes = check_input(input)
    positions = positions_shape(input)
    first, second, share = _check(input, target, positions)
    given = validate_options(input, classes, options)
    dtype = reference.accumulate_dtype(input.dtype)
    v = row_vector("sample_weight", options.sample_weight, input, positions, dtype)
    mixed = _shares(first, second, share.to(dtype), classes, given)
    each = given.reduction == "none"
    if given.margin is None and not given.focal_gamma and not (
        given.weight is not None and given.label_smoothing
    ):  # fmt: skip
        found = _one_read(input, mixed, v, options, given, calibration, validate)
    else:
        found = _two_reads(
            input, (first, second), share.to(dtype), mixed, v, options, given, calibration, validate
        )
    return output(input, found, positions if each else None)


def _check(input: Tensor, target: Any, positions: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """a and b of the positions' shape, and lam, flat or 0-d."""
    if len(target) != 3:
        raise ArgumentError(
            f"target must have three parts, (a, b, lam), where it is a tuple, got {len(target)}"
        )
    first, second, share = target
    for name, indices in (("target[0]", first), ("target[1]", second)):
        check_class_indices(check_tensor(name, indices))
        check_target(input, indices, positions)
    compiling = torch.compiler.is_compiling()
    elsewhere = isinstance(share, Tensor) and share.is_cpu and not input.is_cpu
    if not isinstance(share, Tensor) or (elsewhere and not share.dim() and not compiling):
        number = check_number("target[2]", share, 0.0, 1.0)
        # A copy of a number, as torch.tensor makes it, would wait for the GPU.
        return first, second, torch.full((), number, dtype=torch.float64, device=input.device)
    if not check_tensor("target[2]", share).is_floating_point():
        # `loss_denominator` takes three tensors of indices as three targets.
        raise ArgumentTypeError(
            f"target[2] must be a number or have a floating dtype, got {share.dtype}"
        )
    if share.requires_grad:
        raise ArgumentError("target[2] must not require a gradient, got one that does")
    if share.dim() and share.shape != positions:
        raise ArgumentError(
            f"target[2] must be a number or have the positions' shape {tuple(positions)}, got "
            f"{tuple(share.shape)}"
        )
    share = share.detach()
    if share.is_cpu and not compiling:
        inside = (share >= 0) & (share <= 1)
        if not bool(inside.all()):
            raise ArgumentError("target[2] must be from 0 to 1, got an entry that is not")
    share = share.to(input.device)
    return first, second, share.reshape(-1) if share.dim() else share


def _shares(first: Tensor, second: Tensor, share: Tensor, classes: int, given: Validated) -> Mixed:
    of_both, all_valid = [], []
    for target, lam in ((first, share), (second, 1 - share)):
        dispatch.check_classes(target, classes, given.ignore_index, asserted=False)
        t, valid = reference.class_indices(target.reshape(-1), given.ignore_index)
        w = lam if given.weight is None else lam * given.weight[torch.where(valid, t, 0)]
        of_both.append((t, torch.where(valid, w, 0.0)))
        all_valid.append(valid)
    (a, w_a), (b, w_b) = of_both
    return Mixed(a, b, w_a, w_b, all_valid[0] | all_valid[1])


def _one_read(
    input: Tensor, mixed: Mixed, v: Tensor | None, options: Options, given: Validated,
    calibration: Calibration | None, validate: Validate,
) -> Tensor:  # fmt: skip
    a, b, w_a, w_b, _ = mixed
    # A class that is ignored has no weight; the other one takes its place, whatever its own is.
    no_a, no_b = a == given.ignore_index, b == given.ignore_index
    larger = no_a | (~no_b & (w_b > w_a))
    t, o = torch.where(larger, b, a), torch.where(larger, a, b)
    k = torch.where(larger, w_a, w_b)
    k = torch.where(a == b, 0.0, k) * (1 - given.label_smoothing)
    weight = w_a + w_b
    if v is not None:
        k, weight = k * v, weight * v
    positions = positions_shape(input)
    call = validate(
        input, t.reshape(positions),
        options._replace(weight=None, sample_weight=weight.reshape(positions)), calibration,
    )  # fmt: skip
    assert call is not None
    inputs, problem = call
    logits, u_t, u_o = calibrated_at(inputs, problem, t, o, k)
    found = dispatch.compute(inputs._replace(logits=logits), problem)[0]
    # Where class t is masked the first term is infinite by itself.
    rest = torch.where((k == 0) | (u_t == float("-inf")), 0.0, k * (u_t - u_o))
    if given.reduction == "none":
        return found + rest
    return found + _reduce(rest, given, reference.denominator(
        t, given.normalizer, sample_weight=weight, ignore_index=given.ignore_index
    ), empty=0.0)  # fmt: skip


def _reduce(losses: Tensor, given: Validated, divisor: Tensor, empty: float | None) -> Tensor:
    """Sum or mean. empty: what a mean of nothing is; None: as reference.reduce."""
    by_weights = given.normalizer if empty is None else "count"
    return reference.reduce(losses, given.reduction, by_weights, divisor)


def _two_reads(
    input: Tensor, targets: tuple[Tensor, Tensor], share: Tensor, mixed: Mixed, v: Tensor | None,
    options: Options, given: Validated, calibration: Calibration | None, validate: Validate,
) -> Tensor:  # fmt: skip
    """Where the terms differ in more than u_t: each is a loss of its own."""
    if given.in_place:
        raise ArgumentError(
            "inplace_backward must be False where target is (a, b, lam) with a margin, "
            "focal_gamma, or weight and label_smoothing, got True: the logits are read twice"
        )
    if given.gradient == "forward":
        refuse_in_forward(
            "where target is (a, b, lam) with a margin, focal_gamma, or weight and label_smoothing"
        )
    positions = positions_shape(input)
    parts = []
    for target, lam in zip(targets, (share, 1 - share), strict=True):
        weight = lam.expand(mixed.valid.shape) if v is None else lam * v
        call = validate(
            input, target,
            options._replace(reduction="none", sample_weight=weight.reshape(positions),
                             normalizer="count", gradient="auto"),
            calibration,
        )  # fmt: skip
        assert call is not None
        part = dispatch.compute(*call)[0]
        parts.append(torch.where(weight == 0, 0.0, part))  # a masked class of no share: 0 * inf
    losses = parts[0] + parts[1]
    if given.reduction == "none":
        return losses
    weights = mixed.first_share + mixed.second_share
    divisor = reference.denominator_of(given.normalizer, mixed.valid, weights, v)
    return _reduce(losses, given, divisor, empty=None)


def calibrated_at(
    inputs: Inputs, problem: Problem, t: Tensor, o: Tensor, k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, to be used in place of the inputs', and u_t and u_o, flat. 0 where k is 0."""
    logits = inputs.logits
    classes = torch.stack((t, o)).clamp(min=0)
    classes = torch.where(k == 0, 0, classes)
    positions = logits.shape[2] if logits.dim() == 3 else 1  # -1 is ambiguous in an empty batch
    index = classes.view(2, logits.shape[0], positions).transpose(0, 1).contiguous()  # (N, 2, S)
    if logits.dim() == 2:
        index = index[..., 0]
    of_graph = dispatch.serving_backend(logits) == "reference" or torch.compiler.is_compiling()
    if of_graph or not (logits.requires_grad and torch.is_grad_enabled()):
        z = logits.gather(1, index).to(k.dtype)
    else:
        logits, z = _Entries.apply(logits, index, k.dtype)  # type: ignore[no-untyped-call]
    z = z.unsqueeze(-1) if logits.dim() == 2 else z
    z = z.transpose(0, 1).reshape(classes.shape)
    # Masked classes stay masked and add nothing to the gradients of the calibration.
    masked = (z == float("-inf")) & (k != 0)
    u = torch.where((k == 0) | masked, 0.0, z)
    scale, bias = problem.form.vectors(inputs.scale, inputs.bias)
    if inputs.confidence is not None and scale is not None and bias is not None:
        c = torch.sigmoid(inputs.confidence)
        u = (1 + c * _pick(scale, classes)) * u + c * _pick(bias, classes)
    if inputs.prior is not None:
        u = u + _pick(inputs.prior, classes)
    u = torch.where(masked, float("-inf"), u)
    return logits, u[0], u[1]


def _pick(vector: Tensor, classes: Tensor) -> Tensor:
    """Entries of a class vector, whose gradient is summed in the same order on every run."""
    if vector.is_cpu:
        return vector.gather(0, classes.reshape(-1)).view(classes.shape)
    return vector[classes]


class _Entries(torch.autograd.Function):
    """The logits, and two of each position's in the arithmetic dtype.

    Their gradient is added to that of the logits where it lies: nothing of the logits' size is made
    for it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, dtype: torch.dtype) -> Any:
        ctx.save_for_backward(index)
        return logits.view_as(logits), logits.gather(1, index).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_entries: Tensor) -> Any:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        if torch.is_grad_enabled() or type(grad) is not Tensor or _is_batched(grad, of_entries):
            return grad.scatter_add(1, index, of_entries.to(grad.dtype)), None, None
        # Both entries are one where their gradients are 0: either may be written.
        values = grad.gather(1, index).to(of_entries.dtype) + of_entries
        _as_bits(grad).scatter_(1, index, _as_bits(values.to(grad.dtype)))
        return grad, None, None


def _as_bits(tensor: Tensor) -> Tensor:
    """Half precision as int16: scatter_ on the CPU would take it through a copy in float32."""
    return tensor.view(torch.int16) if tensor.element_size() == 2 else tensor


def _is_batched(*tensors: Tensor) -> bool:
    functorch = torch._C._functorch
    return any(
        functorch.is_legacy_batchedtensor(t) or functorch.is_functorch_wrapped_tensor(t)
        for t in tensors
    )
