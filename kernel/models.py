"""Models: what is on disk, what is open on which device, and who sits in which seat.

Owner: the kernel creates and drops records; the device's dispatcher changes `seats` and `host`.
Lock: the process table's.
Not here: loading (kernel.loader), files and folders (the catalog that boot hands in).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from kernel.device import DeviceInfo, Driver, EngineHost, EngineOptions, ModelInfo
from kernel.errors import LlmosError
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
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"
    QUARANTINED = "quarantined"


@dataclass(slots=True, eq=False)
class Model:
    """A model in use: asked for, loading, or open."""

    name: str
    description: str
    info: ModelInfo
    driver: Driver
    device: DeviceInfo
    options: EngineOptions
    state: ModelState = ModelState.LOADING
    host: EngineHost | None = None
    queue: RunQueue = field(default_factory=RunQueue)  # its runnable threads
    seats: list[Thread | None] = field(default_factory=list)
    draining: dict[int, int] = field(default_factory=dict)  # seat -> last quantum that may still name it
    to_close: list[int] = field(default_factory=list)  # vacated seats that the engine has not been told of
    kv_short: bool = False  # the engine refused a sequence for want of KV memory, and has closed none since
    contested: bool = True  # something changed since nobody who waits had a claim to a taken seat
    users: set[int] = field(default_factory=set)  # PIDs
    progress: float = 0.0
    wanted: bool = False  # by a `load`, not only by the process that needs it
    cancelled: bool = False
    restarts_s: list[float] = field(default_factory=list)  # when its worker was restarted
    error: LlmosError | None = None

    def open_host(self) -> EngineHost:
        assert self.host is not None
        return self.host

    def free_seat(self) -> int | None:
        """The lowest free seat: engines like them contiguous."""
        for seat, thread in enumerate(self.seats):
            if thread is None and seat not in self.draining and seat not in self.to_close:
                return seat
        return None

    def has_seat(self) -> bool:
        """Whether a sequence can be opened now, as far as we know."""
        return not self.kv_short and self.free_seat() is not None

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
        host = self.host
        return ModelView(
            name=self.name,
            path=str(self.info.path),
            state=self.state.value,
            device=self.device.name,
            processes=len(self.users),
            load_progress=self.progress,
            restarts=len(self.restarts_s),
            worker_pid=getattr(host, "pid", None),
            error=self.error.message if self.error else "",
            info=self.info,
            engine=host.info if host else None,
            description=self.description,
        )
