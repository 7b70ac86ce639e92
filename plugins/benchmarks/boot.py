"""`bench boot`: wall time until LLMOS is there, as ratios to `python -c pass`, in turn in one run.

Two things: `llmos -c true` from start to exit, and `llmos` on a pseudo-terminal from start until its
prompt is on the screen.
"""

import argparse
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kernel.errors import KernelFault, TimedOut, UsageError
from plugins.benchmarks.command import Report, benchmark
from plugins.benchmarks.machine import check_idle
from plugins.benchmarks.progress import Tell
from plugins.benchmarks.spread import Spread
from plugins.benchmarks.throughput import positive
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

AIM = 5.0
PROMPT = b"[llmos]"
PATIENCE_S = 60.0
_END_OF_INPUT = b"\x04"
_LLMOS = (sys.executable, "-m", "llmos")


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was timed."""

    what: str
    elapsed_s: Spread
    ratio: Spread  # to `python -c pass` of the same round


def measure(repeat: int, tell: Tell) -> list[Row]:
    """Time everything in turn. The first round warms the file cache and is not counted."""
    plan: list[tuple[str, Callable[[], float]]] = [
        ("python -c pass", lambda: to_exit([sys.executable, "-c", "pass"])),
        ("llmos -c true", lambda: to_exit([*_LLMOS, "-c", "true"])),
        ("llmos, to its prompt", lambda: to_prompt(_LLMOS)),
    ]
    rounds: list[list[float]] = []
    for number in range(repeat + 1):
        tell(f"boot: {number} of {repeat}")
        rounds.append([act() for _, act in plan])
    return [_row(what, rounds[1:], place) for place, (what, _) in enumerate(plan)]


def _row(what: str, rounds: Sequence[Sequence[float]], place: int) -> Row:
    elapsed_s = Spread.of([times[place] for times in rounds])
    return Row(what, elapsed_s, Spread.of([times[place] / times[0] for times in rounds]))


def to_exit(command: Sequence[str]) -> float:
    """Seconds from start to exit. Raises KernelFault if it fails."""
    begin_s = time.perf_counter()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=_environment(), check=False
    )
    elapsed_s = time.perf_counter() - begin_s
    if done.returncode:
        raise KernelFault(f"{' '.join(command[1:])}: exit status {done.returncode}")
    return elapsed_s


def to_prompt(command: Sequence[str]) -> float:
    """Seconds from start until the prompt has been written to a terminal; then it is told to leave."""
    if sys.platform == "win32":
        raise UsageError("there are no pseudo-terminals here")
    import pty

    ours, theirs = pty.openpty()
    begin_s = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=_environment(), start_new_session=True
    )
    os.close(theirs)
    try:
        _read_until(ours, PROMPT, begin_s + PATIENCE_S)
        elapsed_s = time.perf_counter() - begin_s
        os.write(ours, _END_OF_INPUT)
        _drain(ours, process)
        return elapsed_s
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_until(terminal: int, wanted: bytes, deadline_s: float) -> None:
    seen = b""
    while wanted not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline_s - time.perf_counter()))
        if not ready:
            raise TimedOut("no prompt came")
        try:
            seen += os.read(terminal, 4096)
        except OSError as error:  # it has ended
            raise KernelFault("llmos ended before its prompt") from error


def _drain(terminal: int, process: subprocess.Popen[bytes]) -> None:
    """Read what it still says, so that it can end; not for ever."""
    deadline_s = time.perf_counter() + PATIENCE_S
    while process.poll() is None and time.perf_counter() < deadline_s:
        if select.select([terminal], [], [], 0.02)[0]:
            try:
                os.read(terminal, 4096)
            except OSError:
                return


def _environment() -> dict[str, str]:
    import_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {"TERM": "xterm-256color", **os.environ, "PYTHONPATH": import_path}


def _arguments(parser: Arguments) -> None:
    parser.add("--repeat", type=positive, default=10, metavar="R", help="rounds; 10")


def _run(shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Row]:
    check_idle(shell)
    rows = measure(args.repeat, tell)
    return Report(report(rows), _COLUMNS, rows)


def report(rows: Sequence[Row]) -> dict[str, object]:
    """What --json prints."""
    return {"aim_ratio": AIM, "rows": [asdict(row) for row in rows]}


_COLUMNS: list[Column[Row]] = [
    Column("WHAT", lambda row: row.what, keep=99),
    Column("MS", lambda row: row.elapsed_s.text(0, 1000), right=True, keep=50),
    Column("RATIO", lambda row: row.ratio.text(1), right=True, keep=90),
]

SPEC = benchmark(
    "boot",
    "time to the prompt and of `llmos -c true`, as ratios to `python -c pass`",
    _run,
    _arguments,
    ("bench boot --repeat 20",),
)
