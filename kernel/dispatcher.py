"""The dispatcher: drives the engines of one device, quantum by quantum.

Owner: one per device; on a thread of its own, or stepped by hand under a hand-fed clock.
Lock: the process table's, taken to plan and to commit, never held while an engine is called.
Order of one round: requests, closing, seating, launching (two quanta in flight, so that the device never
waits for us), then the next event.
Not here: who runs (scheduler), who sits where (seats), what an exit means (kernel).
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kernel.clock import Clock
from kernel.config import KernelConfig
from kernel.device import DeviceInfo, QuantumEnd, SequenceStep, StepEvent
from kernel.errors import ContextFull, KernelFault, LlmosError, WorkerDied
from kernel.fairness import OUTPUT_UNITS
from kernel.models import Model
from kernel.monitor import DeviceMeter, Rate
from kernel.process import Process, State, Thread
from kernel.scheduler import Flight, Grant, Scheduler
from kernel.seats import Seats
from kernel.swap import SwapSpace
from kernel.table import ProcessTable

QUANTA_IN_FLIGHT = 2
STALLS_MAX = 3  # quanta in a row that end by themselves with nothing done


class Lifecycle(Protocol):
    """What the dispatcher tells the kernel. Called with the table's lock held."""

    def ended(self, process: Process, exit_code: int, error: LlmosError | None = None) -> None:
        """A process is done."""

    def touched(self, process: Process) -> None:
        """A process has new tokens or a new reply."""

    def rests(self, process: Process) -> None:
        """A process has nothing to run, for now."""

    def worker_died(self, model: Model, error: WorkerDied) -> None:
        """A model's engine is gone; its threads have been taken off their seats."""


