"""The scheduler: fills a device's next quantum from its run queues.

Two levels of the same fair queue. On a device, models share *time*: a model's weight is the sum of its
runnable threads' weights, charged in device seconds. Within a model, threads share *service units*.
Owner: one per device. Lock: the process table's, held by the caller of every method.
Not here: engines and events (dispatcher); how fairness is computed (fairness).
"""

from collections import deque
from dataclasses import dataclass, field

from kernel.config import KernelConfig
from kernel.device import Quantum
from kernel.fairness import OUTPUT_UNITS, PROMPT_UNITS, FairQueue
from kernel.models import Model, ModelState
from kernel.process import Thread


@dataclass(slots=True)
class Grant:
    """What one thread was given in one quantum, and what it used of it."""

    tokens: int = 0
    units: float = 0.0
    used_tokens: int = 0
    used_units: float = 0.0


@dataclass(slots=True)
class Flight:
    """A quantum on its way: planned, started, not yet ended."""

    id: int
    model: Model
    grants: dict[Thread, Grant] = field(default_factory=dict)
    planned_s: float = 0.0
    used_s: float = 0.0

    def quantum(self, quota_tokens: dict[int, int]) -> Quantum:
        return Quantum(self.id, quota_tokens)


class Scheduler:
    """Who runs next on one device, and for how many tokens."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.models: FairQueue[Model] = FairQueue(slice_units=config.quantum_s)
        self.flights: deque[Flight] = deque()  # planned and not yet ended, oldest first

    def wake(self, thread: Thread, model: Model) -> None:
        """A thread became runnable."""
        self._settle()
        seated = thread.seat is not None
        model.queue.join(thread, thread.weight, thread.lag, seated=seated)
        self.refresh(model)

    def sleep(self, thread: Thread, model: Model) -> None:
        """A thread is runnable no more."""
        if thread in model.queue:
            self._settle()
            thread.process.share_due += model.queue.take_due(thread)
            thread.lag = model.queue.leave(thread)
            self.refresh(model)

    def renice(self, thread: Thread, model: Model) -> None:
        if thread in model.queue:
            self._settle()
            thread.process.share_due += model.queue.take_due(thread)
            model.queue.reweight(thread, thread.weight)
            self.refresh(model)

    def refresh(self, model: Model) -> None:
        """A model counts on the device while it is open and has runnable threads."""
        wants = model.state is ModelState.LOADED and len(model.queue) > 0
        if wants and model in self.models:
            self.models.reweight(model, model.queue.weight)
        elif wants:
            self.models.join(model, model.queue.weight, seated=True)
        elif model in self.models:
            self.models.leave(model)

    def plan(self, quantum_id: int) -> Flight | None:
        """The next quantum; None if nobody can run, or another model than the one in flight is due."""
        model = self.models.pick()
        if model is None or (self.flights and self.flights[-1].model is not model):
            return None
        flight = Flight(quantum_id, model)
        sharers = sum(1 for t in model.seats if t is not None and t in model.queue)
        token_s = model.decode_s(max(1, sharers))
        while flight.planned_s < self.config.quantum_s:
            thread = model.queue.pick()
            if thread is None:
                break
            self._grant(flight, thread, token_s)
        if not flight.grants:
            return None
        self.models.charge(model, flight.planned_s)
        self.flights.append(flight)
        return flight

    def end(self, flight: Flight) -> None:
        """A quantum is over."""
        self._refund(flight)
        self.flights.remove(flight)
        for thread, grant in flight.grants.items():
            thread.granted -= grant.tokens - grant.used_tokens

    def _settle(self) -> None:
        """Before weights change: what is granted and not used yet was granted at the old ones."""
        for flight in self.flights:
            self._refund(flight)

    def _refund(self, flight: Flight) -> None:
        """Count only what was really used; what is used later counts at the next refund."""
        if flight.model in self.models:
            self.models.charge(flight.model, flight.used_s - flight.planned_s)
        flight.planned_s = flight.used_s
        for thread, grant in flight.grants.items():
            refund, grant.units = grant.units - grant.used_units, grant.used_units
            if thread in flight.model.queue:
                flight.model.queue.charge(thread, -refund)
            else:
                thread.lag += refund

    def _grant(self, flight: Flight, thread: Thread, token_s: float) -> None:
        """One request of the thread with the best claim."""
        prefill_s = flight.model.open_host().info.prefill_token_s
        grant = flight.grants.get(thread) or Grant()
        if thread.pending > 1:
            tokens = min(thread.pending, self.config.prefill_chunk_tokens)
            units, cost_s = tokens * PROMPT_UNITS, tokens * prefill_s
        else:
            tokens = max(1, int(self.config.quantum_s / self.config.rounds / token_s))
            units, cost_s = tokens * OUTPUT_UNITS, tokens * token_s
        thread.granted += tokens
        grant.tokens += tokens
        grant.units += units
        flight.grants[thread] = grant
        flight.planned_s += cost_s
        flight.model.queue.charge(thread, units)
