"""The scheduler: fills a device's next quantum from its run queues.

Two levels of the same fair queue. On a device, models share *time*: a model's weight is the sum of its
claimants' weights, charged in device seconds. Within a model, threads and groups of them share *service
units* (runqueue): an output token is two, a prompt token what its time is worth in those.
Owner: one per device. Lock: the process table's, held by the caller of every method.
Not here: engines and events (dispatcher); how fairness is computed (fairness).
"""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernel.config import KernelConfig
from kernel.device import Quantum
from kernel.fairness import OUTPUT_UNITS, PROMPT_UNITS, FairQueue, prompt_units
from kernel.models import Model, ModelState
from kernel.policy import Policy, Terms
from kernel.process import Thread

if TYPE_CHECKING:
    from kernel.record import DeviceRecord

ROUNDS = 4  # of passes for those who draw, in a quantum of nothing else


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
    output_s: float = 0.0  # device seconds per output token
    prompt_s: float = 0.0
    prompt_units: float = PROMPT_UNITS  # service units per prompt token
    planned_s: float = 0.0
    used_s: float = 0.0

    def price(self, model: Model, drawers: int) -> None:
        """What tokens cost, beside so many that draw."""
        self.output_s, self.prompt_s = model.decode_s(drawers), model.open_host().info.prefill_token_s
        self.prompt_units = prompt_units(self.prompt_s, self.output_s)

    def grant(self, thread: Thread, tokens: int, *, prompt: bool = False) -> None:
        """Charged as it is granted."""
        grant = self.grants.get(thread)
        if grant is None:
            grant = self.grants[thread] = Grant()
        units = tokens * (self.prompt_units if prompt else OUTPUT_UNITS)
        thread.granted += tokens
        grant.tokens += tokens
        grant.units += units
        self.planned_s += tokens * (self.prompt_s if prompt else self.output_s)
        self.model.queue.charge(thread, units)

    def quantum(self, quota_tokens: dict[int, int]) -> Quantum:
        return Quantum(self.id, quota_tokens)


