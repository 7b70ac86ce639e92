"""The monitor: one screen of panels over the newest snapshot, and the keys that act on processes.

Owner: the main thread, from `run_monitor` to its return. Nothing here waits for the kernel: it asks
for a snapshot each tick, and reads output with no timeout.
Not here: what a panel shows (one file each), the frame that `top -1` prints (the shell).
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Input

from kernel.errors import LlmosError
from kernel.snapshot import ProcessView
from kernel.syscall import Signal, Syscalls
from tui.detail import Detail
from tui.devices import Devices
from tui.dialogs import Help, KillMenu, NiceDialog
from tui.feed import Feed
from tui.layout import CSS
from tui.lines import CHANGES, Footer, Header
from tui.processes import ProcessTable
from tui.throughput import Throughput

_TICK_S = 0.1
_TEXT_S = 0.5  # between two updates of the table and the header
_PAINT_SLOW_S = 0.05  # a tick that takes longer is followed by a rest
_RESTS = 4  # as many times as long as the tick
_NOTICE_S = 4.0
_REARMED = (signal.SIGINT, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)


class MonitorApp(App[None]):
    """The full-screen monitor of one kernel."""

    CSS = CSS
    ENABLE_COMMAND_PALETTE = False
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (80, "-wide")]  # noqa: RUF012 (typed by the base class)
    VERTICAL_BREAKPOINTS = [(0, "-tiny"), (13, "-short"), (24, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,f12,ctrl+c", "leave", show=False),
        Binding("escape", "undo", show=False),
        Binding("question_mark,f1", "help", show=False),
        Binding("slash", "filter", show=False),
        Binding("z", "freeze", show=False),
        Binding("k", "kill", show=False),
        Binding("n", "nice", show=False),
        Binding("s", "stop", show=False),
        Binding("f7", "renice(-1)", show=False),
        Binding("f8", "renice(1)", show=False),
    ]

    def __init__(self, system: Syscalls, *, feed: Feed | None = None, readonly: bool = False) -> None:
        super().__init__()
        self.readonly = readonly
        self._system = system
        self._feed = feed or Feed(system.snapshot)
        self._header = Header(self._feed, "header")
        self._devices = Devices(self._feed, "devices")
        self._throughput = Throughput(self._feed, "throughput")
        self._table = ProcessTable(self._feed, "processes")
        self._detail = Detail(self._feed, "detail", system)
        self._footer = Footer(self._feed, "footer", readonly=readonly)
        self._rest_until_s = 0.0  # monotonic, as the other two
        self._text_at_s = 0.0
        self._notice_until_s = 0.0

    def compose(self) -> ComposeResult:
        yield self._header
        with Horizontal(id="top"):
            yield self._devices
            yield self._throughput
        yield self._table
        yield self._detail
        yield Input(id="filter", placeholder="words to look for", compact=True)
        yield self._footer

    def on_mount(self) -> None:
        self._table.focus()
        self.set_interval(_TICK_S, self._tick)

    # Time

    def _tick(self) -> None:
        """One pull, one repaint of what changed; a slow one is followed by a rest."""
        now_s = time.monotonic()
        if now_s < self._rest_until_s:
            return
        self._rest_until_s = now_s + 1.0  # until the paint is done
        text = now_s - self._text_at_s >= _TEXT_S - _TICK_S / 2
        self._text_at_s = now_s if text else self._text_at_s
        self.update(text=text)
        self.call_after_refresh(self._painted, now_s)

    def _painted(self, began_s: float) -> None:
        now_s = time.monotonic()
        took_s = now_s - began_s
        self._rest_until_s = now_s + (_RESTS * took_s if took_s > _PAINT_SLOW_S else 0.0)

    def update(self, *, text: bool = True) -> None:
        """Pull, then draw the graphs and the output; the words too if `text`."""
        if self._notice_until_s and time.monotonic() > self._notice_until_s:
            self.say("", 0.0)
        self._attempt(self._feed.pull)
        with self.batch_update():
            self._devices.update_lines()
            self._throughput.update_lines()
            if text:
                self._header.update_lines()
                self._table.update_rows()
            self._update_detail()

    def _update_detail(self) -> None:
        self._detail.follow(self._table.roster.current)
        self._attempt(self._detail.pull)
        self._detail.update_lines()

    def say(self, notice: str, for_s: float = _NOTICE_S) -> None:
        """Put one line in the footer for a while."""
        self._notice_until_s = time.monotonic() + for_s if notice else 0.0
        self._footer.say(notice)

    def _attempt(self, call: Callable[[], object]) -> bool:
        """Make a system call; what goes wrong is a notice, for instance that the process is gone."""
        try:
            call()
        except LlmosError as error:
            self.say(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""))
            return False
        return True

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if self.readonly and action in CHANGES:
            self.say("read only")
            return False
        return True

    def action_leave(self) -> None:
        self.exit()

    def action_undo(self) -> None:
        """Escape: take back the filter, then the tags, then the monitor."""
        if self._filter.has_class("shown") or self._table.roster.pattern:
            self._filter.value = ""
            self._close_filter()
        elif self._table.roster.tags:
            self._table.untag()
        else:
            self.exit()

    def action_help(self) -> None:
        self.push_screen(Help())

    def action_freeze(self) -> None:
        self._feed.frozen = not self._feed.frozen
        self.update()

    @property
    def _filter(self) -> Input:
        return self.query_one("#filter", Input)

    def action_filter(self) -> None:
        self._filter.add_class("shown").focus()

    def _close_filter(self) -> None:
        self._filter.remove_class("shown")
        self._table.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input is self._filter:
            self._table.filter(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._close_filter()

    def on_process_table_moved(self, event: ProcessTable.Moved) -> None:
        self._update_detail()

    # What changes processes. The processes are those that were meant when the key was pressed.

    def action_kill(self) -> None:
        if chosen := self._table.roster.chosen:
            self.push_screen(KillMenu(chosen), lambda signal: self._signal(chosen, signal))

    def action_nice(self) -> None:
        if chosen := self._table.roster.chosen:
            self.push_screen(NiceDialog(chosen, self._feed.view), lambda nice: self._set_nice(chosen, nice))

    def action_stop(self) -> None:
        """Stop each, or let it go on, whichever its state calls for at this moment."""

        def toggle(pid: int) -> str:
            stopped = self._system.process(pid).state == "STOPPED"
            self._system.signal(pid, Signal.CONT if stopped else Signal.STOP)
            return "continued" if stopped else "stopped"

        self._each(self._table.roster.chosen, toggle)

    def action_renice(self, step: int) -> None:
        def renice(pid: int) -> str:
            nice = max(-20, min(19, self._system.process(pid).nice + step))
            self._system.renice(pid, nice)
            return f"nice {nice}"

        self._each(self._table.roster.chosen, renice)

    def _signal(self, chosen: Sequence[ProcessView], signal: Signal | None) -> None:
        def send(pid: int) -> str:
            assert signal is not None
            self._system.signal(pid, signal)
            return f"{signal.name} sent"

        if signal is not None:
            self._each(chosen, send)

    def _set_nice(self, chosen: Sequence[ProcessView], nice: int | None) -> None:
        def renice(pid: int) -> str:
            assert nice is not None
            self._system.renice(pid, nice)
            return f"nice {nice}"

        if nice is not None:
            self._each(chosen, renice)

    def _each(self, chosen: Sequence[ProcessView], act: Callable[[int], str]) -> None:
        """Act on each process, and say what was done; one that fails does not keep the others from it."""
        done: dict[str, list[str]] = {}

        def note(pid: int) -> None:
            done.setdefault(act(pid), []).append(str(pid))

        succeeded = [self._attempt(lambda pid=process.pid: note(pid)) for process in chosen]  # type: ignore[misc]
        if done and all(succeeded):
            self.say(" · ".join(f"{what}: {' '.join(pids)}" for what, pids in done.items()))
        self.update()


def run_monitor(system: Syscalls) -> int:
    """Show the monitor until the user leaves it; returns an exit code. Main thread only.

    Afterwards the signal handlers are what they were: the screen driver leaves its own behind.
    """
    if os.environ.get("NO_COLOR") == "":
        del os.environ["NO_COLOR"]  # empty means unset, but Textual asks only if it is there
    before = [(number, signal.getsignal(number)) for number in _REARMED]
    app = MonitorApp(system)
    try:
        app.run()
    finally:
        for number, handler in before:
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    return app.return_code or 0
