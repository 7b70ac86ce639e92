"""Commands on processes: ps, kill, stop, cont, renice, nice, wait."""

import re
from argparse import REMAINDER, Namespace

from kernel.errors import UsageError
from kernel.snapshot import ProcessView
from kernel.syscall import Signal
from shell.commands.targets import add_targets, for_each, pid_of, signal_of
from shell.interpreter import invoke
from shell.jobs import wait_job
from shell.process_table import process_columns, sorted_by
from shell.registry import Arguments, CommandSpec
from shell.render import to_json, write_table
from shell.session import Shell

_POLL_S = 0.05
_NUMBER = re.compile(r"[+-]{0,2}\d+")
_SIGNAL_FLAG = re.compile(r"-(\d+|[A-Za-z][A-Za-z0-9]+)")


def _ps_arguments(parser: Arguments) -> None:
    parser.add("-a", "--all", action="store_true", help="finished processes too")
    parser.add("-q", "--quiet", action="store_true", help="PIDs only")
    parser.add("-o", "--columns", metavar="COLS", help="these columns or fields: pid,model,output_tokens")
    parser.add("--sort", metavar="COL", help="by a column or field; -COL turns the order round")
    parser.add("--json", action="store_true", help="one array, all fields, bytes and seconds")


def _ps_words(words: list[str]) -> list[str]:
    """`--sort -pid` as `--sort=-pid`: argparse would take `-pid` for an option."""
    if "--sort" in words[:-1]:
        at = words.index("--sort")
        return [*words[:at], f"--sort={words[at + 1]}", *words[at + 2 :]]
    return words


def _ps(shell: Shell, args: Namespace) -> int:
    rows: list[ProcessView] = list(shell.system.snapshot().processes)
    if args.all:
        rows = [*shell.system.finished(), *rows]
    if args.sort:
        rows = sorted_by(rows, args.sort)
    if args.quiet:
        shell.out.lines(str(row.pid) for row in rows)
    elif args.json or shell.json:
        shell.out.line(to_json(rows))
    else:
        write_table(shell.out, process_columns(shell, args.columns), rows)
    return 0


def _kill_arguments(parser: Arguments) -> None:
    parser.add(
        "-s", "--signal", default="TERM", metavar="SIGNAL", help="INT TERM KILL STOP CONT USR1, or a number"
    )
    parser.add("-l", "--list", action="store_true", help="list the signals")
    add_targets(parser, optional=True)


def _kill_words(words: list[str]) -> list[str]:
    """`-9` and `-KILL` as `-s`; `-sKILL` is that already, but `-stop` is a signal."""
    if not words or not _SIGNAL_FLAG.fullmatch(words[0]):
        return words
    name = words[0][1:]
    if name.startswith("s") and name.upper().removeprefix("SIG") not in Signal.__members__:
        return words
    return ["-s", name, *words[1:]]


def _kill(shell: Shell, args: Namespace) -> int:
    if args.list:
        shell.out.lines(f"{number.value:2} {number.name}" for number in Signal)
        return 0
    if not args.targets:
        raise UsageError("kill: which process?", "`kill PID` or `kill %JOB`")
    number = signal_of(args.signal)
    return for_each(shell, args.targets, lambda pid: shell.system.signal(pid, number))


def _stop(shell: Shell, args: Namespace) -> int:
    return for_each(shell, args.targets, lambda pid: shell.system.signal(pid, Signal.STOP))


def _cont(shell: Shell, args: Namespace) -> int:
    return for_each(shell, args.targets, lambda pid: shell.system.signal(pid, Signal.CONT))


def _renice_arguments(parser: Arguments) -> None:
    parser.add("-n", dest="nice", type=int, metavar="N", help="the nice value, if it is not the first word")
    parser.add("words", nargs="+", metavar="N PID|%JOB", completes=("pid", "job"))


def _renice(shell: Shell, args: Namespace) -> int:
    words = list(args.words)
    nice = args.nice
    if nice is None:
        nice = _integer(words.pop(0))
    if not words:
        raise UsageError("renice: which process?", "`renice 10 PID`")

    def renice(pid: int) -> None:
        before = shell.system.renice(pid, nice)
        shell.note(f"{pid}: nice {before} → {nice}")

    return for_each(shell, words, renice)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"renice: `{text}` is not a number", "`renice 10 PID`") from None


