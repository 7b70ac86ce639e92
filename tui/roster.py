"""Which processes the table lists, in which order, and which are meant. No screen here.

The cursor stays with its process, not with its line, so that a key acts on what was looked at. The
order stands still for HOLD_S after each sort and each move of the cursor; a process that appears
meanwhile goes to the end, one that is gone leaves.
"""

from kernel.snapshot import ProcessView, SystemView
from tui.columns import COLUMNS, TOKENS_PER_S
from tui.sanitise import one_line

HOLD_S = 2.0


class Roster:
    """The rows, the cursor, the tags, the filter and the order."""

    def __init__(self) -> None:
        self.rows: list[ProcessView] = []
        self.tags: set[int] = set()
        self.sort = TOKENS_PER_S
        self.reverse = True
        self.pattern = ""
        self.index = 0  # of the cursor
        self._pid: int | None = None  # at the cursor
        self._view: SystemView | None = None
        self._hold_until_s = 0.0  # in the views' time

    @property
    def current(self) -> ProcessView | None:
        """The process under the cursor."""
        return self.rows[self.index] if self.rows else None

    @property
    def chosen(self) -> tuple[ProcessView, ...]:
        """What an operation acts on: the tagged processes, else the one under the cursor."""
        if self.tags and self._view:
            return tuple(p for p in self._view.processes if p.pid in self.tags)
        return (self.current,) if self.current else ()

    def update(self, view: SystemView) -> None:
        """Take the processes of a view."""
        self._view = view
        self.tags &= {process.pid for process in view.processes}
        shown = [process for process in view.processes if self._matches(process)]
        self.rows = self._sorted(shown) if view.time_s >= self._hold_until_s else self._in_old_order(shown)
        self._find_cursor()

    def move_to(self, index: int) -> None:
        """Put the cursor on a row, the nearest one if there is none of that number."""
        self.index = max(0, min(index, len(self.rows) - 1))
        self._pid = self.current.pid if self.current else None
        self._hold()

    def sort_by(self, column: int) -> None:
        """Sort by a column; by the same one again: the other way round."""
        self.reverse = not self.reverse if column == self.sort else COLUMNS[column].descending
        self.sort = column
        self._resort()

    def invert(self) -> None:
        self.sort_by(self.sort)

    def set_pattern(self, pattern: str) -> None:
        """List only rows that hold every word of the pattern; a number means that PID."""
        self.pattern = pattern
        self._resort()

    def toggle_tag(self) -> None:
        if self.current:
            self.tags ^= {self.current.pid}

    def _resort(self) -> None:
        self._hold_until_s = 0.0
        if self._view:
            self.update(self._view)

    def _hold(self) -> None:
        if self._view:
            self._hold_until_s = self._view.time_s + HOLD_S

    def _matches(self, process: ProcessView) -> bool:
        text = one_line(f"{process.state} {process.program} {process.model} {process.command}").lower()
        return all(
            word == str(process.pid) if word.isdecimal() else word in text
            for word in self.pattern.lower().split()
        )

    def _sorted(self, shown: list[ProcessView]) -> list[ProcessView]:
        self._hold()
        shown.sort(key=lambda process: process.pid)
        shown.sort(key=COLUMNS[self.sort].key, reverse=self.reverse)
        return shown

    def _in_old_order(self, shown: list[ProcessView]) -> list[ProcessView]:
        old = {process.pid: place for place, process in enumerate(self.rows)}
        return sorted(shown, key=lambda process: (old.get(process.pid, len(old)), process.pid))

    def _find_cursor(self) -> None:
        places = (place for place, process in enumerate(self.rows) if process.pid == self._pid)
        self.index = next(places, max(0, min(self.index, len(self.rows) - 1)))
        self._pid = self.current.pid if self.current else None
