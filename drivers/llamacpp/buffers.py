"""The memory an engine takes: asked for before the load, counted after it.

Owner: `open_engine`, for the time of a load. Not here: how the need is estimated (estimate.py).
"""

import re
from typing import Final

from drivers.llamacpp import layout
from kernel.errors import AdmissionRefused

MIB: Final = 1 << 20
_CACHE = re.compile(r"(?:llama_kv_cache|llama_memory_recurrent): size =\s*([0-9.]+) MiB")
_BUFFER = re.compile(r"(KV|RS|compute|output|_REPACK model)\s+buffer size\s*=\s*([0-9.]+) MiB")


def admit(need_bytes: int) -> None:
    """Running out of memory in native code kills the process, so it is refused here."""
    free_bytes = layout.free_ram_bytes()
    if need_bytes > free_bytes:
        raise AdmissionRefused(
            f"needs {need_bytes // MIB} MiB of RAM; {free_bytes // MIB} MiB are free",
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
