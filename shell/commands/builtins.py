"""The shell's own: help, exit, echo, cat, history, cd, pwd, clear, sleep, true, false."""

import json
import os
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kernel.errors import LlmosError
from shell.files import open_file, path_of
from shell.help import command_help, overview, plain_entry, plain_help
from shell.registry import Arguments, CommandSpec
from shell.session import Exit, Shell

_CHUNK_BYTES = 65536
_POLL_S = 0.05


def _help_arguments(parser: Arguments) -> None:
    parser.add("command", nargs="?", metavar="COMMAND", completes=("command",))
    parser.add("--json", action="store_true", help="one array of names and summaries, or one object")


def _help(shell: Shell, args: Namespace) -> int:
    spec = shell.command(args.command) if args.command else None
    if args.json or shell.json:
        plain = plain_help(spec) if spec else [plain_entry(entry) for entry in shell.registry]
        shell.out.line(json.dumps(plain))
    else:
        shell.out.lines(command_help(spec) if spec else overview(shell.registry))
    return 0


def _exit_arguments(parser: Arguments) -> None:
    parser.add("code", nargs="?", type=int, metavar="N", help="the exit code; the last command's if left out")


def _exit(shell: Shell, args: Namespace) -> int:
    if may_leave(shell):
        raise Exit(shell.status if args.code is None else args.code & 0xFF)
    return shell.status  # the same `exit`, typed again, leaves with the code that it would have had


def may_leave(shell: Shell) -> bool:
    """False once, with a warning, while jobs run and somebody is there to read it."""
    alive = [job for job in shell.jobs if shell.system.process(job.pid).state != "ZOMBIE"]
    if not shell.interactive or not alive or shell.exit_warned:
        return True
    shell.exit_warned = True
    count = f"{len(alive)} job" + ("s" if len(alive) > 1 else "")
    shell.note(f"there {'are' if len(alive) > 1 else 'is'} {count} (`jobs`); leaving again ends them")
    return False


def _words_argument(parser: Arguments) -> None:
    parser.add("words", nargs="*", metavar="WORDS")


def _echo(shell: Shell, args: Namespace) -> int:
    shell.out.line(" ".join(args.words))
    return 0


def _echo_words(words: list[str]) -> list[str]:
    """All words are text, also those that look like options."""
    return ["--", *words]


def _cat_arguments(parser: Arguments) -> None:
    parser.add("files", nargs="*", metavar="FILE", completes=("file",))


def _cat(shell: Shell, args: Namespace) -> int:
    for name in args.files:
        with shell.interrupts.raised(), open_file(name, "rb") as file:
            _copy(shell, file, name)
    if not args.files and (stdin := shell.frame.stdin or shell.stdin) is not None:
        with shell.interrupts.raised():
            _copy(shell, stdin, "standard input")
    return 0


def _copy(shell: Shell, file: BinaryIO, name: str) -> None:
    for chunk in _chunks(file, name):
        shell.out.write(chunk.decode("utf-8", "surrogateescape"))


def _chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Raises LlmosError if it cannot be read, as a folder."""
    try:
        while chunk := file.readline(_CHUNK_BYTES):
            yield chunk
    except OSError as error:
        raise LlmosError(f"{name}: {error.strerror}") from error


def _history_arguments(parser: Arguments) -> None:
    parser.add("last", nargs="?", type=int, metavar="N", help="the last N")
    parser.add("--json", action="store_true", help="one array")


def _history(shell: Shell, args: Namespace) -> int:
    numbered = list(enumerate(shell.history, 1))
    if args.last is not None:
        numbered = numbered[max(len(numbered) - args.last, 0) :]
    if args.json or shell.json:
        shell.out.line(json.dumps([{"number": number, "line": line} for number, line in numbered]))
        return 0
    for number, line in numbered:
        shell.out.line(f"{number:5}  {line}")
    return 0


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1e9:
        raise ArgumentTypeError(f"`{text}` is not a time")
    return value


def _sleep_arguments(parser: Arguments) -> None:
    parser.add("seconds", type=_seconds, metavar="SECONDS")


def _sleep(shell: Shell, args: Namespace) -> int:
    end_s = time.monotonic() + args.seconds
    while (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(left_s, _POLL_S))
        if shell.interrupts.take_interrupt():
            return 130
    return 0


def _cd_arguments(parser: Arguments) -> None:
    parser.add("folder", nargs="?", default="~", metavar="FOLDER", completes=("file",))


def _cd(shell: Shell, args: Namespace) -> int:
    try:
        os.chdir(path_of(args.folder).expanduser())
    except (OSError, ValueError, RuntimeError) as error:
        raise LlmosError(f"{args.folder}: {getattr(error, 'strerror', None) or error}") from error
    return 0


def _pwd(shell: Shell, args: Namespace) -> int:
    shell.out.line(str(Path.cwd()))
    return 0


def _clear(shell: Shell, args: Namespace) -> int:
    if shell.out.animated:
        shell.out.emit("\x1b[H\x1b[2J\x1b[3J")
    return 0


def _true(shell: Shell, args: Namespace) -> int:
    return 0


def _false(shell: Shell, args: Namespace) -> int:
    return 1


SPECS = (
    CommandSpec(
        "help",
        "list the commands, or explain one",
        _help,
        _help_arguments,
        ("help", "help run"),
        group="shell",
    ),
    CommandSpec(
        "exit",
        "leave; jobs that run are ended (asks once)",
        _exit,
        _exit_arguments,
        ("exit", "exit 3"),
        group="shell",
        aliases=("quit",),
    ),
    CommandSpec(
        "echo",
        "print words",
        _echo,
        _words_argument,
        ("echo $?",),
        group="shell",
        rewrite=_echo_words,
    ),
    CommandSpec("cat", "print files", _cat, _cat_arguments, ("cat out.txt",), group="shell"),
    CommandSpec(
        "history", "list what was typed", _history, _history_arguments, ("history 10",), group="shell"
    ),
    CommandSpec(
        "cd", "go to another folder; home without one", _cd, _cd_arguments, ("cd ~/jobs",), group="shell"
    ),
    CommandSpec("pwd", "print the folder we are in", _pwd, group="shell"),
    CommandSpec("clear", "clear the screen", _clear, group="shell"),
    CommandSpec("sleep", "wait some seconds", _sleep, _sleep_arguments, ("sleep 0.5",), group="shell"),
    CommandSpec("true", "succeed", _true, group="shell"),
    CommandSpec("false", "fail", _false, group="shell"),
)
