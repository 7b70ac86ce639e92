"""Views as text: numbers with units, bars, tables that fit the terminal.

Plain strings with a little colour, no library: `llmos ps` starts faster than rich can be imported.
Not here: which fields a command shows (commands).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Generic, TypeVar

from kernel.units import scaled
from shell.terminal import Output, cell_width, fit, one_line

Row = TypeVar("Row")

_MINIMUM_FLEXIBLE_WIDTH = 8


def short_count(count: float) -> str:
    """`1.1M`, `9.1k`: powers of 1000."""
    digits, power = scaled(count, 1000)
    return digits + ("", "k", "M", "B", "T", "P")[power]


def bar(fraction: float, width: int) -> str:
    """`▇▇░░░`."""
    full = round(min(max(fraction, 0.0), 1.0) * width)
    return "▇" * full + "░" * (width - full)


def to_json(value: object) -> str:
    """A view, or a sequence of views, with all its fields: raw bytes, raw seconds."""
    if isinstance(value, (list, tuple)):
        plain: object = [_plain(item) for item in value]
    else:
        plain = _plain(value)
    return json.dumps(plain, default=str, ensure_ascii=True)


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """One column: where the terminal is narrow, those with the lowest `keep` go first."""

    header: str
    text: Callable[[Row], str]
    right: bool = False
    keep: int = 0
    flexible: bool = False  # may be cut short
    colour: Callable[[Row], str] | None = None


def write_table(out: Output, columns: Sequence[Column[Row]], rows: Sequence[Row]) -> None:
    """Write a table: as wide as it needs, or cut to the terminal's width."""
    cells = {id(column): [one_line(column.text(row)) for row in rows] for column in columns}
    widths = {
        id(column): max(map(cell_width, [column.header, *cells[id(column)]]), default=0) for column in columns
    }
    shown = _fitting(columns, widths, out.width)
    header = " ".join(_cell(column.header, column, widths) for column in shown).rstrip()
    lines = [out.paint(header, "bold")]
    for index, row in enumerate(rows):
        line = [_painted(out, column, row, cells[id(column)][index], widths) for column in shown]
        lines.append(" ".join(line).rstrip())
    out.lines(lines)


def _fitting(columns: Sequence[Column[Row]], widths: dict[int, int], limit: int | None) -> list[Column[Row]]:
    """The columns that fit; a flexible one is cut (in `widths`) before a column is given up."""
    shown = list(columns)
    if limit is None:
        return shown
    while True:
        excess = sum(widths[id(column)] + 1 for column in shown) - 1 - limit
        flexible = max((c for c in shown if c.flexible), key=lambda c: widths[id(c)], default=None)
        if excess <= 0:
            return shown
        if flexible is not None and widths[id(flexible)] - excess >= _MINIMUM_FLEXIBLE_WIDTH:
            widths[id(flexible)] -= excess
            return shown
        if len(shown) == 1:
            widths[id(shown[0])] = limit
            return shown
        shown.remove(min(shown, key=lambda column: column.keep))


def _cell(text: str, column: Column[Row], widths: dict[int, int]) -> str:
    width = widths[id(column)]
    text = fit(text, width)
    blanks = " " * (width - cell_width(text))
    return blanks + text if column.right else text + blanks


def _painted(out: Output, column: Column[Row], row: Row, text: str, widths: dict[int, int]) -> str:
    cell = _cell(text, column, widths)
    return out.paint(cell, column.colour(row)) if column.colour else cell
