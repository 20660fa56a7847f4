"""Why backward makes the gradient of the logits under torch.compile: both graphs, as docs/math.md
states them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.metrics
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

import disalign_ops
from disalign_ops._ops.codes import LOGITS, NORMALIZERS, REDUCTIONS, STATISTICS
from disalign_ops._ops.schemas import ROW

N, FEATURES, C = 8, 16, 50


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(N, FEATURES, requires_grad=True)
    return x, torch.randn(FEATURES, C, requires_grad=True), torch.randint(0, C, (N,))


def _made_in_forward(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """What gradient="forward" would be, which is refused under torch.compile."""
    forward = ROW.operator("forward")
    reduction, normalizer = REDUCTIONS["mean"], NORMALIZERS["weights"]
    wanted = LOGITS | STATISTICS
    results = forward(x @ w, target, *[None] * 8, -100, 0.0, 0.0, reduction, normalizer, wanted)
    loss: Tensor = results[0]
    return loss


def _by_default(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return disalign_ops.cross_entropy(x @ w, target)


def _graphs(loss: Callable[..., Tensor]) -> tuple[list[str], list[str]]:
    """The nodes of forward and of backward that read or write N x C elements in memory, but for the
    linear head's.
    """
    found: dict[str, list[str]] = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: Any, _: Any) -> Any:
            found[name] = [
                node.target.name().split("::")[1]
                for node in graph.graph.nodes
                if node.op == "call_function"
                and hasattr(node.target, "name")
                and node.target.name().split("::")[1] not in ("mm", "t", "detach")
                and any(t.shape == (N, C) for t in _tensors(node))
            ]
            return make_boxed_func(graph.forward)

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    torch.compile(loss, backend=backend, fullgraph=True)(*_inputs()).backward()
    return found["forward"], found["backward"]


def _tensors(node: Any) -> list[Tensor]:
    values = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
    flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
    return [v for v in flat if isinstance(v, Tensor)]


def test_by_default_three_passes_over_the_logits() -> None:
    # Forward reads, backward reads and writes.
    assert _graphs(_by_default) == (["row_forward"], ["row_backward"])


def test_made_in_forward_it_would_be_four() -> None:
    # Forward reads and writes, backward reads and writes: the upstream gradient is not known.
    assert _graphs(_made_in_forward) == (["row_forward"], ["mul.Tensor"])


@pytest.mark.parametrize("donated", [False, True])
def test_the_product_is_a_kernel_into_new_memory(
    donated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", donated)
    torch._dynamo.reset()
    torch._inductor.metrics.reset()
    x, w, target = _inputs()
    loss = torch.compile(_made_in_forward, fullgraph=True)(x, w, target) * 3
    gradients = [torch.autograd.grad(loss, (x, w), retain_graph=True) for _ in range(2)]
    assert torch._inductor.metrics.generated_kernel_count == 1
    # In place the second would be 3 times the first.
    assert all(map(torch.equal, *gradients))
    expected = torch.autograd.grad(3 * torch.nn.functional.cross_entropy(x @ w, target), (x, w))
    torch.testing.assert_close(gradients[0], expected)
