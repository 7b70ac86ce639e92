"""A model's file, copied to where its user wants it: outside of LLMOS's own folder.

The name appears when the file is whole and on the disk; what it replaces is a model or nothing.
Owner: the store. Not here: the own folder (shelf).
"""

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from kernel.errors import LlmosError, NotPermitted, UsageError

_MAGIC = b"GGUF"
_COPY_BYTES = 1 << 20


def export(source: Path, target: Path, progress: Callable[[str, int, int], None]) -> None:
    """Raises NotPermitted (it would replace something else), LlmosError. Ended early, it leaves nothing."""
    if not target.name:
        raise UsageError("the model needs a file name")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _check_target(source, target)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o644), "wb") as out, source.open("rb") as file:
            total, done = os.fstat(file.fileno()).st_size, 0
            while chunk := file.read(_COPY_BYTES):
                done += out.write(chunk)
                progress(target.name, done, total)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(target)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        _remove(temporary)
        raise LlmosError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
    except BaseException:  # ^C
        _remove(temporary)
        raise


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        temporary.unlink(missing_ok=True)


def _check_target(source: Path, target: Path) -> None:
    try:
        status = target.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise NotPermitted(f"{target} exists and is not a regular file")
    if target.samefile(source):
        raise NotPermitted(f"{target} is that model already")
    with target.open("rb") as file:
        if status.st_size and file.read(len(_MAGIC)) != _MAGIC:
            raise NotPermitted(f"{target} exists and is not a model", "choose another name")
