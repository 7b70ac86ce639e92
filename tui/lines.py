"""The two lines of the screen that are no box: the header and the footer."""

from collections import Counter
from collections.abc import Sequence
from time import localtime, strftime

from rich.segment import Segment
from rich.style import Style

from kernel.snapshot import SystemView
from kernel.units import short_time
from tui.feed import Feed
from tui.panel import BOLD, PLAIN, WARN, Line, Panel, fit, words
from tui.sanitise import one_line
from tui.units import percent, rate_short

_KEYS = (  # key, word, action; those that change the system are not shown to who may only look
    ("?", "Help", "help"),
    ("/", "Filter", "filter"),
    ("k", "Kill", "kill"),
    ("n", "Nice", "nice"),
    ("s", "Stop/cont", "stop"),
    ("space", "Tag", "tag"),
    ("z", "Freeze", "freeze"),
    ("q", "Quit", "leave"),
)
CHANGES = frozenset({"kill", "nice", "stop", "renice"})


class Header(Panel):
    """The whole system in one line. What matters least gives way to a narrow screen."""

    def lines(self, width: int, height: int) -> Sequence[Line]:
        view = self.feed.view
        parts = {  # in order of place; the rank says who goes first when room is short
            f"LLMOS up {short_time(view.uptime_s)}": 3,
            _processes(view): 0,
            f"{rate_short(self.feed.history[-1].decode_tokens_per_s)} tok/s": 1,
            f"mem {percent(_memory_share(view))}": 2,
            strftime("%H:%M:%S", localtime(view.time_s)): 4,
        }
        if self.feed.frozen:
            parts["FROZEN"] = -1
        while len(text := " │ ".join(parts)) + 2 > width and len(parts) > 1:
            del parts[max(parts, key=lambda part: parts[part])]
        return [(words(fit(f" {text}", width), WARN if self.feed.frozen else BOLD),)]


def _processes(view: SystemView) -> str:
    letters = Counter(process.letter for process in view.processes)
    counts = " ".join(f"{letters[letter]}{letter}" for letter in "RQSTWZ?" if letters[letter])
    return f"{len(view.processes)} procs {counts}".rstrip()


def _memory_share(view: SystemView) -> float:
    """Of the fullest pool; a full disk is no lack of memory."""
    pools = [pool for pool in view.pools if pool.capacity_bytes and pool.name != "disk"]
    return max((pool.used_bytes / pool.capacity_bytes for pool in pools), default=0.0)


class Footer(Panel):
    """A notice if there is one, else the keys; a click on one is as good."""

    def __init__(self, feed: Feed, id: str, *, readonly: bool) -> None:  # noqa: A002
        super().__init__(feed, id)
        self.notice = ""
        self._keys = [key for key in _KEYS if not (readonly and key[2] in CHANGES)]

    def say(self, notice: str) -> None:
        self.notice = one_line(notice)
        self.update_lines()

    def lines(self, width: int, height: int) -> Sequence[Line]:
        if self.notice:
            return [(words(fit(f" {self.notice}", width), WARN),)]
        line: list[Segment] = []
        for key, word, action in self._keys:
            click = Style(meta={"@click": f"app.{action}"})
            if sum(len(segment.text) for segment in line) + len(key) + len(word) + 3 > width:
                break
            line += [words(f" {key}", BOLD + click), words(f" {word} ", PLAIN + click)]
        return [tuple(line)]
