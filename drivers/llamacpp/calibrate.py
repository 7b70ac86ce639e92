"""What a forward pass costs on this machine, measured once after the load.

Batches of a few sequences can cost more per token than the same sequences one by one, so the curve
is measured, not assumed. Bounded: about a third of a second for small models, a few passes for large.
Not here: acting on it (curve.py, and the scheduler).
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from drivers.llamacpp import kvstate
from drivers.llamacpp.curve import Curve
from drivers.llamacpp.slab import Slab
from kernel.errors import Interrupted

BUDGET_S: Final = 0.25
MOST_REPEATS: Final = 5
LEAST_ROUNDS: Final = 3  # of the curve
PREFILL_S: Final = 0.5  # a prompt chunk is cut to about this long on slow models


@dataclass(slots=True)
class _Probe:
    """A sequence of zeros. Fills `slab.Seated`."""

    seat: int
    tokens: list[int]
    computed: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds."""

    curve: Curve  # of decode passes
    prefill_token_s: float  # per prompt token in a chunk
    copy_token_s: float  # per token of KV, from one seat to another
    dump_token_s: float = 0.0  # per token of KV, to bytes with a checksum, or back


def measure(slab: Slab) -> Costs:
    """Leaves the slab empty. Raises Interrupted if the abort flag is set meanwhile."""
    _pass_s(slab, 1, 1)  # reads the weights from disk; not counted
    deadline_s = time.perf_counter() + BUDGET_S
    rounds = [_first_round(slab)]
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_REPEATS and time.perf_counter() < deadline_s):
        rounds.append({count: _pass_s(slab, count, 1) for count in rounds[0]})
    curve = Curve(rounds)
    most_tokens = max(8, int(2 * PREFILL_S / curve.least_s[1]))
    chunk = min(slab.capacity_tokens, slab.window_tokens - 1, most_tokens)
    prefill_s = _least_s(slab, 1, chunk, deadline_s)
    copy_s = min(_copy_s(slab, chunk) for _ in range(MOST_REPEATS))
    dump_s = min(_dump_s(slab, chunk) for _ in range(MOST_REPEATS))
    slab.clear()
    return Costs(curve, prefill_s / chunk, copy_s / chunk, dump_s / chunk)


def measure_more(slab: Slab, curve: Curve) -> None:
    """A new slab has more seats than any before: what does a pass of all of them cost? Leaves it empty."""
    if slab.seats > max(curve.least_s):
        with suppress(Interrupted):  # somebody waits for this pass to end: it stays unknown
            curve.learn(slab.seats, min(_pass_s(slab, slab.seats, 1) for _ in range(2)))
        slab.clear()


def _first_round(slab: Slab) -> dict[int, float]:
    """The whole curve once: what disturbs a measurement for a while disturbs all of its points."""
    points: dict[int, float] = {}
    for count in _counts(slab.seats):
        if count > 2 and max(points.values()) > BUDGET_S:
            break  # a large model: two points tell enough, and more would take seconds
        points[count] = _pass_s(slab, count, 1)
    return points


def _counts(seats: int) -> Iterator[int]:
    """1, 2, 4, 8, ... and the number of seats."""
    count = 1
    while count < seats:
        yield count
        count *= 2
    yield seats


def _least_s(slab: Slab, sequences: int, tokens: int, deadline_s: float) -> float:
    """The least of a few runs; of one run, if time is up."""
    least_s = _pass_s(slab, sequences, tokens)
    for _ in range(MOST_REPEATS - 1):
        if time.perf_counter() > deadline_s and least_s > BUDGET_S / 20:
            break
        least_s = min(least_s, _pass_s(slab, sequences, tokens))
    return least_s


def _copy_s(slab: Slab, tokens: int) -> float:
    """Of what the last pass left on the first seat, to the last one."""
    begin_s = time.perf_counter()
    slab.write(slab.seats - 1, slab.read(0), tokens)
    return time.perf_counter() - begin_s


def _dump_s(slab: Slab, tokens: int) -> float:
    """To bytes, of what is on the first seat, with the checksum that a dump has; restoring takes as long."""
    begin_s = time.perf_counter()
    kvstate.pack(b"", [0] * tokens, slab.read(0))
    return time.perf_counter() - begin_s


def _pass_s(slab: Slab, sequences: int, tokens: int) -> float:
    slab.clear()
    plan = [(_Probe(seat, [0] * tokens), tokens) for seat in range(sequences)]
    begin_s = time.perf_counter()
    if slab.compute(plan) is None:
        raise Interrupted("the load was cancelled")
    return time.perf_counter() - begin_s
