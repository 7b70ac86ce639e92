"""Numbers as a few characters, as wide as their columns."""

from kernel.units import short_bytes


def bytes_short(size_bytes: float) -> str:
    """At most four characters: "-", "512B", "612M", "5.1G"."""
    return short_bytes(size_bytes) if size_bytes > 0 else "-"


def rate_short(per_s: float) -> str:
    """At most five characters: "-", "48.2", "2.1k"."""
    if per_s < 0.05:
        return "-"
    if per_s < 99.95:
        return f"{per_s:.1f}"
    if per_s < 9_999.5:
        return f"{per_s:.0f}"
    return f"{per_s / 1000:.0f}k" if per_s < 999_500 else f"{per_s / 1e6:.1f}M"


def percent(fraction: float) -> str:
    """ "57%", never above 999%."""
    return f"{min(999, round(100 * fraction))}%"
