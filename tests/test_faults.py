"""Every system call, with the n-th thing it needs made to fail, for n = 1, 2, … until it gets through.

Whatever fails: the caller hears a LlmosError, or nothing; the tables are in order; nothing leaks, neither
memory nor files; and who ran beside it ends with exactly the output it would have had.
"""

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from simkernel import SimSystem

from drivers.sim import SimDriver, SimEngine
from drivers.simmodel import SimModel
from kernel import checkpoint, orphans
from kernel.device import Sampling
from kernel.errors import AdmissionRefused, LlmosError, WorkerDied
from kernel.memory import MemoryLedger
from kernel.process import Signal
from kernel.snapshot import ClaimView
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls

HANG_S = 20
MODELS = {"m": SimModel(mean_tokens=0, sequences=3), "cold": SimModel(mean_tokens=0, weights_bytes=1 << 20)}


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def refused() -> LlmosError:
    return AdmissionRefused("refused, as planned")


POINTS: dict[str, tuple[Callable[[], BaseException], tuple[tuple[Any, str], ...]]] = {
    "open": (full, ((os, "open"), (io, "open"))),
    "read": (full, ((os, "read"), (os, "pread"))),
    "write": (full, ((os, "write"), (os, "fsync"), (os, "ftruncate"))),
    "name": (full, ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "mkdir"))),
    "look": (full, ((os, "stat"), (os, "lstat"), (os, "scandir"))),
    "lock": (full, ((fcntl, "flock"),)),
    "driver": (refused, tuple((SimDriver, name) for name in ("inspect", "estimate", "open"))),
    "engine": (
        lambda: WorkerDied("dead, as planned"),
        tuple((SimEngine, name) for name in ("open", "queue", "fork", "dump", "restore", "close", "step")),
    ),
    "claim": (refused, ((MemoryLedger, "claim"),)),
    "thread": (lambda: RuntimeError("can't start new thread"), ((threading.Thread, "start"),)),
    "memory": (
        MemoryError,
        (
            (json, "dumps"),
            (json, "loads"),
            (checkpoint, "encode"),
            (checkpoint, "decode"),
            (SimEngine, "dump"),
            (Path, "read_bytes"),
        ),
    ),
    "sqlite": (lambda: sqlite3.OperationalError("database or disk is full"), ()),  # see Faults
}


class Faults:
    """Makes the n-th use of a point by this thread fail."""

    def __init__(self, point: str, n: int) -> None:
        self.n, self.count, self.armed = n, 0, False
        self.error, self.places = POINTS[point]
        self.sqlite = point == "sqlite"
        self.thread = threading.get_ident()

    def hit(self) -> None:
        if self.armed and threading.get_ident() == self.thread:
            self.count += 1
            if self.count == self.n:
                raise self.error()

    def failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            self.hit()
            return call(*args, **kwargs)

        return failing

    @contextmanager
    def planted(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        with patch.context() as here:
            for owner, name in self.places:
                here.setattr(owner, name, self.failing(getattr(owner, name)))
            here.setattr(os, "fdopen", self.fdopen)
            here.setattr(sqlite3, "connect", self.connect)
            yield

    def fdopen(self, handle: int, mode: str) -> Any:
        """What is written through it counts as a write."""
        stream = _fdopen(handle, mode)
        if any(name == "write" for _, name in self.places):
            return Stream(stream, self)
        return stream

    def connect(self, file: Path, **options: Any) -> sqlite3.Connection:
        faults = self

        class Connection(sqlite3.Connection):
            def execute(self, *args: Any) -> sqlite3.Cursor:
                if faults.sqlite:
                    faults.hit()
                return super().execute(*args)

            def commit(self) -> None:
                if faults.sqlite:
                    faults.hit()
                super().commit()

            def executescript(self, *args: Any) -> sqlite3.Cursor:
                if faults.sqlite:
                    faults.hit()
                return super().executescript(*args)

        if self.sqlite:
            self.hit()
        return _connect(file, factory=Connection, **options)


_connect, _fdopen = sqlite3.connect, os.fdopen


class Stream:
    """A file whose writes may fail."""

    def __init__(self, stream: Any, faults: Faults) -> None:
        self._stream, self._faults = stream, faults

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: bytes) -> int:
        self._faults.hit()
        return int(self._stream.write(data))

    def flush(self) -> None:
        self._faults.hit()
        self._stream.flush()


