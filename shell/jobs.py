"""Jobs: processes that this shell started, in the foreground or behind it.

A background job's output is held back by the kernel, and shown whole when the job is waited for,
brought to the foreground, or found done.
Owner: the session's thread. Not here: output that goes to a file (sink).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernel.errors import LlmosError, NotPermitted, ProcessNotFound, UsageError
from kernel.snapshot import BY_HAND, ProcessView
from kernel.syscall import Signal
from kernel.units import short_bytes, short_time
from shell.sink import Sink
from shell.terminal import Output, cell_width, fit, one_line

if TYPE_CHECKING:
    from shell.session import Shell

_POLL_S = 0.05  # how late ^C may be noticed while a process is silent
_STOPPED = 148
_INTERRUPTED = 130
_LABEL_MIN = 20  # columns of a command that stay, however narrow the terminal


@dataclass(slots=True, eq=False)
class Job:
    """One row of `jobs`."""

    number: int
    pid: int
    command: str
    sink: Sink | None = None
    offset: int = 0  # characters shown so far
    announced: bool = False  # its end has been told; what it said may still be to come
    draft: str = ""  # of a chat: what was typed when it was left

    def status(self, view: ProcessView) -> int | None:
        """Its exit code; None while it runs. Output that could not be kept is a failure of the job."""
        if view.exit_code is None:
            return None
        return 1 if self.failure else view.exit_code

    @property
    def failure(self) -> str:
        """Why its output could not be kept, or ""."""
        return self.sink.error if self.sink else ""

    @property
    def silent(self) -> bool:
        """Nothing that it says is to be shown: it goes to a file."""
        return self.sink is not None


class JobTable:
    """Jobs by number. The current one (`%+`) is the last that was touched, `%-` the one before."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._recent: list[int] = []

    def __iter__(self) -> Iterator[Job]:
        return iter([self._jobs[number] for number in sorted(self._jobs)])

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, pid: int, command: str, sink: Sink | None) -> Job:
        job = Job(max(self._jobs, default=0) + 1, pid, command, sink)
        self._jobs[job.number] = job
        self._recent.append(job.number)
        return job

    def remove(self, job: Job) -> None:
        if self._jobs.pop(job.number, None):
            self._recent.remove(job.number)

    def touch(self, job: Job) -> None:
        self._recent.remove(job.number)
        self._recent.append(job.number)

    def mark(self, job: Job) -> str:
        """`+` for the current job, `-` for the one before, a blank for others."""
        if self._recent[-1:] == [job.number]:
            return "+"
        return "-" if self._recent[-2:-1] == [job.number] else " "

    def of(self, pid: int) -> Job | None:
        return next((job for job in self if job.pid == pid), None)

    def find(self, name: str = "%+") -> Job:
        """A job by `%n`, `%+`, `%%`, `%-` or a PID. Raises UsageError."""
        number = self._number(name)
        if number in self._jobs:
            return self._jobs[number]
        if name in ("%+", "%%"):
            raise UsageError("there is no job", "`run MODEL … &` starts one in the background")
        raise UsageError(f"no job `{name}`", "`jobs` lists them")

    def _number(self, name: str) -> int:
        if name in ("%+", "%%", "%"):
            return self._recent[-1] if self._recent else 0
        if name == "%-":
            return self._recent[-2] if len(self._recent) > 1 else 0
        if name.startswith("%") and name[1:].isdecimal():
            return int(name[1:])
        job = self.of(int(name)) if name.isdecimal() else None
        return job.number if job else 0


def start(shell: Shell, pid: int, *, asked: bool = False) -> int:
    """Put a new process under job control, as its frame says; returns the command's exit code.

    `asked`: it is a chat, and its user has just typed the first turn.
    """
    frame, sink = shell.frame, None
    if frame.stdout is not None:
        sink = Sink(shell.system, pid, frame.stdout, frame.target)
        frame.stdout = None
        hang_up(shell, pid)  # into a file nobody can talk
    job = shell.jobs.add(pid, frame.line, sink)
    if not frame.background:
        return foreground(shell, job, asked=asked)
    shell.last_background_pid = pid
    shell.note(labelled(shell.err, f"[{job.number}] {pid}  ", job))
    return 0