def _nice_arguments(parser: Arguments) -> None:
    parser.add("-n", dest="nice", type=int, default=10, metavar="N", help="-20 (most) to 19 (least); 10")
    parser.add("command", nargs=REMAINDER, metavar="COMMAND", completes=("command",))


def _nice_words(words: list[str]) -> list[str]:
    """`nice 5 run …` and `nice -5 run …` mean opposite things to different people: neither is taken."""
    if words and _NUMBER.fullmatch(words[0]):
        following = " ".join(words[1:2]) or "COMMAND"
        raise UsageError(
            f"nice: `{words[0]}` is not a command",
            f"`nice -n {words[0]} {following} …`, or `renice` for a PID",
        )
    return words


def _nice(shell: Shell, args: Namespace) -> int:
    if not args.command:
        raise UsageError("nice: which command?", "`nice -n 10 run nano …`")
    shell.frame.nice += args.nice
    return invoke(shell, args.command)


def _wait_arguments(parser: Arguments) -> None:
    add_targets(parser, optional=True)


def _wait(shell: Shell, args: Namespace) -> int:
    pids = [pid_of(shell, target) for target in args.targets] or [job.pid for job in shell.jobs]
    status = 0
    for pid in pids:
        job = shell.jobs.of(pid)
        status = wait_job(shell, job) if job else _wait_process(shell, pid)
        if shell.interrupts.pressed:
            break
    return status


def _wait_process(shell: Shell, pid: int) -> int:
    """Wait for a process that is not a job of this shell."""
    while (view := shell.system.wait(pid, _POLL_S)) is None:
        if shell.interrupts.take_interrupt():
            return 130
    return view.exit_code or 0


def _targets_only(parser: Arguments) -> None:
    add_targets(parser)


def _why(shell: Shell, args: Namespace) -> int:
    def tell(pid: int) -> None:
        view = shell.system.process(pid)
        shell.out.line(f"{pid}  {view.command}")
        shell.out.lines(f"  {line}" for line in shell.system.why(pid))

    return for_each(shell, args.targets, tell)


SPECS = (
    CommandSpec(
        "ps",
        "list processes",
        _ps,
        _ps_arguments,
        ("ps", "ps --sort -tokens_per_s", "ps -a -o pid,nice,output_tokens,exit_code"),
        group="processes",
        rewrite=_ps_words,
    ),
    CommandSpec(
        "why",
        "what a process waits for, why it ended, and its share",
        _why,
        _targets_only,
        ("why 15", "why %1"),
        group="processes",
    ),
    CommandSpec(
        "kill",
        "end a process (or send it another signal)",
        _kill,
        _kill_arguments,
        ("kill 15", "kill -9 %1 %2", "kill -s STOP 15", "kill -USR1 15", "kill -l"),
        group="processes",
        rewrite=_kill_words,
    ),
    CommandSpec(
        "stop",
        "pause a process; it keeps its place",
        _stop,
        _targets_only,
        ("stop %1",),
        group="processes",
    ),
    CommandSpec("cont", "let a stopped process go on", _cont, _targets_only, ("cont %1",), group="processes"),
    CommandSpec(
        "renice",
        "change the nice value of a process",
        _renice,
        _renice_arguments,
        ("renice 10 15", "renice -5 %1"),
        group="processes",
    ),
    CommandSpec(
        "nice",
        "start a command with another nice value",
        _nice,
        _nice_arguments,
        ("nice run nano list the files", "nice -n -5 run nano -f report.md &"),
        group="processes",
        background=True,
        patterns=False,
        rewrite=_nice_words,
    ),
    CommandSpec(
        "wait",
        "wait for jobs or processes to end; the exit code is the last one's",
        _wait,
        _wait_arguments,
        ("wait", "wait %1", "wait $!"),
        notes="Without an argument: for all jobs. ^C ends the waiting, not the jobs.",
        group="processes",
    ),
)
