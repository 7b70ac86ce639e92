"""^C and ^Z while a line runs: noted, never acted upon inside a handler.

A command that takes its time asks for them; what nobody asked for ends the list after the command.
A plugin's code does not ask, nor does a read that blocks: there ^C raises KeyboardInterrupt, as in any
Python program.

Owner: the main thread. On another thread nothing is caught (Python delivers signals to the main one).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class ToldToGo(SystemExit):
    """SIGTERM, SIGHUP: unlike the `SystemExit` of a plugin's code it passes through everything."""


class Interrupts:
    """The signals of one session."""

    def __init__(self) -> None:
        self.pressed = False  # ^C, since the line began: its list of commands ends
        self._seen: list[int] = []
        self._noting = False

    @contextmanager
    def noted(self, *, stop: bool) -> Iterator[None]:
        """Within this block SIGINT (and with `stop`, SIGTSTP) only append to a list."""
        if self._noting or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._seen.clear()
        self.pressed = False
        numbers = [signal.SIGINT, signal.SIGTSTP] if stop else [signal.SIGINT]
        before = [(number, signal.signal(number, self._note)) for number in numbers]
        self._noting = True
        try:
            yield
        finally:
            self._noting = False
            for number, handler in before:
                signal.signal(number, handler)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within this block ^C raises KeyboardInterrupt: it ends a call that blocks and asks for nothing."""
        if not self._noting or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            if signal.SIGINT in self._seen:  # it came just before
                raise KeyboardInterrupt
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def take(self) -> int | None:
        """The oldest signal that was noted and not yet taken."""
        return self._seen.pop(0) if self._seen else None

    def take_interrupt(self) -> bool:
        """Whether ^C was pressed; forgets all that was noted."""
        pressed = signal.SIGINT in self._seen
        self._seen.clear()
        return pressed

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen.append(number)
        self.pressed |= number == signal.SIGINT
