"""What process commands are pointed at: PIDs and jobs; and one way to do something to each of them."""

from collections.abc import Callable, Iterable

from kernel.errors import LlmosError, UsageError
from kernel.syscall import Signal
from shell.registry import Arguments
from shell.session import Shell


def add_targets(parser: Arguments, *, optional: bool = False) -> None:
    nargs = "*" if optional else "+"
    parser.add("targets", nargs=nargs, metavar="PID|%JOB", completes=("pid", "job"))


def pid_of(shell: Shell, target: str) -> int:
    """The PID that `15` or `%2` means. Raises UsageError."""
    if target.startswith("%"):
        return shell.jobs.find(target).pid
    try:
        return int(target)
    except ValueError:
        raise UsageError(f"`{target}` is not a PID or a job", "`ps` lists PIDs, `jobs` lists jobs") from None


def for_each(shell: Shell, targets: Iterable[str], act: Callable[[int], None]) -> int:
    """Do it to every target, also after one that fails; the exit code of the last failure."""
    status = 0
    for target in targets:
        try:
            act(pid_of(shell, target))
        except LlmosError as error:
            shell.report(error)
            status = error.exit_code
    return status


def signal_of(name: str) -> Signal:
    """`9`, `KILL` or `SIGKILL`. Raises UsageError."""
    plain = name.upper().removeprefix("SIG")
    for number in Signal:
        if plain in (number.name, str(number.value)):
            return number
    known = " ".join(f"{number.name}({number.value})" for number in Signal)
    raise UsageError(f"no signal `{name}`", known)
