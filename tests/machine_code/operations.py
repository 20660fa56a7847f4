"""What instructions compute, as far as control flow depends on it: integers, comparisons, floats.

A function takes the values of its sources, None for those that are not known, and returns those of
its destinations. Registers hold 32 bits, pairs 64, without a sign; predicates are bools.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
Value = Any  # int, bool, or None: not known; Bits, for LOP3 alone


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def to_float(bits: int, wide: bool = False) -> float:
    if wide:
        return float(struct.unpack("<d", struct.pack("<Q", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def from_float(value: float, wide: bool = False) -> int:
    if wide:
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    try:
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


def _half(value: float) -> int:
    return int(struct.unpack("<H", struct.pack("<e", value))[0])


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "NUM": lambda a, b: a == a and b == b,
    "NAN": lambda a, b: a != a or b != b,
}


def both(a: Value, b: Value, how: str) -> Value:
    """Of predicates, by AND, OR or XOR: known where one of them decides."""
    if how == "AND":
        return False if a is False or b is False else None if a is None or b is None else True
    if how == "OR":
        return True if a is True or b is True else None if a is None or b is None else False
    return None if a is None or b is None else a != b


class Modifiers(list[str]):
    """An instruction's, with what a lane's comparison asks of them."""

    @functools.cached_property
    def how(self) -> str:
        return next((m for m in self if m in ("AND", "OR", "XOR")), "AND")

    @functools.cached_property
    def compare(self) -> Callable[[Any, Any], bool]:
        return COMPARE[self[0]]

    @functools.cached_property
    def bits(self) -> int:
        return 64 if "S64" in self or "U64" in self else 32

    @functools.cached_property
    def unsigned(self) -> bool:
        return "U32" in self or "U64" in self

    @functools.cached_property
    def extended(self) -> bool:
        return "EX" in self


def _combine(modifiers: Modifiers, result: Value, others: tuple[Value, ...]) -> tuple[Value, Value]:
    other = others[0] if others else True
    inverse = None if result is None else not result
    if other is True and modifiers.how == "AND":
        return result, inverse
    return both(result, other, modifiers.how), both(inverse, other, modifiers.how)


def compare_integers(modifiers: Modifiers, a: Value, b: Value, *others: Value) -> tuple[Value, ...]:
    result: Value = None
    if a is not None and b is not None:
        if not modifiers.unsigned:
            a, b = signed(a, modifiers.bits), signed(b, modifiers.bits)
        if modifiers.extended and a == b:  # the lower halves decide
            result = others[1]
        else:
            result = modifiers.compare(a, b)
    return _combine(modifiers, result, others)


def compare_floats(wide: bool, modifiers: Modifiers, a: Value, b: Value,
                   *others: Value) -> tuple[Value, ...]:  # fmt: skip
    result: Value = None
    how = modifiers[0]
    if a is not None and b is not None:
        x, y = to_float(a, wide), to_float(b, wide)
        unordered = how not in COMPARE  # as GEU
        result = COMPARE[how[:-1] if unordered else how](x, y)
        if how == "NE" or unordered:
            nan = x != x or y != y
            result = unordered if nan else result
    return _combine(modifiers, result, others)


def move(modifiers: list[str], a: Value) -> tuple[Value, ...]:
    return (a,)


def add(modifiers: list[str], *values: Value) -> tuple[Value, ...]:
    """The sum, carries among the values, and the two carries out of it."""
    if None in values:
        return None, None, None
    total = sum(values)
    return total & M32, total >> 32 >= 1, total >> 32 >= 2


def add_wide(modifiers: list[str], *values: Value) -> tuple[Value, ...]:
    return (None if None in values else sum(values) & M64, None, None)


def multiply_add(modifiers: list[str], a: Value, b: Value, c: Value,
                 *carries: Value) -> tuple[Value, ...]:  # fmt: skip
    if a == 0 or b == 0:
        a = b = 0
    if None in (a, b, c, *carries):
        return None, None
    carry = sum(carries)
    if "WIDE" in modifiers or "HI" in modifiers:
        if "U32" not in modifiers:
            a, b = signed(a), signed(b)
        total = (a * b & M64) + c + carry
        return (total & M64) >> (32 if "HI" in modifiers else 0), total >> 64 > 0
    total = (a * b & M32) + c + carry
    return total & M32, total >> 32 > 0


def shift_add(modifiers: list[str], *values: Value) -> tuple[Value, ...]:
    """LEA: b plus the lower or upper half of (c:a) << shift."""
    if None in values:
        return None, None
    carry = 0
    rest = list(values)
    if "X" in modifiers:
        carry = rest.pop()
    a, b = rest[:2]
    shift = rest[-1] & 31 if len(rest) > 2 else 0
    if "SX32" in modifiers:
        whole = signed(a) & M64
    else:
        whole = a | (rest[2] << 32 if "HI" in modifiers and len(rest) == 4 else 0)
    part = (whole << shift & M64) >> 32 if "HI" in modifiers else whole << shift & M32
    total = part + b + carry
    return total & M32, total >> 32 > 0


def shift(modifiers: list[str], a: Value, by: Value, c: Value) -> tuple[Value, ...]:
    if None in (a, by, c):
        return (None,)
    by = by & 31 if "W" in modifiers else min(by, 64)
    whole = a | c << 32
    if "L" in modifiers:
        whole = whole << by & M64
        # Of a 32-bit shift the lower register alone is shifted.
    elif any(m.startswith("S") for m in modifiers):
        whole = signed(whole, 64) >> by & M64
    else:
        whole >>= by
    return (whole >> 32 if "HI" in modifiers else whole & M32,)


def magnitude(modifiers: list[str], a: Value) -> tuple[Value, ...]:
    return (None if a is None else abs(signed(a)) & M32,)


def reverse(modifiers: list[str], a: Value) -> tuple[Value, ...]:
    return (None if a is None else int(f"{a:032b}"[::-1], 2),)


def leading_one(modifiers: list[str], a: Value) -> tuple[Value, ...]:
    """FLO, of numbers without a sign: the highest bit, counted from bit 0 or (SH) from bit 31."""
    if a is None or "U32" not in modifiers:
        return (None,)
    place = a.bit_length() - 1
    return (M32 if place < 0 else 31 - place if "SH" in modifiers else place,)


def extend(modifiers: list[str], a: Value, bits: Value) -> tuple[Value, ...]:
    """The lower bits, and the last of them above, or 0."""
    if a is None or bits is None:
        return (None,)
    low = a & (1 << bits) - 1
    return (low if "U32" in modifiers else signed(low, bits) & M32,)


@dataclass(frozen=True)
class Bits:
    """A register of which some bits are known: where conditions are packed into one."""

    known: int  # which
    value: int  # those; 0 elsewhere


def logic(modifiers: list[str], a: Value, b: Value, c: Value, table: Value,
          *other: Value) -> tuple[Value, ...]:  # fmt: skip
    """LOP3: the result, and whether it is not 0 (or the predicate holds)."""
    choices = []  # of each source, what its unknown bits may be
    for source in (a, b, c):
        if source is None:
            choices.append((0, M32))
        elif isinstance(source, Bits):
            choices.append((source.value, source.value | ~source.known & M32))
        else:
            choices.append((source,))
    found = [_look_up(table, *chosen) for chosen in itertools.product(*choices)]
    known = M32
    for one in found:
        known &= ~(one ^ found[0])
    result: Value = found[0] if known == M32 else Bits(known, found[0] & known) if known else None
    nonzero = True if found[0] & known else None if known != M32 else False
    how = "AND" if "PAND" in modifiers else "OR"
    return result, both(nonzero, other[0], how) if other else nonzero


def _look_up(table: int, a: int, b: int, c: int) -> int:
    result = 0
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result & M32


def predicate_logic(modifiers: list[str], a: Value, b: Value, c: Value,
                    *tables: Value) -> tuple[Value, ...]:  # fmt: skip
    def look_up(table: int) -> Value:
        options = {
            bool(table >> (4 * x + 2 * y + z) & 1)
            for x in ((a,) if a is not None else (False, True))
            for y in ((b,) if b is not None else (False, True))
            for z in ((c,) if c is not None else (False, True))
        }
        return options.pop() if len(options) == 1 else None

    return tuple(look_up(table) for table in tables)


def select(modifiers: list[str], a: Value, b: Value, which: Value) -> tuple[Value, ...]:
    if which is None:
        return (a if a == b else None,)
    return (a if which else b,)


def absolute(modifiers: Modifiers, a: Value) -> tuple[Value, ...]:
    return (None if a is None else abs(signed(a)) & M32,)


def minimum(modifiers: list[str], a: Value, b: Value, least: Value) -> tuple[Value, ...]:
    if None in (a, b, least):
        return (None,)
    if "U32" not in modifiers:
        return ((min if least else max)(signed(a), signed(b)) & M32,)
    return ((min if least else max)(a, b),)


def minimum_of_three(
    modifiers: list[str], a: Value, b: Value, c: Value, least: Value
) -> tuple[Value, ...]:
    return minimum(modifiers, *minimum(modifiers, a, b, least), c, least)


def add_minimum(modifiers: list[str], a: Value, b: Value, c: Value,
                least: Value) -> tuple[Value, ...]:  # fmt: skip
    return minimum(modifiers, None if None in (a, b) else a + b & M32, c, least)


def permute(modifiers: list[str], a: Value, selector: Value, b: Value) -> tuple[Value, ...]:
    """PRMT: bytes of a and b, of which some may not be known."""
    if type(selector) is not int or modifiers:
        return (None,)
    known, value = 0, 0
    for place in range(4):
        nibble = selector >> (4 * place) & 15
        source, shift = (a, b)[nibble >> 2 & 1], 8 * (nibble & 3)
        bits = source.known if isinstance(source, Bits) else 0 if source is None else M32
        sign = nibble & 8
        if bits >> shift & (0x80 if sign else 0xFF) != (0x80 if sign else 0xFF):
            continue
        byte = (source.value if isinstance(source, Bits) else source) >> shift & 0xFF
        known |= 0xFF << 8 * place
        value |= (0xFF if sign and byte >> 7 else 0 if sign else byte) << 8 * place
    return (value if known == M32 else Bits(known, value) if known else None,)


def float_arithmetic(wide: bool, name: str, modifiers: list[str],
                     *values: Value) -> tuple[Value, ...]:  # fmt: skip
    if None in values:
        return (None,)
    x = [to_float(v, wide) for v in values]
    with_nan = math.nan
    try:
        result = x[0] + x[1] if name == "ADD" else x[0] * x[1] + (x[2] if name == "FMA" else 0.0)
    except (OverflowError, ValueError):
        result = with_nan
    if "SAT" in modifiers:
        result = min(max(result, 0.0), 1.0)
    return (from_float(result, wide),)


def reciprocal(modifiers: list[str], a: Value) -> tuple[Value, ...]:
    """MUFU: the reciprocal; other functions are not needed."""
    if a is None or modifiers != ["RCP"]:
        return (None,)
    x = to_float(a)
    return (from_float(1 / x if x else math.inf),)


def to_integer(modifiers: list[str], a: Value) -> tuple[Value, ...]:
    if a is None:
        return (None,)
    x = to_float(a)
    wide = "U64" in modifiers or "S64" in modifiers
    if not math.isfinite(x):
        return (None,)
    whole = math.trunc(x) if "TRUNC" in modifiers else round(x)
    return (whole & (M64 if wide else M32),)


def from_integer(modifiers: list[str], a: Value) -> tuple[Value, ...]:
    if a is None:
        return (None,)
    bits = next(
        (int(m[1:]) for m in modifiers if m in ("U16", "S16", "U64", "S64", "U8", "S8")), 32
    )
    a &= (1 << bits) - 1
    if not any(m in ("U32", "U16", "U64", "U8") for m in modifiers):
        a = signed(a, bits)
    if "F64" in modifiers:
        return (from_float(float(a), True),)
    found = from_float(float(a))
    value = to_float(found)
    if "RP" in modifiers and value < a:
        found += 1  # of positive numbers alone
    if "RZ" in modifiers and value > a:
        found -= 1
    return (found,)


def convert_float(modifiers: list[str], a: Value) -> tuple[Value, ...]:
    if a is None or modifiers not in (["F32", "F64"], ["F64", "F32"]):
        return (None,)
    to_wide = modifiers[0] == "F64"
    return (from_float(to_float(a, not to_wide), to_wide),)


def half_pair(high: float, low: float) -> int:
    """What HFMA2 -RZ, RZ, high, low yields: a way to write a constant."""
    return _half(high) << 16 | _half(low)
