"""Weighted fair shares in virtual time: earliest eligible virtual deadline first (EEVDF).

After Stoica and Abdel-Wahab, "Earliest Eligible Virtual Deadline First" (1995), and the Linux
scheduler's use of it. Virtual time V advances by (service / total weight); a member that has received
less than V says (lag >= 0) is eligible, and among the eligible the nearest virtual deadline wins.
Pure: no clock, no locks, no threads. Every operation is O(log n), amortised.

A member may be *ready*, to be picked for a turn, or *waiting* for a seat in the KV cache (for one more, if
it is a group). Each counts in the total weight, so one that waits builds up lag.
Other policies order the same accounts in other ways (policy).
Not here: what a seat is, how long a quantum is (scheduler), groups (runqueue).
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, TypeVar

from kernel.policy import FAIR, Policy, Terms

PROMPT_UNITS = 1.0
OUTPUT_UNITS = 2.0
"""Service units per prompt and output token, as Sheng et al., "Fairness in Serving Large Language
Models" (OSDI 2024), weigh them."""


def prompt_units(prompt_token_s: float, output_token_s: float) -> float:
    """Units per prompt token of a model, so that a unit is as much time in a prompt as in an output.

    At most what the paper has it at: where output is cheap because many share a step, few may share it yet.
    """
    return max(0.01, min(PROMPT_UNITS, OUTPUT_UNITS * prompt_token_s / output_token_s))


# Linux's sched_prio_to_weight (kernel/sched/core.c): nice -20 to 19, about 1.25 per step.
# fmt: off
WEIGHTS = (
    88761, 71755, 56483, 46273, 36291, 29154, 23254, 18705, 14949, 11916,
    9548, 7620, 6100, 4904, 3906, 3121, 2501, 1991, 1586, 1277,
    1024, 820, 655, 526, 423, 335, 272, 215, 172, 137,
    110, 87, 70, 56, 45, 36, 29, 23, 18, 15,
)
# fmt: on


_WEIGHTS_OF_NICE = tuple(weight / 1024 for weight in WEIGHTS)


def weight_of(nice: int) -> float:
    """The weight of a nice value, 1.0 at nice 0."""
    return _WEIGHTS_OF_NICE[nice + 20]


Entity = TypeVar("Entity", bound=Hashable)


@dataclass(slots=True, eq=False)
class Member(Generic[Entity]):
    """A member's account; what a policy sees of it is told in `policy.Account`."""

    entity: Entity
    weight: float
    vruntime: float
    order: int
    turn: int
    ideal_mark: float  # the ideal clock when `due` was last brought up to date
    held: int = 0
    spent_units: float = 0.0
    moved: bool = False  # served since its heap entry was made
    turn_stamp: int = 0  # of its entry among the ready, others are dead; 0: it is not ready
    seat_stamp: int = 0  # of its entry among the waiting; 0: it does not wait


NEW = -1  # stamp of an entry that is about to be made

Entry = tuple[float, float, int, Member[Entity]]


