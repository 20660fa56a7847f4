"""Which instructions of a kernel must be followed to know where its warps go.

Most compute data. Two analyses of the code, of every way through it: forward, which registers hold
what is not known (data from memory, and what is made of them); backward from the instructions that
move lanes, which registers these need. What needs no value is counted and not followed, and what is
not known is not computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from .control import MOVES
from .disassembly import Instruction, Kernel, Operand
from .forms import ARITHMETIC, DATA, plain_name, results_of, widths
from .warp import ZERO

# A bit each for R0 to R255, UR0 to UR255, P0 to P7, UP0 to UP7, and one for all of local memory.
_FIRST = {"R": 0, "UR": 256, "P": 512, "UP": 520}
_LOCAL = 1 << 528
_EVERYTHING = (1 << 529) - 1
_PACKED = {"P2R": 255 << _FIRST["P"], "UP2UR": 255 << _FIRST["UP"]}
# Their results are not known where one of these sources is not: all, or those.
_SELECTS = {"SEL": (0, 1), "FSEL": (0, 1)}
_COMPARES = ("ISETP", "FSETP", "DSETP")
_NEVER = ("LOP3", "PLOP3", "PRMT", "IMAD")  # a known source may decide


@dataclass
class Effect:
    """Bits of registers. unknown: a mask of sources, of which one that is not known is enough for
    the results not to be; or, of `both`, all.
    """

    reads: int
    writes: int
    guarded: bool
    unknown: tuple[int, ...]
    both: bool
    always: bool  # the results are not known


def _bits(kind: str, number: int | float, count: int) -> int:
    if kind not in _FIRST or number == ZERO:
        return 0
    return (1 << (count if kind[-1] == "R" else 1)) - 1 << _FIRST[kind] + int(number)


def _read(operand: Operand, words: int) -> int:
    found = _bits(operand.kind, operand.value, words)
    for kind, number, _ in operand.parts:
        found |= _bits(kind.removesuffix("64"), number, 2 if kind.endswith("64") else 1)
    return found


def _effect(i: Instruction) -> Effect:
    name, results, (words, of_sources) = plain_name(i.name), results_of(i), widths(i)
    sources = [
        _read(operand, width)
        for operand, width in zip(i.operands[len(results) :], of_sources, strict=True)
    ]
    reads = _PACKED.get(i.name, 0) | (_read(i.guard, 1) if i.guard else 0)
    for mask in sources:
        reads |= mask
    writes = 0
    for operand in results:
        writes |= _bits(operand.kind, operand.value, words)
    if i.name == "LDL":
        reads |= _LOCAL
    elif i.name == "STL":
        writes |= _LOCAL
    found = Effect(reads, writes, i.guard is not None or i.name == "STL", (), False, False)
    modifiers = i.modifiers
    if name in MOVES:
        return found
    if name == "LDG":
        pass  # the launch's memory says
    elif name == "LD":
        found.always = True
    elif name in _SELECTS:
        found.unknown, found.both = tuple(sources[:2]), True
    elif name in _COMPARES:
        other = i.operands[len(results) + 2]
        if other.text in ("PT", "UPT") and not {"OR", "XOR"} & set(modifiers):
            found.unknown = tuple(sources[:2])
    elif name == "MUFU" and modifiers != ["RCP"]:
        found.always = True
    elif name == "IMAD":
        found.unknown = tuple(sources[2:])
    elif name == "SHFL":
        found.unknown = tuple(sources[:1])
    elif name in ("R2UR", "VOTE", "VOTEU") or (name in ARITHMETIC and name not in _NEVER):
        found.unknown = tuple(sources)
    elif name == "HFMA2" and [o.kind for o in i.operands[3:]] == ["float", "float"]:
        pass  # a constant
    elif name in DATA:
        found.always = True
    return found


def _is_unknown(effect: Effect, state: int) -> bool:
    if effect.always or not effect.unknown:
        return effect.always
    found = [bool(mask & state) for mask in effect.unknown]
    return all(found) if effect.both else any(found)


@dataclass(frozen=True)
class Flow:
    """Addresses: of what is followed, and of what of it has results that are not known."""

    followed: frozenset[int]
    unknown: frozenset[int]


def analyse(kernel: Kernel) -> Flow:
    code, effects = kernel.instructions, {a: _effect(i) for a, i in kernel.instructions.items()}
    ways = {a: _successors(i, kernel) if i.name in MOVES else [a + 16] for a, i in code.items()}
    starts = sorted({min(code), *(w for a in code if code[a].name in MOVES for w in ways[a])})
    blocks = _blocks(code, [s for s in starts if s in code])

    # Forward: what is unknown at the start of each block.
    before = dict.fromkeys(blocks, _EVERYTHING & ~_LOCAL)
    before[min(code)] = 0
    unknown: set[int] = set()
    waiting = list(blocks)
    while waiting:
        start = waiting.pop(0)
        state = before[start]
        for address in blocks[start]:
            effect = effects[address]
            if not effect.writes:
                continue
            if _is_unknown(effect, state):
                unknown.add(address)
                state = state if effect.guarded else state | effect.writes
            else:
                unknown.discard(address)
                state &= ~effect.writes
        for way in ways[blocks[start][-1]]:
            if way in before and before[way] & ~state:
                before[way] &= state
                if way not in waiting:
                    waiting.append(way)

    # Backward: what is needed.
    needed = dict.fromkeys(blocks, 0)
    comes_from: dict[int, list[int]] = {start: [] for start in blocks}
    for start, addresses in blocks.items():
        for way in ways[addresses[-1]]:
            if way in comes_from:
                comes_from[way].append(start)
    followed = set()
    waiting = list(blocks)
    while waiting:
        start = waiting.pop()
        state = 0
        for way in ways[blocks[start][-1]]:
            state |= needed.get(way, 0)
        for address in reversed(blocks[start]):
            effect = effects[address]
            if code[address].name in MOVES:
                state |= effect.reads
            elif not effect.writes & state:
                continue
            else:
                if not effect.guarded:
                    state &= ~effect.writes
                if address not in unknown:
                    state |= effect.reads
                elif code[address].guard:
                    state |= _read(code[address].guard, 1)  # type: ignore[arg-type]
            followed.add(address)
        if state != needed[start]:
            needed[start] = state
            waiting += [other for other in comes_from[start] if other not in waiting]
    return Flow(frozenset(followed), frozenset(unknown))


def _successors(instruction: Instruction, kernel: Kernel) -> list[int]:
    following = [instruction.address + 16]
    if instruction.name == "BRX":
        return [*kernel.labels, *following]
    if instruction.name == "RET":
        return [*kernel.returns, *following]
    labels = [int(o.value) for o in instruction.operands if o.kind == "label"]
    always = instruction.guard is None and len(instruction.operands) == len(labels)
    if always and instruction.name == "EXIT":
        return []
    if always and instruction.name == "BRA":
        return labels
    return labels + following


def _blocks(code: dict[int, Instruction], starts: list[int]) -> dict[int, list[int]]:
    """Addresses by their block's first: what is run from there to where lanes may go elsewhere."""
    found: dict[int, list[int]] = {}
    here: list[int] = []
    first = set(starts)
    for address in sorted(code):
        if address in first or not here:
            here = found[address] = []
        here.append(address)
        if code[address].name in MOVES:
            here = []
    return found