class World:
    """A kernel at work: two run, one is stopped, one has ended; a checkpoint; a dead LLMOS's journal."""

    def __init__(self, folder: Path, template: Path, ram_bytes: int = 64 << 30) -> None:
        shutil.copytree(template, folder)
        self.folder = folder
        self.sim = SimSystem(MODELS, folder=folder, swap=folder / "swap", ram_bytes=ram_bytes)
        self.system, self.kernel = self.sim.system, self.sim.kernel
        self.bystander = self.sim.spawn(seed=1, max_tokens=300)
        self.subject = self.sim.spawn(seed=2, max_tokens=200)
        self.stopped = self.sim.spawn(seed=3, max_tokens=40)
        self.sim.run_until(90)
        self.system.signal(self.stopped, Signal.STOP)
        self.ended = self.sim.spawn(seed=4, max_tokens=1)
        while self.system.process(self.ended).exit_code is None:
            self.sim.dispatcher.advance()
        self.chat = self.system.spawn(ProcessSpec("m", ("hello",), program="chat", max_tokens=5))
        while self.system.process(self.chat).state != "SLEEPING":
            self.sim.dispatcher.advance()
        self.orphans = self.system.orphans()
        self.second: SimSystem | None = None

    def boot_another(self) -> int:
        """Its first process opens its journal."""
        self.second = SimSystem({"m": MODELS["m"]}, folder=self.folder)
        return self.second.spawn(max_tokens=3)

    def claims(self) -> set[ClaimView]:
        """What is ours in the ledger."""
        every = {claim for pool in self.system.snapshot().pools for claim in pool.claims}
        return {claim for claim in every if claim.kind != "other"}

    def models_claims(self) -> set[ClaimView]:
        return {claim for claim in self.claims() if not claim.owner.startswith("process")}

    def pids(self) -> list[int]:
        return [view.pid for view in self.system.snapshot().processes if view.exit_code is None]

    def strangers(self) -> set[str]:
        """Files that no one asked for: temporary ones, and journals without an owner."""
        names = {str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()}
        for sim in (self.sim, self.second):
            if sim is not None and (mine := sim.kernel.recovery.journal):
                names -= {f"journal/{mine.file.stem}{end}" for end in (".db", ".lock")}
        return {name for name in names if not name.endswith(("-wal", "-shm"))}

    def close(self) -> None:
        self.system.shutdown()
        if self.second is not None:
            self.second.system.shutdown()


def solo(seed: int, max_tokens: int) -> str:
    sim = SimSystem(MODELS)
    pid = sim.spawn(seed=seed, max_tokens=max_tokens)
    sim.kernel.pump()
    return sim.output(pid)


def spec(model: str = "m") -> ProcessSpec:
    return ProcessSpec(model, ("one two", "three"), max_tokens=20, sampling=Sampling(seed=9))


