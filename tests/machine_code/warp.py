"""A warp that walks through a kernel: which instructions it issues, where no data is known.

Registers and predicates hold a value for all lanes, a list of 32 (None: not known), or None. Loads
yield what the launch's `memory` says. A branch on what is not known is put to `decide`. Lanes that
part meet again where the code says so (BSSY, BSYNC): what some of them run alone is issued once
more, and so counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .disassembly import Instruction, Kernel
from .operations import M32, Bits, Value

LANES = 32
ALL = (1 << LANES) - 1
ZERO = -1  # the number of RZ, and of PT


class NotModelledError(Exception):
    """An instruction that the walk does not know, or a place that it cannot know to go to."""


@dataclass(frozen=True)
class Unknown:
    """A branch on a predicate that is not known, and the instruction that made the predicate."""

    branch: Instruction
    source: Instruction | None


@dataclass
class Launch:
    """What a warp knows from its launch.

    constants: bank 0, the arguments included. memory: the value of `size` bytes at a global
    address, None where it is not known.
    """

    constants: bytes
    block: tuple[int, int] = (0, 0)
    first_thread: int = 0
    memory: Callable[[int, int], int | None] = lambda address, size: None


@dataclass
class Meeting:
    """Lanes that wait for others. `lanes` is shared: a lane may leave it (BREAK)."""

    lanes: list[int]
    arrived: Counter[int] = field(default_factory=Counter)  # by the address they go on from


@dataclass
class Warp:
    kernel: Kernel
    launch: Launch
    decide: Callable[[Unknown], bool]  # the predicate's value
    runs: Counter[int] = field(default_factory=Counter)  # how often one began, by address
    registers: dict[str, list[Any]] = field(default_factory=dict)
    sources: dict[tuple[str, int], Instruction] = field(default_factory=dict)  # of predicates
    local: dict[int, Any] = field(default_factory=dict)
    barriers: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # number, lane
    meetings: dict[int, Meeting] = field(default_factory=dict)
    warpsyncs: dict[int, list[int]] = field(default_factory=dict)  # by mask
    groups: list[tuple[int, int]] = field(default_factory=list)  # address, lanes: wait for a turn
    alive: int = ALL
    active: int = ALL
    address: int = 0

    def __post_init__(self) -> None:
        # What a kernel has not written is taken to be 0: the compiler keeps predicates in bits of a
        # register, and never reads the others.
        for kind in ("R", "UR"):
            self.registers[kind] = [0] * 256 + [0]
        for kind in ("P", "UP"):
            self.registers[kind] = [False] * 8 + [True]

    def run(self, most: int = 10**6) -> int:
        """Walks to the end of all lanes. Returns the number of instructions issued."""
        from .instructions import run_from

        runs, issued = self.kernel.runs, 0
        while issued <= most:
            if not self.active:
                if not self.groups:
                    assert not self.alive, "lanes wait for each other"
                    return issued
                self.address, self.active = self.groups.pop()
            here = self.address
            if here not in runs:
                runs[here] = run_from(self.kernel, here)
            run = runs[here]
            self.runs[here] += 1
            issued += run.length
            self.address = here + 16 * run.length
            for step in run.steps:
                step(self)
        raise NotModelledError(f"{self.kernel.symbol} does not end")

    def opcodes(self) -> Counter[str]:
        """How often each opcode was issued."""
        found: Counter[str] = Counter()
        for address, times in self.runs.items():
            for opcode, n in self.kernel.runs[address].opcodes.items():
                found[opcode] += times * n
        return found

    # ---- Lanes ----

    def split(self, taken: int, target: int) -> None:
        """`taken` of the active lanes go to target, the others on."""
        if taken == self.active:
            self.address = target
        elif taken:
            self.groups.append((target, taken))
            self.active &= ~taken

    def leave(self, lanes: int) -> None:
        """These lanes are done."""
        self.alive &= ~lanes
        self.active &= ~lanes
        self.release()

    def meet(self, lanes: list[int]) -> None:
        """The active lanes wait here until all of `lanes` have come or are done."""
        meeting = self.meetings.setdefault(id(lanes), Meeting(lanes))
        meeting.arrived[self.address] |= self.active
        self.active = 0
        self.release()

    def release(self) -> None:
        for key, meeting in list(self.meetings.items()):
            if not meeting.lanes[0] & self.alive & ~sum(meeting.arrived.values()):
                del self.meetings[key]
                self.groups += meeting.arrived.items()

    def first_active(self) -> int:
        return (self.active & -self.active).bit_length() - 1

    def lanes_of(self, condition: Value) -> int:
        """The active lanes for which it holds."""
        if not isinstance(condition, list):
            return self.active if condition else 0
        return self.active & sum(1 << lane for lane in range(LANES) if condition[lane])

    def has_unknown(self, value: Value) -> bool:
        """Whether it is not known for one of the active lanes."""
        if not isinstance(value, list):
            return value is None
        return any(v is None and self.active >> lane & 1 for lane, v in enumerate(value))

    # ---- Registers ----

    def write(self, kind: str, number: int, value: Value, guard: Value = True) -> None:
        if number == ZERO:
            return
        file = self.registers[kind]
        active = self.active if kind in ("R", "P") else ALL
        file[number] = merge(file[number], value, guard, active)


def merge(old: Value, new: Value, guard: Value, active: int) -> Value:
    """`new` in the active lanes for which the guard holds."""
    if guard is True and active == ALL:
        return new
    kept = old if isinstance(old, list) else [old] * LANES
    value = new if isinstance(new, list) else [new] * LANES
    guards = guard if isinstance(guard, list) else [guard] * LANES
    merged = []
    for lane in range(LANES):
        if guards[lane] is False or not active >> lane & 1:
            merged.append(kept[lane])
        elif guards[lane] is True or kept[lane] == value[lane]:
            merged.append(value[lane])
        else:
            merged.append(agreeing(kept[lane], value[lane]))
    return uniform(merged)


def agreeing(a: Value, b: Value) -> Value:
    """The bits of a register that may have either value."""
    masks = [(v.known, v.value) if isinstance(v, Bits) else (M32, v) for v in (a, b)
             if type(v) in (int, Bits)]  # fmt: skip
    if len(masks) < 2:
        return None
    (known, one), (other_known, other) = masks
    known &= other_known & ~(one ^ other)
    return Bits(known, one & known) if known else None


def uniform(values: list[Value]) -> Value:
    """One value where all lanes have the same."""
    first = values[0]
    return first if values.count(first) == LANES else values


def lift(function: Callable[..., tuple[Value, ...]], values: list[Any],
         bits: bool = False) -> tuple[Any, ...]:  # fmt: skip
    """function of the values, for each lane where lanes differ. bits: it knows what Bits are."""
    if not bits:
        values = [_whole(v) for v in values]
    if list not in map(type, values):
        return function(*values)
    lanes = [v if type(v) is list else itertools.repeat(v) for v in values]
    results = map(function, *lanes)
    return tuple(uniform(list(r)) for r in zip(*results, strict=True))


def _whole(value: Value) -> Value:
    """None, too, where some bits are known."""
    if type(value) is list:
        return (
            [None if type(v) is Bits else v for v in value] if Bits in map(type, value) else value
        )
    return None if type(value) is Bits else value
