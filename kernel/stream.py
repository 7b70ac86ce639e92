"""Streams: the output of a process, kept whole, read by anyone at any offset.

Owner: the process. Lock: one of a few that all streams share (a hundred thousand processes may be queued,
and a lock of its own is heavier than the rest of one), held for one string operation; it is a leaf, like
a mailbox's.
Not here: files and terminals (the shell copies from here to there).
"""

import io
import itertools
import threading

_SHARED = tuple(threading.Condition() for _ in range(32))
_next = itertools.cycle(_SHARED)


class Stream:
    """Append-only text with a condition to wait on. Offsets count characters."""

    __slots__ = ("_closed", "_length", "_readers", "_ready", "_text")

    def __init__(self) -> None:
        self._ready = next(_next)
        self._text: io.StringIO | None = None  # guarded by _ready; made by the first write
        self._length = 0  # guarded by _ready
        self._readers = 0  # that wait; guarded by _ready
        self._closed = False  # guarded by _ready

    def __len__(self) -> int:
        return self._length

    def write(self, text: str) -> None:
        if not text:
            return
        with self._ready:
            if self._text is None:
                self._text = io.StringIO()  # its position is the end: who reads, reads all
            self._length += self._text.write(text)
            if self._readers:
                self._ready.notify_all()

    def close(self) -> None:
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    def read(self, offset: int, timeout_s: float | None) -> tuple[str, int, bool]:
        """Text from `offset` on, the next offset, and whether that is the end.

        Waits until there is some text, the stream is closed, or the time is up (None: for ever).
        """
        with self._ready:
            self._readers += 1
            self._ready.wait_for(lambda: self._length > offset or self._closed, timeout_s)
            self._readers -= 1
            if self._text is None:
                return "", 0, self._closed
            self._text.seek(max(0, min(offset, self._length)))
            return self._text.read(), self._length, self._closed
