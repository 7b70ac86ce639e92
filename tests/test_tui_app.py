"""The monitor on a headless terminal: keys, golden screens, what is drawn and what is not.

GOLDEN_WRITE=1 writes the golden screens anew; read the difference before it is committed.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import cast

import pytest
from textual.pilot import Pilot

from kernel.errors import KernelFault
from kernel.snapshot import SystemView
from kernel.syscall import Signal, Syscalls
from tests.fake_feed import GOLDEN, FakeSystem, many, process, system_view
from tui.app import MonitorApp, run_monitor
from tui.feed import Feed
from tui.panel import Panel
from tui.processes import ProcessTable

Script = Callable[[MonitorApp, Pilot[None]], Awaitable[None]]


@pytest.fixture(autouse=True)
def _utc() -> Iterator[None]:
    """The header's clock shows local time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def play(system: FakeSystem, script: Script, size: tuple[int, int] = (100, 30), **options: bool) -> None:
    """Run the monitor on a fake system, and a script on the monitor."""

    async def run() -> None:
        app = MonitorApp(cast(Syscalls, system), **options)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await script(app, pilot)

    asyncio.run(run())


def screen_text(app: MonitorApp) -> str:
    """The screen as lines of text (the only use of this private call)."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips()) + "\n"


def current_pid(app: MonitorApp) -> int | None:
    current = app.query_one(ProcessTable).roster.current
    return current and current.pid


# Golden screens


def check_golden(app: MonitorApp, name: str) -> None:
    """Compare the screen with a file, or write the file."""
    path = GOLDEN / f"tui-{name}-{app.size.width}x{app.size.height}.txt"
    if os.environ.get("GOLDEN_WRITE"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(screen_text(app), encoding="utf-8")
    assert screen_text(app) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("size", [(100, 30), (60, 16), (20, 10)])
def test_golden(size: tuple[int, int]) -> None:
    system = FakeSystem()
    system.output[14] = "user> Why is the sky blue?\n14> Sunlight scatters off \x1b[31mair[/] molecules.\n"

    async def run() -> None:
        feed = Feed(
            system.snapshot, samples_max=1
        )  # one sample: the graph does not grow with the time it takes
        app = MonitorApp(cast(Syscalls, system), feed=feed)
        async with app.run_test(size=size) as pilot:
            await pilot.press("down")
            await pilot.pause()
            check_golden(app, "main")
            for key, name in (("k", "kill"), ("n", "nice"), ("question_mark", "help")):
                await pilot.press(key)
                await pilot.pause()
                check_golden(app, name)
                await pilot.press("escape")

    asyncio.run(run())


# Keys


def test_kill_sends_the_chosen_signal_to_the_process_under_the_cursor() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("down", "k", "down", "enter")
        await pilot.pause()
        assert "TERM sent: 14" in screen_text(app)

    play(system, script)
    assert system.signals == [(14, Signal.TERM)]


def test_kill_means_the_process_that_was_under_the_cursor_when_asked() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("down", "k")
        system.remove(14)
        app.update()
        await pilot.press("enter")
        await pilot.pause()
        assert "error: no process 14" in screen_text(app)

    play(system, script)
    assert system.signals == []


def test_escape_and_q_leave_the_kill_menu_and_send_nothing() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        for key in ("escape", "q"):
            await pilot.press("k", key)
            await pilot.pause()
            assert app.is_running and len(app.screen_stack) == 1

    play(system, script)
    assert system.signals == []


def test_nice_sets_what_was_typed_and_shows_the_share_it_gives() -> None:
    system = FakeSystem(system_view((process(14), process(15, tokens_per_s=1.0))))

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("n", "backspace", "5")
        await pilot.pause()
        assert "share 50% → 25%" in screen_text(app)
        await pilot.press("enter")
        await pilot.pause()

    play(system, script)
    assert system.nices == [(14, 5)]


def test_nice_does_not_take_a_value_out_of_range() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("n", "backspace", "4", "4", "enter")
        await pilot.pause()
        assert "a whole number from -20 to 19" in screen_text(app)

    play(system, script)
    assert system.nices == []


def test_s_stops_then_continues() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("s", "s")

    play(system, script)
    assert system.signals == [(21, Signal.STOP), (21, Signal.CONT)]


def test_s_says_which_it_stopped_and_which_go_on() -> None:
    system = FakeSystem(system_view((process(14), process(15, "STOPPED", tokens_per_s=1.0))))

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("space", "space", "s")
        await pilot.pause()
        assert "stopped: 14 · continued: 15" in screen_text(app)
        await pilot.press("f8")
        await pilot.pause()
        assert "nice 1: 14 15" in screen_text(app)

    play(system, script)


def test_f7_and_f8_step_the_nice_value_from_what_the_kernel_says_now() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("z")
        system.change(21, nice=19)
        await pilot.press("f8", "f7", "f7")

    play(system, script)
    assert system.nices == [(21, 19), (21, 18), (21, 17)]


def test_operations_act_on_tags_and_one_failure_does_not_stop_the_rest() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("space", "space")
        await pilot.pause()
        assert "2 tagged" in screen_text(app)
        app.query_one(ProcessTable).roster.tags.add(19)  # a zombie
        await pilot.press("s")
        await pilot.pause()
        assert "error: process 19 has ended" in screen_text(app)

    play(system, script)
    assert system.signals == [(14, Signal.STOP), (21, Signal.STOP)]


def test_readonly_changes_nothing() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        assert "Kill" not in screen_text(app)
        for key in ("k", "n", "s", "f7"):
            app.say("")
            await pilot.press(key, "enter")
            await pilot.pause()
            assert "read only" in screen_text(app), key

    play(system, script, readonly=True)
    assert system.signals == [] and system.nices == []


@pytest.mark.parametrize("key", ["q", "f12", "escape", "ctrl+c"])
def test_keys_that_leave(key: str) -> None:
    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press(key)
        await pilot.pause()
        assert not app.is_running or app._exit

    play(FakeSystem(), script)


def test_filter_narrows_as_it_is_typed_and_escape_takes_it_back() -> None:
    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"smol")
        await pilot.pause()
        table = app.query_one(ProcessTable)
        assert [row.pid for row in table.roster.rows] == [21]
        await pilot.press("enter")
        assert table.roster.pattern == "smol" and app.focused is table
        await pilot.press("escape")
        assert len(table.roster.rows) == 8 and app.is_running

    play(FakeSystem(), script)


def test_frozen_screen_stands_still_and_goes_on() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("z")
        system.remove(14, 15, 16)
        app.update()
        await pilot.pause()
        assert "FROZEN" in screen_text(app) and "8 procs" in screen_text(app)
        await pilot.press("z")
        await pilot.pause()
        assert "5 procs" in screen_text(app)

    play(system, script)


def test_click_on_a_row_moves_there_and_on_a_head_sorts() -> None:
    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.click("#processes", offset=(10, 4))  # border, head, third row
        assert current_pid(app) == 15
        await pilot.click("#processes", offset=(7, 1))  # PID's head
        table = app.query_one(ProcessTable)
        assert [row.pid for row in table.roster.rows] == sorted(row.pid for row in table.roster.rows)
        assert current_pid(app) == 15

    play(FakeSystem(), script)


# What goes wrong


def test_a_process_that_vanishes_under_the_cursor_hands_it_to_the_next() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("down")
        system.remove(14)
        await pilot.press("s")  # the screen does not know yet
        await pilot.pause()
        assert "error: no process 14" in screen_text(app)
        assert current_pid(app) == 15

    play(system, script)
    assert system.signals == []


def test_output_of_a_process_that_was_just_reaped_is_no_error() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        system.remove(21)
        app.update(text=False)
        await pilot.pause()
        assert "error" not in screen_text(app)

    play(system, script)


def test_no_process_at_all() -> None:
    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press("down", "space", "k", "n", "s", "f7", "end", "pagedown", "I", "greater_than_sign")
        await pilot.pause()
        assert "no process" in screen_text(app) and len(app.screen_stack) == 1

    play(FakeSystem(system_view(())), script)


def test_a_kernel_that_fails_is_a_notice_and_the_last_view_stays() -> None:
    system = FakeSystem()

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        def fail() -> SystemView:
            raise KernelFault("the table is gone")

        app._feed._read = fail
        app.update()
        await pilot.pause()
        assert "error: the table is gone" in screen_text(app) and "8 procs" in screen_text(app)

    play(system, script)


def test_model_output_is_data() -> None:
    system = FakeSystem()
    system.output[21] = "[bold]x[/bold] \x1b]0;owned\x07 \u202egnp.exe\nlast"

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        app.update()
        await pilot.pause()
        text = screen_text(app)
        assert "[bold]x[/bold] ␛]0;owned␇ \ufffdgnp.exe" in text and "last" in text
        assert not {"\x1b", "\x07", "\u202e"} & set(text)

    play(system, script)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (200, 60)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        await pilot.press(
            "down", "k", "escape", "slash", "a", "escape", "n", "escape", "question_mark", "escape"
        )
        await pilot.resize_terminal(80, 24)
        await pilot.resize_terminal(*size)

    play(FakeSystem(), script, size=size)


# What is drawn


def test_only_visible_lines_are_drawn_however_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    system = FakeSystem(many(500))
    drawn: list[int] = []
    render_line = ProcessTable.render_line
    monkeypatch.setattr(ProcessTable, "render_line", lambda self, y: drawn.append(y) or render_line(self, y))

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        height = app.query_one(ProcessTable).size.height
        app._rest_until_s = float("inf")  # no ticks of its own
        await pilot.pause()
        drawn.clear()
        system.view = many(500, tick=3)
        app.update()
        await pilot.pause()
        assert 0 < len(drawn) <= height
        await pilot.press("end")
        assert current_pid(app) == app.query_one(ProcessTable).roster.rows[-1].pid

    play(system, script)


def test_nothing_is_drawn_when_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = replace(system_view().devices[0], busy=0.0, tokens_per_s=0.0, prefill_tokens_per_s=0.0)
    system = FakeSystem(replace(system_view(), devices=(idle,)))
    drawn: list[str] = []
    for kind in (ProcessTable, Panel):
        render_line = kind.render_line
        monkeypatch.setattr(
            kind, "render_line", lambda self, y, r=render_line: drawn.append(self.id) or r(self, y)
        )

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        app._rest_until_s = float("inf")
        app.update()
        await pilot.pause()
        drawn.clear()
        app.update()
        await pilot.pause()
        assert drawn == []
        system.change(21, tokens_per_s=9000.0)
        app.update()
        await pilot.pause()
        assert set(drawn) == {"processes"} and len(drawn) == 1

    play(system, script)


def test_a_slow_paint_is_followed_by_a_rest() -> None:
    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        now_s = time.monotonic()
        app._painted(now_s - 0.001)
        assert app._rest_until_s - now_s < 0.1
        app._painted(now_s - 0.2)
        assert app._rest_until_s - now_s > 0.5

    play(FakeSystem(), script)


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def script(app: MonitorApp, pilot: Pilot[None]) -> None:
        assert app.no_color

    play(FakeSystem(), script)


def test_handlers_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    mine = [signal.getsignal(number) for number in numbers]

    def leave_handlers_behind(app: MonitorApp) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise RuntimeError("and fail")

    monkeypatch.setattr(MonitorApp, "run", leave_handlers_behind)
    try:
        with pytest.raises(RuntimeError):
            run_monitor(cast(Syscalls, FakeSystem()))
        assert [signal.getsignal(number) for number in numbers] == mine
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
