"""Swap: KV state outside its engine, in RAM or, when that is short, on disk.

Owner: the kernel; dispatchers put and read. Lock: the ledger's, inside it; the rates below are hints and
need none. Files have no name: what a dead LLMOS had swapped out is gone with it.
Not here: who is swapped out (dispatcher), the form of the state (the engine's).
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from kernel.device import EngineInfo
from kernel.errors import AdmissionRefused
from kernel.memory import MemoryLedger, Pool

RAM, DISK = "ram", "disk"


class SwappedKv:
    """One thread's KV state; its bytes are claimed until it is freed. Fills `process.Swapped`."""

    __slots__ = ("_blob", "_file", "_free", "size_bytes")

    def __init__(
        self, blob: bytes | None, file: IO[bytes] | None, size_bytes: int, free: Callable[[], None]
    ) -> None:
        self._blob, self._file, self._free = blob, file, free
        self.size_bytes = size_bytes

    def read(self) -> bytes | None:
        """None if the disk does not give it back."""
        if self._file is None:
            return self._blob
        try:
            self._file.seek(0)
            blob = self._file.read()
        except OSError:
            return None
        return blob if len(blob) == self.size_bytes else None

    def free(self) -> None:
        if self._blob is not None or self._file is not None:
            self._free()
        if self._file is not None:
            self._file.close()
        self._blob = self._file = None


class SwapSpace:
    """Where swapped state is kept. `now_s` times the disk."""

    def __init__(self, ledger: MemoryLedger, folder: Path | None, now_s: Callable[[], float]) -> None:
        self._ledger = ledger
        self._folder = folder
        self._now_s = now_s
        self._disk_byte_s = 0.0  # of the last write

    def pays(self, info: EngineInfo, tokens: int) -> bool:
        """Whether moving so many tokens out and in again is cheaper than computing them again."""
        size_bytes = tokens * info.kv_bytes_per_token
        disk_s = 0.0 if self._ledger.free_bytes(RAM) >= size_bytes else size_bytes * self._disk_byte_s
        return 2 * (tokens * info.copy_token_s + disk_s) <= tokens * info.prefill_token_s

    def put(self, pid: int, thread: int, blob: bytes) -> SwappedKv | None:
        """Keep a state; None if there is no room for it: then it is to be computed again."""
        owner = f"process {pid}.{thread}" if thread else f"process {pid}"
        if self._claim(RAM, owner, len(blob)):
            return SwappedKv(blob, None, len(blob), lambda: self._release(RAM, owner))
        if self._folder is None or not self._claim(DISK, owner, len(blob)):
            return None
        file = self._write(self._folder, blob)
        if file is None:
            self._release(DISK, owner)
            return None
        return SwappedKv(None, file, len(blob), lambda: self._release(DISK, owner))

    def _claim(self, pool: str, owner: str, size_bytes: int) -> bool:
        try:
            self._ledger.claim(pool, owner, {"kv": size_bytes})
        except AdmissionRefused:
            return False
        return True

    def _release(self, pool: str, owner: str) -> None:
        self._ledger.release(pool, owner, "kv")

    def _write(self, folder: Path, blob: bytes) -> IO[bytes] | None:
        begin_s = self._now_s()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the state
        except OSError:
            return None
        try:
            file.write(blob)
            file.flush()
        except OSError:
            file.close()
            return None
        self._disk_byte_s = (self._now_s() - begin_s) / max(1, len(blob))
        return file


def disk_pool(folder: Path, reserve_bytes: int) -> Pool:
    """The pool of the disk that a folder is, or will be, on."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return Pool(DISK, shutil.disk_usage(there).total, reserve_bytes, lambda: _free_bytes(there))


def _free_bytes(folder: Path) -> int:
    """Of a disk that is gone nothing is left."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
