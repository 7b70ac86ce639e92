"""`bench eviction`: three to six models, memory for two: how often models are loaded, how long it all takes.

The production kernel under a hand-fed clock, with simulated engines. Against it, on the same kernel, what a
simple server does: requests start in the order of their arrival, and the idle model that was used longest ago
goes. And against the optimum of whoever knows the trace beforehand (offline).
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from drivers.sim import SimDriver
from drivers.simmodel import SimModel
from kernel.clock import ManualClock
from kernel.device import (
    DeviceInfo,
    Driver,
    EngineOptions,
    InlineHost,
    LogLine,
    ModelInfo,
    Progress,
    Sampling,
)
from kernel.errors import ModelNotFound
from kernel.kernel import Kernel, Parts
from kernel.snapshot import ProcessView
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls
from plugins.benchmarks.command import Report, benchmark
from plugins.benchmarks.offline import Trace, in_order, reordered
from plugins.benchmarks.progress import Tell
from shell.registry import Arguments
from shell.render import Column
from shell.session import Shell

PLACES = 2
MODELS = (3, 4, 5, 6)
POLL_S = 0.25  # as often as the kernel looks after those who wait
REQUESTS = 200
OUTPUT_TOKENS = 20
GAP_S = 4.0
MODEL = SimModel(
    mean_tokens=0, weights_bytes=1 << 30, context_tokens=512, base_s=0.05, decode_s=0.01, load_s=4.0
)
"""A request alone takes 1.2 s, loading its model 4 s."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trace."""

    loads: int
    makespan_s: float
    wait_mean_s: float  # from arrival to the first token
    wait_max_s: float


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    path: Path
    description: str = ""


class _Catalog:
    def __init__(self, count: int) -> None:
        self.entries = [_Entry(f"m{n}", Path(f"m{n}.sim")) for n in range(count)]

    def list(self) -> list[_Entry]:
        return self.entries

    def resolve(self, name: str) -> _Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise ModelNotFound(f"no model {name}")


class _Counting(SimDriver):
    """Counts loads."""

    loads = 0

    def open(
        self, model: ModelInfo, device: DeviceInfo, options: EngineOptions, progress: Progress, log: LogLine
    ) -> InlineHost:
        self.loads += 1
        return super().open(model, device, options, progress, log)


class Simulation:
    """A kernel with memory for `PLACES` models, and the requests that have come."""

    def __init__(self, trace: Trace) -> None:
        count = 1 + max(model for _, model in trace)
        self.trace = trace
        self.clock = ManualClock()
        names = {f"m{n}.sim": replace(MODEL, seed=n) for n in range(count)}
        size = 1 + PLACES * (MODEL.weights_bytes + MODEL.compute_bytes + _kv_bytes())
        device = DeviceInfo("sim0", "sim", "simulated", size)
        self.driver = _Counting([device], sleep=self.clock.sleep, models=names)
        drivers: dict[str, Driver] = {".sim": self.driver}
        self.kernel = Kernel(Parts(self.clock, drivers, _Catalog(count), threaded=False))
        self.system = Syscalls(self.kernel)
        self.dispatcher = self.kernel.dispatchers["sim0"]
        self.came: list[int] = []  # PIDs, by number of request

    def spawn(self, number: int) -> None:
        sampling = Sampling(seed=number, ignore_eos=True)
        spec = ProcessSpec(
            f"m{self.trace[number][1]}", ("a request",), max_tokens=OUTPUT_TOKENS, sampling=sampling
        )
        self.came.append(self.system.spawn(spec))

    def play(self, arrive: Callable[[int], None], look: Callable[[], None] = lambda: None) -> Outcome:
        """Feed the trace by its times until all of it is answered."""
        coming = 0
        while True:
            while coming < len(self.trace) and self.trace[coming][0] <= self.clock.now_s():
                arrive(coming)
                coming += 1
            look()
            if self.dispatcher.advance():
                continue
            rest = [self.trace[coming][0] - self.clock.now_s()] if coming < len(self.trace) else []
            if self.kernel.admission.line:
                rest.append(POLL_S)
            if not rest:
                break
            self.clock.sleep(min(rest))
            self.kernel.admission.settle()
        self.kernel.check_integrity()
        return self.outcome()

    def outcome(self) -> Outcome:
        views = [self.system.process(pid) for pid in self.came]
        assert len(views) == len(self.trace) and all(view.exit_code == 0 for view in views)
        waits = [_first_s(view) - at_s for view, (at_s, _) in zip(views, self.trace, strict=True)]
        ends = [view.started_s + view.elapsed_s for view in views]
        return Outcome(self.driver.loads, max(ends), sum(waits) / len(waits), max(waits))


def _kv_bytes() -> int:
    return MODEL.kv_bytes_per_token * MODEL.context_tokens * MODEL.sequences


def _first_s(view: ProcessView) -> float:
    assert view.first_token_s is not None
    return view.started_s + view.first_token_s


