"""Instructions that decide which lanes go where."""

from __future__ import annotations

import functools
from collections.abc import Callable

from . import operations as ops
from .disassembly import Instruction, Operand
from .operands import reader
from .operations import M32, Value
from .warp import ALL, LANES, NotModelledError, Unknown, Warp, lift

Step = Callable[[Warp], None]
# The names of those, and of those by which lanes wait for each other.
MOVES = {
    "BRA", "BRX", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "BPT",
}  # fmt: skip


def control(instruction: Instruction) -> Step | None:
    name, modifiers, operands = instruction.name, instruction.modifiers, instruction.operands
    if name not in MOVES:
        return None
    predicates = [o for o in (instruction.guard, *operands) if o and o.kind in ("P", "UP")]
    conditions = [reader(p, "p") for p in predicates]

    def together(*values: Value) -> tuple[Value, ...]:
        return (functools.reduce(lambda a, b: ops.both(a, b, "AND"), values, True),)

    def lanes(warp: Warp) -> int:
        values = [c(warp) for c in conditions]
        holds = lift(together, values)[0]
        if warp.has_unknown(holds):
            values = [_decided(warp, instruction, p, v)
                      for p, v in zip(predicates, values, strict=True)]  # fmt: skip
            holds = lift(together, values)[0]
        return warp.lanes_of(holds)

    label = next((int(o.value) for o in operands if o.kind == "label"), -1)
    if (name == "BRA" and "DIV" not in modifiers) or (name == "CALL" and "REL" in modifiers):
        return lambda warp: warp.split(lanes(warp), label)
    if name == "BRA":  # where not all of these lanes are here
        wanted = reader(operands[0], "i")

        def part(warp: Warp) -> None:
            parted = wanted(warp) & warp.alive != warp.active
            warp.split(warp.active if parted else 0, label)

        return part
    if name in ("RET", "BRX"):
        target = reader(operands[0], "w" if name == "RET" else "i")
        offset = int(operands[1].value) + instruction.address + 16 if name == "BRX" else 0

        def jump(warp: Warp) -> None:
            to = target(warp)
            if isinstance(to, list):
                to = to[warp.first_active()]
            if to is None:
                raise NotModelledError(f"{instruction.text}: where to is not known")
            to = to + offset & M32
            if to not in (warp.kernel.returns if name == "RET" else warp.kernel.labels):
                raise NotModelledError(f"{instruction.text}: to where flow.py does not look")
            warp.split(lanes(warp), to)

        return jump
    if name == "EXIT":
        return lambda warp: warp.leave(lanes(warp))
    if name == "BSSY":
        number = int(operands[0].value)

        def mark(warp: Warp) -> None:
            together = [warp.active]
            for lane in range(LANES):
                if warp.active >> lane & 1:
                    warp.barriers[number, lane] = together

        return mark
    if name == "BSYNC":
        number = int(operands[0].value)
        return lambda warp: warp.meet(warp.barriers[number, warp.first_active()])
    if name == "BREAK":
        number = int(next(o.value for o in operands if o.kind == "B"))

        def break_(warp: Warp) -> None:
            gone = lanes(warp)
            warp.barriers[number, warp.first_active()][0] &= ~gone
            warp.release()

        return break_
    if name == "WARPSYNC":
        mask = reader(operands[0], "i") if operands else lambda warp: ALL

        def wait(warp: Warp) -> None:
            lanes = mask(warp)
            if isinstance(lanes, list):
                lanes = lanes[warp.first_active()]
            if lanes is None:
                raise NotModelledError(f"{instruction.text}: of which lanes is not known")
            warp.meet(warp.warpsyncs.setdefault(lanes, [lanes]))

        return wait

    def stop(warp: Warp) -> None:  # CALL, BPT
        raise NotModelledError(f"{instruction.text}: an assertion fails")

    return stop


def _decided(warp: Warp, branch: Instruction, predicate: Operand, value: Value) -> Value:
    """The value, or that of each lane, with a decision where it is not known."""
    if not warp.has_unknown(value):
        return value
    source = warp.sources.get((predicate.kind, int(predicate.value)))
    decision = warp.decide(Unknown(branch, source)) != (predicate.sign == "!")
    return lift(lambda v: (decision if v is None else v,), [value])[0]
