"""Time, injected. No kernel file calls `time` itself.

`RealClock` is the machine's monotonic clock with a wall-clock offset; `ManualClock` is fed by hand,
so a simulated day takes seconds and one seed gives one log.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since some fixed instant, never going back."""

    def now_s(self) -> float:
        """Monotonic seconds."""

    def wall_s(self) -> float:
        """Seconds since the Unix epoch."""

    def sleep(self, duration_s: float) -> None:
        """Let time pass."""


class RealClock:
    """The machine's clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    def sleep(self, duration_s: float) -> None:
        time.sleep(duration_s)


class ManualClock:
    """Stands still until told to move."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._now_s

    def sleep(self, duration_s: float) -> None:
        self._now_s += duration_s
