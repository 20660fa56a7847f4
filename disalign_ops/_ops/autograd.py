"""Autograd of the operators: what forward keeps, what backward makes of it.

A layout's forward reads the logits once. With a scalar reduction it also yields the gradients of
scale, bias and confidence for an upstream gradient of 1, which backward multiplies by the real one.
The gradient of the logits is made by the layout's backward, or, where in_forward.py says so, in
forward while the logits are at hand (which costs one read of the logits and one exponential less).
The first backward hands it over, the very tensor; a second one makes another.

On the CPU the first backward multiplies it by the upstream gradient. On a GPU the host does not
know that, and leaves it to `backward_made`, which returns at once where it is 1 and else makes the
gradient from the logits with it, rounded once. A second backward does the same to a gradient that
it has forward's kernel make again, so that it has the same bits.

A loss of few logits costs what Python costs here: `Saved` takes apart only what a backward needs.
Forward gives statistics and denominator where in_forward.py expects a backward to read them;
another backward makes them again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from . import in_forward, reference
from .calibration_form import UNCHANGED
from .codes import (
    DETAILS,
    GRADIENTS,
    LOGITS,
    REDUCTIONS,
    STATISTICS,
)
from .namespace import NAMESPACE
from .problem import Inputs, Problem, reference_loss
from .schemas import BOXED, LAYOUTS, UPSAMPLE, Layout, library
from .wrong_target import raise_for_target

_NONE, _GRADIENT_BITS = REDUCTIONS["none"], sum(GRADIENTS)
_functorch, _modes = torch._C._functorch, torch._C._len_torch_dispatch_stack
_is_legacy_batched = _functorch.is_legacy_batchedtensor
_is_wrapped = _functorch.is_functorch_wrapped_tensor
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
# Where logits, scale, bias and confidence stand among the operators' arguments.
_DIFFERENTIABLE = tuple(Inputs._fields.index(n) for n in ("logits", "scale", "bias", "confidence"))


def _by_name(results: Sequence[Tensor], wanted: int, first: int = 0) -> list[Tensor | None]:
    """The gradients of logits, scale, bias and confidence, which begin at `first` among results;
    None where one was not wanted.
    """
    found: list[Tensor | None] = [None] * 4
    for k, bit in enumerate(GRADIENTS):
        if wanted & bit:
            found[k], first = results[first], first + 1
    return found


def _first_gradient(wanted: int) -> int:
    """Its place among forward's results: behind the loss and, if wanted, the statistics."""
    return 3 if wanted & STATISTICS else 1


def _first_detail(wanted: int) -> int:
    return _first_gradient(wanted) + (wanted & _GRADIENT_BITS).bit_count()


def _details(results: list[Tensor], wanted: int, problem: Problem) -> list[Tensor]:
    """The positions' losses, where the result is not that; then, of an upsampled loss, the target's
    softmax and prediction, of others prediction and entropy, each if wanted, and the statistics.
    """
    if not wanted & DETAILS:
        return []
    found = results[_first_detail(wanted) :]
    return found if problem.layout.name == UPSAMPLE.name else [*found, results[1]]


