"""The columns of the process table: what they say, how they sort, which fit. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from kernel.snapshot import ProcessView
from kernel.units import short_time
from tui.graph import bar
from tui.panel import fit
from tui.sanitise import one_line
from tui.units import bytes_short, percent, rate_short

COMMAND_MIN = 12


@dataclass(frozen=True, slots=True)
class Column:
    """`rank` 0 is always shown; the highest rank goes first when room is short. `width` 0: the rest."""

    title: str
    width: int
    rank: int
    cell: Callable[[ProcessView], str]
    key: Callable[[ProcessView], float | str]
    right: bool = False
    descending: bool = False  # the order that one wants first


def _context_share(view: ProcessView) -> float:
    return view.context_tokens / view.context_limit_tokens if view.context_limit_tokens else 0.0


def _context_cell(view: ProcessView) -> str:
    if view.exit_code is not None:
        return f"exit {view.exit_code}"
    share = _context_share(view)
    return f"{bar(share, 4)}{percent(share):>5}" if view.context_limit_tokens else "-"


def _rate_cell(view: ProcessView) -> str:
    return "-" if view.state == "ZOMBIE" else rate_short(view.tokens_per_s)


def _rate_now(view: ProcessView) -> float:
    """What has ended goes below what stands still, however fast it was."""
    return -1.0 if view.state == "ZOMBIE" else view.tokens_per_s


def _command_cell(view: ProcessView) -> str:
    """What went wrong or is awaited comes first, for it is what one looks for."""
    waits = f"waits for {view.waits_for}" if view.waits_for and view.state != "STOPPED" else ""
    return one_line(" · ".join(filter(None, (view.error or waits, view.command))))


COLUMNS = (
    Column("PID", 5, 0, lambda v: str(v.pid), lambda v: v.pid, right=True),
    Column("NI", 3, 2, lambda v: str(v.nice), lambda v: v.nice, right=True),
    Column("S", 1, 0, lambda v: v.letter, lambda v: v.letter),
    Column("PROGRAM", 8, 7, lambda v: one_line(v.program), lambda v: v.program),
    Column("MODEL", 16, 4, lambda v: one_line(v.model), lambda v: v.model),
    Column("DEV", 5, 9, lambda v: v.device or "-", lambda v: v.device),
    Column("KV", 5, 8, lambda v: bytes_short(v.kv_bytes), lambda v: v.kv_bytes, True, True),
    Column("CTX%", 9, 6, _context_cell, _context_share, False, True),
    Column("TOK/S", 6, 1, _rate_cell, _rate_now, True, True),
    Column("TIME", 8, 5, lambda v: short_time(v.elapsed_s), lambda v: v.elapsed_s, True, True),
    Column("COMMAND", 0, 3, _command_cell, lambda v: v.command),
)
PID = 0
STATE = 2
TOKENS_PER_S = 8


def visible(width: int) -> tuple[tuple[int, int], ...]:
    """(column, width) of those that fit side by side, one cell between them."""
    shown = set(range(len(COLUMNS)))
    while _needs(shown) > width and (spare := [i for i in shown if COLUMNS[i].rank]):
        shown.discard(max(spare, key=lambda i: COLUMNS[i].rank))
    rest = width - _needs(shown) + COMMAND_MIN
    return tuple((i, COLUMNS[i].width or rest) for i in sorted(shown))


def _needs(shown: set[int]) -> int:
    return sum((COLUMNS[i].width or COMMAND_MIN) + 1 for i in shown) - 1


def title(index: int, width: int, sort: int, reverse: bool) -> str:
    """A column's head, with an arrow on the one that sorts."""
    column = COLUMNS[index]
    name = column.title + ("▼" if reverse else "▲") * (index == sort)
    return fit(name, width, right=column.right)


def cell(index: int, width: int, view: ProcessView) -> str:
    column = COLUMNS[index]
    return fit(column.cell(view), width, right=column.right)
