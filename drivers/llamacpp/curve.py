"""What a decode pass costs by the number of sequences in it, and how to divide a round of them into passes.

The curve is not smooth: on a CPU with Q8_0 weights, a pass of 2 sequences takes longer than two passes of
one (9.2 ms against 2 x 3.3 ms for 61 M parameters on one Zen 4 core), and 16 take no longer than 12. Other
programs can bend it while it is measured, so a division must have been cheaper each time.
Owner: one engine; it learns when larger slabs are made. Not here: measuring (calibrate.py).
"""

from collections.abc import Mapping, Sequence
from typing import Final

WORTH: Final = 0.8  # a round is divided if that takes less than this part of the time

Points = Mapping[int, float]  # seconds of a pass, by sequences in it


class Curve:
    """A curve that was measured several times, always at the same points."""

    def __init__(self, rounds: Sequence[Points]) -> None:
        self._rounds = [dict(points) for points in rounds]
        self._firsts: dict[int, int] = {}

    @property
    def least_s(self) -> dict[int, float]:
        """At each point, the least of what was measured."""
        return {size: min(points[size] for points in self._rounds) for size in self._rounds[0]}

    def learn(self, sequences: int, seconds: float) -> None:
        """One more point."""
        for points in self._rounds:
            points[sequences] = seconds
        self._firsts.clear()

    def first(self, sequences: int) -> int:
        """How many of so many sequences to compute in one pass."""
        first = self._firsts.get(sequences)
        if first is None:
            first = self._firsts[sequences] = self._first(sequences)
        return first

    def round_s(self, sequences: int) -> float:
        """Seconds of one token for each."""
        return _divided_s(self.least_s, sequences, self.first(sequences))

    def _first(self, sequences: int) -> int:
        least_s = self.least_s
        smaller = [size for size in least_s if size < sequences]
        best = min(smaller, key=lambda size: _divided_s(least_s, sequences, size), default=sequences)
        cheaper = [
            _divided_s(points, sequences, best) < WORTH * _pass_s(points, sequences)
            for points in self._rounds
        ]
        return best if len(cheaper) > 1 and all(cheaper) else sequences


def _divided_s(points: Points, sequences: int, part: int) -> float:
    """Of passes of so many, and one of the rest."""
    whole, rest = divmod(sequences, part)
    return whole * _pass_s(points, part) + (_pass_s(points, rest) if rest else 0.0)


def _pass_s(points: Points, sequences: int) -> float:
    """Straight lines between points; beyond them, as the last one per sequence."""
    sizes = sorted(points)
    above = next((size for size in sizes if size >= sequences), None)
    if above is None:
        return points[sizes[-1]] * sequences / sizes[-1]
    below = max((size for size in sizes if size <= sequences), default=above)
    part = (sequences - below) / max(1, above - below)
    return points[below] + part * (points[above] - points[below])
