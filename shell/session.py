"""`Shell`: one user's session. What commands see: the kernel, streams, variables, jobs.

Owner: the thread that runs commands (the main thread, which owns the terminal).
Not here: how a line is run (interpreter), job control (jobs), the prompt (repl).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from kernel.errors import LlmosError, UsageError
from kernel.syscall import Syscalls
from shell.interrupts import Interrupts
from shell.jobs import JobTable
from shell.registry import CommandSpec, Registry
from shell.syntax import ShellSyntaxError, Variable
from shell.terminal import Output, fit, one_line


class Exit(Exception):
    """Leave the shell with a code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True)
class Frame:
    """What surrounds one command. Whoever takes a file from it closes it."""

    line: str = ""  # the command as typed, `&` left out
    background: bool = False
    stdin: BinaryIO | None = None  # `< file`
    stdout: BinaryIO | None = None  # `> file`
    target: str = ""  # the name of that file
    nice: int = 0  # what `nice` before the command said
    words: list[str] = field(default_factory=list)  # the command after expansion

    def close(self) -> None:
        """Close the files that nobody took. What was written has been flushed, and checked, before."""
        for file in (self.stdin, self.stdout):
            if file is not None:
                with suppress(OSError):
                    file.close()


@dataclass(slots=True)
class Place:
    """Where in a script we are, for error messages."""

    name: str = ""
    line_number: int = 0
    reported: bool = False  # the current command has printed an error


@dataclass(eq=False)
class Shell:
    """A session.

    `interactive` turns on job control by ^Z and notices; scripts are strict instead (the first
    failure ends them, an unset variable is an error). `json` makes `--json` the default.
    `open_monitor` runs the full-screen monitor and returns an exit code; None where there is none.
    """

    system: Syscalls
    registry: Registry
    out: Output = field(default_factory=lambda: Output(sys.stdout))
    err: Output = field(default_factory=lambda: Output(sys.stderr))
    stdin: BinaryIO | None = field(default_factory=lambda: sys.stdin.buffer if sys.stdin else None)
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    interactive: bool = False
    json: bool = False
    open_monitor: Callable[[], int] | None = None
    chat_history: Path | None = None  # the file that remembers what was said to models

    variables: dict[str, str] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    jobs: JobTable = field(default_factory=JobTable)
    interrupts: Interrupts = field(default_factory=Interrupts)
    frame: Frame = field(default_factory=Frame)
    place: Place = field(default_factory=Place)
    status: int = 0  # `$?`
    last_background_pid: int | None = None  # `$!`
    exit_warned: bool = False
    last_traceback: str = ""  # of the last internal error
    alerts: list[str] = field(default_factory=list)  # for the next prompt

    def lookup(self, variable: Variable) -> str:
        """A variable's value, "" where there is none; in a script without a default: raises UsageError."""
        name = variable.name
        value = self._special(name) if not name[0].isalpha() and name[0] != "_" else self._named(name)
        if value is None and variable.default is None and not self.interactive:
            raise UsageError(f"the variable {name} is not set")
        return value or ""

    def _named(self, name: str) -> str | None:
        return self.variables.get(name, self.environment.get(name))

    def _special(self, name: str) -> str | None:
        match name:
            case "?":
                return str(self.status)
            case "!":
                return None if self.last_background_pid is None else str(self.last_background_pid)
            case "#":
                return str(len(self.arguments))
            case "@":
                return " ".join(self.arguments)
            case "0":
                return self.place.name or "llmos"
        index = int(name) - 1
        return self.arguments[index] if index < len(self.arguments) else None

    @contextmanager
    def framed(self, frame: Frame) -> Iterator[None]:
        """Run a command inside a frame: its output goes where the frame says."""
        before, out = self.frame, self.out
        self.frame = frame
        if frame.stdout is not None:
            self.out = Output(frame.stdout, self.environment)
        try:
            yield
        finally:
            self.frame, self.out = before, out

    def report(self, error: LlmosError, *, json: bool = False) -> None:
        """Tell the user of an error: one line, and a hint if there is one."""
        self.out_line_done()
        self.place.reported = True
        if json or self.json:
            self.err.line(error_json(error))
            return
        where = self._where(error)
        self.err.emit(self.err.paint("error:", "red") + f" {where}{one_line(error.message)}\n")
        if isinstance(error, ShellSyntaxError):
            self.err.line("\n".join("  " + line for line in error.excerpt().splitlines()))
        if error.hint:
            self.err.line(f"  hint: {one_line(error.hint)}")

    def note(self, text: str) -> None:
        """Tell the user something that is not data."""
        self.out_line_done()
        self.err.line(text)

    def alert(self, text: str) -> None:
        """Tell the user of something unasked, from any thread; at a prompt, not into the line being typed."""
        self.alerts.append(text)
        if not self.interactive:
            with suppress(OSError, ValueError):  # nobody reads this any more
                self.tell_alerts()

    def tell_alerts(self) -> None:
        """Say what there is to say, once."""
        with suppress(IndexError):  # another thread may have taken the last one
            while True:
                text = one_line(self.alerts.pop(0))
                self.out_line_done()
                self.err.emit(self.err.paint("warning:", "yellow") + f" {text}\n")

    def remark(self, text: str) -> None:
        """A dim line, cut where the terminal ends: what may be overlooked."""
        self.out_line_done()
        width = self.err.width
        text = one_line(text) if width is None else fit(one_line(text), width - 1)
        self.err.emit(self.err.paint(text, "dim") + "\n")

    def out_line_done(self) -> None:
        """Where both streams are one terminal, a message begins on its own line."""
        if self.out.is_terminal:
            self.out.finish_line()

    def _where(self, error: LlmosError) -> str:
        if not self.place.name:
            return ""
        number = error.line_number if isinstance(error, ShellSyntaxError) else self.place.line_number
        return f"{self.place.name}:{number}: "

    def report_internal(self, error: BaseException, message: str) -> None:
        """Tell of an exception that nobody foresaw."""
        self.report(LlmosError(message, "" if self._debugs else "LLMOS_DEBUG=1 shows where it happened"))
        self.keep_traceback(error)

    def keep_traceback(self, error: BaseException) -> None:
        """Kept for whoever asks, and shown only on demand."""
        self.last_traceback = "".join(traceback.format_exception(error))
        if self._debugs:
            self.err.write(self.last_traceback)

    @property
    def _debugs(self) -> bool:
        return bool(self.environment.get("LLMOS_DEBUG"))

    def command(self, name: str) -> CommandSpec:
        """A command, imported if need be; ^C ends an import. Raises CommandNotFound, PluginFailed."""
        with self.interrupts.raised():
            return self.registry.find(name)


def error_json(error: LlmosError) -> str:
    """The form in which `--json` prints an error."""
    import json

    body = {"code": error.code, "message": error.message, "hint": error.hint}
    return json.dumps({"error": body})
