"""Amounts and times as people read them. Pure.

Not here: what only one face shows (shell.render, tui.units).
"""

_UNITS = "BKMGTP"


def scaled(value: float, base: int) -> tuple[str, int]:
    """Three digits at most, and the power of `base` that they count: 642 MiB are ("642", 2)."""
    power = 0
    while abs(value) >= 999.5 and power < len(_UNITS) - 1:
        value /= base
        power += 1
    return f"{value:.{1 if power and abs(value) < 9.95 else 0}f}", power


def short_bytes(size_bytes: float) -> str:
    """`512B`, `612M`, `5.1G`: powers of 1024, at most four characters."""
    digits, power = scaled(size_bytes, 1024)
    return digits + _UNITS[power]


def human_bytes(size_bytes: float) -> str:
    """`512 B`, `5.1 GiB`: for sentences."""
    digits, power = scaled(size_bytes, 1024)
    return f"{digits} {_UNITS[power]}iB" if power else f"{digits} B"


def short_time(duration_s: float) -> str:
    """`1:40`, `1:12:44`, `3d02h`: at most eight characters."""
    minutes, seconds = divmod(max(0, int(duration_s)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
