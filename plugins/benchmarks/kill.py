"""`bench kill`: how many engine steps pass between a signal and its effect.

Three processes draw tokens without end; a fourth is killed, stopped or reniced at a random moment, while
it draws or in the middle of its prompt. It runs at nice -20, so that nearly every pass is one of its own.
Times are taken inside the worker (probe.py) and compared with the moment the system call returned. Every
forward pass counts that was under way at that moment, or began after it, and still
  kill     ran before the seat's KV was freed;
  stop     computed a token of the process that was stopped;
  renice   (from 19 to -20) ran before the first pass that served the process.
"""

import argparse
import queue
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kernel.errors import KernelFault
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
from plugins.benchmarks.probe import Freed, ProbedDriver
from plugins.benchmarks.progress import Tell
from plugins.benchmarks.spread import Tail
from plugins.benchmarks.throughput import positive
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

NEIGHBOURS = 3
WINDOW_TOKENS = 2048
PROMPT_TOKENS = 1500  # of a process that is caught in the middle of it
SETTLE_S = 0.1  # how long a stop or a renice is watched
PATIENCE_S = 60.0
AIM_STEPS = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One signal and its effect."""

    steps: int  # passes under way when the call returned, or later, before the effect
    begun: int  # of these, those that began after the call had returned
    latency_s: float  # from the call's return to the effect


@dataclass(frozen=True, slots=True)
class Row:
    """All samples of one action. Where a tail's fields are seconds its name says so."""

    action: str
    during: str
    samples: int
    steps: Tail
    begun_after: Tail
    latency_s: Tail


