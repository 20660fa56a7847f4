"""One case from its gate to its numbers, for every contestant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from . import gate, measure
from .case import Case, Inputs, make_inputs
from .peers import OURS, TRITON, Contestant, first_line

COPY = "copy"

# Called with what is being done, between timed steps.
Progress = Callable[[str], None]


@dataclass
class Result:
    """A contestant in a case. Without a timing, `problem` says what is wrong or what it raised."""

    case: Case
    contestant: str
    problem: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    timing: measure.Timing | None = None
    times_ours: float | None = None  # its time over ours, by paired rounds
    copies: float | None = None  # its time over that of out.copy_(logits), by paired rounds
    bytes_per_second: float | None = None  # the bytes that the mode needs, over its time
    share_of_copy: float | None = None  # of the bandwidth of out.copy_(logits), a read and a write
    peak_extra: int | None = None  # bytes beyond the inputs and the gradients
    gradient_bytes: int | None = None  # of new memory for the gradients asked for

    @property
    def memory_share(self) -> float | None:
        """Peak extra memory as a share of the logits' bytes at the target's size."""
        return None if self.peak_extra is None else self.peak_extra / self.case.full_bytes


@dataclass
class CaseResult:
    case: Case
    copy: measure.Timing
    results: list[Result]
    other_cores: float | None  # that other programs used while this case was timed

    def of(self, contestant: str) -> Result | None:
        return next((r for r in self.results if r.contestant == contestant), None)

    @property
    def ours_failed(self) -> bool:
        results = [self.of(OURS), self.of(TRITON) or self.of(OURS)]  # Triton only where it serves
        return any(result is None or result.timing is None for result in results)


def new_gradient_bytes(outputs: dict[str, Tensor], logits: Tensor) -> int:
    """Bytes of the gradients, without one that lies over the logits."""
    return sum(
        tensor.numel() * tensor.itemsize
        for name, tensor in outputs.items()
        if name != "loss" and tensor.data_ptr() != logits.data_ptr()
    )


def run_case(
    case: Case,
    contestants: list[Contestant],
    device: torch.device,
    rounds: int | None,
    progress: Progress,
) -> CaseResult:
    """Gate, memory and paired times of a case. What raises or is wrong gets no numbers."""
    inputs = make_inputs(case, device)
    # What overwrites the logits needs new ones each time, made before the clock starts. Then all
    # get new ones, so that all find the same part of them in the cache.
    renew = any(c.overwrites for c in contestants)

    def logits() -> Tensor:
        return inputs.logits.clone() if renew else inputs.logits

    progress("reference")
    expected = gate.exact(inputs)
    results = [
        _gated(contestant, case, inputs, expected, logits, progress) for contestant in contestants
    ]
    del expected
    accepted = {
        result.contestant: contestant
        for result, contestant in zip(results, contestants, strict=True)
        if not result.problem
    }

    # Of what has the logits' size, where a linear head is given and not they.
    source = inputs.logits.detach() if inputs.head is None else _like_logits(case, device)
    out = torch.empty_like(source)

    def copy_step() -> Callable[[], object]:
        return partial(out.copy_, logits().detach() if inputs.head is None else source)

    steps = {COPY: copy_step}
    for name, contestant in accepted.items():
        steps[name] = partial(_step, contestant, inputs, logits)
    paired = measure.paired_seconds(
        steps,
        measure.make_clock(device, case.overhead),
        rounds,
        lambda done: progress(f"round {done}"),
    )
    copy = measure.timing(paired.seconds[COPY])
    for result in results:
        if not result.problem:
            _fill(result, paired.seconds, copy, device)
    return CaseResult(case, copy, results, paired.other_cores)


def _like_logits(case: Case, device: torch.device) -> Tensor:
    return torch.zeros(case.shape, dtype=case.dtype, device=device)


def _step(
    contestant: Contestant, inputs: Inputs, logits: Callable[[], Tensor]
) -> Callable[[], object]:
    """A forward and backward, ready to be timed."""
    given = logits()
    wanted = list(inputs.wanted(given).values())

    def step() -> object:
        loss = contestant.loss(inputs, given)
        # Of 1, too, as autograd would make it.
        return torch.autograd.grad(loss, wanted, torch.full_like(loss, inputs.upstream))

    return step


def _gated(
    contestant: Contestant,
    case: Case,
    inputs: Inputs,
    expected: dict[str, Tensor],
    logits: Callable[[], Tensor],
    progress: Progress,
) -> Result:
    result = Result(case, contestant.name)
    device = inputs.logits.device
    progress(f"{contestant.name}: first call and correctness")
    try:
        given = logits()
        outputs = gate.computed(contestant, inputs, given)
        result.problem = gate.objections(outputs, expected, case.dtype)
        if result.problem:
            return result
        result.errors = gate.errors(outputs, expected)
        result.gradient_bytes = new_gradient_bytes(outputs, given)
        del outputs, given
        progress(f"{contestant.name}: memory")
        peak = measure.peak_extra_bytes(_step(contestant, inputs, logits), device)
        result.peak_extra = peak - result.gradient_bytes
    except Exception as error:  # a peer may refuse a case in any way; that is its result
        result.problem = f"raised {first_line(error)}"
    return result


def _fill(
    result: Result, seconds: dict[str, list[float]], copy: measure.Timing, device: torch.device
) -> None:
    mine = seconds[result.contestant]
    result.timing = measure.timing(mine)
    if OURS in seconds:
        result.times_ours = measure.paired_ratio(mine, seconds[OURS])
    result.copies = measure.paired_ratio(mine, seconds[COPY])
    if result.case.features:
        return  # a matmul's work is not bytes
    result.bytes_per_second = measure.counted_bytes(result.case, device) / result.timing.median
    result.share_of_copy = result.bytes_per_second * copy.median / (2 * result.case.logits_bytes)
