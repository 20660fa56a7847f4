"""The benchmarks' dense and upsampling cases."""

from __future__ import annotations

import pytest
import torch

from disalign_ops._bench import gate, peers
from disalign_ops._bench.case import Case, Mode, make_inputs
from disalign_ops._bench.peers import eager_loss
from disalign_ops._bench.results import run_case

CPU = torch.device("cpu")


def silent(what: str) -> None:
    pass


DENSE = {
    "dense": Case("dense", 2, 19, torch.float32, Mode.FULL, "fast", size=(12, 10)),
    "dense stage 2": Case("dense", 2, 19, torch.float32, Mode.STAGE2, "fast", size=(12, 10)),
    "dense in place": Case("dense", 2, 19, torch.float32, Mode.PLAIN_IN_PLACE, "fast", size=(9, 8)),
    "upsample": Case(
        "up", 2, 19, torch.float32, Mode.FULL, "fast", size=(5, 4), target_size=(20, 17)
    ),
    "upsample plain": Case(
        "up", 2, 19, torch.float32, Mode.PLAIN, "fast", size=(5, 4), target_size=(20, 17)
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_cases_pass_the_gate_and_get_numbers(name: str) -> None:
    case = DENSE[name]
    found, left_out = peers.contestants(case, CPU, (peers.EAGER, "quack"))
    assert [c.name for c in found] == [peers.OURS, peers.EAGER]
    assert [c.name for c in left_out] == ["quack"]
    result = run_case(case, found, CPU, 1, silent)
    assert [r.problem for r in result.results] == ["", ""]
    ours, eager = result.results
    assert ours.peak_extra is not None
    assert eager.peak_extra is not None
    assert eager.memory_share == eager.peak_extra / case.full_bytes


def test_the_exact_loss_of_images_is_that_of_the_batch() -> None:
    inputs = make_inputs(DENSE["upsample"], CPU)
    exact = gate.exact(inputs)
    loss = eager_loss(inputs, inputs.logits)
    wanted = inputs.wanted(inputs.logits)
    assert float(exact["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (what, tensor), grad in zip(
        wanted.items(), torch.autograd.grad(loss, list(wanted.values())), strict=True
    ):
        torch.testing.assert_close(exact[what].float(), grad, rtol=1e-3, atol=1e-6)
        assert tensor.grad is None  # the inputs themselves stay as they are