class Bench:
    """A machine with neighbours at work, and the four actions."""

    def __init__(self, machine: Machine, probe: ProbedDriver) -> None:
        self.machine = machine
        self.probe = probe
        self.random = random.Random(0)
        engine = machine.model.engine
        assert engine is not None
        self._prompt_s = engine.prefill_token_s * PROMPT_TOKENS
        self._step_s = engine.step_cost_s[max(engine.step_cost_s)]
        for number in range(NEIGHBOURS):
            machine.system.spawn(machine.spec(f"neighbour {number}", WINDOW_TOKENS // 8, items=100_000))

    def kill_drawing(self) -> Sample | None:
        pid = self._drawing()
        time.sleep(self.random.uniform(0.0, 3 * self._step_s))
        return self._kill(pid)

    def kill_in_prompt(self) -> Sample | None:
        """None if the prompt was over, or not begun, when the signal came."""
        pid = self._reading()
        return self._kill(pid, in_prompt=True)

    def stop_drawing(self) -> Sample | None:
        pid = self._drawing()
        time.sleep(self.random.uniform(0.0, 3 * self._step_s))
        return self._stop(pid)

    def stop_in_prompt(self) -> Sample | None:
        """None if the prompt was over, or not begun, when the signal came."""
        pid = self._reading()
        return self._stop(pid, in_prompt=True)

    def renice(self) -> Sample | None:
        """None if the process was never served again while it was watched."""
        system, pid = self.machine.system, self._drawing()
        seat = self._seat(pid)
        system.renice(pid, 19)
        time.sleep(SETTLE_S + self.random.uniform(0.0, 3 * self._step_s))
        system.renice(pid, -20)
        returned_s = time.monotonic()
        time.sleep(SETTLE_S + 20 * self._step_s)
        self._end(pid)
        after = [step for step in self.probe.steps if step.end_s > returned_s]
        served = next((place for place, step in enumerate(after) if seat in step.tokens), None)
        if served is None:
            return None
        late = [step for step in after[:served] if step.begin_s > returned_s]
        return Sample(served, len(late), max(0.0, after[served].begin_s - returned_s))

    def _reading(self) -> int:
        """A process that is somewhere in its prompt, if all goes well."""
        pid = self.machine.system.spawn(self.machine.spec(self._long(), 0, nice=-20))
        time.sleep(self.random.uniform(0.05, 0.4) * self._prompt_s)
        return pid

    def _long(self) -> str:
        """A prompt of which nothing is in a cache."""
        return random_text(PROMPT_TOKENS, str(self.random.random()))

    def _drawing(self) -> int:
        """A process that has begun to answer."""
        system = self.machine.system
        pid = system.spawn(self.machine.spec("victim", 0, nice=-20))
        if not system.read(pid, 0, PATIENCE_S).text:
            raise KernelFault("a process says nothing")
        return pid

    def _seat(self, pid: int) -> int | None:
        return self.machine.kernel.table.get(pid).threads[0].seat

    def _end(self, pid: int) -> tuple[int | None, float, Freed]:
        """Kill it: (its seat, when the call returned, when the seat was free)."""
        seat = self._seat(pid)
        while not self.probe.freed.empty():
            self.probe.freed.get_nowait()
        self.machine.system.signal(pid, Signal.KILL)
        returned_s = time.monotonic()
        self.machine.system.reap(pid)
        if seat is None:  # it never sat: nothing is freed
            return None, returned_s, Freed(-1, returned_s)
        try:
            freed = self.probe.freed.get(timeout=PATIENCE_S)
            while freed.seq != seat:
                freed = self.probe.freed.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise KernelFault("a killed process keeps its seat") from None
        return seat, returned_s, freed

    def _kill(self, pid: int, *, in_prompt: bool = False) -> Sample | None:
        if in_prompt and not self._mid_prompt(pid):
            self._end(pid)
            return None
        self.probe.steps.clear()
        _, returned_s, freed = self._end(pid)
        steps = [s for s in self.probe.steps if s.end_s > returned_s and s.begin_s < freed.at_s]
        begun = sum(step.begin_s > returned_s for step in steps)
        return Sample(len(steps), begun, max(0.0, freed.at_s - returned_s))

    def _stop(self, pid: int, *, in_prompt: bool = False) -> Sample | None:
        if in_prompt and not self._mid_prompt(pid):
            self._end(pid)
            return None
        self.machine.system.signal(pid, Signal.STOP)
        returned_s = time.monotonic()
        time.sleep(SETTLE_S)
        seat, _, _ = self._end(pid)
        steps = [s for s in self.probe.steps if s.end_s > returned_s and seat in s.tokens]
        begun = sum(step.begin_s > returned_s for step in steps)
        return Sample(len(steps), begun, steps[-1].end_s - returned_s if steps else 0.0)

    def _mid_prompt(self, pid: int) -> bool:
        """Whether some of its prompt is computed, and some is not."""
        thread = self.machine.kernel.table.get(pid).threads[0]
        return 0 < thread.computed < thread.prompt_length


def measure(path: Path, repeat: int, tell: Tell) -> list[Row]:
    """Every action, so many times."""
    probe = ProbedDriver()
    tell("kill: loading")
    with booted(path, options(path, NEIGHBOURS + 1, WINDOW_TOKENS), probe) as machine:
        bench = Bench(machine, probe)
        plan: list[tuple[str, str, Callable[[], Sample | None]]] = [
            ("kill", "decode", bench.kill_drawing),
            ("kill", "prompt", bench.kill_in_prompt),
            ("stop", "decode", bench.stop_drawing),
            ("stop", "prompt", bench.stop_in_prompt),
            ("renice", "decode", bench.renice),
        ]
        rows = []
        for action, during, act in plan:
            samples = []
            for number in range(repeat):
                tell(f"kill: {action} in {during}, {number + 1} of {repeat}")
                probe.steps.clear()
                samples.append(act())
            rows += _rows(action, during, [sample for sample in samples if sample is not None])
        return rows


def _rows(action: str, during: str, samples: Sequence[Sample]) -> list[Row]:
    """One row; none if no sample came at the right moment."""
    if not samples:
        return []
    steps = Tail.of([sample.steps for sample in samples])
    begun = Tail.of([sample.begun for sample in samples])
    latency_s = Tail.of([sample.latency_s for sample in samples])
    return [Row(action, during, len(samples), steps, begun, latency_s)]


def _arguments(parser: Arguments) -> None:
    model_argument(parser)
    parser.add("--repeat", type=positive, default=50, metavar="R", help="signals of each kind; 50")


def _run(shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[Row]:
    check_idle(shell)
    path = model_path(shell, args.model, tell)
    rows = measure(path, args.repeat, tell)
    head = f"engine steps from a signal to its effect, beside {NEIGHBOURS} processes; p50 / p99 / most"
    return Report(report(path, rows), _COLUMNS, rows, head)


def report(path: Path, rows: Sequence[Row]) -> dict[str, object]:
    """What --json prints."""
    return {"model": str(path), "aim_steps": AIM_STEPS, "rows": [asdict(row) for row in rows]}


_COLUMNS: list[Column[Row]] = [
    Column("SIGNAL", lambda row: row.action, keep=99),
    Column("DURING", lambda row: row.during, keep=98),
    Column("SAMPLES", lambda row: str(row.samples), right=True, keep=50),
    Column("STEPS", lambda row: row.steps.text(), right=True, keep=90),
    Column("BEGUN AFTER", lambda row: row.begun_after.text(), right=True, keep=80),
    Column("MS", lambda row: row.latency_s.text(1, 1000), right=True, keep=70),
]

SPEC = benchmark(
    "kill",
    "engine steps from kill, stop and renice to their effect",
    _run,
    _arguments,
    ("bench kill --repeat 200",),
    notes="A step that was under way when the signal came counts as one.",
)
