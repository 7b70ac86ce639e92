"""A chat in the foreground of a terminal: one types, the other answers, until one of them leaves.

Owner: the session's thread. Not here: the line editor (chat_prompt), chats without a terminal (jobs).
"""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass

from kernel.errors import LlmosError, NotPermitted, UsageError
from kernel.snapshot import ProcessView
from kernel.syscall import Signal
from shell.chat_commands import COMMANDS
from shell.jobs import Job, finish, send, stopped
from shell.session import Shell
from shell.terminal import fit, one_line

STOP = "\x1a"  # what `ask` returns for ^Z
BYE = "/bye"
_POLL_S = 0.05  # how late ^C may be noticed while the model is silent
_PATIENCE_S = 0.3  # before it is said what a reply waits for
_SPAN_S = 0.1  # no rate is told of less


def converse(shell: Shell, job: Job, *, asked: bool = False) -> int:
    """Talk until the chat is left, stopped or ended; returns an exit code.

    `asked`: the first turn was typed just now, and is not told again if its reply was quicker than we are.
    """
    from shell.chat_prompt import ChatPrompt  # deferred: prompt-toolkit

    prompt = ChatPrompt(shell, job)
    shell.remark(f"{shell.system.process(job.pid).model} · ^C stops a reply · /help · ^D leaves")
    _recall(shell, job, 1 if asked else 0)
    status = _go_on(shell, job)
    while status is None:
        shell.interrupts.pressed = False  # it was meant for a reply, or for the line that was typed
        if shell.system.process(job.pid).state == "ZOMBIE":
            return _ended(shell, job)
        shell.out.finish_line()
        try:
            status = _take(shell, job, prompt.ask())
        except KeyboardInterrupt:
            shell.remark("^D leaves · /help")
        except LlmosError as error:
            shell.report(error)
    return status


def _take(shell: Shell, job: Job, line: str) -> int | None:
    """Do what was typed; an exit code if that leaves the conversation. Raises LlmosError."""
    if line == STOP:
        return stopped(shell, job) if send(shell, job, Signal.STOP) else None
    if line.startswith("/"):
        name, _, argument = line[1:].partition(" ")
        if name not in COMMANDS:
            raise UsageError(f"no command `/{name}`", "/help lists them; to say it, begin with a blank")
        return COMMANDS[name].run(shell, job, argument.strip())
    return _say(shell, job, line.strip()) if line.strip() else None


def _say(shell: Shell, job: Job, text: str) -> int | None:
    before, began_s = shell.system.process(job.pid), time.monotonic()
    with contextlib.suppress(NotPermitted):  # it has ended just now: the next look at it tells
        shell.system.say(job.pid, text)
        return _follow(shell, job, before, began_s)
    return None


def _go_on(shell: Shell, job: Job) -> int | None:
    """Show the reply that it is giving, if it is."""
    view = shell.system.process(job.pid)
    if view.items_done == view.items_total or view.exit_code is not None:
        piece = shell.system.read(job.pid, job.offset)  # the end of it, if it came just now
        shell.out.write(piece.text)
        job.offset = piece.next_offset
        return None
    return _follow(shell, job, view, 0.0 if view.output_tokens else time.monotonic())


# Replies


def _recall(shell: Shell, job: Job, known: int) -> None:
    """Show what was said while nobody looked, or before it was resumed; of the first `known`, the replies."""
    begin = 0
    for number, (asked, reply) in enumerate(shell.system.items(job.pid)):
        end = begin + len(reply) + 1
        if job.offset <= begin and number >= known:
            shell.out.write(f"you> {asked}\n")
        if job.offset < end:
            shell.out.write(reply[max(job.offset - begin, 0) :] + "\n")
            job.offset = end
        begin = end


def _follow(shell: Shell, job: Job, before: ProcessView, began_s: float) -> int | None:
    """Show a reply as it comes, to its end; an exit code if it was stopped. ^C cuts it.

    `began_s` is 0 if nobody saw it begin.
    """
    system, first_s, cut = shell.system, 0.0, False
    shell.interrupts.take_interrupt()  # one too many for the last reply
    waiting = _Waiting(shell, job)
    while True:
        view = system.process(job.pid)  # before its text: what it said until then is there
        over = view.items_done == view.items_total or view.exit_code is not None
        piece = system.read(job.pid, job.offset, 0.0 if over else _POLL_S)
        waiting.show("" if over or piece.text or first_s else _waits_for(shell, view))
        if first_s or piece.text != "\n":  # else it said nothing
            shell.out.write(piece.text)
            first_s = first_s or (time.monotonic() if piece.text else 0.0)
        job.offset = piece.next_offset
        if over:
            break
        match shell.interrupts.take():
            case signal.SIGINT:
                cut = True
                with contextlib.suppress(NotPermitted):
                    system.cut(job.pid)
            case signal.SIGTSTP if send(shell, job, Signal.STOP):
                waiting.show("")
                return stopped(shell, job)
    if view.exit_code is None:
        _tell(shell, before, view, cut, began_s, first_s)
    return None


def _tell(
    shell: Shell, before: ProcessView, view: ProcessView, cut: bool, began_s: float, first_s: float
) -> None:
    """The line after a reply."""
    if cut and not first_s and shell.err.animated:
        shell.err.emit("\r\x1b[K")  # the terminal wrote ^C
    if view.items_failed > before.items_failed:
        shell.report(LlmosError(view.error, view.hint))
    count = view.output_tokens - before.output_tokens
    facts = ["⏹ stopped", f"{count} tok kept"] if cut else [f"{count} tok"]
    if first_s and began_s:
        facts.append(f"TTFT {first_s - began_s:.2f} s")
    if first_s and count > 1 and (passed_s := time.monotonic() - first_s) > _SPAN_S:
        facts.append(f"{(count - 1) / passed_s:.1f} tok/s")
    if view.context_limit_tokens:
        facts.append(f"ctx {100 * view.context_tokens // view.context_limit_tokens}%")
    shell.remark("  " + " · ".join(facts))


@dataclass(slots=True)
class _Waiting:
    """A line, drawn over, that says what a reply waits for."""

    shell: Shell
    job: Job
    shown: str = ""
    since_s: float = 0.0

    def show(self, text: str) -> None:
        err = self.shell.err
        self.since_s = self.since_s or time.monotonic()
        if not err.animated or text == self.shown:
            return
        if text and time.monotonic() - self.since_s < _PATIENCE_S:
            return
        self.shown = text
        self.shell.out_line_done()
        err.emit("\r" + err.paint(fit(one_line(text), (err.width or 80) - 1), "dim") + "\x1b[K")
        err.at_line_start = not text


def _waits_for(shell: Shell, view: ProcessView) -> str:
    if not view.waits_for:
        return ""
    loading = [m for m in shell.system.snapshot().models if m.name == view.model and m.state == "loading"]
    return f"… waits for {view.waits_for}" + "".join(f" {m.load_progress:.0%}" for m in loading)


def _ended(shell: Shell, job: Job) -> int:
    """Somebody else ended it, or it failed."""
    view = shell.system.process(job.pid)
    if not view.error:
        shell.note(f"{job.pid} was ended (exit code {view.exit_code})")
    return finish(shell, job)
