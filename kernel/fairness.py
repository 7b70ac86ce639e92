"""Weighted fair shares in virtual time: earliest eligible virtual deadline first (EEVDF).

After Stoica and Abdel-Wahab, "Earliest Eligible Virtual Deadline First" (1995), and the Linux
scheduler's use of it. Virtual time V advances by (service / total weight); a member that has received
less than V says (lag >= 0) is eligible, and among the eligible the nearest virtual deadline wins.
Pure: no clock, no locks, no threads. Every operation is O(log n), amortised.

Members stand in one of two places: *seated* (they can be picked) or *waiting* for a seat in the KV
cache. Both count in the total weight, so a member that waits builds up lag.
Not here: what a seat is, how long a quantum is (scheduler).
"""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

PROMPT_UNITS = 1.0
OUTPUT_UNITS = 2.0
"""Service units per prompt and output token, as Sheng et al., "Fairness in Serving Large Language
Models" (OSDI 2024), weigh them."""

# Linux's sched_prio_to_weight (kernel/sched/core.c): nice -20 to 19, about 1.25 per step.
# fmt: off
WEIGHTS = (
    88761, 71755, 56483, 46273, 36291, 29154, 23254, 18705, 14949, 11916,
    9548, 7620, 6100, 4904, 3906, 3121, 2501, 1991, 1586, 1277,
    1024, 820, 655, 526, 423, 335, 272, 215, 172, 137,
    110, 87, 70, 56, 45, 36, 29, 23, 18, 15,
)
# fmt: on


def weight_of(nice: int) -> float:
    """The weight of a nice value, 1.0 at nice 0."""
    return WEIGHTS[nice + 20] / 1024


Entity = TypeVar("Entity", bound=Hashable)


@dataclass(slots=True)
class Member(Generic[Entity]):
    """A member's account."""

    entity: Entity
    weight: float
    vruntime: float  # virtual time up to which it has been served
    order: int  # of joining: breaks ties, so that equal members take turns
    seated: bool = False
    stamp: int = 0  # of its newest heap entry; older ones are dead
    ideal_mark: float = 0.0  # the ideal clock when `due` was last brought up to date


Entry = tuple[float, int, int, Member[Entity]]


@dataclass(slots=True)
class FairQueue(Generic[Entity]):
    """The runnable members of one device."""

    slice_units: float = 8.0  # the request that deadlines are computed from
    seat_units: float = 1000.0  # the request of one who waits for a seat: seats change hands more slowly
    virtual: float = 0.0
    weight: float = 0.0
    _ideal: float = 0.0  # like `virtual`, without the jumps of joins and leaves
    _order: int = 0
    _members: dict[Entity, Member[Entity]] = field(default_factory=dict)
    _ready: list[Entry[Entity]] = field(default_factory=list)  # seated and eligible, by deadline
    _early: list[Entry[Entity]] = field(default_factory=list)  # seated, ahead of V, by vruntime
    _waiting: list[Entry[Entity]] = field(default_factory=list)  # not seated, by deadline

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, entity: Entity) -> bool:
        return entity in self._members

    def join(self, entity: Entity, weight: float, lag: float = 0.0, *, seated: bool = False) -> None:
        """Become runnable, with the lag (in service units) kept from the last `leave`."""
        self.virtual -= lag / (self.weight + weight)
        self.weight += weight
        self._order += 1
        member = Member(entity, weight, self.virtual - lag / weight, self._order, seated)
        member.ideal_mark = self._ideal
        self._members[entity] = member
        self._push(member)

    def leave(self, entity: Entity) -> float:
        """Stop being runnable; returns the lag. The others share what it leaves behind."""
        member = self._members.pop(entity)
        lag = (self.virtual - member.vruntime) * member.weight
        self.weight -= member.weight
        if self._members:
            self.virtual += lag / self.weight
        else:
            self.weight = 0.0
        member.stamp += 1
        return lag

    def reweight(self, entity: Entity, weight: float) -> None:
        """Renice, keeping lag."""
        self.take_due(entity)
        member = self._members[entity]
        lag = (self.virtual - member.vruntime) * member.weight
        self.weight += weight - member.weight
        member.weight = weight
        member.vruntime = self.virtual - lag / weight
        self._push(member)

    def seat(self, entity: Entity, seated: bool) -> None:
        """Move between those who can be picked and those who wait for a seat."""
        member = self._members[entity]
        member.seated = seated
        self._push(member)

    def charge(self, entity: Entity, units: float) -> None:
        """Count service, as it is granted; what was granted and not used comes back as a negative charge."""
        member = self._members[entity]
        member.vruntime += units / member.weight
        self.virtual += units / self.weight
        self._push(member)

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
        member = self._members[entity]
        return (self.virtual - member.vruntime) * member.weight

    def vruntime(self, entity: Entity) -> float:
        """Virtual time up to which it has been served."""
        return self._members[entity].vruntime

    def pick(self) -> Entity | None:
        """The seated member with the best claim; it stays. None if no one is seated."""
        while self._early and (self._dead(self._early) or self._early[0][0] <= self.virtual):
            *_, stamp, member = heapq.heappop(self._early)
            if stamp == member.stamp:
                self._push(member)
        while self._ready:
            if self._dead(self._ready):
                heapq.heappop(self._ready)
            elif self._ready[0][3].vruntime > self.virtual + 1e-9:  # V went back: a refund, a leave
                self._push(self._ready[0][3])
            else:
                return self._ready[0][3].entity
        return self._early[0][3].entity if self._early else None

    def first_waiting(self) -> Entity | None:
        """The member that has waited for a seat with the best claim."""
        while self._waiting and self._dead(self._waiting):
            heapq.heappop(self._waiting)
        return self._waiting[0][3].entity if self._waiting else None

    def check_integrity(self) -> None:
        """Total weight and total lag are what they must be. Raises AssertionError."""
        total = sum(m.weight for m in self._members.values())
        assert abs(total - self.weight) <= 1e-6 * max(1.0, total), (total, self.weight)
        lag = sum(map(self.lag, self._members))
        assert abs(lag) <= 1e-6 * max(1.0, abs(self.virtual) * total), lag

    def _push(self, member: Member[Entity]) -> None:
        member.stamp += 1
        key, heap = member.vruntime, self._early
        if not member.seated:
            key, heap = member.vruntime + self.seat_units / member.weight, self._waiting
        elif member.vruntime <= self.virtual + 1e-9:
            key, heap = member.vruntime + self.slice_units / member.weight, self._ready
        heapq.heappush(heap, (key, member.order, member.stamp, member))

    @staticmethod
    def _dead(heap: list[Entry[Entity]]) -> bool:
        return heap[0][2] != heap[0][3].stamp