@dataclass(slots=True)
class FairQueue(Generic[Entity]):
    """The runnable members of one device, or of one model on it."""

    policy: Policy = FAIR
    terms: Terms = field(default_factory=Terms)
    virtual: float = 0.0
    weight: float = 0.0
    _ideal: float = 0.0  # like `virtual`, without the jumps of joins and leaves
    _stamp: int = 0
    _turn: int = 0
    _members: dict[Entity, Member[Entity]] = field(default_factory=dict)
    _ready: list[Entry[Entity]] = field(default_factory=list)  # ready and eligible, in the policy's order
    _early: list[Entry[Entity]] = field(default_factory=list)  # ready, ahead of V, by vruntime
    _waiting: list[Entry[Entity]] = field(default_factory=list)  # for a seat, in the policy's order

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, entity: Entity) -> bool:
        return entity in self._members

    def __iter__(self) -> Iterator[Entity]:
        return iter(self._members)

    # Members

    def join(self, entity: Entity, weight: float, lag: float = 0.0, *, ready: bool = True) -> None:
        """Become a member, with the lag (in service units) kept from the last `leave`.

        What it is owed, the others owe together; of one who comes alone, there is nobody to owe it.
        """
        self._turn += 1
        member = Member(entity, weight, self.virtual, self._turn, self._turn, self._ideal)
        if self._members and lag:
            self.virtual -= lag / self.weight
            member.vruntime = self.virtual - lag / weight
        self.weight += weight
        self._members[entity] = member
        if ready:
            member.turn_stamp = NEW
            self._enter(member)

    def leave(self, entity: Entity) -> float:
        """Stop being runnable; returns the lag. The others share what it leaves behind."""
        member = self._members.pop(entity)
        lag = self._lag(member)
        self.weight -= member.weight
        if self._members:
            self.virtual += lag / self.weight
        else:
            self.weight = 0.0
        member.turn_stamp = member.seat_stamp = 0
        self._compact()
        return lag

    def reweight(self, entity: Entity, weight: float) -> None:
        """Renice, keeping lag."""
        self.take_due(entity)
        member = self._members[entity]
        lag = self._lag(member)
        self.weight += weight - member.weight
        member.weight = weight
        member.vruntime = self.virtual - lag / weight
        self._enter(member)

    def place(self, entity: Entity, *, held: int, waiting: bool) -> None:
        """Say how many seats it has, and whether it waits for one more."""
        member = self._members[entity]
        if held > member.held:
            member.spent_units = 0.0
        member.held, member.seat_stamp = held, NEW if waiting else 0
        self._enter(member)

    # Accounts

    def charge(self, entity: Entity, units: float) -> bool:
        """Count service, as it is granted; what was granted and not used comes back as a negative charge.

        False if it is not a member: then nothing is counted.
        """
        member = self._members.get(entity)
        if member is None:
            return False
        member.spent_units += units
        member.vruntime += units / member.weight
        self.virtual += units / self.weight
        if units > 0.0:
            self._turn += 1
            member.turn = self._turn
            member.moved = True  # its keys only rose: put right when they come up
        else:
            self._enter(member)
        return True

    def served(self, units: float) -> None:
        """Advance the ideal clock by service that was really given, to whomever."""
        if self.weight:
            self._ideal += units / self.weight

    def take_due(self, entity: Entity) -> float:
        """Settle `due`: what follows counts from here."""
        due = self.due(entity)
        self._members[entity].ideal_mark = self._ideal
        return due

    def due(self, entity: Entity) -> float:
        """Service units its weight entitled it to since the last `take_due`."""
        member = self._members[entity]
        return (self._ideal - member.ideal_mark) * member.weight

    def lag(self, entity: Entity) -> float:
        """Service units it is owed (negative: it is ahead)."""
        return self._lag(self._members[entity])

    def outranks(self, waiting: Entity, seated: Entity) -> bool:
        """Whether one who waits should have the seat of another."""
        members = self._members
        return self.policy.outranks(members[waiting], members[seated], self.virtual, self.terms)

    def rides(self, entity: Entity, head_weight: float, units: float) -> bool:
        """Whether one may have so many units beside the one that `pick` says, who weighs so much."""
        lead_units = self.terms.request_units - units
        return self.policy.rides(self._members[entity], head_weight, self.virtual, lead_units)

    def weight_of(self, entity: Entity) -> float:
        return self._members[entity].weight

    def vruntime(self, entity: Entity) -> float:
        """Virtual time up to which it has been served."""
        return self._members[entity].vruntime

    # Order

    def pick(self) -> Entity | None:
        """The ready member with the best claim; it stays. None if no one is ready."""
        self._promote()
        ready, policy = self._ready, self.policy
        while ready:
            _, _, stamp, member = ready[0]
            if stamp != member.turn_stamp:
                heappop(ready)
            elif not policy.eligible(member, self.virtual):
                heappop(ready)
                heappush(self._early, (member.vruntime, 0.0, stamp, member))
            elif member.moved:
                member.moved = False
                heapreplace(ready, (*policy.turn(member, self.terms), stamp, member))
            else:
                return member.entity
        return self._early[0][3].entity if self._early else None  # V went back: take the least ahead

    def first_waiting(self) -> Entity | None:
        """The member with the best claim to a seat, of those that wait for one."""
        waiting = self._waiting
        while waiting:
            first, second, stamp, member = waiting[0]
            if stamp != member.seat_stamp:
                heappop(waiting)
                continue
            key = self.policy.seat(member, self.terms)
            if key == (first, second):
                return member.entity
            heapreplace(waiting, (*key, stamp, member))
        return None

    def set_terms(self, terms: Terms) -> None:
        """Measure claims by other sizes."""
        self.terms = terms
        for member in self._members.values():
            self._enter(member)

    def check_integrity(self) -> None:
        """Totals are what they must be, and garbage is bounded. Raises AssertionError."""
        total = sum(m.weight for m in self._members.values())
        assert abs(total - self.weight) <= 1e-6 * max(1.0, total), (total, self.weight)
        lag = sum(map(self.lag, self._members))
        assert abs(lag) <= 1e-6 * max(1.0, abs(self.virtual) * total), lag
        for heap in (self._ready, self._early, self._waiting):
            assert len(heap) <= self._room(), (len(heap), len(self))

    def _lag(self, member: Member[Entity]) -> float:
        return (self.virtual - member.vruntime) * member.weight

    def _promote(self) -> None:
        """Those whose time has come may be picked again."""
        early, eligible, virtual = self._early, self.policy.eligible, self.virtual
        while early:
            at, _, stamp, member = early[0]
            if stamp != member.turn_stamp:
                heappop(early)
            elif at < member.vruntime:
                heapreplace(early, (member.vruntime, 0.0, stamp, member))
            elif eligible(member, virtual):
                heappop(early)
                member.moved = False
                heappush(self._ready, (*self.policy.turn(member, self.terms), stamp, member))
            else:
                return

    def _enter(self, member: Member[Entity]) -> None:
        """New entries for a member whose keys may have fallen; older ones are dead."""
        self._stamp += 1
        member.moved = False
        if member.turn_stamp:
            member.turn_stamp = self._stamp
            heappush(self._ready, (*self.policy.turn(member, self.terms), self._stamp, member))
        if member.seat_stamp:
            member.seat_stamp = self._stamp
            heappush(self._waiting, (*self.policy.seat(member, self.terms), self._stamp, member))
        self._compact()

    def _room(self) -> int:
        """Entries that a heap may have: half of them dead."""
        return 2 * len(self._members) + 16

    def _compact(self) -> None:
        """Sweep a heap that is mostly dead entries; paid for by the pushes that made them."""
        room = self._room()
        for heap in (self._ready, self._early):
            if len(heap) > room:
                heap[:] = [entry for entry in heap if entry[2] == entry[3].turn_stamp]
                heapify(heap)
        if len(self._waiting) > room:
            self._waiting[:] = [entry for entry in self._waiting if entry[2] == entry[3].seat_stamp]
            heapify(self._waiting)
