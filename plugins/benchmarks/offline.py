"""The fewest loads that any schedule could do with, knowing the whole trace beforehand.

`in_order`: requests are served in the order of their arrival; Belady's rule (1966) is optimal then.
`reordered`: requests may be put in any order, as long as the model of each is in memory at some moment
within `wait_s` of its arrival. Loading and serving take no time here, so this is a lower bound for every
schedule that lets nobody wait longer, on any machine.
Not here: the schedules that are measured against it (eviction).
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from itertools import combinations

Trace = Sequence[tuple[float, int]]
"""Arrivals in order: seconds, number of the model."""

State = tuple[frozenset[int], tuple[float, ...]]
"""Who is in memory, and by when each model has to be next; never, for those that are."""

NEVER = float("inf")


def in_order(trace: Trace, places: int) -> int:
    """Loads if first come is first served and who is needed last goes."""
    loads, here = 0, set[int]()
    for at, (_, model) in enumerate(trace):
        if model in here:
            continue
        loads += 1
        if len(here) == places:
            coming = [other for _, other in trace[at:]]
            here.remove(max(here, key=lambda m: coming.index(m) if m in coming else len(coming)))
        here.add(model)
    return loads


def reordered(trace: Trace, places: int, wait_s: float) -> int:
    """Loads if nobody waits longer than `wait_s`.

    Loads can be put off to the next moment at which some model has to be there: until then the others serve
    on. So a state changes only at such moments, when several models may pass through memory; all of them have
    then served what has come so far. Dynamic programming over these moments is exact.
    """
    models = sorted({model for _, model in trace})
    arrivals = {model: [s for s, other in trace if other == model] for model in models}

    def due_s(model: int, after_s: float) -> float:
        times = arrivals[model]
        index = bisect_right(times, after_s)
        return times[index] + wait_s if index < len(times) else NEVER

    start: State = (frozenset(), tuple(due_s(model, -1.0) for model in models))
    costs = {start: 0}
    moments = [(min(start[1]), 0)]
    at_moment: dict[float, dict[State, int]] = {min(start[1]): costs}
    best = len(trace)
    while moments:
        now_s, _ = heapq.heappop(moments)
        for state, cost in _undominated(at_moment.pop(now_s, {})):
            for (here, loads), out in _moves(models, state, now_s, wait_s, places):
                due = tuple(
                    NEVER if m in here else due_s(m, now_s) if m in out else state[1][i]
                    for i, m in enumerate(models)
                )
                if min(due) == NEVER:
                    best = min(best, cost + loads)
                    continue
                layer = at_moment.get(min(due))
                if layer is None:
                    layer = at_moment[min(due)] = {}
                    heapq.heappush(moments, (min(due), 0))
                if cost + loads < layer.get((here, due), best):
                    layer[here, due] = cost + loads
    return best


def _moves(
    models: Sequence[int], state: State, now_s: float, wait_s: float, places: int
) -> list[tuple[tuple[frozenset[int], int], frozenset[int]]]:
    """Who may be in memory after this moment, at how many loads; and who was in it at this moment."""
    here, due = state
    forced = {m for m, at_s in zip(models, due, strict=True) if at_s <= now_s}
    waiting = [m for m, at_s in zip(models, due, strict=True) if now_s < at_s <= now_s + wait_s]
    found = []
    for count in range(len(waiting) + 1):
        for more in combinations(waiting, count):
            loaded = forced | set(more)
            served = here | loaded
            kept = map(frozenset, combinations(sorted(served), min(places, len(served))))
            # Any number pass through the place that the last one then has.
            found += [((stay, len(loaded)), served) for stay in kept if stay & loaded]
    return found


def _undominated(layer: dict[State, int]) -> list[tuple[State, int]]:
    """Without states that another is as good as in every respect."""
    groups: dict[frozenset[int], list[tuple[tuple[float, ...], int]]] = {}
    for (here, due), cost in sorted(layer.items(), key=lambda item: item[1]):
        kept = groups.setdefault(here, [])
        if not any(c <= cost and all(a >= b for a, b in zip(d, due, strict=True)) for d, c in kept):
            kept.append((due, cost))
    return [((here, due), cost) for here, kept in groups.items() for due, cost in kept]
