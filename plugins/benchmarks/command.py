"""A benchmark as a command: `--json`, a line that says what is being measured, and a table.

Not here: what is measured.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from plugins.benchmarks.progress import Tell, progress
from shell.registry import Arguments, CommandSpec
from shell.render import Column, write_table
from shell.session import Shell

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Report(Generic[T]):
    """What was measured, for programs and for people."""

    value: object  # what --json prints
    columns: Sequence[Column[T]]
    rows: Sequence[T]
    head: str = ""  # a line above the table
    tail: str = ""


def benchmark(
    name: str,
    summary: str,
    measure: Callable[[Shell, argparse.Namespace, Tell], Report[Any]],
    arguments: Callable[[Arguments], None] = lambda _parser: None,
    examples: tuple[str, ...] = (),
    notes: str = "",
) -> CommandSpec:
    """`bench NAME`."""

    def add(parser: Arguments) -> None:
        arguments(parser)
        parser.add("--json", action="store_true", help="one object")

    def run(shell: Shell, args: argparse.Namespace) -> int:
        with progress(shell.err) as tell:
            report = measure(shell, args, tell)
        if args.json or shell.json:
            shell.out.line(json.dumps(report.value))
            return 0
        shell.out.lines([report.head] if report.head else [])
        write_table(shell.out, report.columns, report.rows)
        shell.out.lines([report.tail] if report.tail else [])
        return 0

    return CommandSpec(f"bench {name}", summary, run, add, examples, notes)
