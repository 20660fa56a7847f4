"""The benchmarks' cases of a linear head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from disalign_ops._bench import gate, peers
from disalign_ops._bench.case import Case, Mode, make_inputs
from disalign_ops._bench.results import run_case

CPU = torch.device("cpu")
TORCH = "F.linear_cross_entropy"


def silent(what: str) -> None:
    pass


def tiny(mode: Mode) -> Case:
    return Case("head", 24, 67, torch.float32, mode, "fast", features=9)


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.FULL, Mode.STAGE2], ids=str)
def test_heads_pass_the_gate_and_get_numbers(mode: Mode) -> None:
    case = tiny(mode)
    found, left_out = peers.contestants(case, CPU, (peers.EAGER, TORCH, "cut-cross-entropy"))
    plain = mode is Mode.PLAIN
    assert [c.name for c in found] == [peers.OURS, peers.EAGER, *([TORCH] if plain else [])]
    assert [c.name for c in left_out] == [*([] if plain else [TORCH]), "cut-cross-entropy"]
    result = run_case(case, found, CPU, 1, silent)
    for r in result.results:
        assert r.problem == ""
        wanted = {"loss"} if mode is Mode.STAGE2 else {"loss", "logits", "head"}
        assert wanted <= set(r.errors)
        assert r.bytes_per_second is None  # a matmul's
        assert r.copies is not None


def test_a_wrong_gradient_of_the_head_gets_no_number() -> None:
    case = tiny(Mode.PLAIN)

    def wrong(inputs: object, features: torch.Tensor) -> torch.Tensor:
        scaled = replace(inputs, head=inputs.head * 1.0)  # type: ignore[attr-defined, type-var]
        scaled.head.register_hook(lambda grad: grad * 1.01)
        return peers.our_loss(scaled, features)

    result = run_case(case, [peers.Contestant("wrong", wrong)], CPU, 1, silent).results[0]
    assert result.problem.startswith("head: relative error 0.01")
    assert result.timing is None


def test_the_exact_loss_is_that_of_the_logits() -> None:
    inputs = make_inputs(tiny(Mode.FULL), CPU)
    exact = gate.exact(inputs)
    assert set(exact) == {"loss", "logits", "head", "confidence", "scale", "bias"}
    assert exact["head"].shape == (67, 9)
    assert float(exact["loss"]) == pytest.approx(
        float(peers.eager_loss(inputs, inputs.logits).detach()), rel=1e-5
    )


def test_other_cases_leave_the_fused_heads_out() -> None:
    logits = Case("rows", 24, 67, torch.float32, Mode.PLAIN, "fast")
    _, left_out = peers.contestants(logits, CPU, (TORCH,))
    assert [(p.name, p.reason) for p in left_out] == [
        (TORCH, "takes a linear head, where a case has logits")
    ]