def labelled(out: Output, head: str, job: Job, tail: str = "") -> str:
    """A line about a job; its command is cut where the terminal ends."""
    command = one_line(job.command)
    if out.width is not None:
        command = fit(command, max(out.width - cell_width(head + tail), _LABEL_MIN))
    return head + command + tail


def foreground(shell: Shell, job: Job, *, asked: bool = False) -> int:
    """Show a job's output as it comes, until it ends or is stopped; returns its exit code.

    ^C asks it to end, a second one kills it, a third leaves it to itself. ^Z stops it. With a chat it is
    a conversation, if there is a terminal.
    """
    if listens(shell.system.process(job.pid)):
        if can_talk(shell):
            from shell.conversation import converse  # deferred: prompt-toolkit

            return converse(shell, job, asked=asked)
        hang_up(shell, job.pid)
    presses = 0
    try:
        while not _pump(shell, job):
            match shell.interrupts.take():
                case signal.SIGINT:
                    presses += 1
                    if presses > 2:
                        return _INTERRUPTED
                    send(shell, job, Signal.INT if presses == 1 else Signal.KILL)
                case signal.SIGTSTP if send(shell, job, Signal.STOP):
                    return stopped(shell, job)
    except BrokenPipeError:
        send(shell, job, Signal.TERM)
        raise
    return finish(shell, job, interrupted=presses > 0)


def listens(view: ProcessView) -> bool:
    """Whether it is a chat that can be talked to."""
    return view.program == "chat" and not view.hung_up and view.state != "ZOMBIE"


def can_talk(shell: Shell) -> bool:
    """Whether a person can have a conversation with what runs in the foreground."""
    if shell.frame.stdin is not None or shell.frame.stdout is not None:
        return False
    return shell.interactive or (shell.stdin is not None and shell.stdin.isatty() and shell.out.is_terminal)


def hang_up(shell: Shell, pid: int) -> None:
    """Nothing more will be said to it, if it is a chat."""
    if listens(shell.system.process(pid)):
        with contextlib.suppress(NotPermitted):  # it has ended just now
            shell.system.hang_up(pid)


def _pump(shell: Shell, job: Job) -> bool:
    """Pass on what there is, or wait a moment; True at the end."""
    if job.sink is not None:
        return shell.system.wait(job.pid, _POLL_S) is not None
    piece = shell.system.read(job.pid, job.offset, _POLL_S)
    shell.out.write(piece.text)
    job.offset = piece.next_offset
    return piece.eof


def send(shell: Shell, job: Job, number: Signal) -> bool:
    """Send a signal to a job that may have ended meanwhile; whether it arrived."""
    try:
        shell.system.signal(job.pid, number)
    except (NotPermitted, ProcessNotFound):
        return False
    return True


def stopped(shell: Shell, job: Job) -> int:
    shell.jobs.touch(job)
    view = shell.system.process(job.pid)
    kept = f"  (pid {job.pid}, KV {short_bytes(view.kv_bytes)} kept)"
    shell.note(labelled(shell.err, f"[{job.number}]{shell.jobs.mark(job)} Stopped  ", job, kept))
    return _STOPPED


