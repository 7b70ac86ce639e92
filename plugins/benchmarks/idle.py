"""`bench idle`: what a booted kernel with a loaded model does while nobody asks it anything.

Each thread of this process (but the one that measures) and of the worker: how often it was woken, and the
CPU time it took. A thread that polls shows up as wake-ups; there should be none.
Source: /proc (Linux): `voluntary_ctxt_switches` in status, the first number in schedstat (nanoseconds).
"""

import argparse
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kernel.errors import UsageError
from plugins.benchmarks.command import Report, benchmark
from plugins.benchmarks.machine import booted, check_idle, model_argument, model_path, options
from plugins.benchmarks.progress import Tell
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

SETTLE_S = 0.5  # for what boot and load still have to say
WINDOW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Count:
    """What a thread has done since it began."""

    wake_ups: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """A thread, and what it did meanwhile."""

    process: str
    thread: str
    wake_ups: int
    cpu_s: float


def measure(path: Path, idle_s: float, tell: Tell) -> list[Row]:
    """Boot, load, wait, watch. Raises UsageError where there is no /proc."""
    if not Path("/proc/self/task").is_dir():
        raise UsageError("wake-ups are counted in /proc, which this system does not have")
    tell("idle: loading")
    with booted(path, options(path, 4, WINDOW_TOKENS)) as machine:
        assert machine.model.worker_pid is not None
        processes = {"llmos": os.getpid(), "worker": machine.model.worker_pid}
        time.sleep(SETTLE_S)
        tell(f"idle: watching for {idle_s:g} s")
        before = {name: counts(pid) for name, pid in processes.items()}
        time.sleep(idle_s)
        after = {name: counts(pid) for name, pid in processes.items()}
        return [row for name in processes for row in _rows(name, before[name], after[name])]


def counts(pid: int) -> dict[int, Count]:
    """Every thread of a process, by its number; the one that asks is left out."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if int(task.name) == threading.get_native_id():
            continue
        try:
            found[int(task.name)] = _count(task)
        except OSError:  # it has ended meanwhile
            continue
    return found


def _count(task: Path) -> Count:
    status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line)
    cpu_ns = int((task / "schedstat").read_text().split()[0])
    return Count(int(status["voluntary_ctxt_switches"]), cpu_ns / 1e9)


def _rows(process: str, before: Mapping[int, Count], after: Mapping[int, Count]) -> list[Row]:
    """Threads that were there all the time."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()} if process == "llmos" else {}
    return [
        Row(
            process,
            names.get(task, str(task)),
            after[task].wake_ups - before[task].wake_ups,
            after[task].cpu_s - before[task].cpu_s,
        )
        for task in sorted(before.keys() & after.keys())
    ]


def _arguments(parser: Arguments) -> None:
    model_argument(parser)
    parser.add("--seconds", type=float, default=3.0, metavar="S", help="how long to watch; 3")


def _run(shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Row]:
    if not 0 < args.seconds <= 3600:
        raise UsageError("bench idle: --seconds is above 0, and at most 3600")
    check_idle(shell)
    rows = measure(model_path(shell, args.model, tell), args.seconds, tell)
    head = f"an idle kernel with a loaded model, for {args.seconds:g} s"
    return Report(report(args.seconds, rows), _COLUMNS, rows, head)


def report(seconds: float, rows: Sequence[Row]) -> dict[str, object]:
    """What --json prints."""
    return {
        "seconds": seconds,
        "wake_ups": sum(row.wake_ups for row in rows),
        "cpu_s": sum(row.cpu_s for row in rows),
        "rows": [asdict(row) for row in rows],
    }


_COLUMNS: list[Column[Row]] = [
    Column("PROCESS", lambda row: row.process, keep=99),
    Column("THREAD", lambda row: row.thread, keep=90),
    Column("WAKE-UPS", lambda row: str(row.wake_ups), right=True, keep=95),
    Column("CPU MS", lambda row: f"{1000 * row.cpu_s:.1f}", right=True, keep=80),
]

SPEC = benchmark(
    "idle",
    "wake-ups and CPU time of an idle kernel with a loaded model",
    _run,
    _arguments,
    ("bench idle --seconds 10",),
)
