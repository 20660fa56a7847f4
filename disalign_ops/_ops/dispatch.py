"""Which backend an input goes to, and a loss by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, backends, composed, in_forward, reference
from .codes import REDUCTIONS
from .problem import Inputs, Problem, is_soft, reference_loss
from .schemas import DENSE, UPSAMPLE, Layout
from .wrong_target import indices


def compute(inputs: Inputs, problem: Problem) -> tuple[Tensor, ...]:
    """The loss in the accumulation dtype ('none': flat), and the details, if there are any."""
    backend = serving_backend(inputs.logits)
    if inputs.target.requires_grad and is_soft(inputs) and torch.is_grad_enabled():
        backend = "reference"  # no kernel gives class probabilities a gradient
    if backend == "native":
        return autograd.loss(inputs, problem)
    if composes(backend):
        mean = composed.plain_mean(inputs, problem)
        if mean is not None:
            return (mean,)
    if not is_soft(inputs):
        check_classes(inputs.target, inputs.logits.shape[1], problem.numbers[0])
    if backend == "triton":
        layout = operators_of(problem.layout, backend)
        return autograd.loss(inputs, problem._replace(layout=layout))
    loss = composed.cross_entropy if composes(backend) else reference_loss
    if problem.layout is UPSAMPLE:
        return _upsampled(inputs, problem, loss)
    return (loss(inputs, problem),)


def _upsampled(
    inputs: Inputs, problem: Problem, loss_of: Callable[[Inputs, Problem], Tensor]
) -> tuple[Tensor, ...]:
    """An upsampled loss through the upsampled logits."""
    height, width = inputs.target.shape[-2:]
    *numbers, align_corners = problem.numbers
    scale, bias = problem.form.vectors(inputs.scale, inputs.bias)
    u = reference.upsample(
        inputs.logits, (height, width), align_corners,
        scale=scale, bias=bias, confidence=inputs.confidence, prior=inputs.prior,
    ).flatten(2)  # fmt: skip
    target = inputs.target.flatten(2) if is_soft(inputs) else inputs.target
    planes = Inputs(
        u, target, inputs.weight, margin=inputs.margin, sample_weight=inputs.sample_weight,
        denominator=inputs.denominator,
    )  # fmt: skip
    dense = Problem(DENSE, tuple(numbers), problem.reduction, problem.normalizer)
    loss = loss_of(planes, dense)
    if not problem.details:
        return (loss,)
    each = loss_of(planes, dense._replace(reduction=REDUCTIONS["none"])).detach()
    return (loss, each, *reference.details(u.detach(), inputs.target, numbers[0]))


def serving_backend(input: Tensor) -> str:
    """The backend that this input goes to."""
    if transformed():
        return "reference"
    if input.is_cpu and backends.cpu_is_native():
        return "native"  # what the rest finds, without its cost to a small batch
    return backends.serving(input.device)


def makes_in_forward(layout: Layout, logits: Tensor) -> bool:
    """Whether the kernels that these logits go to can make their gradient in forward."""
    native = serving_backend(logits) == "native"
    return native and layout.name in in_forward.kernels_of(layout, logits).layouts


def predicts(layout: Layout, logits: Tensor) -> bool:
    """Whether the kernels that these logits go to give prediction and entropy beside the loss."""
    return layout.name != UPSAMPLE.name and serving_backend(logits) in ("native", "triton")


_transforms_active, _is_tracing = torch._C._are_functorch_transforms_active, torch._C._is_tracing
_is_compiling = torch.compiler.is_compiling
NO_TRANSFORMS = (
    "torch.func transforms, forward-mode differentiation, torch.export and torch.jit.trace are not "
    "supported with sample_rate or classes over several processes: leave the loss out of what is "
    "transformed, or leave out sample_rate"
)


def transformed() -> bool:
    """Whether plain PyTorch alone is right: registered operators know neither functorch transforms
    nor forward-mode tangents, which they would drop, and are none of ONNX's, nor torch.jit's.
    """
    return not _is_compiling() and (
        _transforms_active() or forward_ad._current_level >= 0 or _is_tracing()
    )


def needs_logits() -> bool:
    """Whether a loss without logits must make them: its gradients are no part of a graph."""
    return transformed() or torch.compiler.is_exporting()


def composes(backend: str) -> bool:
    """Whether the loss is that of composed.py: no kernel serves, and nobody asked for the
    reference.
    """
    return backend == "reference" and backends.is_automatic() and not transformed()


def operators_of(layout: Layout, backend: str) -> Layout:
    """The layout's operators of a backend, "native" or "triton"."""
    if backend == "native":
        return layout
    from .triton import registration  # which imports triton

    return registration.layout_of(layout)


def check_classes(
    target: Tensor, classes: int, ignore_index: int, *, asserted: bool = True, name: str = "target"
) -> None:
    """IndexError for a target that is no class, on the CPU. Other devices assert: in the kernel if
    it is `asserted` there, or else here.
    """
    on_cpu = target.device.type == "cpu"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if not on_cpu and asserted:
        return
    flat = target.reshape(-1)
    bad = reference.no_class(flat, classes, ignore_index)
    if not on_cpu:
        torch._assert_async(~bad.any(), f"target is no class of {classes}")
        return
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise IndexError(
            f"Target {int(flat[at])} is out of bounds: "
            f"{name}[{indices(at, target.shape)}], the logits have {classes} classes and "
            f"ignore_index is {ignore_index}"
        )
