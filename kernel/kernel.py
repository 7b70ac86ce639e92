"""The kernel: owns the tables; boots, spawns, ends, shuts down.

Owner: `llmos.boot` makes one. Lock: the process table's (`table.lock`) guards every table here.
Order: process table, then memory, then mailbox; none is held while a driver runs or a file is written.
Not here: the door (syscall), what users do to processes (control), devices' work (dispatcher), models
(residency), files (recovery).
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kernel.admission import Admission
from kernel.bus import Bus
from kernel.clock import Clock
from kernel.config import KernelConfig
from kernel.control import Control
from kernel.device import DeviceInfo, Driver, EngineOptions, HostSample
from kernel.dispatcher import Dispatcher
from kernel.errors import AdmissionRefused, Interrupted, KernelFault, LlmosError, WorkerDied
from kernel.fairness import weight_of
from kernel.memory import MemoryLedger, Pool, Resources
from kernel.message import Message
from kernel.models import Catalog, Model, ModelState
from kernel.policy import policy_named
from kernel.process import Group, Process, Signal, State
from kernel.recovery import Recovery
from kernel.residency import Residency
from kernel.snapshot import LogView
from kernel.spec import ProcessSpec, check_spec
from kernel.swap import RAM, SwapSpace, disk_pool
from kernel.table import ProcessTable

if TYPE_CHECKING:
    from kernel.record import Recorder

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
    host: Callable[[], HostSample] | None = None  # sensors of the machine
    journal: Path | None = None  # the folder that survives a crash; None: nothing does
    swap: Path | None = None  # the folder for KV state that RAM is too short for
    ram_bytes: int = 64 << 30  # of the host, where no device computes in it
    ram_resident: Callable[[], int] | None = None  # what LLMOS and its workers hold of what is not available
    resources: Resources = field(default_factory=Resources)
    checkpoints: Path | None = None  # the folder that USR1 writes to
    record: Path | None = None  # where every scheduling decision is written
    alert: Callable[[str], None] | None = None  # tells a person what cannot be kept, from any thread


class Kernel:
    """All state of one LLMOS."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config, self.clock, self.catalog = parts.config, parts.clock, parts.catalog
        self.booted_s = self.clock.now_s()
        self.log_lines: deque[LogView] = deque(maxlen=self.config.log_lines)
        self.bus = Bus(self.config.mailbox_messages)
        self.recorder = self._recorder(parts.record) if parts.record else None
        self.table = ProcessTable(self.config)
        self.ledger = MemoryLedger()
        self.swap = SwapSpace(self.ledger, parts.swap, self.clock.now_s)
        self.policy = policy_named(self.config.policy)  # guarded by table.lock
        self.groups: dict[str, Group] = {}  # guarded by table.lock
        self.residency = Residency(self)
        self.recovery = Recovery(self)
        self.control = Control(self)
        self.models = self.residency.records  # guarded by table.lock
        self.dispatchers: dict[str, Dispatcher] = {}  # by device; fixed after boot
        self._threads: list[threading.Thread] = []
        self.down = False  # guarded by table.lock
        self.admission = Admission(self)
        for driver in parts.drivers.values():
            for device in driver.devices():
                self._add_device(driver, device)
        self._add_host_pools()
        self.admission.add_processors()

    # Boot and shutdown

    def _recorder(self, path: Path) -> "Recorder":
        from kernel.record import Recorder  # deferred: few sessions are recorded

        return Recorder(path, self.clock, lambda text: self.alert("record", text))

    def _add_device(self, driver: Driver, device: DeviceInfo) -> None:
        if device.name in self.dispatchers:
            return
        if device.kind == "cpu":
            self._add_ram(device.memory_bytes)
        else:
            available = None if driver.free_bytes(device) is None else lambda: driver.free_bytes(device) or 0
            self.ledger.add_pool(Pool(device.pool, device.memory_bytes, available=available))
        dispatcher = Dispatcher(device, self.config, self.table, self.clock, self, self.swap)
        self.dispatchers[device.name] = dispatcher
        dispatcher.scheduler.record = self.recorder.device(device.name) if self.recorder else None
        if self.parts.threaded:
            thread = threading.Thread(target=self._serve, args=(dispatcher,), name=device.name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _add_host_pools(self) -> None:
        """Where KV state is swapped out to."""
        parts = self.parts
        if not self.ledger.has_pool(RAM):
            self._add_ram(parts.ram_bytes)
        if parts.swap is not None:
            self.ledger.add_pool(disk_pool(parts.swap, self.config.disk_reserve_bytes))

    def _add_ram(self, size_bytes: int) -> None:
        parts, reserve_bytes = self.parts, self.config.ram_reserve_bytes
        self.ledger.add_pool(Pool(RAM, size_bytes, reserve_bytes, parts.ram_available, parts.ram_resident))

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
                dispatcher.fault = fault
                self.table.changed.notify_all()
            for model in dispatcher.models:
                dispatcher.lost(model, WorkerDied(fault.message))
                self.residency.quarantine(model, fault)

    def pump(self) -> None:
        """Run all there is to run, here and now (a kernel that is not threaded)."""
        dispatchers = tuple(self.dispatchers.values())
        while sum(dispatcher.advance() for dispatcher in dispatchers):
            pass

    def shutdown(self) -> None:
        with self.table.lock:
            if self.down:
                return
            self.down = True
            self.table.changed.notify_all()
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
        if self.recovery.journal is not None:
            self.recovery.journal.close()
        if self.recorder is not None:
            self.recorder.close()

    def log(self, level: str, source: str, text: str) -> None:
        """One line for dmesg. From any thread."""
        line = LogView(self.clock.now_s() - self.booted_s, level, source, text)
        self.log_lines.append(line)
        self.publish("log", level=level, source=source, text=text)

    def alert(self, source: str, text: str) -> None:
        """A promise cannot be kept from now on: not for the log only. From any thread."""
        self.log("error", source, text)
        if self.parts.alert is not None:
            self.parts.alert(text)

    def publish(self, topic: str, **body: str | int | None) -> None:
        self.bus.publish(Message("state", topic, self.clock.wall_s(), body))

    def check_integrity(self) -> None:
        """Every invariant of every table. Raises AssertionError."""
        with self.table.lock:
            self.table.check_integrity()
            self.ledger.check_integrity()
            self.admission.check_integrity()
            for model in self.models.values():
                assert model.users == len(self.table.users_of(model.name)), (model.name, model.users)
                model.queue.check_integrity()
                for seat, thread in enumerate(model.seats):
                    assert thread is None or thread.seat == seat, (thread, seat)

    def dispatcher_of(self, model: Model) -> Dispatcher:
        return self.dispatchers[model.device.name]

    def place(self, process: Process) -> tuple[Model, Dispatcher]:
        """Where it runs. With the table's lock held."""
        model = self.models[process.model]
        return model, self.dispatcher_of(model)

    # Processes

    def spawn(self, spec: ProcessSpec, ppid: int = 1) -> Process:
        check_spec(spec)
        entry = self.residency.resolve(spec.model)
        options = (
            EngineOptions(context_tokens=spec.context_tokens) if spec.context_tokens else self.parts.options
        )
        model = self.residency.want(entry, options)
        with self.table.lock:
            model = self.residency.check_wanted(model)
            self.admission.check(spec, model)
            process = self.new_process(spec, entry.name, ppid)
        self.begin(process, model)
        return process

    def new_process(self, spec: ProcessSpec, model: str, ppid: int) -> Process:
        group = self.group_named(spec.group)
        try:
            process = self.table.add(spec, model, ppid, self.clock)
        except AdmissionRefused:
            self.admission.forget(self.models[model])
            raise
        if group is None and spec.threads > 1:  # one claim: else who has more threads has more seats
            group = Group(f"process {process.pid}", weight_of(process.nice))
        process.group = group
        self.models[model].users += 1
        note = self.place(process)[1].scheduler.note
        note("spawn", pid=process.pid, ppid=ppid, model=model, nice=spec.nice, group=spec.group)
        return process

    def begin(self, process: Process, model: Model, exit_code: int | None = None, uid: str = "") -> None:
        """Write it down, then let it run (or end, if it had ended already). `uid`: of what it resumes."""
        self.recovery.write_down(process, model, uid)
        with self.table.lock:
            if not process.alive:  # killed, or its model failed to load, while it was written down
                return
            if exit_code is not None or process.is_over:
                self.ended(process, exit_code or 0)
                return
            self.admission.enter(process)
            self.touched(process)
            self.publish("process", pid=process.pid, state=process.state.value)

    def let_run(self, process: Process, model: Model) -> None:
        """It has been admitted. With the table's lock held."""
        if process.is_chat:
            process.state = State.SLEEPING
            dispatcher, thread = self.dispatcher_of(model), process.threads[0]
            dispatcher.submit(lambda: dispatcher.take_turn(model, thread))  # its engine hears of it first
            if thread.seat is not None:  # else it has yet to get one
                dispatcher.interrupt(hard=dispatcher.scheduler.yields(thread))
        else:
            process.state = State.RUNNABLE if model.state is ModelState.LOADED else State.NEW
            self._wake(process, model)

    def touched(self, process: Process) -> None:
        """A process has something new that a crash must not lose. With the table's lock held."""
        if self.recovery.journal is not None:
            self.recovery.journal.mark(process)

    def _wake(self, process: Process, model: Model) -> None:
        dispatcher = self.dispatcher_of(model)
        for thread in process.threads:
            dispatcher.let_in(thread, model)

    def group_named(self, name: str) -> Group | None:
        """Made when it is first named; none has no name. Raises AdmissionRefused (too many)."""
        if name and name not in self.groups:
            if len(self.groups) >= self.config.groups_max:
                raise AdmissionRefused(f"there are {len(self.groups)} groups already")
            self.groups[name] = Group(name)
        return self.groups.get(name)

    def ended(self, process: Process, exit_code: int, error: LlmosError | None = None) -> None:
        """A process is done. With the table's lock held."""
        model, dispatcher = self.place(process)
        last = dispatcher.flights[-1].id if dispatcher.flights else 0
        for thread in process.threads:
            dispatcher.scheduler.sleep(thread, model)
            model.vacate(thread, last)
            thread.drop_kv()
            thread.computed = 0
        if exit_code > 128:  # by a signal: do not let the quanta in flight compute for the dead
            dispatcher.interrupt()
        dispatcher.wake_up()
        model.users -= 1
        if model.state is ModelState.LOADING and not model.users and not model.wanted:
            model.cancelled = True
        process.state, process.exit_code, process.error = State.ZOMBIE, exit_code, error
        process.ended_s = self.clock.now_s()
        dispatcher.scheduler.note("exit", pid=process.pid, exit_code=exit_code)
        process.stdout.close()
        self.changed(process)
        self.admission.left(process)

    def rests(self, process: Process) -> None:
        """It has nothing to run, for now. With the table's lock held."""
        self.changed(process)
        self.admission.settle_soon()  # nor has its model, perhaps: then it can make room

    def worker_died(self, model: Model, error: WorkerDied) -> None:
        """A model's engine is gone. With the table's lock held."""
        self.residency.worker_died(model, error)

    def changed(self, process: Process) -> None:
        """It is in another state. With the table's lock held."""
        self.touched(process)
        self.table.changed.notify_all()
        self.publish("process", pid=process.pid, state=process.state.value, exit_code=process.exit_code)

    def on_dispatcher(self, model: Model, act: Callable[[], T]) -> T:
        """Run an act on the thread that owns the model's engine; returns or raises what it does.

        Raises KernelFault if a bug has ended that thread, Interrupted if LLMOS ends.
        """
        dispatcher = self.dispatcher_of(model)
        results: list[T] = []
        errors: list[LlmosError] = []

        def request() -> None:
            try:
                results.append(act())
            except LlmosError as error:
                if isinstance(error, WorkerDied):
                    dispatcher.lost(model, error)
                errors.append(error)
            except Exception as bug:  # the caller hears of it; the dispatcher lives
                errors.append(KernelFault(f"{type(bug).__name__}: {bug}"))
            with self.table.lock:
                self.table.changed.notify_all()

        dispatcher.submit(request)
        if not self.parts.threaded:
            dispatcher.serve_requests()
        with self.table.lock:
            self.table.changed.wait_for(lambda: results or errors or dispatcher.fault or self.down)
        if results:
            return results[0]
        raise errors[0] if errors else dispatcher.fault or Interrupted("LLMOS is shutting down")
