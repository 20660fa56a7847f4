"""What each instruction does to a warp (warp.py)."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import flow
from . import operations as ops
from .control import MOVES, control
from .disassembly import Instruction, Kernel, Operand
from .forms import (
    ARITHMETIC,
    DATA,
    LOADS,
    NOTHING,
    WITH_BITS,
    form,
    plain_name,
    results_of,
    widths,
    words_of,
)
from .operands import Read, address_reader, constant_reader, guard_reader, reader
from .operations import M32, Value
from .warp import LANES, ZERO, NotModelledError, Warp, lift, merge, uniform

Step = Callable[[Warp], None]


def _arithmetic(instruction: Instruction) -> Step | None:
    name, modifiers = plain_name(instruction.name), ops.Modifiers(instruction.modifiers)
    if name not in ARITHMETIC:
        return None
    function, modes, wide = form(instruction)
    results = list(results_of(instruction))
    sources = instruction.operands[len(results) :]
    if name == "LOP3" and results[0].kind in ("P", "UP"):
        results.reverse()
    readers = []
    for k, operand in enumerate(sources):
        predicate = operand.kind in ("P", "UP")
        readers.append(reader(operand, "p" if predicate else modes[k]))
    compute = functools.partial(function, modifiers)
    guard = guard_reader(instruction)
    # Rows are alike: most instructions find what they found the last time.
    last: list[Any] = [None, ()]

    def step(warp: Warp) -> None:
        holds = guard(warp)
        values = [r(warp) for r in readers]
        if values != last[0]:
            last[:] = values, lift(compute, values, name in WITH_BITS)
        for result, value in zip(results, last[1], strict=False):
            _write(warp, instruction, result, value, wide, holds)

    return step


def _write(warp: Warp, instruction: Instruction, result: Operand, value: Value, wide: bool,
           guard: Value) -> None:  # fmt: skip
    number = int(result.value)
    if number == ZERO:
        return
    if result.kind in ("P", "UP"):
        warp.sources[result.kind, number] = instruction
        warp.write(result.kind, number, value, guard)
    elif not wide:
        warp.write(result.kind, number, value, guard)
    else:
        halves = lift(lambda v: (None, None) if v is None else (v & M32, v >> 32), [value])
        for half in range(2):
            warp.write(result.kind, number + half, halves[half], guard)


# ---- Loads, and what else moves ----


def _move(instruction: Instruction) -> Step | None:
    name, modifiers, operands = instruction.name, instruction.modifiers, instruction.operands
    guard = guard_reader(instruction)
    if name in NOTHING:
        return lambda warp: None
    plain = plain_name(name)
    if plain == "HFMA2" and [o.kind for o in operands[3:]] == ["float", "float"]:
        constant = ops.half_pair(operands[3].value, operands[4].value)
        return lambda warp: _write(warp, instruction, operands[0], constant, False, guard(warp))
    if plain in LOADS:
        return _load(instruction, plain)
    if name in ("S2R", "S2UR", "CS2R"):
        wide = name == "CS2R" and "32" not in modifiers
        return lambda warp: _write(
            warp, instruction, operands[0], _special(warp, operands[1].text), wide, guard(warp)
        )
    if name == "STL":
        address, words = address_reader(operands[0]), words_of(modifiers)
        sources = [reader(_following(operands[1], k), "i") for k in range(words)]

        def store(warp: Warp) -> None:
            for k, source in enumerate(sources):
                at = address(warp)
                if not isinstance(at, int):
                    raise NotModelledError(instruction.text)
                old = warp.local.get(at + 4 * k)
                warp.local[at + 4 * k] = merge(old, source(warp), guard(warp), warp.active)

        return store
    if name == "R2UR":
        source = reader(operands[1], "i")

        def to_uniform(warp: Warp) -> None:
            value = source(warp)
            if isinstance(value, list):
                value = value[warp.first_active()]
            _write(warp, instruction, operands[0], value, False, guard(warp))

        return to_uniform
    if name == "SHFL":
        return _shuffle(instruction)
    if name in ("VOTE", "VOTEU"):
        return _vote(instruction)
    if name == "B2R":  # what a barrier has found of all warps
        return _forget(instruction)
    if name in ("P2R", "UP2UR"):
        kind = "P" if name == "P2R" else "UP"
        rest, mask = reader(operands[2], "i"), int(operands[3].value)

        def pack(warp: Warp) -> None:
            bits = [warp.registers[kind][n] for n in range(7) if mask >> n & 1]
            places = [n for n in range(7) if mask >> n & 1]

            def together(other: Value, *bits: Value) -> tuple[Value, ...]:
                known, value = (M32, other) if type(other) is int else (0, 0)
                if isinstance(other, ops.Bits):
                    known, value = other.known, other.value
                known, value = known & ~mask, value & ~mask
                for bit, place in zip(bits, places, strict=True):
                    if bit is not None:
                        known, value = known | 1 << place, value | int(bit) << place
                missing = ~known & M32
                return (value if not missing else ops.Bits(known, value) if known else None,)

            value = lift(together, [rest(warp), *bits], True)[0]
            _write(warp, instruction, operands[0], value, False, guard(warp))

        return pack
    if plain in DATA:
        return _forget(instruction)
    return None


def _forget(instruction: Instruction) -> Step:
    """Its results are not known."""
    guard = guard_reader(instruction)
    results, (words, _) = results_of(instruction), widths(instruction)

    def forget(warp: Warp) -> None:
        holds = guard(warp)
        for result in results:
            for k in range(words if result.kind[-1] == "R" else 1):
                _write(warp, instruction, _following(result, k), None, False, holds)

    return forget


def _shuffle(instruction: Instruction) -> Step:
    """SHFL: from the lane that the second source says, within segments that the third says."""
    guard = guard_reader(instruction)
    results, sources = instruction.operands[:2], instruction.operands[2:]
    readers = [reader(o, "i") for o in sources]
    mode = instruction.modifiers[0]

    def shuffle(warp: Warp) -> None:
        value, other, segments = (
            v if isinstance(v, list) else [v] * LANES for v in (r(warp) for r in readers)
        )
        found: list[Value] = []
        for lane in range(LANES):
            if other[lane] is None or segments[lane] is None:
                found.append(None)
                continue
            fixed = segments[lane] >> 8 & 31
            by = other[lane]
            place = {"IDX": by, "BFLY": lane ^ by, "UP": lane - by, "DOWN": lane + by}[mode]
            if mode == "IDX":
                place = lane & fixed | place & ~fixed & 31
            inside = 0 <= place < LANES and place & fixed == lane & fixed
            found.append(value[place if inside else lane])
        holds = guard(warp)
        _write(warp, instruction, results[0], None, False, holds)
        _write(warp, instruction, results[1], uniform(found), False, holds)

    return shuffle


def _vote(instruction: Instruction) -> Step:
    """VOTE: whose predicate holds, to a register; whether any or all do, to a predicate."""
    guard = guard_reader(instruction)
    results, source = instruction.operands[:-1], reader(instruction.operands[-1], "p")
    whole = {"ANY": any, "ALL": all}[instruction.modifiers[0]]

    def vote(warp: Warp) -> None:
        value, holds = source(warp), guard(warp)
        known = not warp.has_unknown(value)
        lanes = warp.lanes_of(value) if known else 0
        votes = [bool(lanes >> lane & 1) for lane in range(LANES) if warp.active >> lane & 1]
        for result in results:
            found: Value = whole(votes) if result.kind in ("P", "UP") else lanes
            _write(warp, instruction, result, found if known else None, False, holds)

    return vote


def _following(operand: Operand, k: int) -> Operand:
    """The k-th register after it."""
    if operand.value == ZERO:
        return operand
    return Operand(operand.kind, operand.text, operand.value + k)


def _special(warp: Warp, name: str) -> Value:
    threads = [warp.launch.first_thread + lane for lane in range(LANES)]
    return {
        "SRZ": 0, "SR_TID.X": threads, "SR_TID.Y": 0, "SR_TID.Z": 0,
        "SR_LANEID": list(range(LANES)),
        "SR_CTAID.X": warp.launch.block[0], "SR_CTAID.Y": warp.launch.block[1], "SR_CTAID.Z": 0,
    }.get(name)  # fmt: skip


def _load(instruction: Instruction, name: str) -> Step:
    modifiers, operands = instruction.modifiers, instruction.operands
    guard, words = guard_reader(instruction), words_of(instruction.modifiers)
    narrow = next((m for m in modifiers if m in ("U8", "S8", "U16", "S16")), "")
    size = int(narrow[1:]) // 8 if narrow else 4
    if name == "LDC":
        bank = operands[1]
        readers = [
            constant_reader(Operand("constant", bank.text, bank.value + 4 * k, "", "", bank.bank,
                              bank.parts), size) for k in range(words)
        ]  # fmt: skip
    else:
        address = address_reader(operands[1])

        def word(k: int) -> Read:
            def at(warp: Warp, place: Value) -> Value:
                if place is None or name == "LD":
                    return None
                if name == "LDL":
                    return warp.local.get(place + 4 * k)
                return warp.launch.memory(place + 4 * k, size)

            if name == "LDL":
                return lambda warp: at(warp, address(warp))
            return lambda warp: lift(lambda place: (at(warp, place),), [address(warp)])[0]

        readers = [word(k) for k in range(words)]

    def extended(value: Value) -> tuple[Value, ...]:
        return (None if value is None else ops.signed(value, 8 * size) & M32,)

    def load(warp: Warp) -> None:
        holds = guard(warp)
        # The address may be among what is written.
        values = [r(warp) for r in readers]
        if narrow.startswith("S"):
            values = [lift(extended, [value])[0] for value in values]
        for k, value in enumerate(values):
            _write(warp, instruction, _following(operands[0], k), value, False, holds)

    return load


def _decode(instruction: Instruction) -> Step:
    step = control(instruction) or _arithmetic(instruction) or _move(instruction)
    if step is None:
        raise NotModelledError(f"{instruction.text} at {instruction.address:#x}")
    return step


@dataclass(frozen=True)
class Run:
    """Instructions up to the next that moves lanes. steps: what is followed of them (flow.py)."""

    length: int
    opcodes: Counter[str]
    steps: tuple[Step, ...]


def run_from(kernel: Kernel, address: int) -> Run:
    if kernel.flow is None:
        kernel.flow = flow.analyse(kernel)
    opcodes: Counter[str] = Counter()
    steps = []
    for at in itertools.count(address, 16):
        instruction = kernel.instructions[at]
        opcodes[instruction.opcode] += 1
        step = _decode(instruction)  # which says no to what it does not know
        if at in kernel.flow.followed:
            steps.append(_forget(instruction) if at in kernel.flow.unknown else step)
        if instruction.name in MOVES:
            return Run(opcodes.total(), opcodes, tuple(steps))
    raise AssertionError
