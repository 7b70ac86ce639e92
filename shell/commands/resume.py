"""`resume`: go on with what ran when LLMOS died."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from kernel.errors import LlmosError
from shell.jobs import start
from shell.registry import Arguments, CommandSpec
from shell.render import Column, write_table
from shell.session import Frame, Shell
from shell.sink import reopen_sink
from shell.terminal import fit, one_line

if TYPE_CHECKING:
    from kernel.syscall import Orphan


_COMMAND_WIDTH = 60
_COLUMNS: list[Column[Orphan]] = [
    Column("PID", lambda orphan: str(orphan.pid), right=True, keep=3),
    Column("ITEMS", lambda orphan: _items(orphan), right=True, keep=1),
    Column("TOK", lambda orphan: str(orphan.state.output_tokens), right=True),
    Column("JOB", lambda orphan: orphan.state.spec.command, keep=2, flexible=True),
]


def _items(orphan: Orphan) -> str:
    return f"{len(orphan.state.replies)}/{orphan.state.items}"


def _is_open(orphan: Orphan) -> bool:
    """Whether it is a conversation, to be gone on with by a person."""
    return orphan.state.spec.program == "chat" and not orphan.state.hung_up and orphan.exit_code is None


def _arguments(parser: Arguments) -> None:
    parser.add("-l", "--list", action="store_true", help="only show what there is")
    parser.add("--forget", action="store_true", help="throw it away")


def _run(shell: Shell, args: Namespace) -> int:
    orphans = shell.system.orphans()
    if args.forget:
        shell.system.forget_orphans()
        shell.note(f"{len(orphans)} processes forgotten")
        return 0
    if args.list:
        write_table(shell.out, _COLUMNS, orphans)
        return 0
    status = 0
    for orphan in orphans:
        if not shell.interactive and _is_open(orphan):  # a script would end it
            shell.note(f"{orphan.pid} waits for its user, `{orphan.state.spec.command}`: `resume` in a shell")
            continue
        try:
            status = _go_on(shell, orphan) or status
        except LlmosError as error:
            command = one_line(orphan.state.spec.command)
            hint = error.hint or "`resume` tries again, `resume --forget` gives up what is left"
            shell.report(
                type(error)(f"{orphan.pid}, `{fit(command, _COMMAND_WIDTH)}`: {error.message}", hint)
            )
            status = error.exit_code
    return status


def _go_on(shell: Shell, orphan: Orphan) -> int:
    """Raises LlmosError; then it is still to be had."""
    frame = Frame(line=orphan.state.spec.command, background=True)
    sink = reopen_sink(orphan.state.spec.sink)
    try:
        if sink is not None:
            frame.stdout, frame.target = sink.file, sink.path
        pid = shell.system.resume(orphan)
        if sink is not None:
            sink.cut_back()  # not before: another LLMOS may be going on with it
        with shell.framed(frame):
            return start(shell, pid)
    finally:
        frame.close()


SPECS = (
    CommandSpec(
        "resume",
        "go on with what ran when LLMOS was killed",
        _run,
        _arguments,
        ("resume", "resume -l", "resume --forget"),
        notes="Output files go on too: each ends up with every token once. A conversation is a job that\n"
        "sleeps: `fg %N` goes on with it. In a script it is left for the next shell.",
        group="processes",
    ),
)
