"""Residency: which models are open, on their way, failed or quarantined.

Owner: the kernel. Lock: the process table's; none is held while a driver loads or shuts down.
Not here: the loading itself (loader), a model's record (models).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kernel.device import DeviceInfo, Driver, EngineHost, EngineOptions, ModelInfo
from kernel.errors import (
    Interrupted,
    KernelFault,
    LlmosError,
    ModelInvalid,
    ModelNotFound,
    NotPermitted,
    UsageError,
    WorkerDied,
)
from kernel.loader import Loader
from kernel.models import CatalogEntry, Model, ModelState, Usage
from kernel.process import State
from kernel.units import human_bytes

if TYPE_CHECKING:
    from kernel.kernel import Kernel


@dataclass(frozen=True, slots=True)
class Named:
    """A `CatalogEntry`."""

    name: str
    path: Path
    description: str


def _named(model: Model) -> Named:
    return Named(model.name, model.info.path, model.description)


class Residency:
    """The models in use, by name."""

    def __init__(self, kernel: "Kernel") -> None:
        self.kernel = kernel
        self.records: dict[str, Model] = {}  # guarded by the table's lock
        self.usage: dict[str, Usage] = {}  # guarded by the table's lock; of every model ever used, by name
        parts = kernel.parts
        self.loader = Loader(parts.config, parts.clock, kernel.log, self._load_done, threaded=parts.threaded)

    def resolve(self, word: str) -> CatalogEntry:
        """What a user means by a name or a path: first a model in use, then the catalog.

        Two files of one name are told apart: the second to be used goes by its path. Raises as the catalog.
        """
        with self.kernel.table.lock:
            if word in self.records:
                return _named(self.records[word])
        entry = self.kernel.catalog.resolve(word)
        with self.kernel.table.lock:
            for model in self.records.values():
                if model.info.path == entry.path:
                    return _named(model)
            if entry.name in self.records:
                return Named(str(entry.path), entry.path, entry.description)
        return entry

    def want(self, entry: CatalogEntry, options: EngineOptions, device: str = "") -> Model:
        """The record of a model; a new one waits for admission to open it."""
        with self.kernel.table.lock:
            model = self._present(entry.name)
        if model is None:
            driver = self.driver(entry.path)
            info = driver.inspect(entry.path)
            chosen = self._living(self.device_for(driver, info, options, device))
            estimate = driver.estimate(info, options, chosen)
            with self.kernel.table.lock:
                model = self._present(entry.name)
                if model is None:
                    if (old := self.records.get(entry.name)) is not None:  # failed, or its load is cancelled
                        self.fail_users(old, Interrupted(f"loading {old.name} was cancelled"))
                        self._drop(old)
                    model = Model(
                        entry.name,
                        entry.description,
                        info,
                        driver,
                        chosen,
                        options,
                        estimate,
                        self.usage.setdefault(entry.name, Usage()),
                    )
                    model.queue.set_policy(self.kernel.policy)
                    self.records[entry.name] = model
        if model.options != options:
            self._check_options(model, options)
        if device and model.device.name != device:
            raise NotPermitted(
                f"{model.name} is loaded on {model.device.name}", f"`unload {model.name}` first"
            )
        return model

    def device_for(self, driver: Driver, info: ModelInfo, options: EngineOptions, name: str) -> DeviceInfo:
        """The one that is named; or, of the kind its driver likes best and it can fit, that with most room.

        Raises UsageError, naming the driver's devices.
        """
        devices = driver.devices()
        if name:
            named = next((device for device in devices if device.name == name), None)
            if named is None:
                known = ", ".join(device.name for device in devices)
                raise UsageError(f"no device {name} for this model", f"there is {known}")
            return named
        fitting = [
            device
            for device in devices
            if device.memory_bytes >= driver.estimate(info, options, device).total_bytes
        ] or devices
        alike = [device for device in fitting if device.kind == fitting[0].kind]
        return max(alike, key=lambda device: self.kernel.ledger.free_bytes(device.pool))

    def _living(self, device: DeviceInfo) -> DeviceInfo:
        """Raises KernelFault: a bug has ended what drives it."""
        fault = self.kernel.dispatchers[device.name].fault
        if fault is not None:
            raise fault
        return device

    @staticmethod
    def _check_options(model: Model, asked: EngineOptions) -> None:
        """A model that is open stays as it is: say so, rather than ignore what was asked."""
        has = model.host.info if model.host else model.options
        for name, value, there in (
            ("--ctx", asked.context_tokens, (has.context_tokens, model.options.context_tokens)),
            ("--seats", asked.sequences, (has.sequences, model.options.sequences)),
        ):
            if value and value not in there:
                raise NotPermitted(
                    f"{model.name} is loaded with {name} {there[0]}, not {value}",
                    f"`unload {model.name}` first",
                )

    def open(self, model: Model) -> None:
        """Its memory has been claimed: load it. With the table's lock held."""
        model.state, model.progress, model.error = ModelState.LOADING, 0.0, None
        self.kernel.publish("model", name=model.name, state=model.state.value)
        self.loader.load(model)

    def _present(self, name: str) -> Model | None:
        model = self.records.get(name)
        if model is None or model.state is ModelState.FAILED or model.cancelled:
            return None
        if model.state is ModelState.QUARANTINED:
            assert model.error is not None
            raise model.error
        return model

    def check_wanted(self, model: Model) -> Model:
        """The record to use: between `want` and now it may have been evicted, or its load may have failed.

        With the table's lock held. Raises what went wrong, NotPermitted (somebody unloaded it).
        """
        if not model.cancelled and model.state is ModelState.WAITING:
            model = self.records.setdefault(model.name, model)
        if self.records.get(model.name) is not model or model.cancelled:
            raise NotPermitted(f"{model.name} was unloaded meanwhile")
        if model.state is ModelState.FAILED and model.error is not None:
            raise model.error
        return model

    def driver(self, path: Path) -> Driver:
        try:
            return self.kernel.parts.drivers[path.suffix.lower()]
        except KeyError:
            known = ", ".join(filter(None, self.kernel.parts.drivers))
            raise ModelInvalid(f"{path} is not a model file", f"LLMOS reads {known}") from None

    def _load_done(self, model: Model, host: EngineHost | None, error: LlmosError | None) -> None:
        """The loader's answer, on its thread."""
        with self.kernel.table.lock:
            fault = self.kernel.dispatcher_of(model).fault
            gone = self.kernel.down or fault or self.records.get(model.name) is not model
            surplus = host if gone else None
            if host is None or surplus is not None:
                self._load_failed(model, error or fault or Interrupted("shutting down"))
            else:
                self._attach(model, host)
            self.kernel.table.changed.notify_all()
            self.kernel.admission.settle()
        if surplus is not None:
            surplus.shutdown()
        self.kernel.publish("model", name=model.name, state=model.state.value)

    def _attach(self, model: Model, host: EngineHost) -> None:
        dispatcher = self.kernel.dispatcher_of(model)
        model.host, model.state, model.error, model.progress = host, ModelState.LOADED, None, 1.0
        self.kernel.ledger.correct(model.device.pool, model.name, model.measured_sizes())
        model.seats, model.opened_s = [None] * host.info.sequences, self.kernel.clock.now_s()
        if model not in dispatcher.models:
            dispatcher.models.append(model)
        dispatcher.scheduler.attach(model)
        for process in self.kernel.table.users_of(model.name):
            if process.state is State.NEW and any(t in model.queue for t in process.threads):
                process.state = State.RUNNABLE
        dispatcher.wake_up()

    def _load_failed(self, model: Model, error: LlmosError) -> None:
        if isinstance(error, WorkerDied) and model.restarts_s:  # died again while it was opened again
            self.worker_died(model, error)
            return
        self.kernel.log("error", model.name, error.message)
        model.state, model.error = ModelState.FAILED, error
        if self.records.get(model.name) is model:  # not if a newer load has taken its place
            self.kernel.ledger.release(model.device.pool, model.name)
            self.fail_users(model, error)

    def fail_users(self, model: Model, error: LlmosError) -> None:
        for process in self.kernel.table.users_of(model.name):
            self.kernel.ended(process, error.exit_code, error)

    def worker_died(self, model: Model, error: WorkerDied) -> None:
        """An engine is gone: open it again; its processes go on from their tokens."""
        self.kernel.log("error", model.name, error.message)
        if (
            model.state is ModelState.EVICTING or self.kernel.dispatcher_of(model).fault
        ):  # it was to go, or nobody drives it
            return
        model.state, model.error = ModelState.LOADING, error
        self.kernel.dispatcher_of(model).scheduler.refresh(model)
        try:
            self.loader.reload(model)
        except KernelFault as fault:
            self.quarantine(model, fault)

    def quarantine(self, model: Model, fault: KernelFault) -> None:
        """It is not opened again before somebody unloads it."""
        with self.kernel.table.lock:
            model.state, model.error = ModelState.QUARANTINED, fault
            self.kernel.ledger.release(model.device.pool, model.name)
            self.fail_users(model, fault)

    def unload(self, name: str) -> int:
        entry = self.resolve(name)
        with self.kernel.table.lock:
            model = self.records.get(entry.name)
            if model is None or model.state is ModelState.FAILED:
                raise NotPermitted(f"{name} is not loaded")
            if model.users:
                pids = ", ".join(str(process.pid) for process in self.kernel.table.users_of(model.name))
                raise NotPermitted(f"{model.name} is in use by {pids}", "end them first: `kill PID`")
            if model.pinned:
                raise NotPermitted(f"{model.name} is pinned", f"`unpin {model.name}` first")
            if model.state is ModelState.EVICTING:
                raise NotPermitted(f"{name} is being evicted: another model needs its memory")
            is_open = model.host is not None
            if is_open:
                self._close(model)
            else:
                freed = self._drop(model)
        if is_open:
            freed = self.kernel.on_dispatcher(model, lambda: self._evict(model))
        self.kernel.publish("model", name=model.name, state="disk")
        self.kernel.admission.settle()
        return freed

    def _drop(self, model: Model) -> int:
        """Of a model that is not open: on its way, waiting, or quarantined."""
        model.cancelled = True
        del self.records[model.name]
        self.kernel.admission.dropped(model)
        return self.kernel.ledger.release(model.device.pool, model.name)

    def _close(self, model: Model) -> None:
        """From now on nothing runs on it, until it is opened again."""
        model.state = ModelState.EVICTING
        self.kernel.dispatcher_of(model).scheduler.refresh(model)

    def cancel(self, name: str) -> None:
        """Stop a load that is going on, or waits for its turn. Raises ModelNotFound."""
        with self.kernel.table.lock:
            model = self.record(name)
            model.cancelled = True
            if model.state is ModelState.WAITING:
                self.kernel.admission.dropped(model)
                self._load_failed(model, Interrupted(f"loading {model.name} was cancelled"))
                self.kernel.table.changed.notify_all()
                self.kernel.admission.settle()

    def pin(self, name: str, pinned: bool) -> None:
        """Raises ModelNotFound, NotPermitted."""
        entry = self.resolve(name)
        with self.kernel.table.lock:
            model = self.records.get(entry.name)
            if model is None or model.state is ModelState.FAILED:
                raise NotPermitted(f"{name} is not loaded", f"`load {name}` first")
            model.pinned = pinned
            self.kernel.admission.settle()

    # Eviction

    def begin_eviction(self, model: Model) -> None:
        """Nothing runs on it: let its dispatcher close it. With the table's lock held."""
        self._close(model)
        self.kernel.dispatcher_of(model).submit(lambda: self._evict_or_say(model))
        self.kernel.publish("model", name=model.name, state=model.state.value)

    def _evict_or_say(self, model: Model) -> None:
        freed = self._evict(model)
        self.kernel.log("info", model.name, f"evicted, {human_bytes(freed)} freed")

    def _evict(self, model: Model) -> int:
        """On the dispatcher's thread. What stopped processes have on their seats goes to RAM with them."""
        dispatcher = self.kernel.dispatcher_of(model)
        for thread in [t for t in model.seats if t is not None]:
            try:
                dispatcher.seats.swap_out(model, thread)
            except LlmosError as error:  # it will be computed again
                self.kernel.log("warn", model.name, f"KV is lost: {error.message}")
                with self.kernel.table.lock:
                    thread.seat, thread.computed, thread.known = None, 0, 0
        self._detach(model)
        with self.kernel.table.lock:
            model.seats, model.draining, model.to_close, model.borrowed = [], {}, [], {}
            freed = self.kernel.ledger.release(model.device.pool, model.name)
            model.state, model.progress, model.wanted = ModelState.WAITING, 0.0, False
            for process in {thread.process: None for thread in model.queue}:  # chats, spoken to meanwhile
                for thread in process.threads:
                    dispatcher.scheduler.sleep(thread, model)
                self.kernel.admission.enter(process)
            self.kernel.admission.forget(model)
            self.kernel.publish("model", name=model.name, state="waiting" if model.users else "disk")
            self.kernel.admission.settle()
        return freed

    def _detach(self, model: Model) -> None:
        dispatcher = self.kernel.dispatcher_of(model)
        dispatcher.drain()
        with self.kernel.table.lock:
            if model in dispatcher.models:
                dispatcher.models.remove(model)
            host, model.host = model.host, None
        if host is not None:
            host.shutdown()

    def record(self, name: str) -> Model:
        """Raises ModelNotFound."""
        entry = self.resolve(name)
        model = self.records.get(entry.name)
        if model is None:
            raise ModelNotFound(f"{entry.name} is not loaded")
        return model
