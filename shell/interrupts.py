"""^C and ^Z while something runs in the foreground: noted, never acted upon inside a handler.

Owner: the main thread. On another thread nothing is caught (Python delivers signals to the main one).
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupts:
    """Within the `with` block, SIGINT (and with `stop`, SIGTSTP) only append to a list."""

    def __init__(self, *, stop: bool = False) -> None:
        self._signals = [signal.SIGINT, signal.SIGTSTP] if stop else [signal.SIGINT]
        self._before: list[tuple[signal.Signals, object]] = []
        self._seen: list[int] = []

    def take(self) -> int | None:
        """The oldest signal that was noted and not yet taken."""
        return self._seen.pop(0) if self._seen else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen.append(number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._before.append((number, signal.signal(number, self._note)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)  # type: ignore[arg-type]
