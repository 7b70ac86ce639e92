"""Files that a person names: opened, with one clear line for what cannot be.

Not here: where a process's output goes (jobs), what may reach a terminal (terminal).
"""

from pathlib import Path
from typing import BinaryIO, Literal

from kernel.errors import LlmosError, UsageError


def path_of(name: str) -> Path:
    """Raises UsageError for an empty name, which `Path` would take for the current folder."""
    if not name:
        raise UsageError("the name of the file is empty")
    return Path(name)


def open_file(name: str, mode: Literal["rb", "wb", "ab"]) -> BinaryIO:
    """The caller closes it. Raises UsageError, LlmosError."""
    try:
        return path_of(name).open(mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise LlmosError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
