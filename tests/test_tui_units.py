"""The monitor's pure parts: graph, units, sanitiser, columns, order."""

from dataclasses import replace

import pytest
from rich.cells import cell_len

from kernel.snapshot import ProcessView, SystemView
from kernel.syscall import Signal
from kernel.units import short_time
from tests.fake_feed import device, many, process, system_view
from tui import columns
from tui.dialogs import _signal_line
from tui.feed import Feed
from tui.graph import bar, braille
from tui.roster import HOLD_S, Roster
from tui.sanitise import one_line, sanitise
from tui.units import bytes_short, percent, rate_short


def test_braille_fills_from_the_bottom_and_the_newest_is_at_the_right() -> None:
    assert braille([0, 4, 8], 2, 2, 8.0) == ["⠀⢸", "⠀⣿"]


def test_braille_shows_a_dot_for_what_is_barely_above_zero() -> None:
    assert braille([1e-9, 0], 1, 1, 1.0) == ["⡀"]


@pytest.mark.parametrize(("width", "height"), [(0, 3), (3, 0), (1, 1)])
def test_braille_has_exactly_the_size_asked_for(width: int, height: int) -> None:
    rows = braille([1.0] * 50, width, height, 0.5)
    assert [len(row) for row in rows] == [width] * height


def test_bar_is_clamped() -> None:
    assert (bar(-1, 3), bar(0.5, 4), bar(7, 3)) == ("░░░", "▇▇░░", "▇▇▇")


def test_units_keep_to_their_width() -> None:
    assert [bytes_short(n) for n in (0, 512, 999, 1023, 642 << 20, 5.1 * 2**30, 2**60)] == [
        "-", "512B", "999B", "1.0K", "642M", "5.1G", "1024P",
    ]  # fmt: skip
    assert [rate_short(n) for n in (0, 48.2, 99.96, 9100, 12_345, 2_000_000)] == [
        "-", "48.2", "100", "9100", "12k", "2.0M",
    ]  # fmt: skip
    assert [short_time(n) for n in (-1, 100, 4364, 180_000)] == ["0:00", "1:40", "1:12:44", "2d02h"]
    assert percent(0.571) == "57%"


@pytest.mark.parametrize(
    "bad", ["\x1b", "\x00", "\x07", "\x7f", "\x9b", "\u202e", "\u2066", "\U000e0041", "\ud800"]
)
def test_nothing_that_a_terminal_obeys_gets_through(bad: str) -> None:
    assert bad not in sanitise(f"a{bad}b")
    assert "\n" not in one_line(f"a{bad}\nb")


def test_ordinary_text_is_left_alone() -> None:
    text = "Grüße, 世界 👩‍🔬 [b]not markup[/b]\nnext"
    assert sanitise(text) == text


@pytest.mark.parametrize("width", [*range(1, 40), 58, 98, 200])
def test_columns_fit_their_width(width: int) -> None:
    shown = columns.visible(width)
    names = [columns.COLUMNS[index].title for index, _ in shown]
    assert names[0] == "PID" and "S" in names
    if width >= 7:
        assert sum(cells for _, cells in shown) + len(shown) - 1 <= width


def test_wide_screens_show_every_column_and_command_takes_the_rest() -> None:
    shown = columns.visible(150)
    assert len(shown) == len(columns.COLUMNS)
    assert sum(cells for _, cells in shown) + len(shown) - 1 == 150


def test_cells_are_never_wider_than_their_column() -> None:
    wild = process(
        1234567,
        model="模型" * 20,
        nice=-20,
        context_tokens=9,
        context_limit_tokens=1,
        command="\x1b[2J世" * 40,
    )
    for index, width in columns.visible(98):
        assert cell_len(columns.cell(index, width, wild)) == width


def _roster(*processes: ProcessView) -> Roster:
    roster = Roster()
    roster.update(system_view(processes))
    return roster


def _pids(roster: Roster) -> list[int]:
    return [row.pid for row in roster.rows]


def test_fastest_first_then_by_pid() -> None:
    roster = _roster(process(3), process(2), process(4, tokens_per_s=99.0))
    assert _pids(roster) == [4, 2, 3]


def test_what_has_ended_goes_below_what_stands_still() -> None:
    ended = process(2, "ZOMBIE", tokens_per_s=99.0, exit_code=0)
    roster = _roster(ended, process(3, "STOPPED", tokens_per_s=0.0), process(4))
    assert _pids(roster) == [4, 3, 2]
    assert columns.cell(columns.TOKENS_PER_S, 6, ended).strip() == "-"


def test_a_rate_that_only_fades_is_shown_as_nothing() -> None:
    view = system_view()

    def at(rate: float, running: int) -> SystemView:
        return replace(view, devices=(device(tokens_per_s=rate, running=running, runnable=0),))

    views = [at(1000.0, 1), at(5.0, 1), at(500.0, 0), at(5.0, 0)]
    feed = Feed(iter(views).__next__)
    for _ in views[1:]:
        feed.pull()
    assert [sample.decode_tokens_per_s for sample in feed.history] == [1000.0, 5.0, 500.0, 0.0]


def test_the_kill_menu_speaks_of_memory_only_if_there_is_any() -> None:
    assert _signal_line(Signal.TERM, 0) == "TERM 15  ends with 143"
    assert _signal_line(Signal.STOP, 0) == "STOP 19  pauses"
    assert _signal_line(Signal.TERM, 1 << 20) == "TERM 15  ends with 143, frees KV +1.0M"


def test_order_is_held_after_a_move_then_follows_again() -> None:
    roster, view = Roster(), system_view((process(2, tokens_per_s=9.0), process(3, tokens_per_s=5.0)))
    roster.update(view)
    roster.move_to(1)
    faster = (process(2, tokens_per_s=9.0), process(3, tokens_per_s=50.0), process(4, tokens_per_s=99.0))
    roster.update(replace(view, processes=faster, time_s=view.time_s + HOLD_S / 2))
    assert _pids(roster) == [2, 3, 4], "held: the newcomer goes to the end"
    roster.update(replace(view, processes=faster, time_s=view.time_s + HOLD_S))
    assert _pids(roster) == [4, 3, 2]
    assert roster.current and roster.current.pid == 3, "the cursor stays with its process"


def test_cursor_takes_the_next_line_when_its_process_is_gone() -> None:
    roster = _roster(process(2), process(3), process(4))
    roster.move_to(1)
    roster.update(system_view((process(2), process(4))))
    assert roster.current and roster.current.pid == 4
    roster.update(system_view(()))
    assert roster.current is None and roster.chosen == ()


def test_filter_wants_every_word_and_a_number_is_a_pid() -> None:
    roster = _roster(process(2, model="nano"), process(22, command="run big Nano"), process(3))
    roster.set_pattern("NANO run")
    assert _pids(roster) == [2, 22]
    roster.set_pattern("2")
    assert _pids(roster) == [2]


def test_tags_win_over_the_cursor_and_leave_with_their_process() -> None:
    roster = _roster(process(2), process(3), process(4))
    roster.toggle_tag()
    roster.move_to(2)
    roster.toggle_tag()
    assert [p.pid for p in roster.chosen] == [2, 4]
    roster.update(system_view((process(3), process(4))))
    assert roster.tags == {4}


def test_every_column_sorts_both_ways() -> None:
    roster = Roster()
    roster.update(many(50))
    for column in range(len(columns.COLUMNS)):
        roster.sort_by(column)
        forward = [columns.COLUMNS[column].key(row) for row in roster.rows]
        roster.invert()
        assert [columns.COLUMNS[column].key(row) for row in roster.rows] == forward[::-1]
