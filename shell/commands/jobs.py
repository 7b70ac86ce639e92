"""Job control: jobs, fg, bg."""

import json
from argparse import Namespace
from contextlib import suppress

from kernel.errors import NotPermitted
from kernel.snapshot import ProcessView
from kernel.syscall import Signal
from kernel.units import short_time
from shell.jobs import Job, foreground, labelled
from shell.registry import Arguments, CommandSpec
from shell.session import Shell
from shell.terminal import one_line

_WORDS = {"T": "Stopped", "Q": "Waiting", "W": "Swapped", "S": "Sleeping"}


def _jobs_arguments(parser: Arguments) -> None:
    parser.add("-l", "--long", action="store_true", help="with PID, time and tokens")
    parser.add("--json", action="store_true", help="one array")


def _jobs(shell: Shell, args: Namespace) -> int:
    if args.json or shell.json:
        shell.out.line(json.dumps([_plain(shell, job) for job in shell.jobs]))
        return 0
    for job in shell.jobs:
        shell.out.line(_line(shell, job, long=args.long))
    return 0


def _plain(shell: Shell, job: Job) -> dict[str, object]:
    view = shell.system.process(job.pid)
    return {
        "job": job.number,
        "pid": job.pid,
        "state": view.state,
        "current": shell.jobs.mark(job) == "+",
        "exit_code": job.status(view),
        "command": job.command,
    }


def _line(shell: Shell, job: Job, *, long: bool) -> str:
    view = shell.system.process(job.pid)
    head = f"[{job.number}]{shell.jobs.mark(job)} " + (f"{job.pid:>4} " if long else "")
    reason = job.failure or view.error or (view.waits_for if long else "")
    tail = (f"   {_facts(view)}" if long else "") + (f"   ({one_line(reason)})" if reason else "")
    return labelled(shell.out, f"{head}{_state(job, view):8} ", job, tail)


def _state(job: Job, view: ProcessView) -> str:
    status = job.status(view)
    if status is None:
        return _WORDS.get(view.letter, "Running")
    return f"Exit {status}" if status else "Done"


def _facts(view: ProcessView) -> str:
    progress = f"{view.items_done}/{view.items_total} · " if view.items_total > 1 else ""
    return f"{progress}{view.output_tokens} tok · {short_time(view.elapsed_s)}"


def _job_argument(parser: Arguments) -> None:
    parser.add("job", nargs="?", default="%+", metavar="%JOB", completes=("job",))


def _fg(shell: Shell, args: Namespace) -> int:
    job = shell.jobs.find(args.job)
    shell.jobs.touch(job)
    shell.note(labelled(shell.err, "", job))
    _continue(shell, job)
    return foreground(shell, job)


def _bg(shell: Shell, args: Namespace) -> int:
    job = shell.jobs.find(args.job)
    _continue(shell, job)
    shell.last_background_pid = job.pid
    shell.note(labelled(shell.err, f"[{job.number}]{shell.jobs.mark(job)} {job.pid}  ", job))
    return 0


def _continue(shell: Shell, job: Job) -> None:
    if shell.system.process(job.pid).state != "ZOMBIE":
        with suppress(NotPermitted):  # it ended just now: its output and exit code are still to be had
            shell.system.signal(job.pid, Signal.CONT)
            shell.system.swap_in(job.pid)  # if it was swapped out by hand: else nothing would ever come


SPECS = (
    CommandSpec(
        "jobs", "list this shell's jobs", _jobs, _jobs_arguments, ("jobs", "jobs -l"), group="processes"
    ),
    CommandSpec(
        "fg",
        "bring a job to the foreground, and show what it has said",
        _fg,
        _job_argument,
        ("fg", "fg %2"),
        group="processes",
    ),
    CommandSpec(
        "bg",
        "let a job that was stopped or swapped out go on in the background",
        _bg,
        _job_argument,
        ("bg", "bg %2"),
        group="processes",
    ),
)
