"""History as braille dots, two samples and four levels to a character cell."""

from collections.abc import Sequence

_LEFT = (0x00, 0x40, 0x44, 0x46, 0x47)  # dots of the left half of a cell, by height
_RIGHT = (0x00, 0x80, 0xA0, 0xB0, 0xB8)


def braille(values: Sequence[float], width: int, height: int, top: float) -> list[str]:
    """Lines of a filled graph, newest value at the right; `top` is what fills the whole height."""
    recent = list(values)[-2 * width :] if width > 0 else []
    levels = [0] * (2 * width - len(recent)) + [_level(value, top, 4 * height) for value in recent]
    pairs = list(zip(levels[::2], levels[1::2], strict=True))
    return [_row(pairs, 4 * (height - 1 - row)) for row in range(height)]


def bar(fraction: float, width: int) -> str:
    """A meter of one line."""
    full = min(width, max(0, round(fraction * width)))
    return "▇" * full + "░" * (width - full)


def _level(value: float, top: float, dots: int) -> int:
    """Dots for a value: what is above zero shows at least one."""
    if value <= 0 or top <= 0:
        return 0
    return max(1, min(dots, round(dots * value / top)))


def _row(pairs: list[tuple[int, int]], base: int) -> str:
    return "".join(
        chr(0x2800 | _LEFT[min(4, max(0, left - base))] | _RIGHT[min(4, max(0, right - base))])
        for left, right in pairs
    )
