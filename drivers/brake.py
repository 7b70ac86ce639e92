"""The brake: one page of memory shared by a worker and its parent, to stop the worker with a store.

It holds the id up to which quanta are to end, and a two-byte string that an engine's native abort
callback reads within a step (empty: go on). No system call, no message: an interrupt costs a store.

Owner: the parent writes `stop`, the worker reads it and clears the abort flag.
Lock: one in the parent, as any thread may stop; held for two stores.
Order: the id is stored before the flag, and read after the flag is cleared: no stop is ever lost.
"""

import ctypes
import mmap
import os
import tempfile
import threading

AbortFlag = ctypes.Array[ctypes.c_char]
"""Two bytes, the second NUL: an empty string while the engine may go on."""


class Brake:
    """A mapping of the shared page. Stays valid after `fd` is closed."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        page = mmap.mmap(fd, mmap.PAGESIZE)
        self._through = ctypes.c_int64.from_buffer(page, 0)  # aligned: stored and read as a whole
        self.abort_flag: AbortFlag = (ctypes.c_char * 2).from_buffer(page, 8)
        self._lock = threading.Lock()

    @classmethod
    def create(cls) -> "Brake":
        """A new page, without a name in any file system."""
        fd = _anonymous_file()
        os.ftruncate(fd, mmap.PAGESIZE)
        brake = cls(fd)
        brake._through.value = -1
        return brake

    def stop(self, quantum: int, *, hard: bool) -> None:
        """End every quantum up to this id; with `hard`, within the step. From any thread."""
        with self._lock:
            self._through.value = max(self._through.value, quantum)
            if hard:
                self.abort_flag[0] = b"x"

    def stops(self, quantum: int) -> bool:
        """Whether this quantum is to end. Clears the abort flag: it was meant for the step before."""
        if self.abort_flag[0] != b"\0":
            self.abort_flag[0] = b"\0"
        return quantum <= self._through.value


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("llmos-brake")
    with tempfile.TemporaryFile() as file:  # macOS has no memfd
        return os.dup(file.fileno())
