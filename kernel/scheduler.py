"""The scheduler: fills a device's next quantum from its run queues.

Two levels of the same fair queue. On a device, models share *time*: a model's weight is the sum of its
claimants' weights, charged in device seconds. Within a model, threads and groups of them share *service
units* (runqueue).
Owner: one per device. Lock: the process table's, held by the caller of every method.
Not here: engines and events (dispatcher); how fairness is computed (fairness).
"""

from collections import deque
from dataclasses import dataclass, field

from kernel.config import KernelConfig
from kernel.device import Quantum
from kernel.fairness import OUTPUT_UNITS, PROMPT_UNITS, FairQueue
from kernel.models import Model, ModelState
from kernel.policy import Policy, Terms
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
        turn_s = config.quantum_s
        self.models: FairQueue[Model] = FairQueue(terms=Terms(turn_s, turn_s))
        self.flights: deque[Flight] = deque()  # planned and not yet ended, oldest first

    def wake(self, thread: Thread, model: Model) -> None:
        """A thread became runnable."""
        self._settle()
        model.queue.join(thread, seated=thread.seat is not None)
        self.refresh(model)

    def sleep(self, thread: Thread, model: Model) -> None:
        """A thread is runnable no more."""
        if thread in model.queue:
            self._settle()
            thread.process.share_due += model.queue.leave(thread)
            self.refresh(model)

    def reweight(self, thread: Thread, model: Model) -> None:
        """The weight of its process or group has changed."""
        if thread in model.queue:
            self._settle()
            thread.process.share_due += model.queue.take_due(thread)
            model.queue.reweight(thread)
            self.refresh(model)

    def set_policy(self, policy: Policy, model: Model) -> None:
        """Put a model's threads in another order."""
        self._settle()
        for thread in model.queue:
            thread.process.share_due += model.queue.take_due(thread)
        model.queue.set_policy(policy)
        self.refresh(model)

    def attach(self, model: Model) -> None:
        """A model's engine is open: claims are measured by what it can do."""
        sequences = model.open_host().info.sequences
        seat_units = self.config.seat_slice_s / model.decode_s(sequences) * OUTPUT_UNITS
        request_units = self._chunk_tokens(model) * PROMPT_UNITS
        model.queue.set_terms(Terms(request_units, seat_units))
        self.refresh(model)

    def refresh(self, model: Model) -> None:
        """A model counts on the device while it is open and has runnable threads."""
        model.contested = True
        wants = model.state is ModelState.LOADED and len(model.queue) > 0
        if wants and model in self.models:
            self.models.reweight(model, model.queue.weight)
        elif wants:
            self.models.join(model, model.queue.weight)
        elif model in self.models:
            self.models.leave(model)

    def plan(self, quantum_id: int) -> Flight | None:
        """The next quantum; None if nobody can run, or another model than the one in flight is due."""
        model = self.models.pick()
        if model is None or (self.flights and self.flights[-1].model is not model):
            return None
        flight = Flight(quantum_id, model)
        self._fill(flight)
        if not flight.grants:
            return None
        self.models.charge(model, flight.planned_s)
        self.flights.append(flight)
        return flight

    def end(self, flight: Flight) -> None:
        """A quantum is over."""
        self._refund(flight)
        self.flights.remove(flight)
        flight.model.contested = True
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
            unused, grant.units = grant.units - grant.used_units, grant.used_units
            if unused:
                flight.model.queue.charge(thread, -unused)

    def _chunk_tokens(self, model: Model) -> int:
        """The largest request of a prompt: half a quantum, so that others' tokens fit into it too."""
        config = self.config
        half_tokens = int(config.quantum_s / 2 / max(1e-9, model.open_host().info.prefill_token_s))
        return min(config.prefill_chunk_tokens, max(config.prefill_chunk_min_tokens, half_tokens))

    def _fill(self, flight: Flight) -> None:
        """Grant one request after another to whoever has the best claim, until the time is used up.

        Output tokens are granted in whole rounds of the sharers: part of a round would be a pass of the
        engine that is part empty.
        """
        config, model, queue = self.config, flight.model, flight.model.queue
        prefill_s = model.open_host().info.prefill_token_s
        sharers = max(1, sum(1 for t in model.seats if t is not None and t in queue))
        token_s, requests = model.decode_s(sharers), 0
        decode_tokens = max(1, int(config.quantum_s / config.rounds / token_s))
        chunk_tokens = self._chunk_tokens(model)
        while flight.planned_s < config.quantum_s or requests % sharers:
            thread = queue.pick()
            if thread is None:
                return
            pending = thread.pending
            if pending > 1:
                # A light one's turn is short: a long one would put it far ahead in virtual time.
                fair_tokens = int(chunk_tokens * min(1.0, queue.standing(thread)))
                tokens = min(pending, max(config.prefill_chunk_min_tokens, fair_tokens))
                units, cost_s = tokens * PROMPT_UNITS, tokens * prefill_s
            else:
                tokens = decode_tokens
                requests += 1
                units, cost_s = tokens * OUTPUT_UNITS, tokens * token_s
            grant = flight.grants.get(thread)
            if grant is None:
                grant = flight.grants[thread] = Grant()
            thread.granted += tokens
            grant.tokens += tokens
            grant.units += units
            flight.planned_s += cost_s
            queue.charge(thread, units)
