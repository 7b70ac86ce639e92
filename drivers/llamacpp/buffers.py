"""The memory an engine takes: asked for before the load, counted after it.

Owner: `open_engine`, for the time of a load. Not here: how the need is estimated (estimate.py).
"""

import re
from functools import cache
from typing import Final

from drivers.llamacpp.estimate import estimate
from drivers.llamacpp.header import Header
from drivers.llamacpp.layout import Layout
from drivers.llamacpp.shape import shape
from kernel.device import Estimate
from kernel.errors import AdmissionRefused

MIB: Final = 1 << 20
_CACHE = re.compile(r"(?:llama_kv_cache|llama_memory_recurrent): size =\s*([0-9.]+) MiB")
_BUFFER = re.compile(r"(KV|RS|compute|output|_REPACK model)\s+buffer size\s*=\s*([0-9.]+) MiB")


def admit(need_bytes: int, free_bytes: int) -> None:
    """Running out of memory in native code kills the process, so it is refused here."""
    if need_bytes > free_bytes:
        raise AdmissionRefused(
            f"needs {need_bytes // MIB} MiB; {free_bytes // MIB} MiB are free",
            "ask for fewer sequences or a smaller context",
        )


class Buffers:
    """Adds up what llama.cpp says it allocates; its C interface has no other way to ask."""

    def __init__(self) -> None:
        self.kv_bytes = 0
        self.cache_bytes = 0  # the same as llama.cpp counts it, which it does in a dry run as well
        self.repacked_bytes = 0
        self.compute_bytes = 0

    def hear(self, _level: str, line: str) -> None:
        self.cache_bytes += sum(round(float(size) * MIB) for size in _CACHE.findall(line))
        for kind, size in _BUFFER.findall(line):
            size_bytes = round(float(size) * MIB)
            if kind in ("KV", "RS"):
                self.kv_bytes += size_bytes
            elif kind == "_REPACK model":
                self.repacked_bytes += size_bytes  # a second copy of some weights, in a faster order
            else:
                self.compute_bytes += size_bytes

    def forget_contexts(self) -> None:
        """All contexts are freed."""
        self.kv_bytes = self.compute_bytes = 0


class Sizes:
    """What slabs take: estimated from the header, and corrected by what the first one took."""

    def __init__(self, header: Header, on_gpu: bool) -> None:
        self._header = header
        self._on_gpu = on_gpu
        self._kv_ratio = self._compute_ratio = 1.0
        self._expected = cache(self._estimate)  # the planning of slabs asks often

    def of(self, window_tokens: int, seats: int) -> int:
        """Bytes of a slab."""
        return sum(self.correct(self._expected(window_tokens, seats)))

    def of_unified(self, cells: int, seats: int) -> int:
        """The same of a unified slab: as of one seat, and the others' logits, computed and told."""
        return self.of(cells, 1) + (seats - 1) * 2 * 4 * shape(self._header).vocabulary

    def correct(self, expected: Estimate) -> tuple[int, int]:
        """(KV, compute) bytes of an estimate, as they will be."""
        return round(expected.kv_bytes * self._kv_ratio), round(expected.compute_bytes * self._compute_ratio)

    def learn(self, window_tokens: int, seats: int, taken: Buffers) -> None:
        expected = self._expected(window_tokens, seats)
        if expected.kv_bytes:
            self._kv_ratio = taken.kv_bytes / expected.kv_bytes
        # where the first one took less than expected, larger ones may not
        self._compute_ratio = max(1.0, taken.compute_bytes / expected.compute_bytes)

    def _estimate(self, window_tokens: int, seats: int) -> Estimate:
        return estimate(self._header, Layout(window_tokens, seats, threads=1, on_gpu=self._on_gpu))
