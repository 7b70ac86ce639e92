"""Every limit of the kernel in one place, with units (after xv6's param.h)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Limits and tunables. Frozen: a running kernel's limits do not move."""

    policy: str = "fair"  # of scheduling; `kernel.policy` names them
    processes_max: int = 100_000
    groups_max: int = 10_000
    finished_max: int = 1_000  # reaped processes that are kept for `ps -a`
    quantum_s: float = 0.05  # device time that one quantum aims at
    mailbox_messages: int = 256
    log_lines: int = 2_000  # kept for dmesg
    rate_window_s: float = 1.0  # time constant of tokens_per_s
    restarts_max: int = 5  # worker restarts within restart_window_s before quarantine
    restart_window_s: float = 10.0
    restart_backoff_s: float = 0.1  # doubled at each restart in the window
    ram_reserve_bytes: int = 1 << 30  # never admitted: left to the machine
    disk_reserve_bytes: int = 1 << 30  # likewise of the disk that is swapped to
    prefill_chunk_tokens: int = 128  # of a prompt, in one grant
    prefill_chunk_min_tokens: int = 32  # smaller chunks waste the device, however slow it is
    patience: float = 4.0  # times what loading it costs that a model waits for others that are in use
    waiting_poll_s: float = 0.25  # how often it is looked after those who wait
    seat_slice_s: float = 1.0  # device time a process keeps its seat when others wait for one
