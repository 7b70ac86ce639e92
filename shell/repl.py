"""The prompt: prompt-toolkit around the interpreter. Imported only for an interactive session.

Owner: the main thread. Completion runs on a thread of prompt-toolkit's and reads snapshots only.
Not here: what a line does (interpreter), colours (highlight), candidates (completer).
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from kernel.units import short_bytes
from shell import jobs
from shell.commands.builtins import may_leave
from shell.completer import ShellCompleter
from shell.highlight import STYLE, Highlighter
from shell.interpreter import run_line
from shell.parser import parse
from shell.process_table import state_counts
from shell.render import bar
from shell.session import Exit, Shell
from shell.syntax import Incomplete, ShellSyntaxError

_REFRESH_S = 0.5
_KEY = "\x00"  # a key ran a command: the prompt returns it between two of these, then what was typed


def interact(shell: Shell, history: Path | None) -> int:
    """Read and run lines until `exit` or ^D; returns the exit code.

    `history` is the file that remembers them; None, or one that cannot be written, means memory.
    """
    shell.interactive = True
    lines = open_history(shell, history)
    shell.history.extend(reversed(list(lines.load_history_strings())))
    session = _session(shell, lines)
    for text in shell.registry.warnings:
        shell.note(f"warning: {text}")
    try:
        with _keys_ignored():
            return _loop(shell, session)
    except Exit as leave:
        return leave.code
    finally:
        jobs.close(shell)


def _loop(shell: Shell, session: PromptSession[str]) -> int:
    typed = ""
    while True:
        try:
            jobs.notices(shell)
            shell.out.finish_line()
            line = session.prompt(_prompt(shell), default=typed, pre_run=lambda: _while_typing(shell))
        except KeyboardInterrupt:
            typed = ""
            continue
        except EOFError:
            if may_leave(shell):
                return 0
            continue
        typed = ""
        if line.startswith(_KEY):
            _, command, typed = line.split(_KEY, 2)
            run_line(shell, command)
        elif line.strip():
            shell.history.append(line)
            before = shell.exit_warned
            run_line(shell, line)
            shell.exit_warned = shell.exit_warned and not before


def _prompt(shell: Shell) -> StyleAndTextTuples:
    status = [("class:status", str(shell.status))] if shell.status else []
    return [("", "[llmos]"), *status, ("", "$ ")]


def _session(shell: Shell, history: History) -> PromptSession[str]:
    return PromptSession(
        history=history,
        lexer=Highlighter(shell.registry),
        completer=ShellCompleter(shell),
        complete_in_thread=True,
        complete_while_typing=False,
        auto_suggest=AutoSuggestFromHistory(),
        key_bindings=_bindings(),
        style=STYLE,
        multiline=Condition(lambda: not _is_complete(get_app().current_buffer.text)),
        prompt_continuation=lambda width, number, wrapped: " " * max(width - 2, 0) + "> ",
        bottom_toolbar=lambda: toolbar(shell) or None,
        enable_open_in_editor=True,
        tempfile_suffix=".llm",
        editing_mode=EditingMode.EMACS,
    )


def _is_complete(text: str) -> bool:
    try:
        parse(text)
    except Incomplete:
        return False
    except ShellSyntaxError:
        return True
    return True


def _leave_for(command: str, event: KeyPressEvent) -> None:
    """Run a command; what was typed comes back after it."""
    event.app.exit(result=f"{_KEY}{command}{_KEY}{event.current_buffer.text}")


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("f12")
    def monitor(event: KeyPressEvent) -> None:
        _leave_for("top", event)

    @bindings.add("f1")
    def help_page(event: KeyPressEvent) -> None:
        _leave_for("help", event)

    @bindings.add("f4")
    def vi(event: KeyPressEvent) -> None:
        is_vi = event.app.editing_mode == EditingMode.VI
        event.app.editing_mode = EditingMode.EMACS if is_vi else EditingMode.VI

    @bindings.add("c-z")
    def nothing(event: KeyPressEvent) -> None:
        """There is nothing to stop here; without this it would be typed."""

    @bindings.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def toolbar(shell: Shell) -> str:
    """Jobs, speed and memory in a line; "" while nothing runs."""
    if not any(shell.jobs):
        return ""
    view = shell.system.snapshot()
    alive = [process for process in view.processes if process.state != "ZOMBIE"]
    if not alive:
        return ""
    rate = sum(device.tokens_per_s for device in view.devices)
    facts = [state_counts(alive), f"{rate:.0f} tok/s"]
    for pool in view.pools[:1]:
        used = pool.used_bytes / pool.capacity_bytes if pool.capacity_bytes else 0.0
        facts.append(f"{pool.name} {bar(used, 8)} {short_bytes(pool.used_bytes)}")
    return " · ".join([*facts, "F12 monitor"])


def _while_typing(shell: Shell) -> None:
    """What goes on behind the line that is being typed. Nothing is polled when idle."""
    if toolbar(shell):
        get_app().create_background_task(_redraw(shell))
    if any(shell.jobs):
        get_app().create_background_task(announce_ends(shell))


async def _redraw(shell: Shell) -> None:
    while toolbar(shell):
        await asyncio.sleep(_REFRESH_S)
        get_app().invalidate()


async def announce_ends(shell: Shell, own: Callable[[], bool] = lambda: False) -> None:
    """Tell of jobs that end, above the prompt; leave it when `own` is true, with nothing typed.

    A thread sleeps in the mailbox until the prompt is left.
    """
    mailbox = shell.system.subscribe("process")
    try:
        while True:
            if own():
                leaving = get_app().future
                if leaving is not None and not leaving.done():
                    get_app().exit(result="")
                return
            if jobs.news(shell):
                await run_in_terminal(lambda: jobs.announce(shell))
            await asyncio.to_thread(mailbox.wait_receive)
    finally:
        shell.system.unsubscribe(mailbox)  # which wakes the thread


@contextlib.contextmanager
def _keys_ignored() -> Iterator[None]:
    """^Z stops a job, never the shell itself; and a ^C between a command's end and the prompt hits nobody."""
    stop = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    interrupt = signal.signal(signal.SIGINT, lambda number, frame: None)  # not inherited, as SIG_IGN would be
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, stop)
        signal.signal(signal.SIGINT, interrupt)


class _Remembered(FileHistory):
    """A history file. A line that begins with a blank is not kept, and a full disk does no harm."""

    def store_string(self, string: str) -> None:
        if not string.startswith(" "):
            with contextlib.suppress(OSError):
                super().store_string(string)


def open_history(shell: Shell, path: Path | None) -> History:
    """What was typed before; in memory where there is no file for it."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        shell.note(f"warning: history is not kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return _Remembered(str(path))
