"""The columns of `ps`: what is shown of a process, and how it is sorted."""

from collections.abc import Sequence
from dataclasses import fields

from kernel.errors import UsageError
from kernel.snapshot import ProcessView
from kernel.units import short_bytes, short_time
from shell.render import Column, bar, short_count
from shell.session import Shell

_KINDS = {"generate": "gen"}
_COLOURS = {"R": "green", "T": "yellow", "Z": "dim", "Q": "cyan", "W": "cyan"}
_FIELDS = tuple(field.name for field in fields(ProcessView))
_SORTED_AS = {
    "pid": "pid",
    "ni": "nice",
    "s": "state",
    "kind": "program",
    "model": "model",
    "dev": "device",
    "kv": "kv_bytes",
    "ctx": "context_tokens",
    "items": "items_done",
    "tok": "output_tokens",
    "tok/s": "tokens_per_s",
    "time": "elapsed_s",
    "job": "command",
}


def state_counts(views: Sequence[ProcessView]) -> str:
    """`2R 1Q`: how many are in which state."""
    letters = [view.letter for view in views]
    return " ".join(f"{letters.count(letter)}{letter}" for letter in "RQSTWZ" if letter in letters)


def process_columns(shell: Shell, names: str | None = None) -> list[Column[ProcessView]]:
    """The columns asked for ("pid,model,output_tokens"), or the usual ones. Raises UsageError."""
    columns = _usual_columns(shell)
    if names is None:
        return columns
    by_name = {column.header.lower(): column for column in columns}
    return [by_name.get(name) or _field_column(name) for name in _split(names)]


def sorted_by(rows: Sequence[ProcessView], name: str) -> list[ProcessView]:
    """Rows in the order of a column or field; `-name` the other way round. Raises UsageError."""
    key = name.removeprefix("-").lower()
    field = _SORTED_AS.get(key, key)
    _known(field)
    with_value = [row for row in rows if getattr(row, field) is not None]
    without = [row for row in rows if getattr(row, field) is None]
    ordered = sorted(with_value, key=lambda row: getattr(row, field), reverse=name.startswith("-"))
    return ordered + without


def _usual_columns(shell: Shell) -> list[Column[ProcessView]]:
    return [
        Column("PID", lambda p: str(p.pid), right=True, keep=99),
        Column("NI", lambda p: str(p.nice), right=True, keep=70),
        Column("S", lambda p: p.letter, keep=98, colour=lambda p: _COLOURS.get(p.letter, "")),
        Column("KIND", lambda p: _KINDS.get(p.program, p.program), keep=30),
        Column("MODEL", lambda p: p.model, keep=60),
        Column("DEV", lambda p: p.device or "-", keep=20),
        Column("KV", lambda p: short_bytes(p.kv_bytes) if p.kv_bytes else "-", right=True, keep=40),
        Column("CTX", _context, keep=10),
        Column("ITEMS", _items, right=True, keep=35),
        Column("TOK", lambda p: short_count(p.output_tokens), right=True, keep=50),
        Column("TOK/S", _rate, right=True, keep=80),
        Column("TIME", lambda p: short_time(p.elapsed_s), right=True, keep=45),
        Column("JOB", lambda p: _job(shell, p), keep=90, flexible=True),
    ]


def _context(view: ProcessView) -> str:
    if view.state == "ZOMBIE":
        return f"exit {view.exit_code}"
    if not view.context_limit_tokens:
        return "-"
    used = view.context_tokens / view.context_limit_tokens
    return f"{bar(used, 5)} {100 * used:2.0f}%"


def _items(view: ProcessView) -> str:
    return f"{view.items_done}/{view.items_total}" if view.items_total > 1 else "-"


def _rate(view: ProcessView) -> str:
    if not view.tokens_per_s:
        return "-"
    return f"{view.tokens_per_s:.1f}" if view.tokens_per_s < 1000 else short_count(view.tokens_per_s)


def _job(shell: Shell, view: ProcessView) -> str:
    job = shell.jobs.of(view.pid)
    text = (f"[{job.number}] " if job else "") + view.command
    reason = view.error or view.waits_for
    return f"{reason} -> {text}" if reason else text


def _field_column(name: str) -> Column[ProcessView]:
    _known(name)
    return Column(name, lambda p: _plain(getattr(p, name)), flexible=name == "command")


def _plain(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _known(field: str) -> None:
    if field not in _FIELDS:
        raise UsageError(f"no column `{field}`", "columns: " + " ".join(_FIELDS))


def _split(names: str) -> list[str]:
    found = [name.strip().lower() for name in names.split(",") if name.strip()]
    if not found:
        raise UsageError("no columns", "-o pid,model,tokens_per_s")
    return found
