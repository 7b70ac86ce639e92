"""What `/name` does in a conversation.

Not here: the conversation (conversation), completion (chat_prompt).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kernel.errors import NotPermitted, UsageError
from kernel.snapshot import ProcessView
from kernel.syscall import Signal
from kernel.units import human_bytes, short_bytes
from shell.files import path_of
from shell.jobs import Job, finish, labelled, send
from shell.lexer import quote
from shell.session import Shell

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ChatCommand:
    """What `/name` does; an exit code leaves the conversation."""

    run: Callable[[Shell, Job, str], int | None]
    summary: str
    argument: str = ""


def _help(shell: Shell, job: Job, argument: str) -> int | None:
    for name, command in COMMANDS.items():
        shell.err.line(f"  {'/' + name + ' ' + command.argument:12} {command.summary}")
    shell.err.line("  Alt-Enter begins a new line. A line that begins with a blank is said as it is.")
    return None


def _nice(shell: Shell, job: Job, argument: str) -> int | None:
    try:
        nice = int(argument)
    except ValueError:
        raise UsageError(f"`{argument}` is not a nice value", "/nice N: -20 (most) to 19 (least)") from None
    before = shell.system.renice(job.pid, nice)
    shell.note(f"{job.pid}: nice {before} → {nice}")
    return None


def _why(shell: Shell, job: Job, argument: str) -> int | None:
    shell.err.line("\n".join(shell.system.why(job.pid)))
    return None


def _save(shell: Shell, job: Job, argument: str) -> int | None:
    try:
        path = path_of(argument).expanduser()
    except RuntimeError:  # no such user
        path = Path(argument)
    size = human_bytes(shell.system.save(job.pid, path))
    shell.note(f"{path}  {size}: `load {quote(str(path))}` goes on with it")
    return None


def _system(shell: Shell, job: Job, argument: str) -> int | None:
    shell.err.line(shell.system.spec(job.pid).system or "(none: `chat MODEL --system TEXT`)")
    return None


def _ctx(shell: Shell, job: Job, argument: str) -> int | None:
    view = shell.system.process(job.pid)
    limit = f" of {view.context_limit_tokens}" if view.context_limit_tokens else ""
    kept = f"KV {short_bytes(view.kv_bytes)}"
    shell.err.line(f"{view.context_tokens}{limit} tokens · {_turns(view)} · {kept}")
    return None


def _need_shell(shell: Shell) -> None:
    """Raises UsageError."""
    if not shell.interactive:
        raise UsageError("there is no shell to go back to", "`llmos`, then `chat`: there it can be a job")


def _bg(shell: Shell, job: Job, argument: str) -> int | None:
    _need_shell(shell)
    shell.jobs.touch(job)
    shell.last_background_pid = job.pid
    head = f"[{job.number}]{shell.jobs.mark(job)} {job.pid}  "
    shell.note(labelled(shell.err, head, job, f"  (`fg %{job.number}` goes on)"))
    return 0


def _fork(shell: Shell, job: Job, argument: str) -> int | None:
    _need_shell(shell)
    pid = shell.system.fork(job.pid)
    copy = shell.jobs.add(pid, shell.system.spec(pid).command, None)
    copy.offset = job.offset
    shell.jobs.touch(job)
    shell.note(labelled(shell.err, f"[{copy.number}]{shell.jobs.mark(copy)} {pid}  ", copy))
    return None


def _bye(shell: Shell, job: Job, argument: str) -> int | None:
    with contextlib.suppress(NotPermitted):
        shell.system.hang_up(job.pid)
    while (view := shell.system.wait(job.pid, _POLL_S)) is None:
        if shell.interrupts.take_interrupt():  # somebody stopped it in mid-reply
            send(shell, job, Signal.KILL)
    status = finish(shell, job, told=True)
    shell.remark(f"{job.pid} ended · {_turns(view)} · {view.output_tokens} tok")
    return status


def _turns(view: ProcessView) -> str:
    return f"{view.items_done} turn" + ("" if view.items_done == 1 else "s")


COMMANDS = {
    "help": ChatCommand(_help, "this list"),
    "nice": ChatCommand(_nice, "change its nice value: -20 (most) to 19 (least)", "N"),
    "why": ChatCommand(_why, "what it waits for, and its share"),
    "ctx": ChatCommand(_ctx, "tokens in its window"),
    "system": ChatCommand(_system, "what was said to it before the first turn"),
    "save": ChatCommand(_save, "write a checkpoint; `load FILE` goes on with it", "FILE"),
    "fork": ChatCommand(_fork, "copy it as another job; this one goes on here"),
    "bg": ChatCommand(_bg, "back to the shell; it sleeps as a job"),
    "bye": ChatCommand(_bye, "end it, as ^D does"),
}
