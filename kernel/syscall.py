"""The only door into the kernel: one table of system calls.

Everything that changes the kernel goes through here: the shell, the monitor, the control socket and
plugins call the same functions. Readers get frozen snapshots.
Lock: none here; each call takes what it needs. All calls may be made from any thread, and none is
made with a kernel lock held.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from kernel.bus import Mailbox
from kernel.device import DeviceInfo, Driver, EngineOptions, Estimate, HostSample, ModelInfo, Sampling
from kernel.errors import NotPermitted
from kernel.explain import explain
from kernel.kernel import Kernel
from kernel.models import ModelState
from kernel.process import Process, Signal, State
from kernel.snapshot import LogView, ModelView, OutputView, ProcessView, SystemView
from kernel.spec import ProcessSpec
from kernel.views import device_view, disk_view, process_view

if TYPE_CHECKING:
    from kernel.orphans import Orphan

__all__ = [
    "EngineOptions",
    "Estimate",
    "HostSample",
    "ModelInfo",
    "Orphan",
    "ProcessSpec",
    "Sampling",
    "Signal",
    "Syscalls",
]


class Syscalls:
    """The system calls of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._table = kernel.table

    # Processes

    def spawn(self, spec: ProcessSpec) -> int:
        """Start a process and return its PID at once; it loads the model if need be.

        Raises UsageError (no prompt, bad nice or sampling), ModelNotFound, ModelInvalid, AdmissionRefused.
        What goes wrong later ends the process with an exit code and `error` in its view.
        """
        return self._kernel.spawn(spec).pid

    def signal(self, pid: int, signal: Signal) -> None:
        """INT, TERM, KILL end it (130, 143, 137) at the next token; STOP and CONT pause it and go on.

        USR1 writes a checkpoint of it into LLMOS's folder for them; the log tells where.

        Raises ProcessNotFound, NotPermitted (it has ended already).
        """
        self._kernel.control.signal(pid, signal)

    def renice(self, pid: int, nice: int) -> int:
        """Set the nice value, -20 (most) to 19; returns the old one. Raises ProcessNotFound, UsageError."""
        return self._kernel.control.renice(pid, nice)

    def say(self, pid: int, text: str) -> int:
        """The next turn of a chat, which may still be answering; returns the number its reply has in `items`.

        Raises ProcessNotFound, NotPermitted (no chat, ended, or hung up), UsageError (empty).
        """
        return self._kernel.control.say(pid, text)

    def cut(self, pid: int) -> None:
        """End the reply that a chat gives or is about to, and keep what there is of it. Raises as `say`."""
        self._kernel.control.cut(pid)

    def hang_up(self, pid: int) -> None:
        """Nothing more will be said to a chat: it ends when all is answered. Raises as `say`."""
        self._kernel.control.hang_up(pid)

    def swap_out(self, pid: int) -> int:
        """Move a process's KV out of its engine, and keep it there until `swap_in`; returns the bytes moved.

        Raises ProcessNotFound, NotPermitted (it has ended).
        """
        return self._kernel.control.swap_out(pid)

    def swap_in(self, pid: int) -> None:
        """Let a process that was swapped out by hand run again. Raises as `swap_out`."""
        self._kernel.control.swap_in(pid)

    def set_policy(self, name: str) -> str:
        """Schedule by another policy from now on: "fair", "fifo", "rr", "priority"; returns the old one.

        Raises UsageError, naming the policies there are.
        """
        return self._kernel.control.set_policy(name)

    def set_group(self, name: str, weight: float) -> None:
        """Make a group, or change its weight (1 is that of a process at nice 0).

        Under "fair", processes spawned with this `group` divide its weight between them; their own nice
        values do not count then. Raises UsageError.
        """
        self._kernel.control.set_group(name, weight)

    def process(self, pid: int) -> ProcessView:
        """One process, also when it has ended. Raises ProcessNotFound."""
        with self._table.lock:
            return self._view(self._table.get(pid))

    def spec(self, pid: int) -> ProcessSpec:
        """What a process was started with. Raises ProcessNotFound."""
        with self._table.lock:
            return self._table.get(pid).spec

    def why(self, pid: int) -> tuple[str, ...]:
        """In words: what a process waits for or why it ended, and its share, due and received.

        Raises ProcessNotFound.
        """
        with self._table.lock:
            process = self._table.get(pid)
            model, now_s = self._kernel.models.get(process.model), self._kernel.clock.now_s()
            queued = None if process.state is State.STOPPED else self._kernel.admission.explain(process)
            return queued or explain(process, model, now_s)

    def wait(self, pid: int, timeout_s: float | None = None) -> ProcessView | None:
        """Block until the process ends; None when the time is up. Raises ProcessNotFound."""
        with self._table.lock:
            process = self._table.get(pid)
            if not self._kernel.parts.threaded:
                self._kernel.pump()
            ended = self._table.changed.wait_for(lambda: not process.alive, timeout_s)
            return self._view(process) if ended else None

    def reap(self, pid: int) -> ProcessView:
        """Take an ended process off the list. `finished` keeps the last ones. Raises as `signal`."""
        with self._table.lock:
            process = self._table.get(pid)
            if process.alive:
                raise NotPermitted(f"process {pid} has not ended")
            self._table.reap(process)
            self._kernel.touched(process)
            return self._view(process)

    def finished(self) -> tuple[ProcessView, ...]:
        """Processes that were reaped, oldest first; the kernel keeps a bounded number."""
        with self._table.lock:
            return tuple(map(self._view, self._table.finished()))

    def read(self, pid: int, offset: int, timeout_s: float | None = 0.0) -> OutputView:
        """Output from a character offset on, waiting for some until the time is up (None: for ever)."""
        with self._table.lock:
            stdout = self._table.get(pid).stdout
        return OutputView(*stdout.read(offset, timeout_s))

    def items(self, pid: int) -> tuple[tuple[str, str], ...]:
        """The prompts answered so far, each with its reply. Raises ProcessNotFound."""
        with self._table.lock:
            process = self._table.get(pid)
            asked = map(process.asked, range(process.item))
            return tuple(zip(asked, process.replies, strict=True))

    def save(self, pid: int, path: Path) -> int:
        """Write a checkpoint of a process that has not ended; returns its bytes. The process goes on.

        Raises ProcessNotFound, NotPermitted, and LlmosError if the file cannot be written (nothing
        half-written is left behind).
        """
        return self._kernel.recovery.save(pid, path)

    def fork(self, pid: int, seed: int | None = None, sink: str = "") -> int:
        """Copy a process, KV and all; the copy goes on beside it. Returns its PID.

        Its output begins with what the parent had said. With `seed` it draws other tokens from here on.
        Raises ProcessNotFound, NotPermitted (it has ended).
        """
        return self._kernel.recovery.fork(pid, seed, sink).pid

    def restore(self, path: Path, sink: str = "") -> int:
        """Continue a checkpoint as a new process; returns its PID.

        Its output begins with what it had said; `sink` is as in `ProcessSpec`.
        Raises CheckpointInvalid, ModelNotFound.
        """
        return self._kernel.recovery.restore(path, sink).pid

    def orphans(self) -> "tuple[Orphan, ...]":
        """What ran when an earlier LLMOS on this home died, and has been neither resumed nor forgotten."""
        return self._kernel.recovery.orphans()

    def resume(self, process: "Orphan") -> int:
        """Continue one of them as a new process; returns its PID. Raises as `restore`."""
        return self._kernel.recovery.resume(process).pid

    def freeze(self) -> None:
        """LLMOS is told to go: leave what runs in the journal, for `resume`. Safe in a signal handler."""
        self._kernel.recovery.freeze()

    def forget_orphans(self) -> None:
        """Throw the journals of dead LLMOSes away."""
        self._kernel.recovery.forget_orphans()

    # Models

    def load(
        self,
        model: str,
        options: EngineOptions = EngineOptions(),  # noqa: B008
        *,
        wait: bool = False,
        device: str = "",
    ) -> ModelView:
        """Begin to load a model (by name or path) and return at once. Loading again changes nothing.

        Without a device's name, it goes to the kind that its driver likes best and that it can fit, and there
        where most room is. Idle models make room. Where that is not enough, it waits for memory, or without
        `wait` is refused.
        Raises ModelNotFound, ModelInvalid, AdmissionRefused, UsageError (no such device), NotPermitted.
        """
        kernel = self._kernel
        if options == EngineOptions():
            options = kernel.parts.options
        record = kernel.residency.want(kernel.residency.resolve(model), options, device)
        with self._table.lock:
            record = kernel.residency.check_wanted(record)
            record.wanted = True
            kernel.admission.load(record, wait=wait)
        if not kernel.parts.threaded:
            kernel.dispatcher_of(record).serve_requests()
        with self._table.lock:
            return record.view()

    def wait_load(self, model: str, timeout_s: float | None = None) -> ModelView | None:
        """Block until a load ended; None when the time is up. Raises what made the load fail."""
        with self._table.lock:
            record = self._kernel.residency.record(model)
            coming = (ModelState.WAITING, ModelState.LOADING, ModelState.EVICTING)
            if not self._table.changed.wait_for(lambda: record.state not in coming, timeout_s):
                return None
            if record.error is not None:
                raise record.error
            return record.view()

    def cancel_load(self, model: str) -> None:
        """Stop a load that is going on, or waits for memory. Raises ModelNotFound."""
        self._kernel.residency.cancel(model)

    def pin(self, model: str, pinned: bool = True) -> None:
        """Keep a loaded model in memory, whoever wants it away; `pinned=False` gives it up again.

        Raises ModelNotFound, NotPermitted (it is not loaded).
        """
        self._kernel.residency.pin(model, pinned)

    def unload(self, model: str) -> int:
        """Close a model and free its memory; returns the bytes freed.

        Raises ModelNotFound, NotPermitted (not loaded, pinned, or processes use it: they are named).
        """
        return self._kernel.residency.unload(model)

    def models(self) -> tuple[ModelView, ...]:
        """Every model that can be named, loaded or not."""
        entries = self._kernel.catalog.list()
        with self._table.lock:
            used = [record.view() for record in self._kernel.models.values()]
        names = {view.name for view in used}
        return (*used, *(disk_view(entry) for entry in entries if entry.name not in names))

    def inspect(
        self,
        model: str,
        options: EngineOptions = EngineOptions(),  # noqa: B008
        device: str = "",
    ) -> tuple[ModelInfo, Estimate]:
        """What a model's header says, and the bytes it would take on a device, or the one it would go to.

        Raises ModelNotFound, ModelInvalid, UsageError (no such device).
        """
        info, driver, options, chosen = self._looked_at(model, options, device)
        return info, driver.estimate(info, options, chosen)

    def confirm(
        self,
        model: str,
        options: EngineOptions = EngineOptions(),  # noqa: B008
        device: str = "",
    ) -> Estimate:
        """The bytes it would take as its native library counts them, in a dry run. Raises as `inspect`."""
        info, driver, options, chosen = self._looked_at(model, options, device)
        return driver.confirm(info, options, chosen)

    def _looked_at(
        self, model: str, options: EngineOptions, device: str
    ) -> tuple[ModelInfo, Driver, EngineOptions, DeviceInfo]:
        residency = self._kernel.residency
        entry = residency.resolve(model)
        driver = residency.driver(entry.path)
        info = driver.inspect(entry.path)
        chosen = self._kernel.parts.options if options == EngineOptions() else options
        return info, driver, chosen, residency.device_for(driver, info, chosen, device)

    # The whole

    def snapshot(self) -> SystemView:
        """Everything at one instant."""
        kernel = self._kernel
        now_s = kernel.clock.now_s()
        with self._table.lock:
            rows = list(self._table)
            return SystemView(
                time_s=kernel.clock.wall_s(),
                uptime_s=now_s - kernel.booted_s,
                policy=kernel.policy.name,
                processes=tuple(map(self._view, rows)),
                models=tuple(model.view() for model in kernel.models.values()),
                devices=tuple(device_view(d, rows, now_s) for d in kernel.dispatchers.values()),
                pools=kernel.ledger.views(),
                shares=kernel.ledger.shares(),
            )

    def host(self) -> HostSample | None:
        """What the machine's sensors say now; None without sensors. Takes some milliseconds."""
        sensors = self._kernel.parts.host
        return sensors() if sensors else None

    def log(self) -> tuple[LogView, ...]:
        """The kernel log, oldest first."""
        return tuple(self._kernel.log_lines)

    def subscribe(self, *topics: str) -> Mailbox:
        """Hear of changes: topics "process" (pid, state, exit_code), "model" (name, state), "log"."""
        return self._kernel.bus.subscribe(*topics)

    def unsubscribe(self, mailbox: Mailbox) -> None:
        """Close a mailbox from `subscribe`."""
        self._kernel.bus.unsubscribe(mailbox)

    def shutdown(self) -> None:
        """Kill every process, close every engine, stop the threads. Idempotent."""
        self._kernel.shutdown()

    def _view(self, process: Process) -> ProcessView:
        """With the table's lock held."""
        kernel = self._kernel
        return process_view(process, kernel.models.get(process.model), kernel.clock.now_s())
