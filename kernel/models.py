"""Models: what is on disk, what is open on which device, and who sits in which seat.

Owner: the kernel creates and drops records; the device's dispatcher changes `seats` and `host`.
Lock: the process table's.
Not here: loading (kernel.loader), files and folders (the catalog that boot hands in).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from kernel.device import DeviceInfo, Driver, EngineHost, EngineOptions, Estimate, ModelInfo
from kernel.errors import Interrupted, LlmosError
from kernel.process import Thread
from kernel.runqueue import RunQueue
from kernel.snapshot import ModelView


class CatalogEntry(Protocol):
    """A model that can be named."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def description(self) -> str: ...


class Catalog(Protocol):
    """Where models are on disk."""

    def list(self) -> Sequence[CatalogEntry]: ...

    def resolve(self, name: str) -> CatalogEntry:
        """By name, unique prefix or path. Raises ModelNotFound, UsageError (ambiguous)."""


class ModelState(Enum):
    WAITING = "waiting"  # for memory
    LOADING = "loading"
    LOADED = "loaded"
    EVICTING = "evicting"  # idle, and somebody needs its memory
    FAILED = "failed"
    QUARANTINED = "quarantined"


GUESSED_LOAD_BYTES_S = 1e9
"""Of a model that has never been loaded."""

_NEWEST = 0.2  # weight of the last gap in the mean


@dataclass(slots=True, eq=False)
class Usage:
    """What is known of a model, in memory or not: what loading it costs, and how often it is used."""

    load_s: float = 0.0  # the last load, as measured
    last_s: float | None = None  # when a process last came for it
    gap_s: float | None = None  # between two that came, on average

    def count(self, now_s: float) -> None:
        """A process has come for it."""
        if self.last_s is not None:
            gap_s = now_s - self.last_s
            self.gap_s = gap_s if self.gap_s is None else self.gap_s + _NEWEST * (gap_s - self.gap_s)
        self.last_s = now_s

    def next_use_s(self, now_s: float) -> float:
        """Seconds until the next one is expected: a gap after the last; overdue, as far off as it is late."""
        if self.last_s is None or self.gap_s is None:
            return math.inf
        return max(1e-3, abs(self.last_s + self.gap_s - now_s))


@dataclass(slots=True, eq=False)
class Model:
    """A model in use: asked for, loading, or open."""

    name: str
    description: str
    info: ModelInfo
    driver: Driver
    device: DeviceInfo
    options: EngineOptions
    estimate: Estimate
    usage: Usage
    state: ModelState = ModelState.WAITING
    host: EngineHost | None = None
    queue: RunQueue = field(default_factory=RunQueue)  # its runnable threads
    seats: list[Thread | None] = field(default_factory=list)
    draining: dict[int, int] = field(default_factory=dict)  # seat -> last quantum that may still name it
    to_close: list[int] = field(default_factory=list)  # vacated seats that the engine has not been told of
    kv_short: bool = False  # the engine refused a sequence for want of KV memory, and has closed none since
    borrowed: dict[int, int] = field(
        default_factory=dict
    )  # by seat: tokens with KV that another is charged for
    contested: bool = True  # something changed since nobody who waits had a claim to a taken seat
    users: int = 0  # processes that need it and have not ended
    progress: float = 0.0
    digest: str = ""  # of the file it was first opened from
    wanted: bool = False  # by a `load`, not only by the process that needs it
    opened_s: float = 0.0  # when it was loaded last
    pinned: bool = False  # not evicted, though nothing runs on it
    was_cut: bool = False  # a pass was cut short, and nothing has been computed since
    cancelled: bool = False
    restarts_s: list[float] = field(default_factory=list)  # when its worker was restarted
    error: LlmosError | None = None

    def open_host(self) -> EngineHost:
        assert self.host is not None
        return self.host

    def estimate_sizes(self) -> dict[str, int]:
        """What the ledger holds for it from the moment its load begins."""
        estimate = self.estimate
        return _sizes(estimate.weights_bytes, estimate.kv_bytes, estimate.compute_bytes)

    def measured_sizes(self) -> dict[str, int]:
        """What the ledger holds for it once it is open."""
        info = self.open_host().info
        return _sizes(info.weights_bytes, info.kv_bytes, info.compute_bytes)

    def held_bytes(self) -> int:
        """What its going would free."""
        if self.state is ModelState.WAITING:
            return 0
        return sum((self.measured_sizes() if self.host else self.estimate_sizes()).values())

    def reload_s(self) -> float:
        """What loading it costs: the last time's measure, or a guess."""
        return self.usage.load_s or self.estimate.total_bytes / GUESSED_LOAD_BYTES_S

    def keep_value(self, now_s: float) -> float:
        """Seconds of loading that a byte of it saves by staying, the less the farther off its next use is."""
        far_s = self.usage.next_use_s(now_s)
        if far_s == math.inf:  # used once, or not yet: as far off as that is ago
            far_s = max(1e-3, now_s - max(self.opened_s, self.usage.last_s or 0.0))
        return self.reload_s() / max(1, self.held_bytes()) / far_s

    def free_seat(self) -> int | None:
        """The lowest seat that a sequence can be opened on now, as far as we know. Engines like no gaps."""
        if self.kv_short:
            return None
        for seat, thread in enumerate(self.seats):
            if thread is None and seat not in self.draining and seat not in self.to_close:
                return seat
        return None

    def vacate(self, thread: Thread, last_quantum: int) -> None:
        """Take a thread off its seat. The seat is reused once the engine has closed it and quanta up
        to `last_quantum`, which may still name it, have ended: their events must not hit a newcomer."""
        seat, thread.seat = thread.seat, None
        if seat is not None:
            self.seats[seat] = None
            self.to_close.append(seat)
            if last_quantum:
                self.draining[seat] = last_quantum

    def decode_s(self, sequences: int) -> float:
        """Measured seconds per output token when so many sequences decode together."""
        costs = self.open_host().info.step_cost_s
        sizes = sorted(costs)
        size = next((n for n in sizes if n >= sequences), sizes[-1])
        return max(costs[size] / size, 1e-9)

    def view(self) -> ModelView:
        host, error = self.host, self.error.message if self.error else ""
        given_up = self.state is ModelState.FAILED and isinstance(self.error, Interrupted)
        return ModelView(
            name=self.name,
            path=str(self.info.path),
            state="disk" if given_up else self.state.value,
            device=self.device.name,
            processes=self.users,
            load_progress=self.progress,
            restarts=len(self.restarts_s),
            worker_pid=getattr(host, "pid", None),
            error="" if given_up else error,
            info=self.info,
            engine=host.info if host else None,
            description=self.description,
            pinned=self.pinned,
            load_s=self.usage.load_s,
        )


def _sizes(weights_bytes: int, kv_bytes: int, compute_bytes: int) -> dict[str, int]:
    return {"weights": weights_bytes, "kv": kv_bytes, "compute": compute_bytes}
