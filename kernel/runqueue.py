"""The run queue of a model: its runnable threads, alone or in groups.

Two levels. Across, the fair queue shares out service among *claimants*: a thread that stands for itself,
or a group, whose weight is divided among its runnable threads. Within a group threads take turns, and
seats are first come, first served.
Owner: the model. Lock: the process table's. Every operation is O(log n), amortised, but for `victim`
(O(seats)) and `set_policy`.
Not here: how claims are weighed (fairness, policy).
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kernel.fairness import FairQueue
from kernel.policy import FAIR, Policy, Terms
from kernel.process import Group, Thread


@dataclass(slots=True, eq=False)
class Party:
    """A group's runnable threads of one model, each with the clock at which it was last paid its due."""

    group: Group
    ready: OrderedDict[Thread, float] = field(default_factory=OrderedDict)  # seated, by turn
    waiting: OrderedDict[Thread, float] = field(default_factory=OrderedDict)  # for a seat, oldest first
    lag: float = 0.0  # kept while nobody is runnable
    clock: float = 0.0  # service units due to a thread that is runnable all the time

    def __len__(self) -> int:
        return len(self.ready) + len(self.waiting)

    def __contains__(self, thread: Thread) -> bool:
        return thread in self.ready or thread in self.waiting

    def shelf(self, thread: Thread) -> OrderedDict[Thread, float]:
        return self.ready if thread in self.ready else self.waiting


Claimant = Thread | Party


class RunQueue:
    """Who is runnable on one model, and who is next."""

    __slots__ = ("_fair", "_parties", "_size")

    def __init__(self, policy: Policy = FAIR) -> None:
        self._fair: FairQueue[Claimant] = FairQueue(policy)
        self._parties: dict[Group, Party] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, thread: Thread) -> bool:
        claimant = self._claimant(thread)
        return thread in claimant if isinstance(claimant, Party) else claimant in self._fair

    def __iter__(self) -> Iterator[Thread]:
        for claimant in self._fair:
            if isinstance(claimant, Party):
                yield from claimant.ready
                yield from claimant.waiting
            else:
                yield claimant

    @property
    def weight(self) -> float:
        return self._fair.weight

    @property
    def policy(self) -> Policy:
        return self._fair.policy

    # Members

    def join(self, thread: Thread, *, seated: bool) -> None:
        """Become runnable, with the lag kept from the last `leave`."""
        claimant = self._claimant(thread)
        self._size += 1
        if isinstance(claimant, Party):
            if claimant:
                self._pay(claimant)
            else:
                self._fair.join(claimant, claimant.group.weight, claimant.lag)
            shelf = claimant.ready if seated else claimant.waiting
            shelf[thread] = claimant.clock
            self._place(claimant)
        else:
            self._fair.join(thread, thread.weight, thread.lag)
            self._fair.place(thread, held=int(seated), waiting=not seated)

    def leave(self, thread: Thread) -> float:
        """Stop being runnable; returns the service units it was due since the last `take_due`."""
        claimant, due = self._claimant(thread), self.take_due(thread)
        self._size -= 1
        if isinstance(claimant, Party):
            del claimant.shelf(thread)[thread]
            if claimant:
                self._place(claimant)
                return due
        claimant.lag = self._fair.leave(claimant)
        return due

    def reweight(self, thread: Thread) -> None:
        """The weight of its process or group has changed."""
        claimant = self._claimant(thread)
        weight = claimant.group.weight if isinstance(claimant, Party) else thread.weight
        if isinstance(claimant, Party):
            self._pay(claimant)
        self._fair.reweight(claimant, weight)

    def seat(self, thread: Thread, seated: bool) -> None:
        """It got its seat, or lost it."""
        claimant = self._claimant(thread)
        if isinstance(claimant, Party):
            mark = claimant.shelf(thread).pop(thread)
            shelf = claimant.ready if seated else claimant.waiting
            shelf[thread] = mark
            self._place(claimant)
        else:
            self._fair.place(thread, held=int(seated), waiting=not seated)

    def set_policy(self, policy: Policy) -> None:
        """Go on under another policy; what is owed is forgotten. Call `take_due` before."""
        old, self._fair = list(self), FairQueue(policy, self._fair.terms)
        seated = [thread.seat is not None for thread in old]
        self._parties.clear()
        self._size = 0
        for thread, has_seat in zip(old, seated, strict=True):
            thread.lag = 0.0
            self.join(thread, seated=has_seat)

    def set_terms(self, terms: Terms) -> None:
        self._fair.set_terms(terms)

    # Accounts

    def charge(self, thread: Thread, units: float) -> None:
        """Count service, as it is granted; a negative charge gives back what was not used."""
        claimant = self._claimant(thread)
        if claimant not in self._fair:
            claimant.lag -= units
            return
        self._fair.charge(claimant, units)
        if isinstance(claimant, Party) and units > 0.0 and thread in claimant.ready:
            claimant.ready.move_to_end(thread)

    def served(self, units: float) -> None:
        """Service was given, to whomever: the ideal clock advances."""
        self._fair.served(units)

    def due(self, thread: Thread) -> float:
        """Service units it was entitled to since the last `take_due`."""
        claimant = self._claimant(thread)
        if not isinstance(claimant, Party):
            return self._fair.due(thread)
        rest = self._fair.due(claimant) / len(claimant)
        return claimant.clock + rest - claimant.shelf(thread)[thread]

    def take_due(self, thread: Thread) -> float:
        """Settle `due`: what follows counts from here."""
        claimant = self._claimant(thread)
        if not isinstance(claimant, Party):
            return self._fair.take_due(thread)
        self._pay(claimant)
        shelf = claimant.shelf(thread)
        due, shelf[thread] = claimant.clock - shelf[thread], claimant.clock
        return due

    def lag(self, thread: Thread) -> float:
        """Service units that it, or its group, is owed."""
        return self._fair.lag(self._claimant(thread))

    # Order

    def pick(self) -> Thread | None:
        """The seated thread with the best claim; it stays."""
        claimant = self._fair.pick()
        return next(iter(claimant.ready)) if isinstance(claimant, Party) else claimant

    def first_waiting(self) -> Thread | None:
        """The thread with the best claim to a seat, of those that wait for one."""
        claimant = self._fair.first_waiting()
        return next(iter(claimant.waiting)) if isinstance(claimant, Party) else claimant

    def victim(self, waiting: Thread, seated: Iterable[Thread]) -> Thread | None:
        """Of runnable threads, the one whose seat should go to one that waits: the most ahead."""
        claimant, fair = self._claimant(waiting), self._fair
        others = [(self._claimant(thread), thread) for thread in seated]
        outranked = [pair for pair in others if pair[0] is not claimant and fair.outranks(claimant, pair[0])]
        if not outranked:
            return None
        return max(outranked, key=lambda pair: (fair.vruntime(pair[0]), -pair[1].computed))[1]

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        self._fair.check_integrity()
        assert sum(1 for _ in self) == self._size
        for party in self._parties.values():
            assert bool(party) == (party in self._fair), party.group

    def _claimant(self, thread: Thread) -> Claimant:
        group = thread.process.group
        if group is None or not self._fair.policy.grouped:
            return thread
        party = self._parties.get(group)
        if party is None:
            party = self._parties[group] = Party(group)
        return party

    def _place(self, party: Party) -> None:
        self._fair.place(party, held=len(party.ready), waiting=bool(party.waiting))

    def _pay(self, party: Party) -> None:
        """Bring the group's clock up to date, before the number of its threads changes."""
        party.clock += self._fair.take_due(party) / len(party)
