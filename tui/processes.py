"""The process table: one line per process, of which only the visible ones are ever drawn.

Own drawing on purpose: 500 rows cost here what a DataTable takes for a handful.
Not here: which rows in which order (roster), what a cell says (columns), what keys do to a process (app).
"""

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from kernel.snapshot import ProcessView
from tui import columns
from tui.feed import Feed
from tui.panel import BAD, BOLD, BUSY, DIM, GOOD, PLAIN, WARN, Line, painted
from tui.roster import Roster

_STATE_STYLES = {"R": GOOD, "Q": BUSY, "T": WARN, "W": WARN, "Z": BAD}
_MARK_CELLS = 2  # cursor and tag, left of the columns
_CURSOR = Style(reverse=True)


class ProcessTable(ScrollView):
    """Rows of the newest view, with a cursor."""

    class Moved(Message):
        """The cursor is on another process, or nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", show=False),
        Binding("down", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home", "edge(0)", show=False),
        Binding("end", "edge(1)", show=False),
        Binding("space", "tag", show=False),
        Binding("less_than_sign", "sort(-1)", show=False),
        Binding("greater_than_sign", "sort(1)", show=False),
        Binding("I", "invert", show=False),
    ]

    def __init__(self, feed: Feed, id: str) -> None:  # noqa: A002 (Textual's name for it)
        super().__init__(id=id)
        self.feed = feed
        self.roster = Roster()
        self.roster.update(feed.view)
        self._painted: dict[int, Line] = {}  # what each visible line shows
        self._titles = ("", "")

    @property
    def _width(self) -> int:
        """Cells of a line, without the scroll bar."""
        return self.scrollable_content_region.width

    # What is shown

    def update_rows(self) -> None:
        """Take the feed's view, and refresh the visible lines that changed."""
        before = self.roster.current
        self.roster.update(self.feed.view)
        self._show(before)

    def filter(self, pattern: str) -> None:
        before = self.roster.current
        self.roster.set_pattern(pattern)
        self._show(before)

    def _show(self, before: ProcessView | None) -> None:
        self.virtual_size = Size(self._width, len(self.roster.rows) + 1)
        self._follow_cursor()
        self._set_titles()
        self._refresh_changed()
        current = self.roster.current
        if (before and before.pid) != (current and current.pid):
            self.post_message(self.Moved())

    def _refresh_changed(self) -> None:
        width = self._width
        changed = [
            y for y in range(self.size.height) if y in self._painted and self._painted[y] != self._line(y)
        ]
        if changed:
            self.refresh(*(Region(0, y, width, 1) for y in changed))

    def _set_titles(self) -> None:
        roster = self.roster
        parts = [f"sort {columns.COLUMNS[roster.sort].title}{'▼' if roster.reverse else '▲'}"]
        parts += [f"filter {roster.pattern} ({len(roster.rows)})"] if roster.pattern else []
        titles = ("⁴ processes  " + " · ".join(parts), f"{len(roster.tags)} tagged" if roster.tags else "")
        if titles != self._titles:
            self._titles = titles
            self.border_title, self.border_subtitle = Content(titles[0]), Content(titles[1])

    # How it is drawn

    def render_line(self, y: int) -> Strip:
        line = self._painted[y] = self._line(y)
        return painted(line, self._width, self.rich_style)

    def _line(self, y: int) -> Line:
        if y == 0:
            return self._head()
        row = self.scroll_offset.y + y - 1
        return self._row(row) if row < len(self.roster.rows) else ()

    def _head(self) -> Line:
        roster = self.roster
        shown = columns.visible(self._width - _MARK_CELLS)
        titles = (columns.title(index, width, roster.sort, roster.reverse) for index, width in shown)
        return (Segment(" " * _MARK_CELLS + " ".join(titles), BOLD),)

    def _row(self, row: int) -> Line:
        process = self.roster.rows[row]
        cursor = _CURSOR if row == self.roster.index else PLAIN
        mark = ("▸" if row == self.roster.index else " ") + ("●" if process.pid in self.roster.tags else " ")
        segments = [Segment(mark, cursor)]
        for index, width in columns.visible(self._width - _MARK_CELLS):
            text = columns.cell(index, width, process)
            segments.append(Segment(text + " ", _style(index, process) + cursor))
        return tuple(Segment.simplify(segments))  # fewer segments, less to paint

    def on_resize(self) -> None:
        self._painted.clear()
        self._show(self.roster.current)

    # The cursor

    def action_move(self, rows: int) -> None:
        self._move_to(self.roster.index + rows)

    def action_page(self, pages: int) -> None:
        self._move_to(self.roster.index + pages * max(1, self.size.height - 2))

    def action_edge(self, end: int) -> None:
        self._move_to(end * len(self.roster.rows))

    def _move_to(self, row: int) -> None:
        before = self.roster.current
        self.roster.move_to(row)
        self._show(before)

    def _follow_cursor(self) -> None:
        top, rows = self.scroll_offset.y, max(1, self.size.height - 1)
        nearest = min(max(top, self.roster.index - rows + 1), self.roster.index)
        if nearest != top:
            self.scroll_to(y=nearest, animate=False)

    # Order and tags

    def action_sort(self, step: int) -> None:
        self._sort_by((self.roster.sort + step) % len(columns.COLUMNS))

    def action_invert(self) -> None:
        self._sort_by(self.roster.sort)

    def _sort_by(self, column: int) -> None:
        self.roster.sort_by(column)
        self._show(self.roster.current)

    def action_tag(self) -> None:
        self.roster.toggle_tag()
        self.action_move(1)

    def untag(self) -> None:
        self.roster.tags.clear()
        self._show(self.roster.current)

    def on_click(self, event: Click) -> None:
        """A head sorts, a row takes the cursor."""
        offset = event.get_content_offset(self)
        if offset is None:
            return
        if offset.y > 0:
            self._move_to(self.scroll_offset.y + offset.y - 1)
        elif (column := self._column_at(offset.x)) is not None:
            self._sort_by(column)

    def _column_at(self, x: int) -> int | None:
        left = _MARK_CELLS
        for index, width in columns.visible(self._width - _MARK_CELLS):
            if left <= x < left + width:
                return index
            left += width + 1
        return None


def _style(column: int, process: ProcessView) -> Style:
    if column == columns.STATE:
        return _STATE_STYLES.get(process.letter, PLAIN)
    return DIM if process.exit_code is not None else PLAIN