CALLS: dict[str, Callable[[World], object]] = {
    "spawn": lambda w: w.system.spawn(spec()),
    "spawn_cold": lambda w: w.system.spawn(spec("cold")),
    "signal_kill": lambda w: w.system.signal(w.subject, Signal.KILL),
    "signal_stop": lambda w: w.system.signal(w.subject, Signal.STOP),
    "signal_cont": lambda w: w.system.signal(w.stopped, Signal.CONT),
    "renice": lambda w: w.system.renice(w.subject, 7),
    "say": lambda w: w.system.say(w.chat, "and then?"),
    "cut": lambda w: w.system.cut(w.chat),
    "hang_up": lambda w: w.system.hang_up(w.chat),
    "swap_out_chat": lambda w: w.system.swap_out(w.chat),
    "save_chat": lambda w: w.system.save(w.chat, w.folder / "new.ckpt"),
    "fork_chat": lambda w: w.system.fork(w.chat),
    "spec": lambda w: w.system.spec(w.subject),
    "pin": lambda w: w.system.pin("m"),
    "confirm": lambda w: w.system.confirm("cold"),
    "swap_out": lambda w: w.system.swap_out(w.subject),
    "swap_out_to_disk": lambda w: w.system.swap_out(w.subject),
    "swap_in": lambda w: w.system.swap_in(w.stopped),
    "set_policy": lambda w: w.system.set_policy("rr"),
    "set_group": lambda w: w.system.set_group("team", 2.0),
    "process": lambda w: (w.system.process(w.subject), w.system.why(w.subject), w.system.items(w.subject)),
    "wait": lambda w: w.system.wait(w.ended),
    "reap": lambda w: w.system.reap(w.ended),
    "finished": lambda w: w.system.finished(),
    "read": lambda w: w.system.read(w.subject, 0),
    "save": lambda w: w.system.save(w.subject, w.folder / "new.ckpt"),
    "save_over": lambda w: w.system.save(w.subject, w.folder / "old.ckpt"),
    "fork": lambda w: w.system.fork(w.subject, seed=5),
    "restore": lambda w: w.system.restore(w.folder / "old.ckpt"),
    "orphans": lambda w: w.system.orphans(),
    "resume": lambda w: w.system.resume(w.orphans[0]),
    "forget_orphans": lambda w: w.system.forget_orphans(),
    "freeze": lambda w: w.system.freeze(),
    "load": lambda w: (w.system.load("cold"), w.system.wait_load("cold", 0)),
    "cancel_load": lambda w: w.system.cancel_load("m"),
    "unload": lambda w: w.system.unload("idle"),
    "models": lambda w: (w.system.models(), w.system.inspect("cold")),
    "snapshot": lambda w: (w.system.snapshot(), w.system.host(), w.system.log()),
    "subscribe": lambda w: w.system.unsubscribe(w.system.subscribe("log")),
    "shutdown": lambda w: w.system.shutdown(),
    "boot": World.boot_another,
    "flush": lambda w: w.kernel.recovery.journal and w.kernel.recovery.journal.flush(),
}
MODELS["idle"] = SimModel()
MAKES = {"new.ckpt"}
LOADS = {"load", "spawn_cold"}
TO_DISK = {"swap_out_to_disk"}
LONG = {"wait"}  # runs everybody to the end: no more of it than this test's patience


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a checkpoint, and the journal of an LLMOS that died."""
    folder = tmp_path_factory.mktemp("template") / "home"
    folder.mkdir()
    sim = SimSystem(MODELS, folder=folder)
    sim.spawn(seed=8, max_tokens=30)
    sim.run_until(10)
    sim.system.save(2, folder / "old.ckpt")
    sim.kernel.recovery.journal.flush()  # type: ignore[union-attr]
    sim.system.freeze()
    sim.system.shutdown()
    for file in (folder / "journal").iterdir():  # a PID that no process has
        file.rename(file.with_name(file.name.replace(str(os.getpid()), "999999999")))
    return folder


@contextmanager
def no_hang() -> Iterator[None]:
    def hangs(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(world: World, call: str, faults: Faults) -> BaseException | None:
    faults.armed = True
    try:
        with no_hang():
            CALLS[call](world)
    except Exception as error:
        return error
    finally:
        faults.armed = False
    return None


def check_after(world: World, call: str, error: BaseException | None, before: tuple[Any, ...]) -> None:
    claims, pids, files = before
    if error is not None:
        assert isinstance(error, LlmosError), repr(error)
        assert error.message
    world.kernel.check_integrity()
    assert world.strangers() - files <= (MAKES if error is None else set())
    if call == "shutdown":
        return
    if error is not None:
        assert world.pids() == pids
        assert world.models_claims() == claims  # KV that was swapped out is its process's
    if call == "resume":  # in one journal or in the other, never in both, never in none
        assert len(world.system.orphans()) == (error is not None)
    world.kernel.pump()
    world.kernel.check_integrity()
    assert world.sim.output(world.bystander) == solo(1, 300)
    if error is not None:
        assert world.system.process(world.subject).exit_code == 0
        assert world.sim.output(world.subject) == solo(2, 200)
    alive = {f"process {pid}" for pid in world.pids()}
    assert {claim.owner for claim in world.claims() - world.models_claims()} <= alive
    late = world.sim.spawn(seed=6, max_tokens=5)
    world.kernel.pump()
    assert world.sim.output(late) == solo(6, 5)
    assert len(checkpoint.read(world.folder / "old.ckpt", b"k" * 32).threads[0].tokens) > 10
    if call in LOADS and error is None:
        with suppress(LlmosError):
            world.system.unload("cold")


def one_attempt(call: str, faults: Faults, folder: Path, template: Path, patch: pytest.MonkeyPatch) -> None:
    """A fresh world, the call, and a look at what it left behind."""
    with faults.planted(patch):
        world = World(folder, template, ram_bytes=1 << 10 if call in TO_DISK else 64 << 30)
        if call == "unload":
            world.system.load("idle")
        before = world.models_claims(), world.pids(), world.strangers()
        try:
            error = attempt(world, call, faults)
            assert error is None or faults.count >= faults.n
            check_after(world, call, error, before)
        finally:
            world.close()
    shutil.rmtree(folder)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("call", CALLS)
def test_the_nth_failure(
    call: str, point: str, tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if point not in uses(call, tmp_path, template, monkeypatch):
        return
    for n in range(1, 15 if call in LONG else 60):
        faults = Faults(point, n)
        one_attempt(call, faults, tmp_path / "world", template, monkeypatch)
        if faults.count < n:
            return
    assert call in LONG, "it never gets through"


_uses: dict[str, set[str]] = {}


def uses(call: str, folder: Path, template: Path, patch: pytest.MonkeyPatch) -> set[str]:
    """The points that a call comes by when nothing fails."""
    if call not in _uses:
        every = {point: Faults(point, 0) for point in POINTS}
        with ExitStack() as stack:
            for faults in every.values():
                stack.enter_context(faults.planted(patch))
            world = World(folder / "probe", template, ram_bytes=1 << 10 if call in TO_DISK else 64 << 30)
            if call == "unload":
                world.system.load("idle")
            for faults in every.values():
                faults.armed = True
            CALLS[call](world)
            for faults in every.values():
                faults.armed = False
            world.close()
        _uses[call] = {point for point, faults in every.items() if faults.count}
    return _uses[call]


def test_killed_between_two_journals_a_process_is_in_both_and_goes_on_once(
    tmp_path: Path, template: Path
) -> None:
    shutil.copytree(template, tmp_path / "home")
    folder = tmp_path / "home" / "journal"
    later = SimSystem(MODELS, folder=tmp_path / "home")
    (orphan,) = later.system.orphans()
    later.system.resume(orphan)
    later.run_until(20)
    later.kernel.recovery.journal.flush()  # type: ignore[union-attr]
    later.system.freeze()
    later.system.shutdown()
    shutil.copytree(template / "journal", folder, dirs_exist_ok=True)  # as if it had not been taken out yet
    assert len(orphans.dead_journals(folder)) == 2
    last = SimSystem(MODELS, folder=tmp_path / "home")
    (orphan,) = last.system.orphans()
    assert orphan.state.output_tokens == 20
    assert len(orphans.dead_journals(folder)) == 1
    pid = last.system.resume(orphan)
    last.kernel.pump()
    assert last.output(pid) == solo(8, 30)
    assert not last.system.orphans()
    last.system.shutdown()


def test_every_system_call_is_in_the_table(tmp_path: Path, template: Path) -> None:
    """A new one is to be listed here, or this fails."""
    called: set[str] = set()

    class Listening:
        def __init__(self, system: Syscalls) -> None:
            self._system = system

        def __getattr__(self, name: str) -> Any:
            called.add(name)
            return getattr(self._system, name)

    for name, call in CALLS.items():
        world = World(tmp_path / name, template)
        world.system.load("idle")
        world.system = cast(Syscalls, Listening(world.system))
        call(world)
        world.close()
    assert called >= {name for name in vars(Syscalls) if not name.startswith("_")}
