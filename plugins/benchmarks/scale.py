"""`bench scale`: what a scheduling decision costs, and what a queued process weighs, as they grow in number.

A decision is what the scheduler does for each request that it grants: pick the thread with the best claim
and charge it, in the production run queue, with nice values mixed: with 64 seats, where the others wait
for one, and with a seat for each.
Not here: what an engine costs (throughput).
"""

import gc
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass

from drivers.simmodel import SimModel
from kernel.fairness import OUTPUT_UNITS
from kernel.runqueue import RunQueue
from kernel.spec import ProcessSpec
from plugins.benchmarks.replay import Replay, percentile
from plugins.benchmarks.trace import Request

SIZES = (1_000, 10_000, 100_000)
DECISIONS = 20_000
SEATS = 64
NICES = (-10, -5, 0, 0, 0, 5, 10, 19)


@dataclass(frozen=True, slots=True)
class Scale:
    """Costs by number of processes, fewest first, in microseconds."""

    processes: dict[str, dict[str, float]]
    bytes_per_process: float

    def growth(self, field: str) -> float:
        """Of the most processes over that of the fewest."""
        rows = list(self.processes.values())
        return rows[-1][field] / rows[0][field]

    def report(self) -> dict[str, object]:
        """What --json prints."""
        return {
            "processes": self.processes,
            "growth_p50": self.growth("decision_p50_us"),
            "growth_p99": self.growth("decision_p99_us"),
            "all_seated_growth_p50": self.growth("all_seated_p50_us"),
            "all_seated_growth_p99": self.growth("all_seated_p99_us"),
            "bytes_per_process": self.bytes_per_process,
        }


def scale(sizes: Sequence[int] = SIZES, decisions: int = DECISIONS) -> Scale:
    """Measure; seconds, mostly for spawning."""
    rows = {str(size): _decide(size, decisions) for size in sizes}
    return Scale(rows, bytes_per_process(min(5_000, sizes[-1])))


def _system() -> Replay:
    return Replay([Request(0.0, "0", 1, 1)], SimModel(mean_tokens=0, sequences=4), "fair")


def _spawn(replay: Replay, count: int) -> None:
    for n in range(count):
        replay.system.spawn(ProcessSpec("trace", ("w",), nice=NICES[n % len(NICES)]))


def _decide(size: int, decisions: int) -> dict[str, float]:
    replay = _system()
    began_s = time.perf_counter()
    _spawn(replay, size)
    spawn_us = (time.perf_counter() - began_s) / size * 1e6
    queue = replay.kernel.models["trace"].queue
    threads = list(queue)
    for thread in threads[:SEATS]:
        queue.seat(thread, True)
    decision = _time(queue, decisions)
    for thread in threads[SEATS:]:
        queue.seat(thread, True)
    crowd = _time(queue, decisions)
    return {
        "decision_p50_us": percentile(decision, 0.50),
        "decision_p99_us": percentile(decision, 0.99),
        "all_seated_p50_us": percentile(crowd, 0.50),
        "all_seated_p99_us": percentile(crowd, 0.99),
        "spawn_us": spawn_us,
    }


def _time(queue: RunQueue, decisions: int) -> list[float]:
    """Microseconds of each decision, in order of size."""
    times_us = []
    for _ in range(decisions):
        at_ns = time.perf_counter_ns()
        thread = queue.pick()
        assert thread is not None
        queue.charge(thread, OUTPUT_UNITS)
        times_us.append((time.perf_counter_ns() - at_ns) / 1000)
    return sorted(times_us)


def bytes_per_process(count: int) -> float:
    """Of the kernel's own: the specification, which the caller made, is counted too."""
    replay = _system()
    _spawn(replay, 16)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        _spawn(replay, count)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / count
