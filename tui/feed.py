"""The feed: pulls snapshots and keeps the short history that the graphs show.

Owner: the monitor's thread, which calls everything here; the kernel never pushes.
Not here: when to pull (app), how it looks (panels).
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kernel.snapshot import SystemView

_FADED = 0.02  # of the highest rate in sight


@dataclass(frozen=True, slots=True)
class Sample:
    """One point of every graph."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    busy: Mapping[str, float]  # by device name, 0 to 1


class Feed:
    """The newest view and the samples before it. `read` may be a recording."""

    def __init__(self, read: Callable[[], SystemView], samples_max: int = 600) -> None:
        self._read = read
        self.frozen = False
        self.history: deque[Sample] = deque(maxlen=samples_max)
        self.view = self._take()

    def pull(self) -> None:
        """Take one snapshot, unless frozen. Raises what `read` raises, and changes nothing then."""
        if not self.frozen:
            self.view = self._take()

    def _take(self) -> SystemView:
        view = self._read()
        decode = sum(device.tokens_per_s for device in view.devices)
        prefill = sum(device.prefill_tokens_per_s for device in view.devices)
        if not any(device.running or device.runnable for device in view.devices):
            decode = self._faded(decode, [sample.decode_tokens_per_s for sample in self.history])
            prefill = self._faded(prefill, [sample.prefill_tokens_per_s for sample in self.history])
        self.history.append(
            Sample(decode, prefill, {device.info.name: device.busy for device in view.devices})
        )
        return view

    @staticmethod
    def _faded(rate: float, before: list[float]) -> float:
        """A rate when nothing runs: the kernel's mean never quite forgets, and that rest is no speed."""
        return rate if rate > _FADED * max(before, default=0.0) else 0.0