def ours(trace: Trace) -> Outcome:
    """LLMOS: each request is a process from the moment of its arrival."""
    sim = Simulation(trace)
    return sim.play(sim.spawn)


def first_come(trace: Trace) -> Outcome:
    """A queue: who came first starts first; the idle model that was used longest ago makes room."""
    sim = Simulation(trace)
    queue: list[int] = []
    used: dict[str, None] = {}  # longest ago first

    def look() -> None:
        while queue and _room_for(f"m{trace[queue[0]][1]}"):
            name = f"m{trace[queue[0]][1]}"
            used.pop(name, None)
            used[name] = None
            sim.spawn(queue.pop(0))

    def _room_for(name: str) -> bool:
        records = sim.kernel.models
        if name in records or len(records) < PLACES:
            return True
        idle = [other for other in used if other in records and not records[other].users]
        if idle:
            sim.system.unload(idle[0])
        return bool(idle)

    return sim.play(queue.append, look)


# Traces


def skewed(models: int, seed: int, count: int = REQUESTS, gap_s: float = GAP_S) -> Trace:
    """Poisson arrivals, popularity as 1/rank."""
    draw, now_s, trace = random.Random(seed), 0.0, []
    weights = [1 / (rank + 1) for rank in range(models)]
    for _ in range(count):
        now_s += draw.expovariate(1 / gap_s)
        trace.append((now_s, draw.choices(range(models), weights)[0]))
    return trace


def alternating(models: int, seed: int, count: int = REQUESTS, gap_s: float = GAP_S) -> Trace:
    """Each model in its turn: the worst there is for least-recently-used."""
    draw = random.Random(seed)
    return [(n * gap_s + draw.uniform(0, gap_s), n % models) for n in range(count)]


def queued(models: int, seed: int, count: int = REQUESTS) -> Trace:
    """All at once, in any order: a night's batch."""
    draw = random.Random(seed)
    return [(0.0, draw.randrange(models)) for _ in range(count)]


TRACES: dict[str, Callable[..., Trace]] = {"skewed": skewed, "alternating": alternating, "queued": queued}


def compare(trace: Trace) -> dict[str, float]:
    """One row of the report."""
    simple, mine = first_come(trace), ours(trace)
    ordered, free = in_order(trace, PLACES), reordered(trace, PLACES, mine.wait_max_s)
    return {
        **{f"lru_{name}": value for name, value in asdict(simple).items()},
        **{f"llmos_{name}": value for name, value in asdict(mine).items()},
        "optimum_loads": ordered,
        "optimum_reordered_loads": free,
        "loads_ratio": mine.loads / ordered,
        "loads_ratio_reordered": mine.loads / free,
    }


_Row = tuple[str, dict[str, float]]


def _arguments(parser: Arguments) -> None:
    parser.add("--seed", type=int, default=1, metavar="N", help="of the traces")


def _run(shell: Shell, args: argparse.Namespace, tell: Tell) -> Report[_Row]:
    rows: dict[str, dict[str, float]] = {}
    for name, make in TRACES.items():
        for models in MODELS:
            tell(f"{name}, {models} models")
            rows[f"{name} {models}"] = compare(make(models, args.seed))
    return Report(rows, _COLUMNS, list(rows.items()))


def _column(header: str, field: str, keep: int, form: str = "{:.0f}") -> Column[_Row]:
    return Column(header, lambda row: form.format(row[1][field]), right=True, keep=keep)


_COLUMNS: list[Column[_Row]] = [
    Column("TRACE", lambda row: row[0], keep=99),
    _column("LRU", "lru_loads", 90),
    _column("LOADS", "llmos_loads", 98),
    _column("OPTIMUM", "optimum_loads", 97),
    _column("RATIO", "loads_ratio", 96, "{:.2f}"),
    _column("REORDERED", "optimum_reordered_loads", 60),
    _column("LRU_S", "lru_makespan_s", 80),
    _column("MAKESPAN_S", "llmos_makespan_s", 85),
    _column("LRU_WAIT_S", "lru_wait_mean_s", 50, "{:.1f}"),
    _column("WAIT_S", "llmos_wait_mean_s", 55, "{:.1f}"),
    _column("WAIT_MAX_S", "llmos_wait_max_s", 40),
]

SPEC = benchmark(
    "eviction",
    "more models than memory: loads and makespan, against a simple server and the offline optimum",
    _run,
    _arguments,
    ("bench eviction --json",),
    notes="Simulated: 200 requests of 1.2 s for 3 to 6 models of 4 s to load, memory for 2.\n"
    "LRU: first come, first served; the idle model used longest ago goes. OPTIMUM: fewest loads of whoever\n"
    "knows the trace and serves it in order. REORDERED: fewest of any schedule in which nobody waits longer\n"
    "than WAIT_MAX_S, if loads and service took no time.",
)
