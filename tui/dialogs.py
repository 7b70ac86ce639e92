"""What the monitor asks before it acts: which signal, which nice value; and the help screen."""

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from kernel.snapshot import ProcessView, SystemView
from kernel.syscall import Signal
from tui.sanitise import one_line
from tui.units import bytes_short, percent

_ENDS = {Signal.INT: 130, Signal.TERM: 143, Signal.KILL: 137}
_SIGNALS = (Signal.INT, Signal.TERM, Signal.KILL, Signal.STOP, Signal.CONT)
_BACK: list[BindingType] = [Binding("escape,q", "dismiss(None)", "Back", priority=True)]


def named(processes: Sequence[ProcessView]) -> str:
    """Processes in a few words: one by what it runs, many by their PIDs."""
    if len(processes) == 1:
        return one_line(f"{processes[0].pid} {processes[0].program} {processes[0].model}")
    return f"{len(processes)} processes: " + " ".join(str(process.pid) for process in processes[:12])


class KillMenu(ModalScreen[Signal | None]):
    """Asks for a signal, and says what each does."""

    BINDINGS: ClassVar[list[BindingType]] = _BACK

    def __init__(self, processes: Sequence[ProcessView]) -> None:
        super().__init__()
        self._processes = processes

    def compose(self) -> ComposeResult:
        kv_bytes = sum(process.kv_bytes for process in self._processes)
        with Vertical(classes="dialog") as box:
            box.border_title = Content(f"kill {named(self._processes)}")
            yield OptionList(*(Option(Text(_signal_line(signal, kv_bytes))) for signal in _SIGNALS))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(_SIGNALS[event.option_index])


def _signal_line(signal: Signal, kv_bytes: int) -> str:
    size = bytes_short(kv_bytes)
    kept, freed = (f"; keeps KV {size}", f", frees KV +{size}") if kv_bytes else ("", "")
    what = {Signal.STOP: f"pauses{kept}", Signal.CONT: "goes on"}
    ends = f"ends with {_ENDS.get(signal)}{freed}"
    return f"{signal.name:<4} {signal.value:>2}  {what.get(signal, ends)}"


class NiceDialog(ModalScreen[int | None]):
    """Asks for a nice value, and shows the share of the device that it would give."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *_BACK,
        Binding("up", "step(1)", show=False),
        Binding("down", "step(-1)", show=False),
    ]

    def __init__(self, processes: Sequence[ProcessView], view: SystemView) -> None:
        super().__init__()
        self._processes = processes
        self._view = view

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = Content(f"nice {named(self._processes)}")
            yield Input(str(self._processes[0].nice), restrict=r"-?[0-9]{0,2}", compact=True)
            yield Static(markup=False, id="preview")
            yield Static("-20 gets most, 19 least\n↑ ↓ change  enter set  esc back", markup=False)

    def on_input_changed(self, event: Input.Changed) -> None:
        nice = _nice_of(event.value)
        text = (
            "a whole number from -20 to 19"
            if nice is None
            else share_preview(self._processes, self._view, nice)
        )
        self.query_one("#preview", Static).update(text)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if (nice := _nice_of(event.value)) is not None:
            self.dismiss(nice)

    def action_step(self, step: int) -> None:
        field = self.query_one(Input)
        field.value = str(max(-20, min(19, (_nice_of(field.value) or 0) + step)))


def _nice_of(text: str) -> int | None:
    try:
        nice = int(text)
    except ValueError:
        return None
    return nice if -20 <= nice <= 19 else None


def share_preview(processes: Sequence[ProcessView], view: SystemView, nice: int) -> str:
    """ "share 24% → 8%": of the device, among those that want to run there now.

    Weights fall by 1.25 per step of nice, as in Linux's table (to within a percent).
    """
    pids = {process.pid for process in processes}
    devices = {process.device for process in processes}
    others = [
        1.25**-process.nice
        for process in view.processes
        if process.pid not in pids and process.device in devices and process.state in ("RUNNING", "RUNNABLE")
    ]
    before, after = sum(1.25**-process.nice for process in processes), len(processes) * 1.25**-nice
    return f"share {percent(before / (before + sum(others)))} → {percent(after / (after + sum(others)))}"


_HELP = """\
↑ ↓ PgUp PgDn Home End   move; the order stands still for two seconds
< >  click on a head     column to sort by        I    other way round
/                        list what holds these words; a number is a PID
Space                    tag; k n s F7 F8 act on the tagged processes
k                        send a signal: INT TERM KILL STOP CONT
n  F7  F8                nice value; one less; one more
s                        stop, or go on
z                        freeze the screen        Esc  undo filter, tags
? F1  this help          q F12  back to the shell

States: R running  Q queued  S sleeping  T stopped
        W swapped out  N new  Z ended
Memory: W weights  K KV cache  A activations  T training
        O other  ░ free  · kept back"""


class Help(ModalScreen[None]):
    """Every key."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,f1", "dismiss(None)", priority=True)
    ]

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog wide") as box:
            box.border_title = "help"
            yield Static(_HELP, markup=False)
