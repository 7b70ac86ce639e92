"""`bench shares`: how exactly weights are kept, on the real engine.

Three processes, each in a group of its own, with weights 4, 2 and 1, draw tokens without end. From the
moment that all are well under way, output tokens are counted until there are so many in all; in each
repetition some more, so that the count does not always end at the same place in a quantum.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kernel.errors import KernelFault, TimedOut
from plugins.benchmarks.command import Report, benchmark
from plugins.benchmarks.machine import Machine, booted, check_idle, model_argument, model_path, options
from plugins.benchmarks.progress import Tell
from plugins.benchmarks.spread import Spread
from plugins.benchmarks.throughput import positive
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

WEIGHTS = (4.0, 2.0, 1.0)
START_TOKENS = 100  # of all of them, before the count begins
MORE_TOKENS = 37  # with each repetition
AIM_ERROR = 0.01
PATIENCE_S = 300.0
LOOK_S = 0.002  # between two looks at the counts


@dataclass(frozen=True, slots=True)
class Row:
    """One process, over all repetitions."""

    weight: float
    due_share: float
    share: Spread  # of the tokens that all of them drew
    error: Spread  # relative to what was due


def measure(path: Path, tokens: int, repeat: int, tell: Tell) -> list[Row]:
    """Count, so many times. Raises KernelFault if a process ends meanwhile."""
    tell("shares: loading")
    window_tokens = 2 * (START_TOKENS + tokens + MORE_TOKENS * repeat) + 64
    with booted(path, options(path, len(WEIGHTS), window_tokens)) as machine:
        for number, weight in enumerate(WEIGHTS):
            machine.system.set_group(f"share {number}", weight)
        counts = []
        for number in range(repeat):
            tell(f"shares: {number + 1} of {repeat}")
            counts.append(_count(machine, tokens + MORE_TOKENS * number, number))
    return rows_of(counts)


def _count(machine: Machine, tokens: int, number: int) -> list[int]:
    """Output tokens of each process while all of them drew so many together."""
    plain = machine.spec(f"share {number}", 2 * (START_TOKENS + tokens))
    pids = [
        machine.system.spawn(replace(plain, group=f"share {place}", command=f"bench {place}"))
        for place in range(len(WEIGHTS))
    ]
    try:
        before = _look(machine, pids, lambda drawn: sum(drawn) >= START_TOKENS)
        after = _look(machine, pids, lambda drawn: sum(drawn) - sum(before) >= tokens)
    finally:
        machine.end(pids)
    return [late - early for early, late in zip(before, after, strict=True)]


def _look(machine: Machine, pids: Sequence[int], enough: Callable[[Sequence[int]], bool]) -> list[int]:
    """Output tokens of each at one instant, as soon as they are enough."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        views = {view.pid: view for view in machine.system.snapshot().processes}
        if ended := [views[pid] for pid in pids if views[pid].exit_code is not None]:
            raise KernelFault(f"a process ended: {ended[0].error or ended[0].exit_code}")
        drawn = [views[pid].output_tokens for pid in pids]
        if enough(drawn):
            return drawn
        time.sleep(LOOK_S)
    raise TimedOut(f"too few tokens in {PATIENCE_S:g} s")


def rows_of(counts: Sequence[Sequence[int]]) -> list[Row]:
    """From the tokens of each process in each repetition."""
    rows = []
    for place, weight in enumerate(WEIGHTS):
        due = weight / sum(WEIGHTS)
        shares = [drawn[place] / sum(drawn) for drawn in counts]
        rows.append(Row(weight, due, Spread.of(shares), Spread.of([share / due - 1 for share in shares])))
    return rows


def worst(rows: Sequence[Row]) -> float:
    """The largest relative error of any process in any repetition."""
    return max(max(-row.error.least, row.error.most) for row in rows)


def _arguments(parser: Arguments) -> None:
    model_argument(parser)
    parser.add("--tokens", type=positive, default=2000, metavar="N", help="of all processes together; 2000")
    parser.add("--repeat", type=positive, default=5, metavar="R", help="repetitions; 5")


def _run(shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Row]:
    check_idle(shell)
    path = model_path(shell, args.model, tell)
    rows = measure(path, args.tokens, args.repeat, tell)
    head = f"shares of {args.tokens} output tokens, {args.repeat} times; middle (least to most)"
    tail = f"no share is further from its due than {100 * worst(rows):.2f} % of it"
    return Report(report(path, args.tokens, rows), _COLUMNS, rows, head, tail)


def report(path: Path, tokens: int, rows: Sequence[Row]) -> dict[str, object]:
    """What --json prints."""
    return {
        "model": str(path),
        "tokens": tokens,
        "aim_error": AIM_ERROR,
        "worst_error": worst(rows),
        "rows": [asdict(row) for row in rows],
    }


_COLUMNS: list[Column[Row]] = [
    Column("WEIGHT", lambda row: f"{row.weight:g}", right=True, keep=99),
    Column("DUE %", lambda row: f"{100 * row.due_share:.2f}", right=True, keep=90),
    Column("SHARE %", lambda row: row.share.text(2, 100), right=True, keep=95),
    Column("ERROR %", lambda row: row.error.text(2, 100), right=True, keep=80),
]

SPEC = benchmark(
    "shares",
    "tokens of three processes with weights 4, 2 and 1, on the real engine",
    _run,
    _arguments,
    ("bench shares --tokens 5000",),
)
