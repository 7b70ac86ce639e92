"""What every panel is made of: lines of segments, drawn again only where they changed."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.content import Content
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from tui.feed import Feed

Line = tuple[Segment, ...]

PLAIN = Style()
DIM = Style(dim=True)
BOLD = Style(bold=True)
GOOD = Style(color="green", bold=True)
BUSY = Style(color="cyan")
WARN = Style(color="yellow", bold=True)
BAD = Style(color="red", bold=True)


class Panel(Widget):
    """A box of lines. A subclass says in `lines` what they are; `update_lines` draws what changed."""

    def __init__(self, feed: Feed, id: str) -> None:  # noqa: A002 (Textual's name for it)
        super().__init__(id=id)
        self.feed = feed
        self._lines: list[Line] = []
        self._titles = ("", "")

    def lines(self, width: int, height: int) -> Sequence[Line]:
        """The content for this size. Called in the monitor's thread, at most once a tick."""
        raise NotImplementedError

    def update_lines(self) -> None:
        """Build the lines and refresh those that differ from what is on the screen."""
        width, height = self.size
        if not (width and height):
            return
        old, self._lines = self._lines, list(self.lines(width, height))[:height]
        changed = [
            y for y in range(max(len(old), len(self._lines))) if old[y : y + 1] != self._lines[y : y + 1]
        ]
        if changed:
            self.refresh(*(Region(0, y, width, 1) for y in changed))

    def set_titles(self, title: str, subtitle: str = "") -> None:
        """Set the words in the border, whatever characters they hold. Setting redraws the whole panel."""
        if (title, subtitle) != self._titles:
            self._titles = (title, subtitle)
            self.border_title, self.border_subtitle = Content(title), Content(subtitle)

    def render_line(self, y: int) -> Strip:
        line = self._lines[y] if y < len(self._lines) else ()
        return painted(line, self.size.width, self.rich_style)

    def on_resize(self) -> None:
        self.update_lines()


def painted(line: Line, width: int, style: Style) -> Strip:
    """A line cut or filled to a width, over the widget's own style (or cells lose their background)."""
    return Strip(line).adjust_cell_length(width).apply_style(style)


def words(text: str, style: Style = PLAIN) -> Segment:
    return Segment(text, style)


def fit(text: str, width: int, *, right: bool = False) -> str:
    """Text in exactly `width` cells; what is cut ends in an ellipsis."""
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + "…" if width > 0 else ""
    return " " * (width - length) + text if right else text + " " * (width - length)


def spread(left: str, right: str, width: int) -> str:
    """One text at each end of a line; the left one gives way."""
    return fit(left, max(0, width - cell_len(right) - 1)) + " " + right if right else fit(left, width)