def _present(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The inputs without those at the end that few calls have: a None costs as much as a tensor
    where it is asked for its type, saved and restored.
    """
    if inputs.prior is inputs.margin is inputs.sample_weight is inputs.denominator is None:
        return inputs[:3] if inputs.scale is None else inputs[:6]
    return inputs


def _save(
    ctx: Any,
    problem: Problem,
    present: tuple[Tensor | None, ...],
    results: list[Tensor],
    wanted: int,
    given: tuple[Tensor | None, ...] = (),
) -> None:
    """For `Saved`: the operator's inputs, its results without the loss and the details, and scale
    and bias as given where those of the inputs are made of them.
    """
    ctx.kept = problem, wanted, len(present), [True]
    end = _first_detail(wanted) if wanted & DETAILS else None
    ctx.save_for_backward(*present, *results[1:end], *given)


_INPUTS = len(Inputs._fields)


class Saved:
    """What forward keeps for backward, by name; autograd saves it as one tuple, see `_save`."""

    __slots__ = ("_first_gradient", "_present", "_tensors", "available", "problem", "wanted")

    def __init__(self, ctx: Any) -> None:
        self._tensors: Sequence[Tensor] = ctx.saved_tensors  # of which inputs may be None
        self.problem: Problem
        self.wanted: int  # what forward has made
        self._present: int  # of the tensors, how many are inputs
        self.available: list[bool]  # empty: a backward has the gradient of the logits
        self.problem, self.wanted, self._present, self.available = ctx.kept
        # (The loss is not kept.)
        self._first_gradient = self._present + _first_gradient(self.wanted) - 1

    @property
    def logits(self) -> Tensor:
        return self._tensors[0]

    @property
    def inputs(self) -> Inputs:
        """Of forward's operator."""
        return Inputs(*self._tensors[: self._present])

    @property
    def inputs_given(self) -> Inputs:
        """The same with scale and bias as the user gave them."""
        if self.problem.form is UNCHANGED:
            return self.inputs
        *_, scale, bias = self._tensors
        return self.inputs._replace(scale=scale, bias=bias)

    @property
    def backward_inputs(self) -> Sequence[Tensor | None]:
        """Of backward's operator, between the upstream gradient and the numbers."""
        if self.wanted & STATISTICS:
            known = self._tensors[self._present : self._first_gradient]
        else:
            known = _forward(self.inputs, self.problem, STATISTICS)[1:]
        *inputs, _ = self.inputs  # without the denominator's, which `known` has
        return (*inputs, *known)

    @property
    def grad_logits(self) -> Tensor | None:
        return self._tensors[self._first_gradient] if self.wanted & LOGITS else None

    @property
    def gradients(self) -> list[Tensor | None]:
        """Of logits, scale, bias and confidence, None where forward did not make it."""
        return _by_name(self._tensors, self.wanted, self._first_gradient)


def is_batched(grad_loss: Tensor) -> bool:
    """Whether it stands for many upstream gradients: is_grads_batched=True or torch.vmap."""
    return _is_legacy_batched(grad_loss) or _is_wrapped(grad_loss)  # type: ignore[no-any-return]


def _precomputed(saved: Saved, grad_loss: Tensor) -> Tensor | None:
    """The gradient of the logits that forward made, for an upstream gradient of grad_loss.

    None where forward made none. The stored tensor itself is returned, so only the first call
    gets it. Later calls repeat what made it: backward's kernel may round it differently.
    """
    made, problem = saved.grad_logits, saved.problem
    if made is None:
        return None
    # (is_batched, without the call)
    batched = _is_legacy_batched(grad_loss) or _is_wrapped(grad_loss)
    if type(made) is not Tensor or _modes() or batched:
        # A fake or traced one has no value, and a batch of upstream gradients as many results.
        return made * grad_loss if saved.available else None
    try:
        saved.available.pop()  # atomic: of several threads' backwards, one has it
        # .data: a tensor of its own over the same memory, so that autograd may keep it as the
        # leaf's .grad without a copy, and changes to it are not changes to what we saved.
        whole = made.data
    except IndexError:
        whole = _forward(saved.inputs, problem, saved.wanted & _GRADIENT_BITS)[1]
    # backward_made, where there is one, reads the statistics.
    if (
        saved.wanted & STATISTICS
        and in_forward.kernels_of(problem.layout, made).finished_by_operator
    ):
        finish = problem.layout.operator("backward_made")
        finish(grad_loss, whole, *saved.backward_inputs, *problem.numbers, LOGITS)
        return whole
    return whole if grad_loss.item() == 1 else whole.mul_(grad_loss)


def _gradients(ctx: Any, grad_loss: Tensor, need: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of logits, scale, bias and confidence, or of the first alone, None where not
    needed (which `need` says).
    """
    saved = Saved(ctx)
    problem = saved.problem
    if _is_grad_enabled():
        if problem.in_place:
            raise RuntimeError(
                "inplace_backward=True cannot be differentiated twice (create_graph=True): the "
                "logits are overwritten by their gradient"
            )
        return _differentiable_backward(saved, grad_loss, need)

    if grad_loss.dim():
        grad_loss = grad_loss.contiguous()
    grads: list[Tensor | None] = [None] * len(need)
    missing = 0
    if need[0]:
        grads[0] = _precomputed(saved, grad_loss)
        # By backward's kernel: forward made none, or one that has no value here is gone.
        if grads[0] is None:
            missing = LOGITS
    if len(need) > 1:
        for k, grad in enumerate(saved.gradients):
            if k == 0 or not need[k]:
                continue
            if grad is None:
                missing |= GRADIENTS[k]
            else:
                grads[k] = (grad if k == 3 else problem.form.gradient(grad)) * grad_loss
    if missing and is_batched(grad_loss):
        # torch cannot batch operators that return lists; it batches its own.
        still = [bool(missing & bit) for bit in GRADIENTS[: len(need)]]
        fresh = _differentiable_backward(saved, grad_loss, still)
        return [new if grad is None else grad for grad, new in zip(grads, fresh, strict=True)]
    if missing:
        over = problem.in_place and need[0]
        backward = problem.layout.operator("backward_" if over else "backward")
        results = backward(grad_loss, *saved.backward_inputs, *problem.numbers, missing)
        fresh = _by_name(results, missing & ~LOGITS if over else missing)
        if over:
            fresh[0] = saved.logits.data
            torch.autograd.graph.increment_version(saved.logits)
        for k, grad in enumerate(fresh):
            if grad is not None:
                grads[k] = problem.form.gradient(grad) if k in (1, 2) else grad
    return grads


def _differentiable_backward(
    saved: Saved, grad_loss: Tensor, need: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients through the reference, so that they can be differentiated again."""
    inputs = saved.inputs_given
    with torch.enable_grad():
        # Aliases: one tensor as scale and bias has a gradient of each.
        logits = inputs.logits.view_as(inputs.logits)
        scale, bias, confidence = (
            t if t is None else t.view_as(t) for t in (inputs.scale, inputs.bias, inputs.confidence)
        )
        inputs = inputs._replace(logits=logits, scale=scale, bias=bias, confidence=confidence)
        loss = reference_loss(inputs, saved.problem)
    learned = (logits, scale, bias, confidence)
    wanted = [t for t, n in zip(learned, need, strict=False) if n and t is not None]
    found = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=True))
    return [next(found) if n else None for n in need]


