"""The kernel: owns the tables; boots, spawns, signals, ends, shuts down.

Owner: `llmos.boot` makes one. Lock: the process table's (`table.lock`) guards every table here.
Order: process table, then memory, then mailbox; none is held while a driver runs or a file is written.
Not here: the door (syscall), devices' work (dispatcher), loading (loader).
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kernel.bus import Bus
from kernel.clock import Clock
from kernel.config import KernelConfig
from kernel.device import DeviceInfo, Driver, EngineHost, EngineOptions
from kernel.dispatcher import Dispatcher
from kernel.errors import (
    AdmissionRefused,
    CheckpointInvalid,
    Interrupted,
    KernelFault,
    LlmosError,
    ModelInvalid,
    ModelNotFound,
    NotPermitted,
    UsageError,
    WorkerDied,
)
from kernel.fairness import WEIGHTS
from kernel.loader import Loader
from kernel.memory import MemoryLedger, Pool
from kernel.message import Message
from kernel.models import Catalog, CatalogEntry, Model, ModelState
from kernel.policy import policy_named
from kernel.process import Group, Process, ProcessSpec, ProcessTable, Signal, State
from kernel.snapshot import LogView

if TYPE_CHECKING:
    from kernel.checkpoint import Checkpoint
    from kernel.journal import Journal, Orphan

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """What boot hands to the kernel."""

    clock: Clock
    drivers: Mapping[str, Driver]  # by file suffix: ".gguf"
    catalog: Catalog
    key: bytes = b""  # of checkpoints' MACs
    config: KernelConfig = field(default_factory=KernelConfig)
    options: EngineOptions = field(default_factory=EngineOptions)  # where a load names none
    ram_available: Callable[[], int] | None = None
    threaded: bool = True  # False: stepped by hand with `pump`
    journal: Path | None = None  # the folder that survives a crash; None: nothing does


class Kernel:
    """All state of one LLMOS."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config, self.clock, self.catalog = parts.config, parts.clock, parts.catalog
        self.booted_s = self.clock.now_s()
        self.bus = Bus(self.config.mailbox_messages)
        self.table = ProcessTable(self.config)
        self.ledger = MemoryLedger()
        self.policy = policy_named(self.config.policy)  # guarded by table.lock
        self.groups: dict[str, Group] = {}  # guarded by table.lock
        self.models: dict[str, Model] = {}  # guarded by table.lock
        self.dispatchers: dict[str, Dispatcher] = {}  # by device; fixed after boot
        self.log_lines: deque[LogView] = deque(maxlen=self.config.log_lines)
        self.loader = Loader(
            self.config, self.clock, self.ledger, self.log, self._load_done, threaded=parts.threaded
        )
        self.journal: Journal | None = None  # of this boot
        self._journal_failed = False
        self._threads: list[threading.Thread] = []
        self._down = False  # guarded by table.lock
        for driver in parts.drivers.values():
            for device in driver.devices():
                self._add_device(device)

    # Boot and shutdown

    def _add_device(self, device: DeviceInfo) -> None:
        if device.name in self.dispatchers:
            return
        reserve, available = 0, None
        if device.kind == "cpu":
            reserve, available = self.config.ram_reserve_bytes, self.parts.ram_available
        self.ledger.add_pool(Pool(device.pool, device.memory_bytes, reserve, available))
        dispatcher = Dispatcher(device, self.config, self.table, self.clock, self)
        self.dispatchers[device.name] = dispatcher
        if self.parts.threaded:
            thread = threading.Thread(target=self._serve, args=(dispatcher,), name=device.name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, dispatcher: Dispatcher) -> None:
        """A dispatcher's thread. A bug in the kernel ends the device's processes, not the shell."""
        try:
            dispatcher.run()
        except Exception as bug:
            import traceback

            for line in traceback.format_exc().splitlines():
                self.log("error", "kernel", line)
            fault = KernelFault(
                f"kernel panic on {dispatcher.device.name}: {type(bug).__name__}", "see `dmesg`"
            )
            with self.table.lock:
                for model in dispatcher.models:
                    model.state, model.error = ModelState.QUARANTINED, fault
                    self._fail_users(model, fault)

    def pump(self) -> None:
        """Run all there is to run, here and now (a kernel that is not threaded)."""
        dispatchers = tuple(self.dispatchers.values())
        while sum(dispatcher.advance() for dispatcher in dispatchers):
            pass

    def shutdown(self) -> None:
        with self.table.lock:
            if self._down:
                return
            self._down = True
            for process in [p for p in self.table if p.alive]:
                self.ended(process, 128 + Signal.TERM)
            for model in self.models.values():
                model.cancelled = True
        for dispatcher in self.dispatchers.values():
            dispatcher.stop()
        for thread in self._threads:
            thread.join(timeout=5.0)
        for model in self.models.values():
            if model.host is not None:
                model.host.shutdown()
        if self.journal is not None:
            self.journal.close()

    def log(self, level: str, source: str, text: str) -> None:
        """One line for dmesg. From any thread."""
        line = LogView(self.clock.now_s() - self.booted_s, level, source, text)
        self.log_lines.append(line)
        self.publish("log", level=level, source=source, text=text)

    def publish(self, topic: str, **body: str | int | None) -> None:
        self.bus.publish(Message("state", topic, self.clock.wall_s(), body))

    def check_integrity(self) -> None:
        """Every invariant of every table. Raises AssertionError."""
        with self.table.lock:
            self.table.check_integrity()
            self.ledger.check_integrity()
            for model in self.models.values():
                model.queue.check_integrity()
                for seat, thread in enumerate(model.seats):
                    assert thread is None or thread.seat == seat, (thread, seat)

    # Processes

    def spawn(self, spec: ProcessSpec, ppid: int = 1) -> Process:
        check_spec(spec)
        entry = self.catalog.resolve(spec.model)
        options = (
            EngineOptions(context_tokens=spec.context_tokens) if spec.context_tokens else self.parts.options
        )
        model = self.want(entry, options)
        with self.table.lock:
            self._still_wanted(model)
            process = self._new_process(spec, entry.name, ppid)
        self._begin(process, model)
        return process

    def restore(self, path: Path) -> Process:
        from kernel import checkpoint  # deferred: a session that saves nothing need not pay for it

        return self.revive(checkpoint.read(path, self.parts.key), str(path))

    def revive(self, saved: "Checkpoint", origin: str, nice: int | None = None) -> Process:
        """Continue what was saved as a new process; its output begins with what it had said."""
        from kernel import checkpoint

        spec = saved.spec if nice is None else replace(saved.spec, nice=nice)
        check_spec(spec)
        entry = self.catalog.resolve(spec.model)
        if checkpoint.model_digest(entry.path) != saved.model_digest:
            raise CheckpointInvalid(
                f"{origin} was saved with another file than {entry.path}",
                f"put the model that it was saved with in place of {entry.name}",
            )
        model = self.want(entry, self.parts.options)
        with self.table.lock:
            self._still_wanted(model)
            process = self._new_process(spec, entry.name, 1)
            for reply in saved.replies:
                process.write(reply)
                process.finish_item()
            process.write(saved.reply)
            process.prompt_tokens, process.output_tokens = saved.prompt_tokens, saved.output_tokens
            thread = process.threads[0]
            thread.tokens.extend(saved.tokens)
            thread.prompt_length, thread.kv = saved.prompt_length, saved.kv
        self._begin(process, model)
        return process

    def _new_process(self, spec: ProcessSpec, model: str, ppid: int) -> Process:
        group = self._group(spec.group)
        process = self.table.add(spec, model, ppid, self.clock)
        process.group = group
        self.models[model].users.add(process.pid)
        return process

    def _begin(self, process: Process, model: Model) -> None:
        """Write it down, then let it run."""
        self._write_down(process, model)
        with self.table.lock:
            if not process.alive:  # killed, or its model failed to load, while it was written down
                return
            if process.item == len(process.spec.prompts):
                self.ended(process, 0)
                return
            if model.state is ModelState.LOADED:
                process.state = State.RUNNABLE
            self._wake(process, model)
            self.touched(process)
            self.publish("process", pid=process.pid, state=process.state.value)

    # The journal

    def _write_down(self, process: Process, model: Model) -> None:
        """Opens this boot's journal with its first process: a session that runs nothing needs none."""
        folder = self.parts.journal
        if folder is None or self._journal_failed:
            return
        import sqlite3

        from kernel.journal import Journal

        try:
            if self.journal is None:
                self.journal = Journal(
                    folder, self.table.lock, lambda text: self.log("error", "journal", text)
                )
        except (OSError, sqlite3.Error) as error:
            self._journal_failed = True
            self.log("warn", "journal", f"no journal: {error}: a crash would lose what runs")
            return
        self.journal.spawned(process, model.info.path)

    def _journal_error(self, text: str) -> None:
        self.log("error", "journal", text)

    def orphans(self) -> "tuple[Orphan, ...]":
        if self.parts.journal is None or not self.parts.journal.is_dir():
            return ()
        from kernel import journal

        files = journal.dead_journals(self.parts.journal)
        return tuple(process for file in files for process in journal.read(file))

    def resume(self, orphan: "Orphan") -> Process:
        from kernel import journal

        with journal.claimed(orphan):
            origin = f"process {orphan.pid} of an earlier LLMOS"
            process = self.revive(orphan.state, origin, orphan.nice)
            if self.journal is not None:
                self.journal.flush()  # it is safe in ours before it leaves the other
            return process

    def forget_orphans(self) -> None:
        from kernel import journal

        if self.parts.journal is not None:
            for file in journal.dead_journals(self.parts.journal):
                journal.discard(file)

    def touched(self, process: Process) -> None:
        """A process has something new that a crash must not lose. With the table's lock held."""
        if self.journal is not None:
            self.journal.mark(process)

    def save(self, pid: int, path: Path) -> int:
        from kernel import checkpoint

        with self.table.lock:
            process = self.table.alive(pid)
            model = self.models[process.model]
        taken = self._on_dispatcher(model, lambda: self._take(process, model))
        return checkpoint.write(taken, path, self.parts.key)

    def _take(self, process: Process, model: Model) -> "Checkpoint":
        """A checkpoint of a process; on its dispatcher's thread, so that tokens and KV agree."""
        from kernel import checkpoint

        dispatcher, thread = self.dispatchers[model.device.name], process.threads[0]
        dispatcher.drain()
        kv = thread.kv
        if model.host is not None and thread.seat is not None and thread.computed:
            kv = model.host.dump(thread.seat)
        digest = checkpoint.model_digest(model.info.path)
        with self.table.lock:
            self.table.alive(process.pid)
            return checkpoint.Checkpoint(
                spec=process.spec,
                model_digest=digest,
                tokens=tuple(thread.tokens),
                prompt_length=thread.prompt_length,
                replies=tuple(process.replies),
                reply="".join(process.reply),
                prompt_tokens=process.prompt_tokens,
                output_tokens=process.output_tokens,
                kv=kv if thread.computed == len(thread.tokens) - 1 or thread.kv else None,
            )

    def _wake(self, process: Process, model: Model) -> None:
        dispatcher = self.dispatchers[model.device.name]
        for thread in process.threads:
            dispatcher.scheduler.wake(thread, model)
            if dispatcher.has_room(model, thread):
                dispatcher.interrupt()  # let it in before the quanta in flight are used up
        dispatcher.wake_up()

    def signal(self, pid: int, signal: Signal) -> None:
        with self.table.lock:
            process = self.table.alive(pid)
            if signal is Signal.STOP:
                self._stop(process)
            elif signal is Signal.CONT:
                self._continue(process)
            else:
                self.ended(process, 128 + signal)

    def _stop(self, process: Process) -> None:
        if process.state is State.STOPPED:
            return
        model = self.models[process.model]
        dispatcher = self.dispatchers[model.device.name]
        for thread in process.threads:
            dispatcher.scheduler.sleep(thread, model)
        process.state = State.STOPPED
        dispatcher.interrupt()
        self._changed(process)

    def _continue(self, process: Process) -> None:
        if process.state is State.STOPPED:
            model = self.models[process.model]
            process.state = State.RUNNABLE if model.host else State.NEW
            self._wake(process, model)
            self._changed(process)

    def renice(self, pid: int, nice: int) -> int:
        check_nice(nice)
        with self.table.lock:
            process = self.table.alive(pid)
            old, process.nice = process.nice, nice
            model = self.models[process.model]
            dispatcher = self.dispatchers[model.device.name]
            for thread in process.threads:
                dispatcher.scheduler.reweight(thread, model)
            dispatcher.interrupt()
        return old

    # Policy and groups

    def set_policy(self, name: str) -> str:
        policy = policy_named(name)
        with self.table.lock:
            old, self.policy = self.policy, policy
            for model in self.models.values():
                self.dispatchers[model.device.name].scheduler.set_policy(policy, model)
            for dispatcher in self.dispatchers.values():
                dispatcher.interrupt()
                dispatcher.wake_up()
        return old.name

    def set_group(self, name: str, weight: float) -> None:
        if not (name and 0.001 <= weight <= 1000.0):
            raise UsageError("a group has a name, and a weight from 0.001 to 1000; a process at nice 0 has 1")
        with self.table.lock:
            group = self._group(name)
            assert group is not None
            group.weight = weight
            for process in [p for p in self.table if p.alive and p.group is group]:
                model = self.models[process.model]
                self.dispatchers[model.device.name].scheduler.reweight(process.threads[0], model)
            for dispatcher in self.dispatchers.values():
                dispatcher.interrupt()

    def _group(self, name: str) -> Group | None:
        if name and name not in self.groups:
            if len(self.groups) >= self.config.groups_max:
                raise AdmissionRefused(f"there are {len(self.groups)} groups already")
            self.groups[name] = Group(name)
        return self.groups.get(name)

    def ended(self, process: Process, exit_code: int, error: LlmosError | None = None) -> None:
        """A process is done. With the table's lock held."""
        model = self.models[process.model]
        dispatcher = self.dispatchers[model.device.name]
        last = dispatcher.flights[-1].id if dispatcher.flights else 0
        for thread in process.threads:
            dispatcher.scheduler.sleep(thread, model)
            model.vacate(thread, last)
            thread.kv = None
            thread.computed = 0
        if exit_code > 128:  # by a signal: do not let the quanta in flight compute for the dead
            dispatcher.interrupt()
        dispatcher.wake_up()
        model.users.discard(process.pid)
        if model.state is ModelState.LOADING and not model.users and not model.wanted:
            model.cancelled = True
        process.state, process.exit_code, process.error = State.ZOMBIE, exit_code, error
        process.ended_s = self.clock.now_s()
        process.stdout.close()
        self._changed(process)

    def _changed(self, process: Process) -> None:
        self.touched(process)
        self.table.changed.notify_all()
        self.publish("process", pid=process.pid, state=process.state.value, exit_code=process.exit_code)

    # Models

    def want(self, entry: CatalogEntry, options: EngineOptions, *, explicit: bool = False) -> Model:
        """The record of a model that is open or on its way; starts the load if need be."""
        with self.table.lock:
            model = self._present(entry.name)
        if model is None:
            driver = self.driver(entry.path)
            fresh = Model(
                entry.name,
                entry.description,
                driver.inspect(entry.path),
                driver,
                driver.devices()[0],
                options,
            )
            with self.table.lock:
                model = self._present(entry.name)
                if model is None:
                    fresh.queue.set_policy(self.policy)
                    model = self.models[entry.name] = fresh
            if model is fresh:
                self._begin_load(fresh)
        model.wanted |= explicit
        return model

    def _begin_load(self, model: Model) -> None:
        try:
            self.loader.load(model)
        except AdmissionRefused:
            with self.table.lock:
                del self.models[model.name]
            raise
        self.publish("model", name=model.name, state=model.state.value)

    def _present(self, name: str) -> Model | None:
        model = self.models.get(name)
        if model is None or model.state is ModelState.FAILED or model.cancelled:
            return None
        if model.state is ModelState.QUARANTINED:
            assert model.error is not None
            raise model.error
        return model

    def _still_wanted(self, model: Model) -> None:
        """Between `want` and now a short load may have failed already."""
        if model.state is ModelState.FAILED and model.error is not None:
            raise model.error

    def driver(self, path: Path) -> Driver:
        try:
            return self.parts.drivers[path.suffix.lower()]
        except KeyError:
            known = ", ".join(self.parts.drivers)
            raise ModelInvalid(f"{path} is not a model file", f"LLMOS reads {known}") from None

    def _load_done(self, model: Model, host: EngineHost | None, error: LlmosError | None) -> None:
        """The loader's answer, on its thread."""
        with self.table.lock:
            surplus = host if self._down or self.models.get(model.name) is not model else None
            if host is None or surplus is not None:
                self._load_failed(model, error or Interrupted("shutting down"))
            else:
                self._attach(model, host)
            self.table.changed.notify_all()
        if surplus is not None:
            surplus.shutdown()
        self.publish("model", name=model.name, state=model.state.value)

    def _attach(self, model: Model, host: EngineHost) -> None:
        dispatcher = self.dispatchers[model.device.name]
        model.host, model.state, model.error, model.progress = host, ModelState.LOADED, None, 1.0
        model.seats = [None] * host.info.sequences
        if model not in dispatcher.models:
            dispatcher.models.append(model)
        dispatcher.scheduler.attach(model)
        for process in self.table:
            if process.pid in model.users and process.state is State.NEW:
                process.state = State.RUNNABLE
        dispatcher.wake_up()

    def _load_failed(self, model: Model, error: LlmosError) -> None:
        self.log("error", model.name, error.message)
        if self.models.get(model.name) is model:  # not if a newer load has taken its place
            self.ledger.release(model.device.pool, model.name)
        model.state, model.error = ModelState.FAILED, error
        self._fail_users(model, error)

    def _fail_users(self, model: Model, error: LlmosError) -> None:
        for process in [p for p in self.table if p.pid in model.users and p.alive]:
            self.ended(process, error.exit_code, error)

    def worker_died(self, model: Model, error: WorkerDied) -> None:
        """An engine is gone: open it again; its processes go on from their tokens."""
        self.log("error", model.name, error.message)
        model.state, model.error = ModelState.LOADING, error
        self.dispatchers[model.device.name].scheduler.refresh(model)
        try:
            self.loader.reload(model)
        except KernelFault as fault:
            model.state, model.error = ModelState.QUARANTINED, fault
            self.ledger.release(model.device.pool, model.name)
            self._fail_users(model, fault)

    def unload(self, name: str) -> int:
        with self.table.lock:
            model = self.models.get(self.catalog.resolve(name).name)
            if model is None or model.state is ModelState.FAILED:
                raise NotPermitted(f"{name} is not loaded")
            if model.users:
                pids = ", ".join(map(str, sorted(model.users)))
                raise NotPermitted(f"{model.name} is in use by {pids}", "end them first: `kill PID`")
            model.cancelled = True
            del self.models[model.name]
        if model.host is not None:
            self._on_dispatcher(model, lambda: self._detach(model))
        freed = self.ledger.release(model.device.pool, model.name)
        self.publish("model", name=model.name, state="disk")
        return freed

    def _detach(self, model: Model) -> None:
        dispatcher = self.dispatchers[model.device.name]
        dispatcher.drain()
        with self.table.lock:
            if model in dispatcher.models:
                dispatcher.models.remove(model)
            host, model.host = model.host, None
        if host is not None:
            host.shutdown()

    def model_record(self, name: str) -> Model:
        """Raises ModelNotFound."""
        entry = self.catalog.resolve(name)
        model = self.models.get(entry.name)
        if model is None:
            raise ModelNotFound(f"{entry.name} is not loaded")
        return model

    def _on_dispatcher(self, model: Model, act: Callable[[], T]) -> T:
        """Run an act on the thread that owns the model's engine; returns or raises what it does."""
        answered = threading.Event()
        results: list[T] = []
        errors: list[LlmosError] = []

        def request() -> None:
            try:
                results.append(act())
            except LlmosError as error:
                errors.append(error)
            except Exception as bug:  # the caller hears of it; the dispatcher lives
                errors.append(KernelFault(f"{type(bug).__name__}: {bug}"))
            answered.set()

        dispatcher = self.dispatchers[model.device.name]
        dispatcher.submit(request)
        if not self.parts.threaded:
            dispatcher.serve_requests()
        answered.wait()
        for error in errors:
            raise error
        return results[0]


