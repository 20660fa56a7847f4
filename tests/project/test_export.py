"""torch.export of the losses without logits, and vmap of predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import disalign_ops
from disalign_ops import nn as dnn

IN, CLASSES = 4, 5


class Heads(nn.Module):
    """Losses without logits, of every kind of head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.head = dnn.DisAlignLinear(IN, CLASSES)
        self.cosine = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        head = self.head
        if self.kind == "linear":
            return disalign_ops.linear_cross_entropy(x, head.weight, t, head.bias, reduction="sum")
        if self.kind == "cosine":
            return disalign_ops.linear_cross_entropy(x, head.weight, t, cosine_scale=self.cosine)
        if self.kind == "sampled":
            return disalign_ops.linear_cross_entropy(x, head.weight, t, sample_rate=0.9)
        return disalign_ops.disalign_linear_cross_entropy(
            x, head.weight, t, head.confidence_layer(x), head.logit_scale, head.logit_bias,
            head.bias, chunk_bytes=1,
        )  # fmt: skip


def gradients(module: Any, x: Tensor, t: Tensor, parameters: dict[str, Tensor]) -> dict[str, Any]:
    q = x.clone().requires_grad_()
    loss = module(q, t)
    inputs = {"x": q, **parameters}
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {"loss": loss.detach(), **dict(zip(inputs, grads, strict=True))}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["linear", "cosine", "calibrated"])
def test_exported_losses_without_logits_have_gradients(kind: str, strict: bool) -> None:
    module, rows = Heads(kind), torch.export.Dim("rows")
    example = torch.randn(6, IN), torch.randint(0, CLASSES, (6,))
    program = torch.export.export(
        module, example, dynamic_shapes=({0: rows}, {0: rows}), strict=strict
    )
    x, t = torch.randn(9, IN), torch.randint(0, CLASSES, (9,))
    t[2] = -100
    expected = gradients(module, x, t, dict(module.named_parameters()))
    for exported in (program, program.run_decompositions()):
        graph = exported.module()
        found = gradients(graph, x, t, dict(graph.named_parameters()))
        for name, value in expected.items():
            if value is not None:
                torch.testing.assert_close(found[name], value)


def test_an_export_that_draws_classes_names_the_way_out() -> None:
    example = torch.randn(6, IN), torch.randint(0, CLASSES, (6,))
    with pytest.raises(RuntimeError, match="leave out sample_rate"):
        torch.export.export(Heads("sampled"), example)


@pytest.mark.parametrize("calibrated", [False, True])
def test_vmap_of_upsample_predict(calibrated: bool) -> None:
    z = torch.randn(3, 2, 5, 4, 3)
    c, a, b = torch.randn(3, 2, 1, 4, 3), torch.rand(5), torch.randn(5)

    def predict(z: Tensor, c: Tensor) -> Tensor:
        vectors = {"confidence": c, "scale": a, "bias": b} if calibrated else {}
        return disalign_ops.upsample_predict(z, (9, 7), prior=b, **vectors)

    found = torch.func.vmap(predict)(z, c)
    expected = torch.stack([predict(*pair) for pair in zip(z, c, strict=True)])
    assert torch.equal(found, expected)
    shared = torch.func.vmap(lambda c: predict(z[0], c))(c)
    assert torch.equal(shared, torch.stack([predict(z[0], each) for each in c]))
