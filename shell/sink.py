"""Sinks: a process's output on its way into a file, and where that file is for who resumes it.

Not here: jobs, and what is shown on the terminal (jobs).
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kernel.errors import LlmosError
from kernel.syscall import Signal, Syscalls
from shell.terminal import encode

if TYPE_CHECKING:
    from shell.session import Frame

GATHER_S = 0.1  # between two writes to a file: eight jobs would else wake a thread each, token by token


class Sink:
    """Copies a process's output into a file.

    Owner: its thread. `error` is written once, before the process is told to end.
    """

    def __init__(self, system: Syscalls, pid: int, file: BinaryIO, name: str) -> None:
        self.error = ""  # one line
        self._system = system
        self._pid = pid
        self._file = file
        self._name = name
        self._thread = threading.Thread(target=self._run, name=f"sink-{pid}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the file is closed."""
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._file:
                self._copy()
        except OSError as error:
            self.error = f"{self._name}: {error.strerror or error}"
            with contextlib.suppress(LlmosError):
                self._system.signal(self._pid, Signal.TERM)  # nothing of what it says can be kept
        except LlmosError as error:
            self.error = error.message

    def _copy(self) -> None:
        offset, last = 0, "\n"
        while True:
            piece = self._system.read(self._pid, offset, None)
            if piece.text:
                self._file.write(encode(piece.text))
                self._file.flush()
                last = piece.text[-1]
            offset = piece.next_offset
            if piece.eof:
                break
            self._system.wait(self._pid, GATHER_S)
        if last != "\n":
            self._file.write(b"\n")


def sink_of(frame: Frame) -> str:
    """Where a command's output goes, so that it can go on there after a crash; "" if not to a file."""
    if frame.stdout is None or not stat.S_ISREG(os.fstat(frame.stdout.fileno()).st_mode):
        return ""
    return json.dumps({"path": str(Path(frame.target).absolute()), "offset": frame.stdout.tell()})


@dataclass(frozen=True, slots=True)
class Reopened:
    """The file of `sink_of`, as another LLMOS left it."""

    file: BinaryIO
    path: str
    offset: int

    def cut_back(self) -> None:
        """To where the job began: its whole output is written again. Only by who goes on with the job."""
        offset = min(self.offset, os.fstat(self.file.fileno()).st_size)  # somebody may have emptied it
        self.file.truncate(offset)
        self.file.seek(offset)


def reopen_sink(description: str) -> Reopened | None:
    """Nothing in the file is changed; one that is gone is made anew. Raises LlmosError (cannot be opened)."""
    if not description:
        return None
    where = json.loads(description)
    try:
        file = os.fdopen(os.open(where["path"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
    except OSError as error:
        raise LlmosError(f"{where['path']}: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise LlmosError(f"{where['path']}: not a regular file any more")
    return Reopened(file, where["path"], where["offset"])
