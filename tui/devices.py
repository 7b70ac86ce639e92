"""The devices: how busy each was, and whose bytes fill its memory.

A column per device, side by side, then one with the pools that belong to none. In a box of three
lines or fewer: one line each. Not here: host sensors (temperature, watts, clocks).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from rich.cells import cell_len
from rich.style import Style
from textual.geometry import Size

from kernel.snapshot import DeviceView, PoolView
from tui.graph import bar, braille
from tui.panel import BOLD, BUSY, DIM, Line, Panel, fit, spread, words
from tui.sanitise import one_line
from tui.units import bytes_short, percent

_COLUMN_MIN = 26
_COMPACT_LINES = 3
_KINDS = {  # a claim's kind: letter (it tells kinds apart where there is no colour), name, style
    "weights": ("W", "weights", Style(color="white", bgcolor="blue")),
    "kv": ("K", "kv", Style(color="black", bgcolor="green")),
    "compute": ("A", "act", Style(color="black", bgcolor="cyan")),
    "training": ("T", "train", Style(color="black", bgcolor="magenta")),
    "declared": ("D", "declared", Style(color="black", bgcolor="bright_cyan")),
    "other": ("O", "other", Style(color="black", bgcolor="yellow")),
}
_STYLES = {letter: style for letter, _, style in _KINDS.values()}
_FREE, _KEPT = "░", "·"  # room that can be admitted; room that is kept back

_Build = Callable[[int, int], list[Line]]  # (width, height) of one column


class Devices(Panel):
    """Every device and every pool."""

    def lines(self, width: int, height: int) -> Sequence[Line]:
        if height <= _COMPACT_LINES:
            return [_compact(device, self._pool(device), width) for device in self.feed.view.devices]
        builds = self._columns()
        count = max(1, min(len(builds), (width + 1) // (_COLUMN_MIN + 1)))
        self.set_titles("¹ devices", f"{len(builds) - count} more" if count < len(builds) else "")
        each = (width + 1) // count - 1
        return _side_by_side([build(each, height) for build in builds[:count]], each, height)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Where the layout leaves it open: a line per device."""
        return min(_COMPACT_LINES, len(self.feed.view.devices))

    def _pool(self, device: DeviceView) -> PoolView | None:
        return next((pool for pool in self.feed.view.pools if pool.name == device.info.pool), None)

    def _columns(self) -> list[_Build]:
        view = self.feed.view
        builds = [self._device_column(device) for device in view.devices]
        names = {device.info.pool for device in view.devices}
        loose = [pool for pool in view.pools if pool.name not in names]
        return [*builds, lambda width, height: _pool_column(loose, width, height)] if loose else builds

    def _device_column(self, device: DeviceView) -> _Build:
        history = [sample.busy.get(device.info.name, 0.0) for sample in self.feed.history]
        pool = self._pool(device)

        def build(width: int, height: int) -> list[Line]:
            below = [] if pool is None else _memory(pool, width)[: max(0, height - 2)]
            rows = max(0, height - 1 - len(below))
            name = one_line(f"{device.info.name} {device.info.description}")
            head = (words(spread(name, percent(device.busy), width), BOLD),)
            return [head, *((words(row, BUSY),) for row in braille(history, width, rows, 1.0)), *below]

        return build


def _compact(device: DeviceView, pool: PoolView | None, width: int) -> Line:
    """A device in one line."""
    head = f"{fit(device.info.name, 5)} {bar(device.busy, 5)} {percent(device.busy):>4} "
    if pool is None:
        return (words(fit(head, width)),)
    room = f" {_room(pool)}"
    return (words(head), *_map(pool, max(0, width - len(head) - len(room))), words(room))


def _pool_column(pools: list[PoolView], width: int, height: int) -> list[Line]:
    lines = [(words(fit("memory", width), BOLD),)]
    return (lines + [line for pool in pools for line in _memory(pool, width)])[:height]


def _memory(pool: PoolView, width: int) -> list[Line]:
    """A pool in three lines: its figures, its map, the map's legend."""
    return [
        (words(spread(one_line(pool.name), _room(pool), width)),),
        _map(pool, width),
        _legend(pool, width),
    ]


def _room(pool: PoolView) -> str:
    return f"{bytes_short(pool.used_bytes)}/{bytes_short(pool.capacity_bytes)}"


def _map(pool: PoolView, width: int) -> Line:
    """One cell per share of the pool. Who has any bytes has a cell."""
    if pool.capacity_bytes <= 0:
        return (words(" " * width),)
    cells = "".join(letter * _share(size, pool, width) for letter, size in _by_letter(pool))
    kept_bytes = pool.capacity_bytes - pool.used_bytes - pool.free_bytes
    kept = _KEPT * (_share(kept_bytes, pool, width) if kept_bytes > 0 else 0)
    text = cells + _FREE * (width - len(cells) - len(kept)) + kept
    return tuple(words("".join(run), _STYLES.get(letter, DIM)) for letter, run in groupby(text[:width]))


def _share(size_bytes: int, pool: PoolView, width: int) -> int:
    return max(1, round(width * size_bytes / pool.capacity_bytes))


def _by_letter(pool: PoolView) -> Iterator[tuple[str, int]]:
    for kind, (letter, _, _) in _KINDS.items():
        if size_bytes := sum(claim.size_bytes for claim in pool.claims if claim.kind == kind):
            yield letter, size_bytes


def _legend(pool: PoolView, width: int) -> Line:
    sizes = {**dict(_by_letter(pool)), _FREE: pool.free_bytes}
    names = {**{letter: name for letter, name, _ in _KINDS.values()}, _FREE: "free"}
    text = "  ".join(f"{letter} {names[letter]} {bytes_short(size)}" for letter, size in sizes.items())
    if cell_len(text) > width:  # without the names, which the help screen gives too
        text = " ".join(f"{letter}{bytes_short(size)}" for letter, size in sizes.items())
    return (words(fit(text, width), DIM),)


def _side_by_side(columns: list[list[Line]], width: int, height: int) -> list[Line]:
    lines: list[Line] = []
    for y in range(height):
        line: Line = ()
        for index, column in enumerate(columns):
            cells = column[y] if y < len(column) else (words(" " * width),)
            line += ((words("│", DIM),) if index else ()) + cells
        lines.append(line)
    return lines
