"""`bench fork`: children of a process that has read a long prompt, against as many independent runs.

Forks: a process is spawned, says its first token and is stopped; then it is forked so many times, and the
clock stops when every child has drawn a token of its own. It began before the spawn: the prompt, which is
computed once, is in it. Independent: as many processes are spawned with a prompt of that length each, no
two alike, to draw one token each. Alternating, in one run. At best the ratio is their number.

Bytes are counted twice: when every child has drawn a token, and when it has drawn LATER_TOKENS more. What
is in use is as `ps` counts it, shared KV once; what is reserved is the whole slab that the family sits on.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from drivers.llamacpp import familysize
from kernel.errors import KernelFault, LlmosError, UsageError
from kernel.syscall import Signal
from plugins.benchmarks.command import Report, benchmark
from plugins.benchmarks.machine import (
    Machine,
    booted,
    check_idle,
    model_argument,
    model_path,
    options,
    random_text,
)
from plugins.benchmarks.progress import Tell
from plugins.benchmarks.spread import Spread
from plugins.benchmarks.throughput import positive
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

AIM_SPEEDUP = 7.0
AIM_BYTES = 1.05
LATER_TOKENS = 64
OUTPUT_TOKENS = 3 * LATER_TOKENS  # that the parent and its children may draw; they are stopped before
PATIENCE_S = 120.0
TICK_S = 0.002


@dataclass(frozen=True, slots=True)
class Result:
    """All repetitions. Bytes are of KV, as the kernel accounts for them."""

    children: int
    prompt_tokens: int
    forked_s: Spread  # from the parent's spawn to the last child's first token
    fork_s: Spread  # from the first fork to the last child's first token
    independent_s: Spread
    speedup: Spread
    copies: Spread  # the family's bytes over the parent's alone
    later_copies: Spread  # the same, when each child has drawn more
    reserved_copies: float  # what a family's slab has room for, over the same


@dataclass(frozen=True, slots=True)
class _Forked:
    prompt_tokens: int
    elapsed_s: float
    fork_s: float
    copies: float
    later_copies: float


def measure(path: Path, children: int, characters: int, repeat: int, tell: Tell) -> Result:
    """Both, in turn. Raises KernelFault if a process says nothing."""
    tell("fork: loading")
    asked = options(path, children + 1, characters + OUTPUT_TOKENS + 16)
    kv_tokens = 2 * asked.sequences * asked.context_tokens  # as by default, not all is in one slab
    with booted(path, replace(asked, kv_tokens=kv_tokens)) as machine:
        _forked(machine, children, random_text(characters, "warm-up"))
        pairs = []
        for number in range(repeat):
            tell(f"fork: {children} children, {number + 1} of {repeat}")
            forked = _forked(machine, children, random_text(characters, f"parent {number}"))
            tell(f"fork: {children} independent runs, {number + 1} of {repeat}")
            texts = [random_text(characters, f"{number} {each}") for each in range(children)]
            pairs.append((forked, _independent(machine, texts)))
    return Result(
        children,
        pairs[0][0].prompt_tokens,
        Spread.of([forked.elapsed_s for forked, _ in pairs]),
        Spread.of([forked.fork_s for forked, _ in pairs]),
        Spread.of([independent_s for _, independent_s in pairs]),
        Spread.of([independent_s / forked.elapsed_s for forked, independent_s in pairs]),
        Spread.of([forked.copies for forked, _ in pairs]),
        Spread.of([forked.later_copies for forked, _ in pairs]),
        _reserved_copies(pairs[0][0]),
    )


def _forked(machine: Machine, children: int, text: str) -> _Forked:
    system = machine.system
    begin_s = time.monotonic()
    parent = system.spawn(machine.spec(text, OUTPUT_TOKENS))
    pids = [parent]
    try:
        _await_text(machine, parent, 0)
        system.signal(parent, Signal.STOP)
        said = system.read(parent, 0).next_offset
        forks_s = time.monotonic()
        pids += [system.fork(parent) for _ in range(children)]
        for pid in pids[1:]:
            _await_text(machine, pid, said)
            _signal(machine, pid, Signal.STOP)
        end_s = time.monotonic()
        copies = _copies(machine, pids)
        _draw_more(machine, pids[1:])
        prompt_tokens = system.process(parent).prompt_tokens
        return _Forked(prompt_tokens, end_s - begin_s, end_s - forks_s, copies, _copies(machine, pids))
    finally:
        machine.end(pids)


def _copies(machine: Machine, pids: Sequence[int]) -> float:
    """KV of all, over that of the first."""
    views = [machine.system.process(pid) for pid in pids]
    return sum(view.kv_bytes for view in views) / max(1, views[0].kv_bytes)


def _draw_more(machine: Machine, pids: Sequence[int]) -> None:
    """Each so many tokens, at least; then it is stopped again."""
    wanted = {pid: machine.system.process(pid).output_tokens + LATER_TOKENS for pid in pids}
    for pid in pids:
        _signal(machine, pid, Signal.CONT)
    end_s = time.monotonic() + PATIENCE_S
    for pid, tokens in wanted.items():
        while (view := machine.system.process(pid)).output_tokens < tokens and view.exit_code is None:
            if time.monotonic() > end_s:
                raise KernelFault(f"process {pid} says no more")
            time.sleep(TICK_S)
        _signal(machine, pid, Signal.STOP)


def _signal(machine: Machine, pid: int, signal: Signal) -> None:
    with suppress(LlmosError):  # it has drawn all it may
        machine.system.signal(pid, signal)


def _reserved_copies(forked: _Forked) -> float:
    shares = forked.copies < 2
    return familysize.cells_for(forked.prompt_tokens) / forked.prompt_tokens if shares else forked.copies


def _independent(machine: Machine, texts: Sequence[str]) -> float:
    """Seconds from the first spawn until each has drawn a token."""
    begin_s = time.monotonic()
    pids: list[int] = []
    try:
        pids += [machine.system.spawn(machine.spec(text, 1)) for text in texts]
        for pid in pids:
            _await_text(machine, pid, 0)
        return time.monotonic() - begin_s
    finally:
        machine.end(pids)


def _await_text(machine: Machine, pid: int, offset: int) -> None:
    if not machine.system.read(pid, offset, PATIENCE_S).text:
        raise KernelFault(f"process {pid} says nothing")


def _arguments(parser: Arguments) -> None:
    model_argument(parser)
    parser.add("--children", type=positive, default=8, metavar="N", help="forks; 8")
    parser.add("--prompt", type=positive, default=1000, metavar="N", help="characters of the prompt; 1000")
    parser.add("--repeat", type=positive, default=5, metavar="R", help="pairs of runs; 5")


def _run(shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Result]:
    check_idle(shell)
    if args.children > 255:
        raise UsageError("bench fork: at most 255 children")
    path = model_path(shell, args.model, tell)
    result = measure(path, args.children, args.prompt, args.repeat, tell)
    head = f"{result.children} children of a process with {result.prompt_tokens} prompt tokens"
    return Report(report(path, result), _COLUMNS, [result], head)


def report(path: Path, result: Result) -> dict[str, object]:
    """What --json prints."""
    aims = {"aim_speedup": AIM_SPEEDUP, "aim_copies": AIM_BYTES}
    return {"model": str(path), **aims, **asdict(result)}


_COLUMNS: list[Column[Result]] = [
    Column("FORKED MS", lambda row: row.forked_s.text(0, 1000), right=True, keep=60),
    Column("OF IT FORKS", lambda row: row.fork_s.text(0, 1000), right=True, keep=70),
    Column("INDEPENDENT MS", lambda row: row.independent_s.text(0, 1000), right=True, keep=50),
    Column("RATIO", lambda row: row.speedup.text(), right=True, keep=99),
    Column("KV OF ALL / OF ONE", lambda row: row.copies.text(), right=True, keep=90),
    Column("LATER", lambda row: row.later_copies.text(), right=True, keep=40),
    Column("RESERVED", lambda row: f"{row.reserved_copies:.2f}", right=True, keep=30),
]

SPEC = benchmark(
    "fork",
    "children of a long prompt, against as many independent runs",
    _run,
    _arguments,
    ("bench fork --children 8 --prompt 1000",),
    notes="The prompt is in both times, so the ratio is at best the number of children.",
)
