"""The dispatcher: drives the engines of one device.

Owner: one per device; on a thread of its own, or stepped by hand under a hand-fed clock.
Lock: the process table's, taken to plan and to commit, never held while an engine is called.
Order of one round: requests, closing, seating, launching (two quanta in flight, so that the device never
waits for us), then the next event.
Not here: who runs (scheduler), what an exit means (kernel).
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kernel.clock import Clock
from kernel.config import KernelConfig
from kernel.device import DeviceInfo, Prompt, QuantumEnd, SequenceStep, StepEvent
from kernel.errors import (
    AdmissionRefused,
    CheckpointInvalid,
    ContextFull,
    KernelFault,
    LlmosError,
    WorkerDied,
)
from kernel.fairness import OUTPUT_UNITS
from kernel.models import Model
from kernel.monitor import DeviceMeter, Rate
from kernel.process import Process, ProcessTable, State, Thread
from kernel.scheduler import Flight, Grant, Scheduler
from kernel.swap import SwapSpace

QUANTA_IN_FLIGHT = 2
QUEUE_AHEAD = 2  # prompts of a job that its engine knows before they are due
DEATHS_MAX = 2  # of the engine while it opens one sequence
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
    """One device's engines, seats and quanta."""

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
        self.swap = swap
        self.config = config
        self.table = table
        self.clock = clock
        self.life = life
        self.scheduler = Scheduler(config)  # guarded by table.lock
        self.meter = DeviceMeter(config.rate_window_s, clock.now_s())  # guarded by table.lock
        self.models: list[Model] = []  # guarded by table.lock
        self.flights = self.scheduler.flights  # guarded by table.lock
        self.last_quantum = 0
        self._stalls = 0
        self._requests: deque[Callable[[], None]] = deque()  # guarded by table.lock
        self._wakeup = threading.Condition(table.lock)
        self._dirty = False  # guarded by table.lock
        self._stopping = False  # guarded by table.lock

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

    def interrupt(self) -> None:
        """End the quanta in flight at the next step. With the table's lock held."""
        if self.flights:
            self.flights[-1].model.open_host().interrupt(self.flights[-1].id)

    def has_room(self, model: Model, thread: Thread) -> bool:
        """Whether a runnable thread has a seat, or would get one now. With the table's lock held."""
        if thread.seat is not None or model.has_seat():
            return True
        return bool(model.seats) and self._victim(model, thread) is not None

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
                worked |= self._close_vacated(model) | self._fill_seats(model)
            except WorkerDied as error:
                self._lost(model, error)
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

    def swap_out(self, model: Model, thread: Thread) -> None:
        """Free a seat: move its thread's KV away, or leave it to be computed again if that is cheaper."""
        self.drain()
        host, process = model.host, thread.process
        if thread.seat is None or host is None:
            return
        kv = None
        if thread.computed and self.swap.pays(host.info, thread.computed):
            kv = self.swap.put(process.pid, thread.index, host.dump(thread.seat))
        if self.scheduler.record:
            self.scheduler.record.thread("swap", thread, computed_tokens=thread.computed)
        with self.table.lock:
            thread.kv = kv
            model.vacate(thread, 0)
            if thread in model.queue:
                model.queue.seat(thread, False)
                if all(each.seat is None for each in process.threads):
                    process.state = State.SWAPPED
        self._close_vacated(model)

    def copy(self, model: Model, source: Thread, thread: Thread) -> None:
        """Give a thread another's KV: within the engine if a seat is free there, or as if swapped out.

        What cannot be had is computed again, also when the engine dies of it.
        """
        host, blob = model.host, source.kv.read() if source.kv is not None else None
        if host is not None and source.seat is not None and source.computed:
            if self._copy_seat(model, source, thread):
                return
            if self.swap.pays(host.info, source.computed):
                with contextlib.suppress(LlmosError):
                    blob = host.dump(source.seat)
        if blob is not None:
            thread.kv = self.swap.put(thread.process.pid, thread.index, blob)

    def _copy_seat(self, model: Model, source: Thread, thread: Thread) -> bool:
        with self.table.lock:
            if not model.has_seat() or not self._sit(model, thread):
                return False
        assert source.seat is not None and thread.seat is not None
        try:
            model.open_host().fork(source.seat, thread.seat, thread.process.sampling(thread.item))
        except LlmosError as error:
            with self.table.lock:
                model.kv_short |= isinstance(error, AdmissionRefused)
                model.vacate(thread, 0)
            return False
        with self.table.lock:
            thread.computed, thread.known = source.computed, 1
        return True

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

    def _close_vacated(self, model: Model) -> bool:
        while model.to_close:
            model.open_host().close(model.to_close[0])
            with self.table.lock:
                model.to_close.pop(0)
                model.kv_short = False
        return False

    # Seats

    def _fill_seats(self, model: Model) -> bool:
        """Give free seats to those who wait, and contested ones to those with a better claim."""
        worked = False
        for _ in range(1 + 2 * len(model.seats)):  # whatever a policy says, seats do not go round for ever
            with self.table.lock:
                thread = model.queue.first_waiting() if model.host else None
                if thread is None:
                    return worked
                victim = None
                if not model.has_seat():
                    victim = self._victim(model, thread) if model.contested else None
                    model.contested = victim is not None
                if victim is None and not self._sit(model, thread):
                    return worked
            if victim is not None:
                self.swap_out(model, victim)
                with self.table.lock:
                    if thread not in model.queue or not self._sit(model, thread):
                        continue  # it was killed meanwhile
            if self.scheduler.record:
                self.scheduler.record.thread("seat", thread, model=model.name, seat=thread.seat)
            self._open(model, thread, fresh=True)
            worked = True
        return worked

    @staticmethod
    def _sit(model: Model, thread: Thread) -> bool:
        """Take the lowest free seat, if there is one, and KV memory for it as far as we know."""
        seat = model.free_seat()
        if seat is None or model.kv_short:
            return False
        thread.seat = seat
        model.seats[seat] = thread
        return True

    @staticmethod
    def _victim(model: Model, waiting: Thread) -> Thread | None:
        """A seated thread that should make room: an idle one, or one that the policy says."""
        seated = [t for t in model.seats if t is not None]
        idle = [t for t in seated if t not in model.queue]
        if idle:
            return min(idle, key=lambda t: t.process.state is not State.STOPPED)  # before those who sleep
        if not seated or model.draining:  # a seat is about to be free
            return None
        return model.queue.victim(waiting, seated)

    def _open(self, model: Model, thread: Thread, *, fresh: bool = False) -> None:
        """Begin, or take up again, a thread's item on its seat, a `fresh` one or the one it had."""
        while (seat := self._seat_of(model, thread)) is not None:
            try:
                if fresh and thread.tokens:
                    thread.computed = self._reopen(model, thread, seat)
                    fresh = False
                if not thread.begun:
                    self._begin_item(model, thread, seat)
                break
            except WorkerDied:
                self._suspect(thread)
                raise
            except AdmissionRefused:
                self._stand(model, thread, fresh)
                return
            except LlmosError as error:
                if not self._next_item(model, thread, error):
                    return
        else:
            return
        with self.table.lock:
            thread.known = 1
            if thread in model.queue:
                model.queue.seat(thread, True)
                thread.process.state, thread.process.waits_for = State.RUNNABLE, ""
        self._queue_ahead(model, thread)

    def _begin_item(self, model: Model, thread: Thread, seat: int) -> None:
        """Open its prompt, in a fresh context, or as the next turn of what is on the seat."""
        host, process, item = model.open_host(), thread.process, thread.items[0]
        turn = bool(thread.tokens)
        if turn:
            opened = host.feed(seat, process.prompt(item))
        else:
            opened = host.open(seat, process.prompt(item), process.sampling(item))
        with self.table.lock:
            thread.begin(opened)
            if not turn:
                thread.computed = opened.shared_tokens

    def _reopen(self, model: Model, thread: Thread, seat: int) -> int:
        """Put a thread's history on a seat; returns how many of its tokens have their KV already."""
        host, process = model.open_host(), thread.process
        sampling = process.sampling(thread.items[0])
        prompt = Prompt(
            tokens=tuple(thread.tokens),
            prompt_tokens=thread.prompt_length,
            max_tokens=process.spec.max_tokens,
        )
        kv = thread.kv.read() if thread.kv is not None else None
        if kv is not None:
            try:
                restored = host.restore(seat, prompt, sampling, kv)
                thread.drop_kv()
                return restored.shared_tokens
            except CheckpointInvalid:
                pass  # of another build or model: compute it again from the tokens
        thread.drop_kv()
        return host.open(seat, prompt, sampling).shared_tokens

    def _seat_of(self, model: Model, thread: Thread) -> int | None:
        """Where a thread is to answer its next item; None if it was killed, or there is no item left."""
        with self.table.lock:
            if thread.seat is not None and not thread.items and not thread.process.claim(thread):
                self._retire(model, thread)
            return thread.seat

    def _stand(self, model: Model, thread: Thread, fresh: bool) -> None:
        """The engine has no KV memory for a thread now: it waits until some is freed."""
        with self.table.lock:
            model.kv_short = True
            if thread.seat is None:
                return
            if self.scheduler.record:
                self.scheduler.record.thread("stand", thread)
            if fresh:  # nothing is open there: closing it would free nothing
                model.seats[thread.seat], thread.seat = None, None
                return
            model.vacate(thread, self.last_quantum)
            if thread in model.queue:
                model.queue.seat(thread, False)

    def _queue_ahead(self, model: Model, thread: Thread) -> None:
        """Let the engine know the job's next prompts, so that it need not wait for us between two."""
        process = thread.process
        if process.is_chat:
            return  # its turns are not of a fresh context
        with self.table.lock:
            while len(thread.items) <= QUEUE_AHEAD and process.claim(thread, ahead=True):
                pass
        while thread.seat is not None and thread.known < len(thread.items):
            item = thread.items[thread.known]
            thread.known += 1
            model.open_host().queue(thread.seat, process.prompt(item), process.sampling(item))

    def _suspect(self, thread: Thread) -> None:
        """The engine died while it opened this sequence: a second time, and the prompt is to blame."""
        thread.deaths += 1
        if thread.deaths >= DEATHS_MAX:
            fault = KernelFault("the engine died twice on this prompt", "`dmesg` shows its last words")
            with self.table.lock:
                if thread.process.alive:
                    self.life.ended(thread.process, fault.exit_code, fault)

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
            self._lost(flight.model, error)
        return True

    def _next_event(self) -> None:
        """Wait for an engine's next event and commit it."""
        model = self.flights[0].model
        try:
            event = model.open_host().poll(None)
            if isinstance(event, StepEvent):
                for thread, stuck in self._commit(self.flights[0], event).items():
                    if stuck:
                        self.swap_out(model, thread)
                    elif not thread.known:
                        self._open(model, thread)
                    else:
                        self._queue_ahead(model, thread)
            elif isinstance(event, QuantumEnd):
                self._end_flight(event)
        except WorkerDied as error:
            self._lost(model, error)

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
                elif (step.finish or step.error) and self._next_item(
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

    def _next_item(self, model: Model, thread: Thread, error: LlmosError | None) -> bool:
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
                self._retire(model, thread)
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
            self._open(model, thread)
        with self.table.lock:
            if process.state in (State.RUNNABLE, State.NEW) and thread not in model.queue:
                self.scheduler.wake(thread, model)
                self.wake_up()

    def cut(self, model: Model, thread: Thread) -> None:
        """End a chat's reply here, or take back a turn that was not begun. On the dispatcher's thread."""
        self.drain()
        with self.table.lock:
            process = thread.process
            if not process.alive or process.is_idle or not (thread.items or process.claim(thread)):
                return
        if self._next_item(model, thread, None):
            self._open(model, thread)

    def _retire(self, model: Model, thread: Thread) -> None:
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

    def _lost(self, model: Model, error: WorkerDied) -> None:
        """The engine is gone. Everything needed to go on is in the process table."""
        with self.table.lock:
            if self.scheduler.record:
                self.scheduler.record.note("lost", model=model.name)
            for flight in [f for f in self.flights if f.model is model]:
                self.scheduler.end(flight)
            for thread in [t for t in model.seats if t is not None]:
                thread.seat, thread.computed, thread.known = None, 0, 0
                if thread in model.queue:
                    model.queue.seat(thread, False)
                    thread.process.state = State.RUNNABLE
            host, model.host = model.host, None
            model.seats, model.draining, model.to_close, model.kv_short = [], {}, [], False
        if host is not None:
            host.shutdown()
        with self.table.lock:
            self.life.worker_died(model, error)
