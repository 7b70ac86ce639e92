"""How an engine is laid out: the window, the seats, the threads. Every option is decided here.

Not here: the model's shape (shape.py), what a layout takes (estimate.py).
"""

import os
from dataclasses import dataclass
from typing import Final

from drivers.llamacpp.header import Header
from drivers.llamacpp.shape import shape
from kernel.device import EngineOptions
from kernel.errors import UsageError

WINDOW_STEP_TOKENS: Final = 256  # llama.cpp pads every window to this
DEFAULT_WINDOW_TOKENS: Final = 4096
DEFAULT_SEATS: Final = 16
MAX_SEATS: Final = 256  # llama_max_parallel_sequences()
MAX_WINDOW_TOKENS: Final = 1 << 22
CHUNK_TOKENS: Final = 128  # most tokens of one forward pass: bounds how long an interrupt waits
SMALL_FILE_BYTES: Final = 50_000_000  # below, a second thread costs more than it gives


@dataclass(frozen=True, slots=True)
class Layout:
    """How an engine is laid out: every option decided."""

    window_tokens: int
    seats: int
    threads: int

    @property
    def options(self) -> EngineOptions:
        return EngineOptions(self.window_tokens, self.seats, self.threads)


def decide(header: Header, options: EngineOptions, free_bytes: int, cores: int) -> Layout:
    """Fill in what the options leave open. Raises UsageError for options out of range."""
    form = shape(header)
    _check(options)
    window = options.context_tokens or min(form.context_tokens, DEFAULT_WINDOW_TOKENS)
    window = -(-window // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS
    seat_bytes = window * form.kv_bytes_per_token
    fitting = free_bytes // 4 // seat_bytes if seat_bytes else DEFAULT_SEATS
    seats = options.sequences or max(1, min(DEFAULT_SEATS, fitting))
    threads = options.threads or (1 if header.weights_bytes < SMALL_FILE_BYTES else cores)
    return Layout(window, seats, threads)


def _check(options: EngineOptions) -> None:
    if not 0 <= options.context_tokens <= MAX_WINDOW_TOKENS:
        raise UsageError(f"a context of {options.context_tokens} tokens; at most {MAX_WINDOW_TOKENS}")
    if not 0 <= options.sequences <= MAX_SEATS:
        raise UsageError(f"{options.sequences} sequences; at most {MAX_SEATS}")
    if not 0 <= options.threads <= 512:
        raise UsageError(f"{options.threads} threads; at most 512")


def cores() -> int:
    """Physical cores this process may run on."""
    import psutil

    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


def free_ram_bytes() -> int:
    """RAM that can be had without swapping, now."""
    import psutil

    return int(psutil.virtual_memory().available)
