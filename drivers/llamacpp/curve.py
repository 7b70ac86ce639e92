"""What a decode pass costs by the number of sequences in it, and how to divide a round of them into passes.

The curve is not smooth: on a CPU with Q8_0 weights, a pass of 2 or 3 sequences takes longer than as many
passes of one (9.2 ms against 2 x 3.3 ms for 61 M parameters on one Zen 4 core), and 16 little
more than 12.
Owner: one engine; it learns when larger slabs are made. Not here: measuring (calibrate.py).
"""

from collections.abc import Mapping
from typing import Final

WORTH: Final = 0.9  # a round is divided if that is expected to take less than this part of the time


class Curve:
    """Measured points; between them straight lines, beyond them as the last one per sequence."""

    def __init__(self, step_s: Mapping[int, float]) -> None:
        self.step_s = dict(step_s)
        self._rounds: list[tuple[int, float]] = []  # by sequences: those in the first pass, seconds of all

    def learn(self, sequences: int, seconds: float) -> None:
        self.step_s[sequences] = seconds
        self._rounds.clear()

    @property
    def largest(self) -> int:
        return max(self.step_s)

    def first(self, sequences: int) -> int:
        """How many of so many sequences to compute in the first pass of a round."""
        return self._round(sequences)[0]

    def round_s(self, sequences: int) -> float:
        """Seconds of one token for each."""
        return self._round(sequences)[1]

    def _round(self, sequences: int) -> tuple[int, float]:
        rounds = self._rounds
        while len(rounds) <= sequences:
            count = len(rounds)
            whole_s = self._pass_s(count) if count else 0.0
            divided_s, first = min(
                ((self._pass_s(each) + rounds[count - each][1], each) for each in range(1, count)),
                default=(whole_s, count),
            )
            rounds.append((first, divided_s) if divided_s < WORTH * whole_s else (count, whole_s))
        return rounds[sequences]

    def _pass_s(self, sequences: int) -> float:
        sizes = sorted(self.step_s)
        above = next((size for size in sizes if size >= sequences), None)
        if above is None:
            return self.step_s[sizes[-1]] * sequences / sizes[-1]
        below = max((size for size in sizes if size <= sequences), default=above)
        if above == below:
            return self.step_s[above]
        part = (sequences - below) / (above - below)
        return self.step_s[below] + part * (self.step_s[above] - self.step_s[below])
