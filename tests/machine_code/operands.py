"""How an instruction's operands are read: registers, constants, addresses, the guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import operations as ops
from .disassembly import Instruction, Operand
from .operations import M32, M64, Value
from .warp import ZERO, NotModelledError, Warp, lift

Read = Callable[[Warp], Any]


def _signed(value: Value, sign: str, mode: str) -> Value:
    if value is None or not sign:
        return value
    if mode == "p":
        return not value
    if mode in "fd":
        top = 31 if mode == "f" else 63
        if "|" in sign:
            value &= ~(1 << top)
        return value ^ (1 << top) if sign[0] == "-" else value
    mask = M64 if mode == "w" else M32
    if sign == "~":
        return ~value & mask
    # -0 is the complement of 0, plus 1: in an adder that carries.
    return (~value & mask) + 1 if mode == "a" else -value & mask


def reader(operand: Operand, mode: str) -> Read:
    """Reads an operand as i(nteger), a(ddend), w(ide integer), f(loat), d(ouble) or p(redicate)."""
    wide = mode in "wd"
    if operand.kind == "number":
        number = int(operand.value)
        number = number << 32 if mode == "d" else number & (M64 if wide else M32)
        return lambda warp: number
    if operand.kind == "float":
        bits = ops.from_float(float(operand.value), wide)
        return lambda warp: bits
    sign = operand.sign
    if operand.kind == "constant":
        constant = constant_reader(operand, 8 if wide else 4)
        return lambda warp: lift(lambda v: (_signed(v, sign, mode),), [constant(warp)])[0]
    if operand.kind not in ("R", "UR", "P", "UP"):
        raise NotModelledError(operand.text)
    kind, n = operand.kind, int(operand.value)

    def register(warp: Warp) -> Value:
        value = warp.registers[kind][n]
        if wide and n != ZERO:
            high = warp.registers[kind][n + 1]
            value = lift(
                lambda a, b: (None if a is None or b is None else a | b << 32,), [value, high]
            )[0]
        return lift(lambda v: (_signed(v, sign, mode),), [value])[0] if sign else value

    return register


def address_reader(operand: Operand) -> Read:
    readers = [
        reader(Operand(kind.removesuffix("64"), "", n), "w" if kind.endswith("64") else "i")
        for kind, n, _ in operand.parts
    ]
    scales = [scale for _, _, scale in operand.parts]
    offset = int(operand.value)

    def total(*parts: Value) -> tuple[Value, ...]:
        if None in parts:
            return (None,)
        return (offset + sum(p * s for p, s in zip(parts, scales, strict=True)),)

    return lambda warp: lift(total, [r(warp) for r in readers])[0]


def constant_reader(operand: Operand, size: int) -> Read:
    address = address_reader(operand)

    def constant(warp: Warp) -> Value:
        banks = warp.kernel.constants
        bank = warp.launch.constants if operand.bank == 0 else banks.get(operand.bank, b"")

        def at(offset: Value) -> tuple[Value, ...]:
            if offset is None or not 0 <= offset <= len(bank) - size:
                return (None,)
            return (int.from_bytes(bank[offset : offset + size], "little"),)

        return lift(at, [address(warp)])[0]

    return constant


def guard_reader(instruction: Instruction) -> Read:
    return reader(instruction.guard, "p") if instruction.guard else lambda warp: True
