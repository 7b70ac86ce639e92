"""Figures with their spread. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """The least, the middle and the most of some runs."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(min(values), median(values), max(values))

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """`0.97 (0.95 to 0.99)`"""
        least, median, most = (
            f"{scale * value:.{digits}f}" for value in (self.least, self.median, self.most)
        )
        return f"{median} ({least} to {most})"


@dataclass(frozen=True, slots=True)
class Tail:
    """How bad it gets: nearest-rank percentiles, so that each is a value that was measured."""

    p50: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Tail":
        ordered = sorted(values)
        return cls(_rank(ordered, 0.5), _rank(ordered, 0.99), ordered[-1])

    def text(self, digits: int = 0, scale: float = 1.0) -> str:
        """`1 / 1 / 2`"""
        return " / ".join(f"{scale * value:.{digits}f}" for value in (self.p50, self.p99, self.most))


def _rank(ordered: Sequence[float], fraction: float) -> float:
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]
