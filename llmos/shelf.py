"""LLMOS's own folder of models: the only one it writes to.

A file gets its name when it is whole and on the disk; until then it lies in `.incoming`, where the next
attempt finds it. Names hold no folders, nothing is overwritten, and no link in the folder is followed.

Owner: the store. Lock: an advisory one on each partial file, held while it is filled, so that two LLMOS
on one home never fill the same. Not here: which model a name means (store), where bytes come from (hub).
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kernel.errors import AdmissionRefused, LlmosError, NotPermitted, UsageError
from kernel.units import human_bytes
from llmos.folders import SUFFIX, stem
from llmos.paths import writable

SPARE_BYTES = 64 << 20  # room on the disk that is left to others
MAX_NAME_BYTES = 200
_INCOMING = ".incoming"


class Shelf:
    """A folder of model files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, file_name: str) -> Path:
        """Where a file of this name will be; the folder is made if need be.

        Raises NotPermitted: something has the name, or the folder cannot be written to.
        """
        if writable(self.folder) is None:
            raise NotPermitted(f"{self.folder} cannot be written to", "LLMOS_HOME names another place")
        path = self.folder / file_name
        if os.path.lexists(path):
            name = stem(file_name)
            raise NotPermitted(f"there is another model named {name} already", f"`rm {name}` first")
        return path

    def fill(
        self,
        target: Path,
        partial_name: str,
        size_bytes: int,
        write: Callable[[BinaryIO], None],
        *,
        keep: bool,
    ) -> None:
        """Have `write` fill a partial file, of `size_bytes` in the end, then give it its name.

        If `write` raises, what it wrote stays for the next time, or with `keep` false goes.
        Raises NotPermitted (someone else fills it now), AdmissionRefused (no room), LlmosError.
        """
        partial = self.folder / _INCOMING / partial_name
        with _told(f"cannot write {target.name}"), _locked(partial) as stream:
            try:
                self._make_room(size_bytes - os.fstat(stream.fileno()).st_size)
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
                _publish(partial, target)
            finally:
                if not keep or os.fstat(stream.fileno()).st_size == 0:
                    partial.unlink(missing_ok=True)

    def link(self, source: Path, target: Path) -> bool:
        """Name a file that lies elsewhere on the same disk; False where that cannot be."""
        try:
            target.hardlink_to(source)
        except FileExistsError:
            raise _taken(target) from None
        except OSError:  # another disk, another owner, a file system without hard links
            return False
        return True

    def remove(self, paths: list[Path]) -> int:
        """Delete files, links (not what they lead to) and folders right in this one; returns bytes freed."""
        with _told("cannot remove it"):
            return sum(_remove(path) for path in paths if path.parent == self.folder)

    def _make_room(self, size_bytes: int) -> None:
        short = size_bytes + SPARE_BYTES - shutil.disk_usage(self.folder).free
        if size_bytes > 0 and short > 0:
            raise AdmissionRefused(
                f"{human_bytes(size_bytes)} are needed on the disk of {self.folder}, "
                f"{human_bytes(short)} more than is free",
                "`rm` what you do not need, or set LLMOS_HOME to a folder on another disk",
            )


def checked_name(name: str) -> str:
    """A name that a model of the own folder may have, without .gguf. Raises UsageError."""
    name = name.removesuffix(SUFFIX)
    why = _wrong(name)
    if why:
        raise UsageError(f"{name[:80]!r} cannot be a model's name: {why}", "letters, digits, - . _ : will do")
    return name


def _wrong(name: str) -> str:
    if not name:
        return "it is empty"
    if "/" in name or "\\" in name:
        return "it names a folder"
    if name[0] in ".-~":
        return f"it begins with {name[0]}"
    if not name.isprintable():
        return "it holds what cannot be shown"
    return "it is too long" if len(name.encode()) > MAX_NAME_BYTES else ""


@contextmanager
def _locked(partial: Path) -> Iterator[BinaryIO]:
    """The partial file, open to read and write, and nobody else's."""
    partial.parent.mkdir(mode=0o700, exist_ok=True)
    if partial.parent.is_symlink():
        raise NotPermitted(f"{partial.parent} is a link, and LLMOS writes through none")
    with suppress(FileNotFoundError):
        if partial.lstat().st_nlink > 1:  # it has its name already: a crash left this second one
            partial.unlink()
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(partial, flags, 0o644), "r+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise NotPermitted("another LLMOS fetches this very file now") from None
        yield stream


def _publish(partial: Path, target: Path) -> None:
    """Give a whole file its name, unless something has it by now."""
    try:
        target.hardlink_to(partial)
    except FileExistsError:
        raise _taken(target) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise _taken(target) from None
        partial.rename(target)
    partial.unlink(missing_ok=True)


def _taken(target: Path) -> NotPermitted:
    return NotPermitted(f"someone else has just made {target.name}")


def _remove(path: Path) -> int:
    status = path.lstat()
    if path.is_dir() and not path.is_symlink():
        freed = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        shutil.rmtree(path)
        return freed
    path.unlink()
    return status.st_size if status.st_nlink == 1 else 0


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What the file system refuses, in one line."""
    try:
        yield
    except OSError as error:
        raise LlmosError(f"{what}: {error.strerror or error}") from error
