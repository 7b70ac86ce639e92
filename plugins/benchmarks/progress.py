"""One line on a terminal's standard error that says what is being measured; nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shell.terminal import Output, fit

Tell = Callable[[str], None]


@contextmanager
def progress(err: Output) -> Iterator[Tell]:
    """Within the block, each call draws over the last; the line is gone at the end."""

    def tell(text: str) -> None:
        if err.animated:
            err.emit(f"\r{fit(text, (err.width or 80) - 1)}\x1b[K")

    try:
        yield tell
    finally:
        if err.animated:
            err.emit("\r\x1b[K")
