"""A kernel's machine code: instructions and constants out of a cubin, by nvdisasm."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import cuda_tools


@dataclass(frozen=True)
class Operand:
    """kind: R, UR, P, UP, B (barrier), number, float, constant, memory, label, special.

    value: a register's number (RZ, PT: -1), the number, the float, or the label's address.
    sign: what is applied to a register or a constant: "", "-", "~", "!" or "|" (absolute value,
    "-|" negated). parts: registers in a memory's or a constant's address, with their scale.
    """

    kind: str
    text: str
    value: int | float = 0
    sign: str = ""
    suffix: str = ""
    bank: int = 0
    parts: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: Operand | None
    opcode: str
    operands: tuple[Operand, ...]
    text: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


@dataclass
class Kernel:
    """instructions: by address. constants: by bank, but for bank 0, which a launch fills."""

    symbol: str
    instructions: dict[int, Instruction]
    constants: dict[int, bytes]
    constant_bytes: int  # of bank 0; the arguments are its end
    labels: frozenset[int]  # addresses
    runs: dict[int, Any] = field(default_factory=dict, repr=False)  # instructions.py's, by address
    flow: Any = field(default=None, repr=False)  # flow.py's

    @functools.cached_property
    def returns(self) -> frozenset[int]:
        """Where a call of one of its functions may return to."""
        found = (i.address + 16 for i in self.instructions.values() if i.name == "CALL")
        return frozenset(found)


REGISTER = re.compile(
    r"(?P<sign>[-~!]?\|?)(?P<kind>UR|R|UP|P|B)(?P<number>\d+|Z|T)(?P<suffix>(\.\w+)*)\|?"
)
CONSTANT = re.compile(r"(?P<sign>[-~]?\|?)cx?\[(?P<bank>\w+)\]\[(?P<inside>[^\]]*)\](\.\w+)*\|?")
ADDRESS_PART = re.compile(r"(-?0x[0-9a-f]+)|(U?R)(\d+|Z)((?:\.\w+)*)")
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)(.*?);")


def _parts(inside: str) -> tuple[int, tuple[tuple[str, int, int], ...]]:
    offset, parts = 0, []
    for number, kind, register, suffix in ADDRESS_PART.findall(inside):
        if number:
            offset += int(number, 16)
        elif register != "Z":
            scale = re.search(r"\.X(\d+)", suffix)
            wide = ".64" in suffix
            name = kind + ("64" if wide else "")
            parts.append((name, int(register), int(scale[1]) if scale else 1))
    return offset, tuple(parts)


@functools.cache
def _operand(text: str) -> Operand:
    register = REGISTER.fullmatch(text)
    if register:
        number = -1 if register["number"] in "ZT" else int(register["number"])
        return Operand(register["kind"], text, number, register["sign"], register["suffix"])
    constant = CONSTANT.fullmatch(text)
    if constant:
        offset, parts = _parts(constant["inside"])
        # cx[UR4]: a bank that the driver binds.
        bank = int(constant["bank"], 16) if constant["bank"].startswith("0x") else -1
        return Operand("constant", text, offset, constant["sign"], bank=bank, parts=parts)
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return Operand("number", text, int(text, 16))
    if "[" in text:
        offset, parts = _parts(text[text.rindex("[") :])
        return Operand("memory", text, offset, parts=parts)
    decimal = re.fullmatch(r"[-+]?(\d[\d.]*(e[-+]?\d+)?|INF|QNAN)", text)
    if decimal:
        return Operand("float", text, float(text.replace("QNAN", "nan")))
    return Operand("special", text)


def _instruction(line: str, labels: dict[str, int]) -> Instruction | None:
    match = INSTRUCTION.match(re.sub(r"\(\*.*?\*\)|\.reuse", "", line))
    if match is None:
        return None
    address, guard, opcode, rest = match.groups()
    rest = re.sub(r"^(\s*\w+) (`|-0x|0x)", r"\1, \2", rest)  # BRX R4 -0x10, RET R4 `(name)
    operands = tuple(
        Operand("label", o, labels.get(o[2:-1], -1)) if o.startswith("`(") else _operand(o)
        for o in map(str.strip, rest.split(","))
        if o
    )
    return Instruction(
        int(address, 16), _operand(guard) if guard else None, opcode, operands,
        f"{opcode}{rest}".strip(),
    )  # fmt: skip


def _symbols(sections: dict[str, bytes]) -> dict[str, int]:
    """Functions of a 64-bit ELF file, and their numbers among its symbols."""
    table, names = sections[".symtab"], sections[".strtab"]
    found = {}
    for number, (name, info) in enumerate(struct.iter_unpack("<IB19x", table)):
        if info & 15 == 2:  # STT_FUNC
            found[names[name : names.index(b"\0", name)].decode()] = number
    return found


def _sections(cubin: bytes) -> dict[str, bytes]:
    """Contents by name of a 64-bit ELF file."""
    start, entry, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * entry) for i in range(count)]
    table = headers[names][4]

    def name(offset: int) -> str:
        return cubin[table + offset : cubin.index(b"\0", table + offset)].decode()

    return {name(h[0]): cubin[h[4] : h[4] + h[5]] for h in headers if h[1] != 8}


class Kernels(Mapping[str, Kernel]):
    """The kernels of cubins by symbol, disassembled when they are asked for: all of the library's
    at once take nvdisasm ten seconds.
    """

    def __init__(self, *cubins: Path) -> None:
        self._places: dict[str, tuple[Path, dict[str, bytes], int]] = {}
        for cubin in cubins:
            sections = _sections(cubin.read_bytes())
            for symbol, number in _symbols(sections).items():
                if f".text.{symbol}" in sections:
                    self._places[symbol] = cubin, sections, number
        self._decoded: dict[str, Kernel] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, symbol: str) -> Kernel:
        if symbol not in self._decoded:
            self._decoded[symbol] = self._decode(symbol)
        return self._decoded[symbol]

    def _decode(self, symbol: str) -> Kernel:
        cubin, sections, number = self._places[symbol]
        lines = cuda_tools.run("nvdisasm", "-c", "-fun", str(number), cubin).splitlines()
        labels: dict[str, int] = {}
        pending: list[str] = []
        for line in lines:
            label = re.match(r"([.$\w]+):", line)
            if label:
                pending.append(label[1])
            elif INSTRUCTION.match(line):
                labels |= dict.fromkeys(pending, int(line.split("*")[1], 16))
                pending = []
        decoded = [_instruction(line, labels) for line in lines]
        constants = {
            bank: sections[name]
            for bank in range(1, 16)
            if (name := f".nv.constant{bank}.{symbol}") in sections
        }
        size = len(sections[f".nv.constant0.{symbol}"])
        return Kernel(symbol, {i.address: i for i in decoded if i}, constants, size,
                      frozenset(labels.values()))  # fmt: skip
