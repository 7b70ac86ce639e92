"""Streams out: what may reach a terminal, and how wide it is.

Model output is data. On a terminal it passes `sanitise`; files and pipes get the bytes as they are.
"""

import os
import unicodedata
from collections.abc import Iterable, Mapping
from typing import BinaryIO, TextIO, cast

from kernel.sanitise import sanitise

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2", "bold": "1"}


def one_line(text: str) -> str:
    """Text that fits in a table's cell or a notice."""
    return sanitise(" ".join(text.split())) if any(c in text for c in "\n\t\r") else sanitise(text)


def cell_width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) == "Cf":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fit(text: str, width: int) -> str:
    """The text, cut to a width; an ellipsis says that something is missing."""
    if cell_width(text) <= width:
        return text
    kept, used = [], 0
    for character in text:
        used += _character_width(character)
        if used > width - 1:
            break
        kept.append(character)
    return "".join(kept) + "…" if width > 0 else ""


class Output:
    """One stream out: standard output, standard error, or a file.

    `width` is None where lines may be as long as they like (files, pipes).
    """

    def __init__(self, stream: TextIO | BinaryIO, environment: Mapping[str, str] = os.environ) -> None:
        self._stream = stream
        self._binary = getattr(stream, "buffer", None if hasattr(stream, "encoding") else stream)
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._environment = environment
        self.is_terminal = stream.isatty()
        self.at_line_start = True

    @property
    def animated(self) -> bool:
        """Whether a line may be drawn over."""
        return self.is_terminal and self._environment.get("TERM") != "dumb"

    @property
    def width(self) -> int | None:
        if not self.is_terminal:
            return None
        columns = self._environment.get("COLUMNS", "")
        if columns.isdecimal() and int(columns) > 0:
            return int(columns)
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    @property
    def coloured(self) -> bool:
        if self._environment.get("NO_COLOR"):
            return False
        return self.animated or bool(self._environment.get("FORCE_COLOR"))

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self.coloured and colour else text

    def write(self, text: str) -> None:
        """Write data: what a model or a file says."""
        self.emit(sanitise(text) if self.is_terminal else text)

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    def lines(self, lines: Iterable[str]) -> None:
        """Write lines that are clean already and may carry our own colours."""
        self.emit("".join(line + "\n" for line in lines))

    def emit(self, text: str) -> None:
        """Write clean text as it is, and flush."""
        if not text:
            return
        self.at_line_start = text.endswith("\n")
        if self._binary is None:  # a StringIO
            cast(TextIO, self._stream).write(text)
            return
        self._binary.write(encode(text, self._encoding))
        self._binary.flush()

    def finish_line(self) -> None:
        """End a line that was begun."""
        if not self.at_line_start:
            self.emit("\n")

    def discard(self) -> None:
        """Nobody reads this any more: send what is buffered, and all that follows, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def encode(text: str, encoding: str = "utf-8") -> bytes:
    """Text as bytes: bytes that came in undecodable go out as they were, the rest as near as can be."""
    try:
        return text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        return text.encode(encoding, "replace")
