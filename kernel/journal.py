"""The journal: the process table on disk, so that a crash of LLMOS loses nothing.

One SQLite file per boot (WAL, so that a write is an append), locked for as long as that LLMOS lives. A
process's specification is written before `spawn` returns; its tokens and replies follow in group commits
by a thread that sleeps while nothing changes: the token loop only adds to a set. Commits do not fsync: the
journal survives the death of LLMOS at any instant, and a power failure up to the last checkpoint of the WAL.
A process leaves the journal when it is reaped, not when it ends: until then its output may not have
reached its file. At a clean end the file is removed. One whose lock is free belongs to an LLMOS that died.
Lock: `_changed` guards the set of changed processes; it is a leaf.
Not here: what dead LLMOSes have left (orphans), how a process goes on from its state (recovery).
"""

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kernel.checkpoint import model_digest
from kernel.errors import LlmosError
from kernel.process import Process, Thread

GROUP_COMMIT_S = 0.1

TABLES = ("process", "turn", "reply", "progress")
_NEW_PROCESS = "INSERT INTO process VALUES (?, ?, ?, ?, NULL, 0, 0, 0, ?, ?)"
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS process (
    pid INTEGER PRIMARY KEY, nice INTEGER, spec TEXT, digest TEXT, exit_code INTEGER,
    prompt_tokens INTEGER, output_tokens INTEGER, hung_up INTEGER, uid TEXT, origin TEXT);
CREATE TABLE IF NOT EXISTS turn (pid INTEGER, number INTEGER, text TEXT, PRIMARY KEY (pid, number));
CREATE TABLE IF NOT EXISTS reply (pid INTEGER, item INTEGER, text TEXT, PRIMARY KEY (pid, item));
CREATE TABLE IF NOT EXISTS progress (
    pid INTEGER, thread INTEGER, item INTEGER, begun INTEGER, prompt_length INTEGER, reply_bounds BLOB,
    tokens BLOB, text TEXT,
    PRIMARY KEY (pid, thread));
"""


@dataclass(frozen=True, slots=True)
class _Row:
    """What changed of one process, copied under the table's lock."""

    pid: int
    item: int  # all replies before it are in `replies`, or were written before
    replies: tuple[tuple[int, str], ...]  # (item, text)
    turns: tuple[str, ...]
    threads: tuple[tuple[int, int, bool, int, bytes, bytes, str], ...]  # as the columns of `progress`
    prompt_tokens: int
    output_tokens: int
    hung_up: bool
    nice: int
    exit_code: int | None
    reaped: bool


