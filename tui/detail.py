"""The output of the process under the cursor, as it grows."""

from collections.abc import Sequence

from rich.cells import chop_cells

from kernel.errors import ProcessNotFound
from kernel.snapshot import ProcessView
from kernel.syscall import Syscalls
from tui.feed import Feed
from tui.panel import BAD, Line, Panel, fit, words
from tui.sanitise import one_line, sanitise

_TAIL_CHARACTERS = 16_384  # of output kept for the screen


class Detail(Panel):
    """A tail of one process's output; model output is data, so it is sanitised and has no markup."""

    def __init__(self, feed: Feed, id: str, system: Syscalls) -> None:  # noqa: A002
        super().__init__(feed, id)
        self._system = system
        self._process: ProcessView | None = None
        self._offset = 0
        self._text = ""

    def follow(self, process: ProcessView | None) -> None:
        """Show this process: the same one's newer view, or another's output from the start."""
        if (process and process.pid) != (self._process and self._process.pid):
            self._offset, self._text = 0, ""
        self._process = process

    def pull(self) -> None:
        """Take the output that is new, without waiting."""
        if self._process is None or self.feed.frozen:
            return
        try:
            piece = self._system.read(self._process.pid, self._offset, 0.0)
        except ProcessNotFound:
            return  # reaped since the view; its row leaves with the next one
        self._offset = piece.next_offset
        self._text = (self._text + piece.text)[-_TAIL_CHARACTERS:]

    def lines(self, width: int, height: int) -> Sequence[Line]:
        process = self._process
        if process is None:
            self.set_titles("⁵ no process")
            return []
        self.set_titles(f"⁵ {_title(process)}", _progress(process))
        after = [(words(fit(text, width), BAD),) for text in _failure(process)]
        tail = _tail(self._text, width, max(1, height - len(after)))
        return [*((words(line),) for line in tail), *after]


def _title(process: ProcessView) -> str:
    return fit(one_line(f"{process.pid} {process.program} {process.model}"), 40).rstrip()


def _progress(process: ProcessView) -> str:
    items = f"{process.items_done}/{process.items_total} answered · " if process.items_total > 1 else ""
    return f"{items}{process.prompt_tokens} + {process.output_tokens} tokens"


def _failure(process: ProcessView) -> list[str]:
    if not process.error:
        return []
    return [f"error: {one_line(process.error)}"] + (
        [f"hint: {one_line(process.hint)}"] if process.hint else []
    )


def _tail(text: str, width: int, height: int) -> list[str]:
    """The last lines, folded to the width."""
    lines: list[str] = []
    for line in reversed(sanitise(text).rstrip("\n").split("\n")[-height:]):
        lines[:0] = chop_cells(line, width) or [""]
        if len(lines) >= height:
            break
    return lines[-height:]
