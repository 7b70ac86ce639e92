"""What a model or a user wrote, made fit for a panel: control characters as pictures, tabs as blanks."""

from kernel import sanitise as kernel_sanitise


def sanitise(text: str) -> str:
    """Text whose only control character is the newline; others show as pictures or U+FFFD."""
    return kernel_sanitise.sanitise(text.replace("\r\n", "\n").expandtabs(8), pictures=True)


def one_line(text: str) -> str:
    """Sanitised, and line breaks as spaces."""
    return sanitise(text).replace("\n", " ")