class Dispatcher:
    """One device's engines and their quanta."""

    def __init__(
        self,
        device: DeviceInfo,
        config: KernelConfig,
        table: ProcessTable,
        clock: Clock,
        life: Lifecycle,
        swap: SwapSpace,
    ) -> None:
        self.device = device
        self.config = config
        self.table = table
        self.clock = clock
        self.life = life
        self.scheduler = Scheduler(config)  # guarded by table.lock
        self.seats = Seats(self, swap)
        self.meter = DeviceMeter(config.rate_window_s, clock.now_s())  # guarded by table.lock
        self.models: list[Model] = []  # guarded by table.lock
        self.flights = self.scheduler.flights  # guarded by table.lock
        self.last_quantum = 0
        self._stalls = 0
        self._requests: deque[Callable[[], None]] = deque()  # guarded by table.lock
        self._wakeup = threading.Condition(table.lock)
        self._dirty = False  # guarded by table.lock
        self._stopping = False  # guarded by table.lock
        self.fault: KernelFault | None = None  # a bug has ended its thread; guarded by table.lock

    # From any thread

    def submit(self, request: Callable[[], None]) -> None:
        """Have a request run on the dispatcher's thread, between events."""
        with self.table.lock:
            self._requests.append(request)
            self.wake_up()

    def wake_up(self) -> None:
        """Something changed that may give the device work. With the table's lock held."""
        self._dirty = True
        self._wakeup.notify()

    def interrupt(self, *, hard: bool = False) -> None:
        """End the quanta in flight at the next step, or within this one. With the table's lock held."""
        for flight in self.flights if hard else ():
            flight.model.was_cut = True
        if self.flights:
            self.flights[-1].model.open_host().interrupt(self.flights[-1].id, hard=hard)

    def let_in(self, thread: Thread, model: Model) -> None:
        """A thread became runnable: if it has a seat, or gets one, it goes before the rest of the quanta in
        flight. With the table's lock held."""
        self.scheduler.wake(thread, model)
        if self.seats.has_room(model, thread):
            self.interrupt(hard=self.scheduler.yields(thread))
        self.wake_up()

    def stop(self) -> None:
        """End `run`, after the quanta in flight."""
        with self.table.lock:
            self._stopping = True
            self.interrupt()
            self.wake_up()

    # On the dispatcher's thread

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            with self.table.lock:
                self._wakeup.wait_for(lambda: self._dirty or self._stopping)
                self._dirty = False
            while not self._stopping and self.advance():
                pass

    def advance(self) -> bool:
        """One round; False if there was nothing to do."""
        worked = self.serve_requests()
        for model in tuple(self.models):
            try:
                worked |= self.seats.fill(model)
            except WorkerDied as error:
                self.lost(model, error)
                worked = True
        while len(self.flights) < QUANTA_IN_FLIGHT and self._launch():
            worked = True
        if self.flights:
            self._next_event()
            worked = True
        return worked

    def drain(self) -> None:
        """End the quanta in flight and commit what they did; then threads and KV agree."""
        with self.table.lock:
            self.interrupt()
        while self.flights:
            self._next_event()

    def serve_requests(self) -> bool:
        """Run what was submitted; False if there was nothing."""
        worked = False
        while True:
            with self.table.lock:
                if not self._requests:
                    return worked
                request = self._requests.popleft()
            request()
            worked = True

    # Quanta

    def _launch(self) -> bool:
        """Plan a quantum and start it."""
        with self.table.lock:
            flight = self.scheduler.plan(self.last_quantum + 1)
            if flight is None:
                return False
            self.last_quantum = flight.id
            quota = {t.seat: grant.tokens for t, grant in flight.grants.items() if t.seat is not None}
            for thread in flight.grants:
                thread.process.state = State.RUNNING
        try:
            flight.model.open_host().start(flight.quantum(quota))
        except WorkerDied as error:
            self.lost(flight.model, error)
        return True

    def _next_event(self) -> None:
        """Wait for an engine's next event and commit it."""
        model = self.flights[0].model
        try:
            event = model.open_host().poll(None)
            if isinstance(event, StepEvent):
                for thread, stuck in self._commit(self.flights[0], event).items():
                    if stuck:
                        self.seats.swap_out(model, thread)
                    elif not thread.known:
                        self.seats.open(model, thread)
                    else:
                        self.seats.queue_ahead(model, thread)
            elif isinstance(event, QuantumEnd):
                self._end_flight(event)
                self.seats.charge(model, event.borrowed_tokens)
        except WorkerDied as error:
            self.lost(model, error)

    def _end_flight(self, event: QuantumEnd) -> None:
        with self.table.lock:
            flight, model = self.flights[0], self.flights[0].model
            moved = event.interrupted or flight.used_s > 0.0
            self._stalls = 0 if moved else self._stalls + 1
            if self._stalls >= STALLS_MAX:
                self._stalls = 0
                raise WorkerDied(f"the engine of {model.name} makes no progress")
            self.scheduler.end(flight)
            model.draining = {seat: last for seat, last in model.draining.items() if last > flight.id}
            still = {thread.process for other in self.flights for thread in other.grants}
            for process in {thread.process for thread in flight.grants} - still:
                if process.state is State.RUNNING:
                    process.state = State.RUNNABLE

    def _commit(self, flight: Flight, event: StepEvent) -> dict[Thread, bool]:
        """Book what a step did; returns the threads that have another item to answer, or are stuck (True)."""
        onward: dict[Thread, bool] = {}
        with self.table.lock:
            now_s = self.clock.now_s()
            flight.used_s += event.step_s
            prompt_units = flight.prompt_units
            units = [
                s.prompt_tokens * prompt_units + (s.token is not None) * OUTPUT_UNITS for s in event.sequences
            ]
            total = sum(units) or 1.0
            flight.model.was_cut &= not any(units)
            flight.model.queue.served(total)
            for step, used in zip(event.sequences, units, strict=True):
                thread = flight.model.seats[step.seq]
                if thread is None:
                    continue  # killed meanwhile: it gets nothing after the acknowledgement
                if step.opened is not None:
                    thread.begin(step.opened)
                    thread.computed = step.opened.shared_tokens
                    continue
                self._book(flight, thread, step, used)
                thread.process.device_s += event.step_s * used / total
                if step.token is not None:
                    self.life.touched(thread.process)
                    self._emit(thread.process, thread, step, now_s)
                if step.stuck:
                    onward[thread] = True
                elif (step.finish or step.error) and self.next_item(
                    flight.model, thread, self._complaint(flight.model, step)
                ):
                    onward[thread] = False
            self._measure(event, now_s)
        return onward

    @staticmethod
    def _book(flight: Flight, thread: Thread, step: SequenceStep, used: float) -> None:
        tokens = step.prompt_tokens + (step.token is not None)
        grant = flight.grants.setdefault(thread, Grant())
        thread.computed += step.shared_tokens
        thread.process.shared_tokens += step.shared_tokens
        grant.used_tokens += tokens
        grant.used_units += used
        thread.granted -= tokens
        thread.process.share_received += used
        # A drawn token's own KV is computed in the step after; the step before's in this one.
        thread.computed = min(thread.computed + tokens, len(thread.tokens) - (step.token is None))

    def _emit(self, process: Process, thread: Thread, step: SequenceStep, now_s: float) -> None:
        assert step.token is not None
        thread.draw(step.token)
        process.output_tokens += 1
        if process.rate is None:
            process.rate = Rate(self.config.rate_window_s, now_s)
        process.rate.count(1, now_s)
        if process.first_token_s is None:
            process.first_token_s = now_s - process.started_s
        process.say(thread, step.text)

    @staticmethod
    def _complaint(model: Model, step: SequenceStep) -> LlmosError | None:
        if step.finish != "context":
            return step.error
        window = model.open_host().info.context_tokens
        return ContextFull(
            f"the context window of {window} tokens is full", "load the model with a larger --ctx"
        )

    def _measure(self, event: StepEvent, now_s: float) -> None:
        meter = self.meter
        meter.busy.count(event.step_s, now_s)
        meter.output.count(sum(s.token is not None for s in event.sequences), now_s)
        meter.prefill.count(sum(s.prompt_tokens for s in event.sequences), now_s)
        meter.steps.count(1, now_s)
        meter.sequences.count(len(event.sequences), now_s)

    # Ends

    def next_item(self, model: Model, thread: Thread, error: LlmosError | None) -> bool:
        """An item is answered, or failed; True if the thread has another one and a seat to answer it on."""
        process = thread.process
        with self.table.lock:
            if not process.alive:
                return False
            process.finish_item(thread, error)
            thread.known = max(0, thread.known - 1)
            if process.is_over:
                self.exit(process)
                return False
            if process.is_idle:
                self._fall_asleep(model, thread)
                return False
            if not process.is_chat:
                thread.restart()
            if not thread.items and not process.claim(thread):
                self.retire(model, thread)
            return thread.seat is not None

    def _fall_asleep(self, model: Model, thread: Thread) -> None:
        """A chat waits for its user; its KV stays on its seat for as long as nobody needs it."""
        self.scheduler.sleep(thread, model)
        if thread.process.state is not State.STOPPED:  # its reply was cut while it was stopped
            thread.process.state = State.SLEEPING
        self.life.rests(thread.process)

    def take_turn(self, model: Model, thread: Thread) -> None:
        """A chat's user has spoken, or its reply is cut short: go on. On the dispatcher's thread."""
        process = thread.process
        with self.table.lock:
            if process.state is not State.SLEEPING or process.is_idle:
                return
            process.state = State.RUNNABLE if model.host else State.NEW
        if thread.seat is not None:
            try:
                self.seats.open(model, thread)
            except WorkerDied as error:  # while nobody listened to it
                self.lost(model, error)
        with self.table.lock:
            if process.state in (State.RUNNABLE, State.NEW) and thread not in model.queue:
                self.let_in(thread, model)

    def cut(self, model: Model, thread: Thread) -> None:
        """End a chat's reply here, or take back a turn that was not begun. On the dispatcher's thread."""
        self.drain()
        with self.table.lock:
            process = thread.process
            if not process.alive or process.is_idle or not (thread.items or process.claim(thread)):
                return
        if self.next_item(model, thread, None):
            self.seats.open(model, thread)

    def retire(self, model: Model, thread: Thread) -> None:
        """Nothing is left for a thread; the others of its process have its part of the weight."""
        process = thread.process
        self.scheduler.sleep(thread, model)
        model.vacate(thread, self.last_quantum if self.flights else 0)
        process.threads = tuple(each for each in process.threads if each is not thread)
        for other in process.threads:
            self.scheduler.reweight(other, model)

    def exit(self, process: Process) -> None:
        """All is answered: it ends, with what failed. With the table's lock held."""
        error, failed = process.error, process.items_failed
        total = process.items
        if error is not None and total > 1:
            which = "last" if process.is_chat else "first"
            error = type(error)(
                f"{failed} of {total} prompts failed; the {which}: {error.message}", error.hint
            )
        self.life.ended(process, error.exit_code if error else 0, error)

    def lost(self, model: Model, error: WorkerDied) -> None:
        """The engine is gone. Everything needed to go on is in the process table."""
        with self.table.lock:
            if model.host is None:  # it is known
                return
            self.scheduler.note("lost", model=model.name)
            for flight in [f for f in self.flights if f.model is model]:
                self.scheduler.end(flight)
            for thread in [t for t in model.seats if t is not None]:
                thread.seat, thread.computed, thread.known = None, 0, 0
                if thread in model.queue:
                    model.queue.seat(thread, False)
                    thread.process.state = State.RUNNABLE
            host, model.host = model.host, None
            model.seats, model.draining, model.to_close, model.borrowed = [], {}, [], {}
            model.kv_short = False
        if host is not None:
            host.shutdown()
        with self.table.lock:
            self.life.worker_died(model, error)
