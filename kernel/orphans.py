"""Orphans: the processes in the journals of LLMOSes that have died.

A journal whose lock is free belongs to a dead one. Whoever takes a process out of it holds that lock.
Not here: writing a journal (journal), how a process goes on from its state (recovery).
"""

import contextlib
import fcntl
import json
import os
import sqlite3
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kernel.checkpoint import Checkpoint, SavedThread, check
from kernel.errors import LlmosError, NotPermitted
from kernel.journal import TABLES, discard
from kernel.spec import spec_from


@dataclass(frozen=True, slots=True)
class Orphan:
    """A process that its LLMOS had not reaped when it died."""

    file: Path  # the journal it is in
    pid: int  # it had; it will get a new one
    nice: int
    exit_code: int | None  # it had ended, but perhaps not all of its output had been written
    uid: str  # no other process of any LLMOS has it
    origin: str  # the uid of the one that it goes on with, if it was resumed
    state: Checkpoint  # without KV


def dead_journals(folder: Path) -> list[Path]:
    """Files whose LLMOS has died, oldest first."""
    try:
        files = sorted(folder.glob("*.db"), key=_age)
    except OSError:
        return []
    return [file for file in files if _is_dead(file)]


def forget(folder: Path) -> None:
    """Throw them all away."""
    for file in dead_journals(folder):
        discard(file)


def sweep(folder: Path) -> None:
    """Remove journals with nothing in them: killed before its first process, or after its last."""
    for file in dead_journals(folder):
        with _locked(file) as free:
            if free and _is_empty(file):
                discard(file)
    with contextlib.suppress(OSError):
        for lock in folder.glob("*.lock"):  # killed between making, or removing, the one file and the other
            file = lock.with_suffix(".db")
            with _locked(file) as free:
                if free and not file.exists():
                    discard(file)


def _is_empty(file: Path) -> bool:
    """Not of a damaged one: something may yet be rescued from it."""
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            made = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'process'").fetchone()
            return not made or not database.execute("SELECT 1 FROM process").fetchone()
    except sqlite3.Error:
        return False


def read(file: Path, failed: Callable[[str], None]) -> list[Orphan]:
    """The processes in a dead LLMOS's journal. A damaged file yields what can be read."""
    found = []
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            for row in database.execute(_PROCESSES).fetchall():
                try:
                    found.append(_orphan(file, database, *row))
                except (ValueError, TypeError, KeyError) as error:
                    failed(f"process {row[0]} in {file} cannot be read: {error!r}")
    except sqlite3.Error as error:
        failed(f"{file} cannot be read: {error}")
    return found


_PROCESSES = (
    "SELECT pid, nice, exit_code, uid, origin, spec, digest, prompt_tokens, output_tokens, hung_up"
    " FROM process ORDER BY pid"
)
_TURNS = "SELECT text FROM turn WHERE pid = ? ORDER BY number"
_PROGRESS = "SELECT * FROM progress WHERE pid = ? ORDER BY thread"


def _orphan(
    file: Path,
    database: sqlite3.Connection,
    pid: int,
    nice: int,
    exit_code: int | None,
    uid: str,
    origin: str,
    spec: str,
    digest: str,
    prompt_tokens: int,
    output_tokens: int,
    hung_up: int,
) -> Orphan:
    replies = database.execute("SELECT item, text FROM reply WHERE pid = ? ORDER BY item", (pid,))
    finished = {item: _text(reply) for item, reply in replies}
    state = Checkpoint(
        spec=spec_from(json.loads(spec)),
        model_digest=digest,
        replies=finished,
        threads=tuple(
            SavedThread(
                item=item,
                begun=bool(begun),
                prompt_length=prompt_length,
                tokens=tuple(array("i", tokens)),
                reply=_text(text),
                reply_bounds=tuple(array("i", b"".join(bounds))),  # journals of before have none
            )
            for _, _, item, begun, prompt_length, *bounds, tokens, text in database.execute(_PROGRESS, (pid,))
            if item not in finished
        ),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        turns=tuple(_text(text) for (text,) in database.execute(_TURNS, (pid,))),
        hung_up=bool(hung_up),
    )
    check(state)
    return Orphan(file, pid, nice, exit_code, uid, origin, state)


@contextlib.contextmanager
def claimed(process: Orphan) -> Iterator[None]:
    """Hold a dead LLMOS's process while it is revived; then it leaves its journal.

    Raises NotPermitted if somebody else has taken it, LlmosError if it cannot be taken out.
    """
    try:
        with _taken_out(process):
            yield
    except (OSError, sqlite3.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise LlmosError(f"cannot take process {process.pid} out of {process.file}: {why}") from error


@contextlib.contextmanager
def _taken_out(process: Orphan) -> Iterator[None]:
    taken = NotPermitted(f"process {process.pid} of an earlier LLMOS is being continued elsewhere")
    with _locked(process.file) as free:
        if not free:
            raise taken
        with contextlib.closing(sqlite3.connect(process.file)) as database:
            if not database.execute("SELECT 1 FROM process WHERE pid = ?", (process.pid,)).fetchone():
                raise taken
            yield
            for table in TABLES:
                database.execute(f"DELETE FROM {table} WHERE pid = ?", (process.pid,))
            rest = database.execute("SELECT count(*) FROM process").fetchone()[0]
            database.commit()
        if not rest:
            discard(process.file)


def find(folder: Path, failed: Callable[[str], None]) -> list[Orphan]:
    """All that dead LLMOSes have left; `failed` hears of what cannot be read.

    One that was killed between writing what it resumes into its own journal and taking it out of the older
    one leaves it in both: then the newer counts, and the older goes.
    """
    sweep(folder)
    found = [orphan for file in dead_journals(folder) for orphan in read(file, failed)]
    taken = {orphan.origin for orphan in found}
    for orphan in found:
        if orphan.uid in taken:
            with contextlib.suppress(LlmosError), claimed(orphan):
                pass
    return [orphan for orphan in found if orphan.uid not in taken]


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # another LLMOS has just ended
        return 0.0


def _is_dead(file: Path) -> bool:
    with _locked(file) as free:
        return free


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Whether a journal's lock was free; it is held meanwhile."""
    try:
        handle = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        if free:  # by name: a worker that is being forked holds a copy of the handle until it execs
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