class Scheduler:
    """Who runs next on one device, and for how many tokens."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.record: DeviceRecord | None = None
        turn_s = config.quantum_s
        self.models: FairQueue[Model] = FairQueue(terms=Terms(turn_s, turn_s))
        self.flights: deque[Flight] = deque()  # planned and not yet ended, oldest first

    def note(self, kind: str, thread: Thread | None = None, **facts: object) -> None:
        """Something was decided, perhaps about a thread: for the recording, if there is one."""
        if self.record:
            self.record.note(kind, thread, **facts)

    def wake(self, thread: Thread, model: Model) -> None:
        """A thread became runnable."""
        self._settle()
        model.queue.join(thread, seated=thread.seat is not None)
        self.note("join", thread, model=model.name, weight=round(thread.weight, 9))
        self.refresh(model)

    def sleep(self, thread: Thread, model: Model) -> None:
        """A thread is runnable no more."""
        if thread in model.queue:
            self._settle()
            thread.process.share_due += model.queue.leave(thread)
            self.note("leave", thread)
            self.refresh(model)

    def reweight(self, thread: Thread, model: Model) -> None:
        """The weight of its process or group has changed."""
        if thread in model.queue:
            self._settle()
            thread.process.share_due += model.queue.take_due(thread)
            model.queue.reweight(thread)
            group = thread.process.group
            self.note("weight", thread, weight=group.weight if group else round(thread.weight, 9))
            self.refresh(model)

    def set_policy(self, policy: Policy, model: Model) -> None:
        """Put a model's threads in another order."""
        self._settle()
        for thread in model.queue:
            thread.process.share_due += model.queue.take_due(thread)
        model.queue.set_policy(policy)
        self.note("policy", model=model.name, policy=policy.name)
        self.refresh(model)

    def attach(self, model: Model) -> None:
        """A model's engine is open: claims are measured by what it can do."""
        config, info = self.config, model.open_host().info
        output_s = model.decode_s(info.sequences)
        piece_units = self._chunk_tokens(model) * prompt_units(info.prefill_token_s, output_s)
        request_units = max(piece_units, config.quantum_s / output_s * OUTPUT_UNITS)
        seat_units = config.seat_slice_s / output_s * OUTPUT_UNITS
        model.queue.set_terms(Terms(request_units, seat_units))
        self.note("open", model=model.name, seats=len(model.seats), policy=model.queue.policy.name)
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
        if self.record:
            self.record.plan(flight)
        return flight

    def yields(self, thread: Thread) -> bool:
        """Whether the pass under way should be cut short for one who comes.

        It is lost then for all who are in it, on average as much as the newcomer is spared: so if he
        outweighs them together. But not if one of them is owed a request, nor twice in a row: they might
        never get through it.
        """
        comes = thread.process.group.weight if thread.process.group else thread.weight
        for flight in self.flights:
            queue = flight.model.queue
            if flight.model.was_cut or not queue.policy.grouped:
                return False
            if not flight.model.open_host().info.abortable:
                return False
            there = [each for each in flight.grants if each in queue]
            if any(queue.lag(each) > queue.request_units for each in there):
                return False
            weights = {each.process.group or each: queue.weight_of(each) for each in there}
            if comes <= sum(weights.values()):
                return False
        return bool(self.flights)

    def end(self, flight: Flight) -> None:
        """A quantum is over."""
        self._refund(flight)
        self.flights.remove(flight)
        flight.model.contested = True
        for thread, grant in flight.grants.items():
            thread.granted -= grant.tokens - grant.used_tokens
        if self.record:
            self.record.end(flight)

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
        """The most tokens of a prompt granted at once: half a quantum, so that others' fit in too."""
        config = self.config
        half_tokens = int(config.quantum_s / 2 / max(1e-9, model.open_host().info.prefill_token_s))
        return min(config.prefill_chunk_tokens, max(config.prefill_chunk_min_tokens, half_tokens))

    def _fill(self, flight: Flight) -> None:
        """Grant one request after another to whoever has the best claim, until the time is used up.

        A pass of the engine costs about the same with one more in it: so when one draws, others ride along,
        as far as the policy lets them; and nobody draws more often than the passes that are run anyway.
        """
        model, queue, quantum_s = flight.model, flight.model.queue, self.config.quantum_s
        seated = [thread for thread in model.seats if thread is not None and thread in queue]
        prompts = [thread for thread in seated if thread.pending > 1]
        drawers = [thread for thread in seated if thread not in prompts] if prompts else seated
        flight.price(model, len(drawers))
        passes = max(1, int(quantum_s / ROUNDS / (flight.output_s * max(1, len(drawers)))))
        if queue.policy.grouped:
            self._first_tokens(flight, prompts, drawers)
        while flight.planned_s < quantum_s and (head := queue.pick()):
            if head.pending > 1:
                self._prompt(flight, head, drawers)
                continue
            flight.grant(head, passes)
            head_weight, units = queue.weight_of(head), passes * OUTPUT_UNITS
            for thread in drawers:
                if thread is not head and queue.rides(thread, head_weight, units):
                    flight.grant(thread, passes)

    def _first_tokens(self, flight: Flight, prompts: list[Thread], drawers: list[Thread]) -> None:
        """Short prompts go before all else, for half a quantum, while that puts nobody half a request from
        his share. (Not a group's: they have pooled theirs.)

        Short for its weight: that order has the least weighted sum of waits (Smith, "Various optimizers for
        single-stage production", 1956). So none goes before a heavier one who draws; and the prompt of one
        who outweighs all others on the device together goes on for as long as nobody could get his seat: they
        are put off by less than half of what he gets.
        """
        queue = flight.model.queue
        half_units, half_s = queue.request_units / 2, self.config.quantum_s / 2
        least = max(map(queue.weight_of, drawers), default=0.0)
        first = [prompt for prompt in prompts if queue.weight_of(prompt) >= least]
        for thread in sorted(first, key=lambda prompt: prompt.pending / queue.weight_of(prompt)):
            outweighs = len(self.models) == 1 and 2 * queue.weight_of(thread) > queue.weight
            most_s = self.config.seat_slice_s if outweighs else half_s
            while thread.pending > 1 and thread.process.group is None:
                head = queue.pick()
                if not head or queue.lag(head) > half_units * (1.5 if outweighs else 1.0):
                    return
                if flight.planned_s >= most_s:
                    return
                if not queue.rides(thread, queue.weight_of(head), half_units):
                    break
                self._prompt(flight, thread, drawers)

    def _prompt(self, flight: Flight, thread: Thread, drawers: list[Thread]) -> None:
        """A piece of a prompt. A light one's is small: a large one would put it far ahead in virtual time."""
        fair_tokens = int(self._chunk_tokens(flight.model) * min(1.0, flight.model.queue.standing(thread)))
        tokens = min(thread.pending, max(self.config.prefill_chunk_min_tokens, fair_tokens))
        flight.grant(thread, tokens, prompt=True)
        if thread.pending <= 1:
            drawers.append(thread)
