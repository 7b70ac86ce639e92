"""Numbers as a few characters: bytes, rates, times."""

_UNITS = "BKMGTP"


def bytes_short(size_bytes: float) -> str:
    """At most four characters: "-", "512B", "612M", "5.1G"."""
    if size_bytes <= 0:
        return "-"
    power = 0
    while size_bytes >= 999.5 and power < len(_UNITS) - 1:
        size_bytes /= 1024
        power += 1
    digits = 1 if power and size_bytes < 9.95 else 0
    return f"{size_bytes:.{digits}f}{_UNITS[power]}"


def rate_short(per_s: float) -> str:
    """At most five characters: "-", "48.2", "2.1k"."""
    if per_s < 0.05:
        return "-"
    if per_s < 99.95:
        return f"{per_s:.1f}"
    if per_s < 9_999.5:
        return f"{per_s:.0f}"
    return f"{per_s / 1000:.0f}k" if per_s < 999_500 else f"{per_s / 1e6:.1f}M"


def time_short(duration_s: float) -> str:
    """At most eight characters: "1:40", "1:12:44", "3d02h"."""
    minutes, seconds = divmod(max(0, int(duration_s)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def percent(fraction: float) -> str:
    """ "57%", never above 999%."""
    return f"{min(999, round(100 * fraction))}%"
