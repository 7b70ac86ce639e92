"""Help, made from the registry: a command's page in at most 25 lines, and the list of commands."""

import argparse
from collections.abc import Iterator
from itertools import groupby

from shell.registry import Arguments, CommandSpec, Entry, Registry
from shell.terminal import cell_width, one_line

_GROUPS = ("processes", "models", "system", "shell", "plugins")


def command_help(spec: CommandSpec) -> list[str]:
    """The page of one command: usage, options, examples."""
    parser = spec.parser()
    rows = [row for row in map(_row, parser.actions) if row]
    lines = [f"usage: {usage(parser)}", f"  {spec.summary}", *_two_columns(rows)]
    if spec.notes:
        lines += ["  " + line for line in spec.notes.splitlines()]
    if spec.aliases:
        lines.append("  also: " + ", ".join(spec.aliases))
    return lines + [f"  $ {example}" for example in spec.examples]


def usage(parser: Arguments) -> str:
    """`kill [options] PID|%JOB…`"""
    options = [action for action in parser.actions if action.option_strings]
    words = [parser.prog, "[options]" if options else ""]
    words += [_positional(action) for action in parser.actions if not action.option_strings]
    return " ".join(filter(None, words))


def overview(registry: Registry) -> list[str]:
    """All commands, by group."""
    specs = sorted(registry, key=lambda entry: (_GROUPS.index(_group(entry.spec)), entry.name))
    lines: list[str] = []
    for group, entries in groupby(specs, key=lambda entry: _group(entry.spec)):
        lines += [group, *_two_columns([(entry.name, entry.summary) for entry in entries])]
    warnings = [one_line(f"warning: {text}") for text in registry.warnings]
    return [*lines, *warnings, "`help COMMAND` or `COMMAND -h` says more."]


def plain_entry(entry: Entry) -> dict[str, object]:
    """A row of the overview, for programs."""
    return {"name": entry.name, "summary": entry.summary, "group": _group(entry.spec)}


def plain_help(spec: CommandSpec) -> dict[str, object]:
    """The page of one command, for programs."""
    parser = spec.parser()
    rows = [row for row in map(_row, parser.actions) if row]
    return {
        "name": spec.name,
        "summary": spec.summary,
        "group": spec.group,
        "usage": usage(parser),
        "options": [{"name": name, "help": text} for name, text in rows],
        "notes": spec.notes,
        "aliases": list(spec.aliases),
        "examples": list(spec.examples),
    }


def _group(spec: CommandSpec | None) -> str:
    return spec.group if spec else "plugins"


def _positional(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper())
    match action.nargs:
        case "?":
            return f"[{name}]"
        case "*":
            return f"[{name}…]"
        case "+" | argparse.REMAINDER:
            return f"{name}…"
    return name


def _row(action: argparse.Action) -> tuple[str, str] | None:
    if not action.help or action.help == argparse.SUPPRESS:
        return None
    name = ", ".join(action.option_strings) or _positional(action)
    if action.option_strings and action.nargs != 0:
        name += f" {action.metavar or action.dest.upper()}"
    return name, action.help


def _two_columns(rows: list[tuple[str, str]]) -> Iterator[str]:
    width = max((cell_width(name) for name, _ in rows), default=0)
    for name, text in rows:
        yield f"  {name}{' ' * (width - cell_width(name))}  {text}"
