"""Every error of nn: layers, conversions, stage 2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disalign_ops.errors import ArgumentError, ArgumentTypeError
from disalign_ops.nn import (
    CrossEntropyLoss,
    DisAlignCosineLinear,
    DisAlignLinear,
    convert_form,
    convert_to_disalign,
    freeze_for_stage2,
)
from support.nn_cases import C, D, N


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def shared() -> nn.Module:
    layer = nn.Linear(D, D)
    return nn.Sequential(layer, nn.ReLU(), layer)


def hooked() -> nn.Module:
    layer = nn.Linear(D, C)
    layer.register_forward_hook(lambda *_: None)
    return layer


def convert(model: nn.Module, **options: Any) -> Callable[[], object]:
    return lambda: convert_to_disalign(model, **options)


PLAIN = (
    "must be a plain nn.Linear, got one that is lazy, parametrized, or has hooks or a forward of "
    "its own"
)
TWO = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C))
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "form": (
        lambda: DisAlignLinear(D, C, form="paper"),
        "form must be one of 'interpolated', 'residual', got 'paper'",
    ),
    "background": (
        lambda: DisAlignCosineLinear(D, C, background="middle"),
        "background must be one of None, 'first', 'last', got 'middle'",
    ),
    "no class": (
        lambda: DisAlignLinear(D, 1, background="last"),
        "in_features must be at least 1, and out_features one more than the background's columns, "
        "got in_features 5, out_features 1, background 'last'",
    ),
    "no feature": (lambda: DisAlignLinear(0, C), "got in_features 0, out_features 9"),
    "scale_init": (
        lambda: DisAlignCosineLinear(D, C, scale_init=0.0),
        "scale_init must be a finite number > 0, got 0.0",
    ),
    "infinite": (
        lambda: DisAlignCosineLinear(D, C, scale_init=float("inf")),
        "scale_init must be a finite number > 0, got inf",
    ),
    "negative": (
        lambda: DisAlignCosineLinear(D, C, scale_init=-1.0),
        "scale_init must be a number >= 0.0, got -1.0",
    ),
    "features": (
        lambda: DisAlignLinear(D, C)(torch.randn(N, D + 1)),
        "x must have shape (..., 5), got (7, 6)",
    ),
    "features of raw_logits": (
        lambda: DisAlignCosineLinear(D, C).raw_logits(torch.tensor(1.0)),
        "x must have shape (..., 5), got ()",
    ),
    "loss of three dimensions": (
        lambda: DisAlignLinear(D, C).loss(torch.randn(2, 3, D), torch.zeros(2, 3).long()),
        "x must have shape (N, 5), got (2, 3, 5): flatten x and target to rows",
    ),
    "loss's own": (
        lambda: DisAlignLinear(D, C).loss(torch.randn(N, D), torch.zeros(3).long()),
        "target must have shape (7,) for an input of shape (7, 9), got (3,)",
    ),
    "reduction": (
        lambda: CrossEntropyLoss(reduction="avg")(torch.randn(N, C), torch.zeros(N).long()),
        "reduction must be one of 'mean', 'sum', 'none', got 'avg'",
    ),
    "bn": (
        lambda: freeze_for_stage2(DisAlignLinear(D, C), "frozen"),
        "bn must be one of 'eval', 'train', got 'frozen'",
    ),
    "stage 2 without a layer": (
        lambda: freeze_for_stage2(TWO),
        "model must have a DisAlign layer (see convert_to_disalign), got a Sequential without one",
    ),
    "form to convert": (
        lambda: convert_form(DisAlignLinear(D, C), "paper"),
        "form must be one of 'interpolated', 'residual', got 'paper'",
    ),
    "convert form without a layer": (
        lambda: convert_form(nn.ReLU(), "residual"),
        "model must have a DisAlign layer (see convert_to_disalign), got a ReLU without one",
    ),
    "no linear": (
        convert(nn.Sequential(nn.ReLU())),
        "model must have an nn.Linear, got a Sequential without one",
    ),
    "name": (convert(TWO, name="1"), "name must be an nn.Linear's (0, 2), got '1'"),
    "no such name": (convert(TWO, name="x"), "name must be an nn.Linear's (0, 2), got 'x'"),
    "shared": (convert(shared()), "the layer '2' must have one name, got 0, 2: it is shared"),
    "lazy": (convert(nn.Sequential(nn.LazyLinear(C))), f"the layer '0' {PLAIN}"),
    "parametrized": (
        convert(nn.utils.parametrizations.weight_norm(nn.Linear(D, C))),
        f"the layer '' {PLAIN}",
    ),
    "hooks": (convert(hooked()), f"the layer '' {PLAIN}"),
    "a forward of its own": (convert(nn.Sequential(Odd(D, C))), f"the layer '0' {PLAIN}"),
    "converted already": (
        convert(nn.Sequential(nn.Linear(D, D), DisAlignLinear(D, C))),
        "name must be given where model has a DisAlign layer already, got None and a Sequential",
    ),
    "form of convert": (
        convert(TWO, form="paper"),
        "form must be one of 'interpolated', 'residual', got 'paper'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    before = copy.deepcopy(TWO.state_dict())
    with pytest.raises(ArgumentError) as caught:
        call()
    assert message in str(caught.value)
    # What failed left the model as it was.
    assert [type(m) for m in TWO] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(p.requires_grad for p in TWO.parameters())
    assert all(torch.equal(v, before[k]) for k, v in TWO.state_dict().items())


def test_scale_init_that_is_no_number() -> None:
    with pytest.raises(ArgumentTypeError, match="scale_init must be a number, got"):
        DisAlignCosineLinear(D, C, scale_init="20")
