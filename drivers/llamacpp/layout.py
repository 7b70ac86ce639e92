"""How an engine is laid out: the window, the seats, the threads. Every option is decided here.

Not here: the model's shape (shape.py), what a layout takes (estimate.py).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drivers.llamacpp.header import Header
from drivers.llamacpp.shape import Shape, shape
from kernel.device import EngineOptions
from kernel.errors import UsageError

WINDOW_STEP_TOKENS: Final = 256  # llama.cpp pads every window to this
SHORT_WINDOW_TOKENS: Final = 4096  # a default window is never cut below it for memory
SHORTEST_TOKENS: Final = 1024  # the smallest class of window (budget.py)
DEFAULT_KV_TOKENS: Final = 65_536
DEFAULT_SEATS: Final = 64
UNIFORM_SEATS: Final = 16  # where every seat has the same window
DEFAULT_SHARE: Final = 4  # of the free RAM, this part at most
MAX_SEATS: Final = 256  # llama_max_parallel_sequences()
MAX_WINDOW_TOKENS: Final = 1 << 22
CHUNK_TOKENS: Final = 128  # most tokens of one forward pass: bounds how long an interrupt waits
LONG_CHUNK_TOKENS: Final = 64  # where windows are long: a chunk's attention scores take memory for all of it
LONG_WINDOW_TOKENS: Final = 8192
GPU_CHUNK_TOKENS: Final = 512
SMALL_FILE_BYTES: Final = 50_000_000  # below, a second thread costs more than it gives


@dataclass(frozen=True, slots=True)
class Layout:
    """How an engine is laid out: every option decided."""

    window_tokens: int  # the largest; slabs may have smaller ones
    seats: int  # most sequences at once
    threads: int
    kv_tokens: int = 0  # that sequences of any length share; 0: each seat has a whole window
    on_gpu: bool = False
    unified: bool = False  # of a slab: its seats share the cells of one window

    @property
    def options(self) -> EngineOptions:
        return EngineOptions(self.window_tokens, self.seats, self.threads, self.kv_tokens)

    @property
    def pool_tokens(self) -> int:
        return self.kv_tokens or self.window_tokens * self.seats


def decide(
    header: Header, options: EngineOptions, free_bytes: int, cores: int, on_gpu: bool = False
) -> Layout:
    """Fill in what the options leave open. Raises UsageError for options out of range.

    Many short sequences share the memory that a few long ones would take. But where a number of sequences
    is asked for, each has its whole window; and so where KV cannot be moved from one slab to another.
    """
    form = shape(header)
    _check(options)
    threads = options.threads or (1 if header.weights_bytes < SMALL_FILE_BYTES else cores)
    token_bytes = form.kv_bytes_per_token
    fitting = free_bytes // DEFAULT_SHARE // token_bytes if token_bytes else MAX_WINDOW_TOKENS
    shares = bool(options.kv_tokens or not options.sequences) and _is_movable(form)
    most = max(SHORT_WINDOW_TOKENS, fitting) if shares else SHORT_WINDOW_TOKENS
    window = options.context_tokens or min(form.context_tokens, most - most % WINDOW_STEP_TOKENS)
    window = -(-window // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS
    if not shares:
        seats = options.sequences or max(1, min(UNIFORM_SEATS, fitting // window))
        return Layout(window, seats, threads, on_gpu=on_gpu)
    shortest = min(window, SHORTEST_TOKENS)
    kv_tokens = options.kv_tokens or min(DEFAULT_KV_TOKENS, DEFAULT_SEATS * shortest, fitting)
    kv_tokens = max(window, kv_tokens)
    seats = options.sequences or min(DEFAULT_SEATS, kv_tokens // shortest)
    return Layout(window, seats, threads, kv_tokens, on_gpu)


def chunk_tokens(window_tokens: int, seats: int, on_gpu: bool) -> int:
    """Most tokens of one pass over a slab; at least one for each seat."""
    if on_gpu:  # it computes so many in a few milliseconds, and keeps no scores
        return max(seats, GPU_CHUNK_TOKENS)
    return max(seats, CHUNK_TOKENS if window_tokens < LONG_WINDOW_TOKENS else LONG_CHUNK_TOKENS)


def _is_movable(form: Shape) -> bool:
    """Whether the KV cache is of one part. Sliding windows and recurrent layers have others beside it."""
    return not any(layer.state_width or layer.slides for layer in form.layers)


def _check(options: EngineOptions) -> None:
    if not 0 <= options.context_tokens <= MAX_WINDOW_TOKENS:
        raise UsageError(f"a context of {options.context_tokens} tokens; at most {MAX_WINDOW_TOKENS}")
    if not 0 <= options.sequences <= MAX_SEATS:
        raise UsageError(f"{options.sequences} sequences; at most {MAX_SEATS}")
    if not 0 <= options.kv_tokens <= MAX_SEATS * MAX_WINDOW_TOKENS:
        raise UsageError(f"KV for {options.kv_tokens} tokens; at most {MAX_SEATS * MAX_WINDOW_TOKENS}")
    if not 0 <= options.threads <= 512:
        raise UsageError(f"{options.threads} threads; at most 512")


def cores() -> int:
    """Physical cores this process may run on."""
    try:
        cpus = [Path(f"/sys/devices/system/cpu/cpu{n}/topology") for n in os.sched_getaffinity(0)]
        return len({(cpu / "thread_siblings_list").read_text() for cpu in cpus})
    except (AttributeError, OSError):  # not Linux
        pass
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def ram_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_ram_bytes() -> int:
    """RAM that can be had without swapping, now."""
    import psutil

    return int(psutil.virtual_memory().available)
