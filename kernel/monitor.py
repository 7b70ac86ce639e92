"""Meters: rates over about the last second, without a thread that samples.

A rate is brought up to date when something is counted or read, so an idle kernel does nothing.
Lock: the owner's (the process table's lock).
"""

import math


class Rate:
    """Events per second, weighted by exp(-age / window); exact for a steady flow from the first second on."""

    __slots__ = ("_at_s", "_born_s", "_sum", "total", "window_s")

    def __init__(self, window_s: float, now_s: float) -> None:
        self.window_s = window_s
        self._sum = self.total = 0.0
        self._at_s = self._born_s = now_s

    def count(self, amount: float, now_s: float) -> None:
        self._sum = self._sum * math.exp((self._at_s - now_s) / self.window_s) + amount
        self.total += amount
        self._at_s = now_s

    def per_s(self, now_s: float) -> float:
        age_s = now_s - self._born_s
        if age_s <= 0.0 or self._sum == 0.0:
            return 0.0
        rest = self._sum * math.exp((self._at_s - now_s) / self.window_s)
        # The weights of [born, now] add up to window * (1 - exp(-age / window)).
        return rest / (self.window_s * -math.expm1(-age_s / self.window_s))


class DeviceMeter:
    """What a device has been doing lately."""

    def __init__(self, window_s: float, now_s: float) -> None:
        self.busy = Rate(window_s, now_s)  # device seconds per second
        self.output = Rate(window_s, now_s)
        self.prefill = Rate(window_s, now_s)
        self.steps = Rate(window_s, now_s)
        self.sequences = Rate(window_s, now_s)  # summed over steps

    def batch(self, now_s: float) -> float:
        """Mean sequences per step."""
        steps = self.steps.per_s(now_s)
        return self.sequences.per_s(now_s) / steps if steps > 1e-6 else 0.0