def check_nice(nice: int) -> None:
    """Raises UsageError."""
    if not -20 <= nice < -20 + len(WEIGHTS):
        raise UsageError(f"nice value {nice} is out of range", "-20 (most) to 19 (least)")


def check_spec(spec: ProcessSpec) -> None:
    """Raises UsageError."""
    check_nice(spec.nice)
    sampling = spec.sampling
    if spec.program != "generate":
        raise UsageError(f"no program {spec.program}")
    if not spec.prompts or not all(prompt.strip() for prompt in spec.prompts):
        raise UsageError("the prompt is empty", "give words, -f FILE, or standard input")
    if not 0.0 <= sampling.temperature <= 100.0:
        raise UsageError(f"temperature {sampling.temperature} is out of range", "0 (greedy) to 100")
    if not (0.0 <= sampling.top_p <= 1.0 and 0.0 <= sampling.min_p <= 1.0 and sampling.top_k >= 0):
        raise UsageError("top_p and min_p are between 0 and 1, top_k is 0 (off) or more")
    if not (0 <= sampling.seed < 2**63) or spec.max_tokens < 0 or spec.context_tokens < 0:
        raise UsageError("seed, max_tokens and ctx are 0 or more")
    if sampling.repeat_penalty <= 0.0:
        raise UsageError("repeat_penalty is above 0; 1 is off")
