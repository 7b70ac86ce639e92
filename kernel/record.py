"""A recording: every scheduling decision, one JSON object a line, in the order they were taken.

The first line says what the file is. Each other one has `t_s` (the kernel's clock, seconds since boot),
`device`, `kind`, and what was decided: `open` and `lost` (an engine), `policy`, `spawn`, `join`, `leave`,
`weight`, `seat`, `stand` (no KV memory), `swap`, `plan` (a quantum, with its grants), `end` (what came of
it) and `exit`. There is nothing in it that was not decided or counted, neither prompts nor addresses: under
a hand-fed clock and simulated engines, one script gives one file, byte for byte.

Owner: the kernel makes one, if it is asked to; whoever decides holds a `DeviceRecord`, or None.
Lock: `_ready` guards the lines that wait; a leaf. Lines are noted under the table's lock, and written by a
thread that holds none. A write is of whole lines, at most `GROUP_S` after they were noted.
Not here: what is decided (scheduler, dispatcher, kernel).
"""

import contextlib
import fcntl
import json
import os
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kernel.clock import Clock
from kernel.errors import LlmosError, NotPermitted, UsageError
from kernel.process import Thread

if TYPE_CHECKING:
    from kernel.scheduler import Flight

VERSION = 1
GROUP_S = 0.1
_HEAD = '{"llmos_recording":'


class Recorder:
    """Writes a recording."""

    def __init__(self, path: Path, clock: Clock, failed: Callable[[str], None]) -> None:
        """Raises UsageError, NotPermitted (it would overwrite something else), LlmosError."""
        self.path = path
        self._clock = clock
        self._booted_s = clock.now_s()
        self._failed = failed
        self._handle = _opened(path)
        self._ready = threading.Condition()
        self._lines: list[str] = [f'{_HEAD}{VERSION},"wall_s":{clock.wall_s()}}}\n']  # guarded by _ready
        self._closed = False  # guarded by _ready
        try:
            self._write()
        except OSError as error:
            os.close(self._handle)
            raise _unwritable(path, error) from error
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def note(self, device: str, kind: str, facts: Mapping[str, object]) -> None:
        """Something was decided. From any thread, with any lock held."""
        at_s = round(self._clock.now_s() - self._booted_s, 9)
        line = json.dumps({"t_s": at_s, "device": device, "kind": kind, **facts}, separators=(",", ":"))
        with self._ready:
            if self._closed:
                return
            if not self._lines:
                self._ready.notify()
            self._lines.append(line + "\n")

    def device(self, name: str) -> "DeviceRecord":
        return DeviceRecord(self, name)

    def close(self) -> None:
        """Write what waits, and stop. Idempotent."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed:
                with self._ready:
                    self._ready.wait_for(lambda: self._lines or self._closed)
                    self._ready.wait_for(lambda: self._closed, GROUP_S)  # let a group gather
                self._write()
            self._write()
        except OSError as error:
            with self._ready:  # the work goes on without
                self._closed = True
                self._lines.clear()
            self._failed(f"the recording ends here: {_unwritable(self.path, error).message}")
        finally:
            os.close(self._handle)

    def _write(self) -> None:
        """All that waits; if part of it cannot be written, the file ends with the last whole line."""
        with self._ready:
            lines, self._lines = self._lines, []
        data = "".join(lines).encode()
        written = 0
        while written < len(data):
            try:
                written += os.write(self._handle, data[written:])
            except OSError:
                torn = written - (data.rfind(b"\n", 0, written) + 1)
                with contextlib.suppress(OSError):  # not a regular file
                    os.ftruncate(self._handle, os.lseek(self._handle, 0, os.SEEK_CUR) - torn)
                raise


class DeviceRecord:
    """What is decided about one device."""

    def __init__(self, recorder: Recorder, device: str) -> None:
        self._recorder = recorder
        self._device = device

    def note(self, kind: str, about: Thread | None = None, **facts: object) -> None:
        """Something was decided, perhaps about a thread."""
        who = {"pid": about.process.pid, "thread": about.index} if about else {}
        self._recorder.note(self._device, kind, {**who, **facts})

    def plan(self, flight: "Flight") -> None:
        grants = _shares((thread, grant.tokens) for thread, grant in flight.grants.items())
        self.note(
            "plan",
            quantum=flight.id,
            model=flight.model.name,
            planned_s=round(flight.planned_s, 9),
            grants=grants,
        )

    def end(self, flight: "Flight") -> None:
        used = _shares((thread, grant.used_tokens) for thread, grant in flight.grants.items())
        self.note(
            "end", quantum=flight.id, model=flight.model.name, used_s=round(flight.used_s, 9), used=used
        )


def _shares(tokens: Iterable[tuple[Thread, int]]) -> list[dict[str, int]]:
    return [{"pid": t.process.pid, "thread": t.index, "tokens": count} for t, count in tokens]


def _opened(path: Path) -> int:
    """A file that is new, empty or an old recording, from its beginning. No pipe is waited for."""
    if not path.name:
        raise UsageError("a recording needs a file name")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unwritable(path, error) from error
    try:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            _lock(handle, path)
            head = os.pread(handle, len(_HEAD), 0)
            if head and head != _HEAD.encode():
                raise NotPermitted(f"{path} exists and is not a recording", "choose another name")
            os.ftruncate(handle, 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise NotPermitted(f"another LLMOS is writing {path}", "choose another name") from None


def _unwritable(path: Path, error: OSError | ValueError) -> LlmosError:
    return LlmosError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")
