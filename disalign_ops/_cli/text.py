"""Numbers and tables as text: the command line needs no package beside torch and numpy."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float, digits: int = 3) -> str:
    """With thousands separated and never an exponent: 4,200 and 0.00123."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    # The decimals that leave so many significant digits: those of the exponent that "e" prints.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Columns two spaces apart: the first to the left, the others to the right."""
    lines = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(headings))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(text)