def _save_operator(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor], layout: Layout) -> None:
    tensors, (*numbers, reduction, normalizer, wanted) = inputs[:_INPUTS], inputs[_INPUTS:]
    problem = Problem(layout, tuple(numbers), reduction, normalizer)
    _save(ctx, problem, tensors, output, wanted)


def _operator_backward(ctx: Any, grads_of_results: list[Tensor]) -> tuple[Tensor | None, ...]:
    need = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    found = _gradients(ctx, grads_of_results[0], need)
    for i, grad in zip(_DIFFERENTIABLE, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def register(layout: Layout, lib: torch.library.Library | None = None) -> None:
    """Autograd of a layout's loss and calibrated logits under the dispatcher, as torch.compile and
    `calibrate` take it.
    """
    name = f"{NAMESPACE}::{layout.prefix}{layout.name}_"
    torch.library.register_autograd(
        name + "forward",
        _operator_backward,
        setup_context=functools.partial(_save_operator, layout=layout),
        lib=lib,
    )
    if layout.name != UPSAMPLE.name:
        torch.library.register_autograd(
            name + "calibrate",
            functools.partial(calibrate_backward, layout=layout),
            setup_context=save_calibrate,
            lib=lib,
        )


class _Loss(torch.autograd.Function):
    """A loss in eager mode: less overhead than the dispatcher's autograd, and in place.

    Called with inputs, problem and wanted in one, then those of logits, scale, bias and confidence
    that there are, which stand apart for autograd to see.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Inputs, Problem, int], *learned: Tensor) -> Any:
        inputs, problem, wanted = call
        given: tuple[Tensor, ...] = ()
        with _BelowAutograd():
            if problem.form is not UNCHANGED:
                inputs, given = _all_classes(inputs, problem), learned[1:3]
            present = _present(inputs)
            results = _forward(inputs, problem, wanted, present)
        _save(ctx, problem, present, results, wanted, given)
        if not problem.details:
            return results[0]
        details = _details(results, wanted, problem)
        ctx.mark_non_differentiable(*details)
        return (results[0], *details)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, *_gradients(ctx, grad_loss, ctx.needs_input_grad[1:]))


# Function.apply without what it does for functorch's transforms, under which this is not called.
_apply = super(torch.autograd.Function, _Loss).apply


def _all_classes(inputs: Inputs, problem: Problem) -> Inputs:
    """scale and bias of all classes in place of those given."""
    if inputs.scale is None or problem.form is UNCHANGED:
        return inputs
    scale, bias = problem.form.vectors(inputs.scale, inputs.bias)
    return inputs._replace(scale=scale, bias=bias)


def _forward(
    inputs: Inputs,
    problem: Problem,
    wanted: int,
    present: tuple[Tensor | None, ...] | None = None,
    compiling: bool = False,
) -> list[Tensor]:
    plain = not compiling and not has_torch_function(present or inputs)
    layout = problem.layout
    operator = BOXED[layout.forward] if plain else layout.operator("forward")
    results: list[Tensor] = operator(
        *inputs, *problem.numbers, problem.reduction, problem.normalizer, wanted
    )
    return results


def loss(inputs: Inputs, problem: Problem) -> tuple[Tensor, ...]:
    """The loss through a layout's operators, in the accumulation dtype ('none': flat), and details.

    (scale and bias of all classes are made below autograd in eager mode, which costs a small batch
    less than its nodes would.)
    """
    logits, scale = inputs.logits, inputs.scale
    calibration: tuple[Tensor, ...] = ()
    if scale is not None:
        assert inputs.bias is not None
        assert inputs.confidence is not None
        calibration = scale, inputs.bias, inputs.confidence
    need = 0
    if _is_grad_enabled():
        need = LOGITS * logits.requires_grad
        if calibration:
            for tensor, bit in zip(calibration, GRADIENTS[1:], strict=True):
                need |= bit * tensor.requires_grad
    compiling = _is_compiling()
    wanted = in_forward.wanted(inputs, problem, need, compiling)
    if compiling:
        results = _forward(_all_classes(inputs, problem), problem, wanted, compiling=True)
        return (results[0], *(t.detach() for t in _details(results, wanted, problem)))
    try:
        if not need:
            with _BelowAutograd():
                results = _forward(_all_classes(inputs, problem), problem, wanted)
            return (results[0], *_details(results, wanted, problem))
        found = _apply((inputs, problem, wanted), logits, *calibration)
    except RuntimeError as error:
        raise_for_target(error, inputs.target)
        raise
    return found if problem.details else (found,)


def save_calibrate(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def calibrate_backward(ctx: Any, grad_output: Tensor, layout: Layout) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    need = ctx.needs_input_grad
    if torch.is_grad_enabled():
        with torch.enable_grad():
            u = reference.calibrate(*tensors).to(tensors[0].dtype)
        inputs = [t for t, n in zip(tensors, need, strict=True) if n]
        found = iter(torch.autograd.grad(u, inputs, grad_output, create_graph=True))
        return tuple(next(found) if n else None for n in need)
    wanted = sum(bit for bit, n in zip(GRADIENTS, need, strict=True) if n)
    operator = layout.operator("calibrate_backward")
    return tuple(_by_name(operator(grad_output.contiguous(), *tensors, wanted), wanted))


for _layout in LAYOUTS:
    register(_layout, library)


def calibrate(
    layout: Layout, logits: Tensor, scale: Tensor, bias: Tensor, confidence: Tensor
) -> Tensor:
    """(1 + c a) z + c b of (N, C) or (N, C, S) logits, in their dtype; vectors as in `Inputs`."""
    calibrated: Tensor = layout.operator("calibrate")(logits, scale, bias, confidence)
    return calibrated
