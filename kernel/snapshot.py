"""Frozen views for readers: the shell, the monitor, plugins, other programs.

Names here are public: `ps --json`, `models --json` and `free --json` print these fields, raw bytes
and seconds. Adding a field is fine; renaming or removing one is not.
"""

from dataclasses import dataclass

from kernel.device import DeviceInfo, EngineInfo, ModelInfo

BY_HAND = "`swapin`"  # what a process waits for that was swapped out by hand


@dataclass(frozen=True, slots=True)
class ProcessView:
    """One row of `ps`."""

    pid: int
    ppid: int
    nice: int
    state: str  # NEW RUNNABLE RUNNING SLEEPING STOPPED SWAPPED ZOMBIE
    program: str  # generate chat embed train host
    model: str
    device: str  # "" while the model is not open
    threads: int
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int  # prompt tokens found in the KV cache instead of computed
    tokens_per_s: float  # output tokens, over about the last second of its life
    context_tokens: int  # tokens now in the window, all threads
    context_limit_tokens: int  # of all their windows
    kv_bytes: int
    device_s: float  # device time received
    started_s: float  # seconds since the epoch
    elapsed_s: float  # wall seconds from spawn to now, or to its end
    first_token_s: float | None  # seconds from spawn to the first output token
    items_done: int  # prompts answered
    items_total: int
    share_due: float  # service units its weight entitled it to while it was runnable
    share_received: float  # service units it got: 1 per prompt token, 2 per output token
    waits_for: str  # in words; "" if it waits for nothing
    exit_code: int | None
    error: str  # one line, if it ended by an error; of a chat that goes on: its last turn's that failed
    hint: str
    command: str
    items_failed: int = 0
    hung_up: bool = False  # nothing more will be said to a chat
    cpus: float = 0.0  # held in the ledger, as declared; 0 while it waits
    gpus: float = 0.0
    mem_bytes: int = 0

    @property
    def letter(self) -> str:
        """Its state: R also between two turns, Q for one that waits for memory, a model or a seat on it."""
        if self.state == "RUNNABLE" and self.waits_for:
            return "Q"
        return _LETTERS.get(self.state, "?")


_LETTERS = {
    "NEW": "Q",
    "RUNNABLE": "R",
    "RUNNING": "R",
    "SLEEPING": "S",
    "STOPPED": "T",
    "SWAPPED": "W",
    "ZOMBIE": "Z",
}


@dataclass(frozen=True, slots=True)
class ModelView:
    """One row of `models`.

    state: "disk", "waiting" (for memory), "loading", "loaded", "evicting", "failed", "quarantined".
    """

    name: str
    path: str
    state: str
    device: str
    processes: int  # that use it now
    load_progress: float  # 0 to 1
    restarts: int  # of its worker
    worker_pid: int | None
    error: str
    info: ModelInfo | None
    engine: EngineInfo | None
    description: str = ""
    pinned: bool = False  # not evicted while it is idle
    load_s: float = 0.0  # the last load, as measured


@dataclass(frozen=True, slots=True)
class ClaimView:
    """One owner's bytes in a pool. kind: "weights", "kv", "compute", "training", "declared", "other"."""

    owner: str
    kind: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PoolView:
    """A place with room: a device's memory, or host RAM."""

    name: str
    capacity_bytes: int
    used_bytes: int  # the sum of claims
    free_bytes: int  # what can still be admitted
    claims: tuple[ClaimView, ...]
    reserve_bytes: int = 0  # never admitted: left to the machine


@dataclass(frozen=True, slots=True)
class ShareClaim:
    """One owner's part of the processors, in thousandths of one."""

    owner: str
    milli: int


@dataclass(frozen=True, slots=True)
class ShareView:
    """Processors that processes have declared to need: "cpus", "gpus". In thousandths of one."""

    name: str
    capacity_milli: int
    used_milli: int  # the sum of claims
    free_milli: int
    claims: tuple[ShareClaim, ...]


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device and what it does. `busy` is the share of the last second spent in steps, 0 to 1."""

    info: DeviceInfo
    busy: float
    tokens_per_s: float  # output tokens, all processes
    prefill_tokens_per_s: float
    running: int
    runnable: int
    batch: float  # mean sequences in recent steps


@dataclass(frozen=True, slots=True)
class SystemView:
    """Everything at one instant."""

    time_s: float  # seconds since the epoch
    uptime_s: float
    policy: str
    processes: tuple[ProcessView, ...]
    models: tuple[ModelView, ...]
    devices: tuple[DeviceView, ...]
    pools: tuple[PoolView, ...]
    shares: tuple[ShareView, ...] = ()


@dataclass(frozen=True, slots=True)
class LogView:
    """One line of `dmesg`."""

    time_s: float  # seconds since boot
    level: str  # debug info warn error
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class OutputView:
    """A piece of a process's output. Read again from `next_offset`, until `eof`."""

    text: str
    next_offset: int  # in characters
    eof: bool
