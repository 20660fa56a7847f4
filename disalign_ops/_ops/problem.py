"""The arguments of a loss after validation, in the form that every backend takes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .calibration_form import UNCHANGED, CalibrationForm
from .codes import NORMALIZERS, REDUCTIONS
from .schemas import Layout

_REDUCTION_OF = {code: name for name, code in REDUCTIONS.items()}
_NORMALIZER_OF = {code: name for name, code in NORMALIZERS.items()}


class Inputs(NamedTuple):
    """The tensors of a loss, in the order of the operators.

    logits: as the layout takes them. Class vectors (C,) and position vectors, flat: contiguous and
    of the accumulation dtype. scale and bias are a and b of u = (1 + c a) z + c b, or what the
    problem's form makes those of. denominator: the caller's, a float64 0-d tensor. target: class
    indices, or class probabilities in the layout of the logits (`is_soft`).
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    confidence: Tensor | None = None
    prior: Tensor | None = None
    margin: Tensor | None = None
    sample_weight: Tensor | None = None
    denominator: Tensor | None = None


def is_soft(inputs: Inputs) -> bool:
    """Whether the target is class probabilities.

    No property: torch.compile of torch 2.10 does not evaluate those of named tuples.
    """
    return inputs.target.is_floating_point()


class Problem(NamedTuple):
    """The rest of it, numbers alone.

    numbers: ignore_index, label_smoothing, focal_gamma, and the layout's options. reduction and
    normalizer: codes.py. details: the bits of details that are wanted. in_place: backward writes
    over the logits. gradient: the pass that makes the gradient of the logits, "auto", "forward" or
    "backward".
    """

    layout: Layout
    numbers: tuple[Any, ...]
    reduction: int
    normalizer: int
    form: CalibrationForm = UNCHANGED
    in_place: bool = False
    details: int = 0
    gradient: str = "auto"

    @property
    def reduction_name(self) -> str:
        return _REDUCTION_OF[self.reduction]

    def normalizer_of(self, inputs: Inputs) -> str | Tensor:
        """Its name, or the caller's number, as reference.py takes them."""
        given = inputs.denominator
        return _NORMALIZER_OF[self.normalizer] if given is None else given


def reference_loss(inputs: Inputs, problem: Problem) -> Tensor:
    """The loss by reference.py."""
    keywords: dict[str, Any] = inputs._asdict()
    del keywords["logits"], keywords["target"], keywords["denominator"]
    keywords["scale"], keywords["bias"] = problem.form.vectors(inputs.scale, inputs.bias)
    names = ("ignore_index", "label_smoothing", "focal_gamma", *problem.layout.options)
    keywords |= dict(zip(names, problem.numbers, strict=True))
    return problem.layout.reference(
        inputs.logits, inputs.target, **keywords,
        reduction=problem.reduction_name, normalizer=problem.normalizer_of(inputs),
    )  # fmt: skip