def wait_job(shell: Shell, job: Job) -> int:
    """Wait for the end of a background job, show what it said, and return its exit code.

    ^C ends the waiting, not the job. A stopped job is not waited for, nor one that was swapped out by hand,
    nor a chat that waits for its user; in a script it has none: there it ends.
    """
    while shell.system.wait(job.pid, _POLL_S) is None:
        if shell.interrupts.take_interrupt():
            return _INTERRUPTED
        view = shell.system.process(job.pid)
        if listens(view) and not shell.interactive:
            hang_up(shell, job.pid)
        elif listens(view) and view.items_done == view.items_total and view.state != "STOPPED":
            shell.note(f"[{job.number}] waits for you: `fg %{job.number}` goes on with it")
            return _STOPPED
        elif view.state == "STOPPED":
            shell.note(f"[{job.number}] is stopped: `bg %{job.number}` continues it")
            return _STOPPED
        elif view.waits_for == BY_HAND:
            shell.note(f"[{job.number}] is swapped out: `swapin %{job.number}` lets it go on")
            return _STOPPED
    return conclude(shell, job)


def conclude(shell: Shell, job: Job) -> int:
    """Show what an ended background job said, and a notice to a person; returns its exit code."""
    while not job.silent and not _pump(shell, job):
        pass
    head = f"[{job.number}]{shell.jobs.mark(job)}  "
    view = shell.system.wait(job.pid)
    assert view is not None
    status = finish(shell, job, background=True)
    if shell.interactive and not job.announced:
        _tell_end(shell, job, head, view, status)
    return status


def _tell_end(shell: Shell, job: Job, head: str, view: ProcessView, status: int) -> None:
    facts = f"   {short_time(view.elapsed_s)} · {view.output_tokens} tok · rc {status}"
    shell.note(labelled(shell.err, head + ("Done  " if status == 0 else "Ended  "), job, facts))


def finish(
    shell: Shell, job: Job, *, interrupted: bool = False, background: bool = False, told: bool = False
) -> int:
    """Take an ended job off the lists, and say what went wrong unless it was told; returns its exit code."""
    view = shell.system.wait(job.pid)
    assert view is not None
    if job.sink is None:
        shell.out.finish_line()
    else:
        job.sink.join()
    shell.jobs.remove(job)
    with contextlib.suppress(ProcessNotFound):
        shell.system.reap(job.pid)
    name = f"[{job.number}] {job.pid}: " if background else ""
    status = job.status(view) or 0
    if told:
        return status
    if reason := job.failure or view.error:
        shell.report(LlmosError(name + reason, "" if job.failure else view.hint))
    elif interrupted and status:
        shell.note(f"  ⏹ stopped · {_reply(view)}")
    return status


def notices(shell: Shell) -> None:
    """Before a prompt: tell of what went wrong, and of background jobs that have ended: what they said."""
    shell.tell_alerts()
    for job in shell.jobs:
        if shell.system.process(job.pid).state == "ZOMBIE":
            conclude(shell, job)


def news(shell: Shell) -> list[Job]:
    """Jobs that have ended, and nobody was told."""
    return [
        job for job in shell.jobs if not job.announced and shell.system.process(job.pid).state == "ZOMBIE"
    ]


def announce(shell: Shell) -> None:
    """While a line is typed: tell of jobs that have ended. What they said waits for the next prompt."""
    for job in news(shell):
        if job.silent:
            conclude(shell, job)
        else:
            job.announced = True
            view = shell.system.process(job.pid)
            head = f"[{job.number}]{shell.jobs.mark(job)}  "
            _tell_end(shell, job, head, view, job.status(view) or 0)


def close(shell: Shell) -> None:
    """Kill what still runs, and let the files be closed: the session ends."""
    for job in shell.jobs:
        send(shell, job, Signal.KILL)
    for job in shell.jobs:
        shell.jobs.remove(job)
        if job.sink:
            job.sink.join()
        with contextlib.suppress(ProcessNotFound, NotPermitted):
            shell.system.reap(job.pid)


def _reply(view: ProcessView) -> str:
    facts = [f"{view.output_tokens} tok kept"]
    if view.first_token_s is not None:
        facts.append(f"TTFT {view.first_token_s:.2f} s")
    facts.append(f"{view.tokens_per_s:.1f} tok/s")
    if view.context_limit_tokens:
        facts.append(f"ctx {100 * view.context_tokens // view.context_limit_tokens}%")
    return " · ".join(facts)