class Journal:
    """This boot's journal. `table_lock` is the process table's."""

    def __init__(self, folder: Path, table_lock: threading.RLock, failed: Callable[[str], None]) -> None:
        """Raises OSError, sqlite3.Error if the folder cannot be used, RuntimeError (no more threads)."""
        self.folder = folder
        self._table_lock = table_lock
        self._failed = failed
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.file, self._lock_handle = _new_file(folder)
        self._uid = f"{self.file.stem}.{os.fstat(self._lock_handle).st_mtime_ns}"
        self._writing = threading.Lock()  # one transaction at a time
        self._changed = threading.Condition()
        self._dirty: dict[Process, None] = {}  # guarded by _changed; a set that keeps order
        self._items: dict[int, int] = {}  # replies written so far, by PID; guarded by _writing
        self._specs: dict[int, tuple[object, ...]] = {}  # not written yet, by PID; guarded by _writing
        self._ailing = False  # guarded by _writing
        self._closed = False  # guarded by _changed
        self._frozen = False
        self._removed = False  # written under _writing, read by anybody
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        try:
            self._database = sqlite3.connect(self.file, check_same_thread=False, isolation_level=None)
            self._database.executescript(_SCHEMA)
            self._thread.start()
        except BaseException:
            discard(self.file)
            os.close(self._lock_handle)
            raise

    def spawned(self, process: Process, model_file: Path, origin: str, digest: str) -> None:
        """Write a specification, before its PID is given out. Called without the table's lock.

        `origin` is the uid of the orphan that it goes on with, or ""; `digest` that of the file which the
        engine has loaded, or "" while it is not open.
        """
        try:
            digest = digest or model_digest(model_file)
        except LlmosError as error:
            self._failed(error.message)
            return
        with self._writing, self._failing():
            spec, uid = json.dumps(asdict(process.spec)), f"{self._uid}.{process.pid}"
            values = (process.pid, process.nice, spec, digest, uid, origin)
            self._specs[process.pid] = values
            self._database.execute(_NEW_PROCESS, values)
            del self._specs[process.pid]

    def mark(self, process: Process) -> None:
        """A process has new tokens, ended, or was reaped. Called with the table's lock held."""
        if self._frozen or self._removed:
            return
        with self._changed:
            if not self._dirty:
                self._changed.notify()
            self._dirty[process] = None

    def flush(self) -> bool:
        """Write what is marked, now; False if it cannot be."""
        with self._writing:
            with self._changed:
                dirty, self._dirty = list(self._dirty), {}
            with self._table_lock:
                rows = [self._row(process) for process in dirty]
            if self._frozen or self._written(rows):
                return self._frozen or self._is_there()
            with self._changed:  # for the next time: the disk may have room then
                self._dirty = dict.fromkeys(dirty) | self._dirty
            return False

    def _is_there(self) -> bool:
        """Whether `resume` would find what was written: a file that was removed can be written to."""
        try:
            self.file.stat()
        except (FileNotFoundError, NotADirectoryError):
            if not self._removed:
                self._failed(f"{self.file} was removed: a crash would lose what runs")
            self._removed = True
        except OSError:  # who knows
            pass
        return not self._removed

    def freeze(self) -> None:
        """Write nothing more, and keep the file: what runs now is to be found by `resume`.

        No lock is taken: a signal handler may call this.
        """
        self._frozen = True

    def close(self) -> None:
        """Stop. The file goes, unless it is frozen."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._database.close()
        if not self._frozen:
            discard(self.file)
        os.close(self._lock_handle)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closed)
                if self._closed:
                    return
                self._changed.wait_for(lambda: self._closed, GROUP_COMMIT_S)  # let a group gather
            self.flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A full disk must not stop the machine: it is told, and the work goes on without a journal."""
        try:
            yield
            self._ailing = False
        except (sqlite3.Error, MemoryError) as error:
            if not self._ailing:
                why = error or "out of memory"
                self._failed(f"the journal cannot be written: {why}: a crash would lose what runs")
            self._ailing = True

    def _written(self, rows: list[_Row]) -> bool:
        """All of it or nothing; what was not written is to be written again."""
        with self._failing():
            self._write(rows)
            self._items.update({row.pid: row.item for row in rows})
            return True
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("ROLLBACK")
        return False

    def _row(self, process: Process) -> _Row:
        first = self._items.get(process.pid, 0)
        replies = *enumerate(process.replies[first:], first), *(process.early or {}).items()
        busy = [t for t in process.threads if t.items or (t.tokens and process.is_chat)]
        return _Row(
            pid=process.pid,
            item=process.item,
            replies=replies,
            turns=tuple(process.turns or ()),
            threads=tuple(map(_columns, busy)),
            prompt_tokens=process.prompt_tokens,
            output_tokens=process.output_tokens,
            hung_up=process.hung_up,
            nice=process.nice,
            exit_code=process.exit_code,
            reaped=process.reaped,
        )

    def _write(self, rows: list[_Row]) -> None:
        run = self._database.execute
        run("BEGIN")
        for row in rows:
            if row.reaped:
                for table in TABLES:
                    run(f"DELETE FROM {table} WHERE pid = ?", (row.pid,))
                continue
            if row.pid in self._specs:
                run(_NEW_PROCESS.replace("INSERT", "INSERT OR REPLACE"), self._specs[row.pid])
            counts = (row.prompt_tokens, row.output_tokens, row.hung_up)
            run(_UPDATE, (row.nice, row.exit_code, *counts, row.pid))
            for item, text in row.replies:
                run("INSERT OR REPLACE INTO reply VALUES (?, ?, ?)", (row.pid, item, _bytes(text)))
            for number, text in enumerate(row.turns):
                run("INSERT OR IGNORE INTO turn VALUES (?, ?, ?)", (row.pid, number, _bytes(text)))
            for *thread, text in row.threads:
                progress = (row.pid, *thread, _bytes(str(text)))
                run("INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?, ?, ?, ?)", progress)
        run("COMMIT")
        for row in rows:
            self._specs.pop(row.pid, None)


_UPDATE = (
    "UPDATE process SET nice = ?, exit_code = ?, prompt_tokens = ?, output_tokens = ?, hung_up = ? "
    "WHERE pid = ?"
)


def _columns(thread: Thread) -> tuple[int, int, bool, int, bytes, bytes, str]:
    bounds, tokens = array("i", thread.reply_bounds).tobytes(), array("i", thread.tokens).tobytes()
    return thread.index, thread.item, thread.begun, thread.prompt_length, bounds, tokens, thread.reply


def discard(file: Path) -> None:
    """Remove a journal."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(OSError):
            Path(f"{file}{suffix}").unlink()
    with contextlib.suppress(OSError):
        file.with_suffix(".lock").unlink()


def _new_file(folder: Path) -> tuple[Path, int]:
    """A fresh name, and the lock that says its owner lives."""
    number = 0
    while True:
        file = folder / f"{os.getpid()}-{number}.db"
        handle = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), file.with_suffix(".lock").stat()):
                raise FileNotFoundError  # swept away before it was locked
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            return file, handle
        except (BlockingIOError, FileExistsError, FileNotFoundError):  # or a dead one's, who had our PID
            os.close(handle)
        except BaseException:
            os.close(handle)
            discard(file)
            raise
        number += 1


def _bytes(text: str) -> bytes:
    """Text as SQLite can hold it: prompts and replies may have lone surrogates."""
    return text.encode("utf-8", "surrogatepass")
