"""What instructions look like: results, sources, how wide they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import operations as ops
from .control import MOVES
from .disassembly import Instruction, Operand

# By the name without the U of the uniform ones: the function, how it reads its sources.
ARITHMETIC: dict[str, tuple[Callable[..., Any], str]] = {
    "IADD3": (ops.add, "aaa"),
    "IADD": (ops.add, "aa"),
    "VIADD": (ops.add, "aa"),
    "IMAD": (ops.multiply_add, "iii"),
    "LEA": (ops.shift_add, "iaii"),
    "SHF": (ops.shift, "iii"),
    "SGXT": (ops.extend, "ii"),
    "IABS": (ops.magnitude, "i"),
    "BREV": (ops.reverse, "i"),
    "FLO": (ops.leading_one, "i"),
    "LOP3": (ops.logic, "iiii"),
    "PLOP3": (ops.predicate_logic, "pppii"),
    "ISETP": (ops.compare_integers, "ii"),
    "FSETP": (functools.partial(ops.compare_floats, False), "ff"),
    "DSETP": (functools.partial(ops.compare_floats, True), "dd"),
    "SEL": (ops.select, "ii"),
    "FSEL": (ops.select, "ff"),
    "IMNMX": (ops.minimum, "ii"),
    "VIMNMX": (ops.minimum, "ii"),
    "VIMNMX3": (ops.minimum_of_three, "iii"),
    "VIADDMNMX": (ops.add_minimum, "iii"),
    "PRMT": (ops.permute, "iii"),
    "FADD": (functools.partial(ops.float_arithmetic, False, "ADD"), "ff"),
    "FMUL": (functools.partial(ops.float_arithmetic, False, "MUL"), "ff"),
    "FFMA": (functools.partial(ops.float_arithmetic, False, "FMA"), "fff"),
    "DADD": (functools.partial(ops.float_arithmetic, True, "ADD"), "dd"),
    "DMUL": (functools.partial(ops.float_arithmetic, True, "MUL"), "dd"),
    "DFMA": (functools.partial(ops.float_arithmetic, True, "FMA"), "ddd"),
    "MUFU": (ops.reciprocal, "f"),
    "F2I": (ops.to_integer, "f"),
    "I2F": (ops.from_integer, "i"),
    "I2FP": (ops.from_integer, "i"),
    "F2F": (ops.convert_float, "f"),
    "MOV": (ops.move, "i"),
}
PREDICATES = ("ISETP", "FSETP", "DSETP", "PLOP3")  # they write two
WITH_BITS = ("LOP3", "MOV", "PRMT")  # they know what operations.Bits are
# What they write is not followed.
DATA = {
    "FMNMX", "FMNMX3", "HMNMX2", "FRND", "FCHK", "F2FP", "LDS", "HFMA2", "HADD2", "HMUL2", "LEPC",
    "MUFU", "ATOMG", "LDSM", "HSETP2",
}  # fmt: skip
NOTHING = {"STG", "STS", "STSM", "ST", "BAR", "NOP", "MEMBAR", "LDGSTS", "LDGDEPBAR", "DEPBAR",
           "ENDCOLLECTIVE", "ERRBAR", "CGAERRBAR", "CCTL"}  # fmt: skip


LOADS = {"LDC", "LDG", "LDL", "LD"}


def words_of(modifiers: list[str]) -> int:
    """That an instruction loads: bits, or the matrices of LDSM."""
    sizes = {"64": 2, "128": 4, "2": 2, "4": 4}
    return next((sizes[m] for m in modifiers if m in sizes), 1)


def plain_name(name: str) -> str:
    if name in ("ULDC", "LDCU"):
        return "LDC"
    short = name[1:] if name[0] == "U" else name
    return short if short in ARITHMETIC or short in DATA else name


def form(instruction: Instruction) -> tuple[Callable[..., Any], str, bool]:
    """Of ARITHMETIC: the function, how it reads its sources, whether it writes two registers."""
    name, modifiers = plain_name(instruction.name), instruction.modifiers
    function, modes = ARITHMETIC[name]
    wide = name[0] == "D"
    if "64" in modifiers or "S64" in modifiers or "U64" in modifiers:
        if name in ("IADD3", "IADD"):
            function = ops.add_wide
        if name not in ("F2I", "SHF"):
            modes = modes.replace("i", "w").replace("a", "w")
        wide = name not in ("I2F", "ISETP", "SHF")
    elif name == "IMAD" and ("WIDE" in modifiers or "HI" in modifiers):
        modes, wide = "iiw", "WIDE" in modifiers
    elif name == "F2F" and modifiers[:2] == ["F32", "F64"]:
        modes = "d"
    elif name in ("F2F", "I2F") and "F64" in modifiers[:1]:
        wide = True
    return function, modes, wide


def results_of(instruction: Instruction) -> tuple[Operand, ...]:
    """What it writes: the first of its operands."""
    name, operands = instruction.name, instruction.operands
    plain = plain_name(name)
    if name in NOTHING or name in MOVES or name == "STL":
        return ()
    # ATOMG: a predicate, the register; HSETP2: two predicates
    if plain in PREDICATES or plain in ("SHFL", "ATOMG", "HSETP2"):
        return operands[:2]
    if name in ("VOTE", "VOTEU"):
        return operands[:-1]
    if name == "B2R":
        return operands
    if plain not in ARITHMETIC:
        return operands[:1]
    if plain == "LOP3" and operands[0].kind in ("P", "UP"):
        return operands[:2]
    written = 1
    while operands[written : written + 1] and operands[written].kind in ("P", "UP"):
        written += 1
    return operands[:written]


def widths(instruction: Instruction) -> tuple[int, list[int]]:
    """How many registers a result has, and each source."""
    name, plain = instruction.name, plain_name(instruction.name)
    sources = instruction.operands[len(results_of(instruction)) :]
    if plain in ARITHMETIC:
        _, modes, wide = form(instruction)
        modes = modes.ljust(len(sources), "i")[: len(sources)]
        return 1 + wide, [2 if mode in "wd" else 1 for mode in modes]
    each = 2 if name == "RET" else words_of(instruction.modifiers) if name == "STL" else 1
    wide = plain == "LEPC" or (name == "CS2R" and "32" not in instruction.modifiers)
    return 2 if wide else words_of(instruction.modifiers), [each] * len(sources)
