"""The run queue of a model: its runnable threads, alone or in groups.

Two levels. Across, a fair queue shares out service among *claimants*: a thread that stands for itself, or
a group. Within a group, another one divides it equally among the threads that have seats; seats within a
group are first come, first served.
Owner: the model. Lock: the process table's. Every operation is O(log n), amortised, but for `victim`
(O(seats)), `set_policy` and `set_terms`.
Not here: how claims are weighed (fairness, policy).
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from kernel.fairness import FairQueue
from kernel.policy import FAIR, Policy, Terms
from kernel.process import Group, Thread


class Party:
    """A group's runnable threads of one model.

    Threads whose prompts are not finished pool their shares: together they are one member of the inner
    queue, by the name of None, and the oldest of them gets it all. So prompts are finished one by one,
    none later than if each had only its own share, and the others' tokens flow evenly meanwhile.
    """

    __slots__ = ("_pool_lag", "_turns", "clock", "group", "lag", "marks", "prompts", "waiting")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.lag = 0.0  # kept while nobody is runnable
        self.clock = 0.0  # service units due to a thread that is runnable all the time
        self.marks: dict[Thread, float] = {}  # of all its threads: the clock when it was paid its due
        self.prompts: OrderedDict[Thread, None] = OrderedDict()  # seated, oldest first
        self.waiting: OrderedDict[Thread, None] = OrderedDict()  # for a seat, oldest first
        self._turns: FairQueue[Thread | None] = FairQueue(terms=Terms(8.0))
        self._pool_lag = 0.0

    def __len__(self) -> int:
        return len(self.marks)

    def __contains__(self, thread: Thread) -> bool:
        return thread in self.marks

    @property
    def held(self) -> int:
        return len(self.marks) - len(self.waiting)

    def sit(self, thread: Thread) -> None:
        if thread.prefilling:
            self.prompts[thread] = None
            self._pool()
        else:
            self._turns.join(thread, 1.0)
            self._turns.place(thread, held=1, waiting=False)

    def rise(self, thread: Thread) -> None:
        """Off its seat, or out of the line for one."""
        if thread in self.prompts:
            del self.prompts[thread]
            self._pool()
        elif thread in self._turns:
            self._turns.leave(thread)
        else:
            del self.waiting[thread]

    def pick(self) -> Thread:
        return self._turns.pick() or next(
            (thread for thread in self.prompts if thread.pending > 1), next(iter(self.prompts))
        )

    def charge(self, thread: Thread, units: float) -> None:
        member = None if thread in self.prompts else thread
        if member in self._turns:
            self._turns.charge(member, units)
        if member is None and not thread.prefilling:
            del self.prompts[thread]
            self._pool()
            self.sit(thread)

    def _pool(self) -> None:
        """The pool's weight is the number of its threads."""
        turns, weight = self._turns, float(len(self.prompts))
        if weight and None in turns:
            turns.reweight(None, weight)
        elif weight:
            turns.join(None, weight, self._pool_lag)
            turns.place(None, held=1, waiting=False)
        elif None in turns:
            self._pool_lag = turns.leave(None)


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
                yield from claimant.marks
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
            claimant.marks[thread] = claimant.clock
            claimant.sit(thread) if seated else claimant.waiting.update({thread: None})
            self._place(claimant)
        else:
            self._fair.join(thread, thread.weight, thread.lag)
            self._fair.place(thread, held=int(seated), waiting=not seated)

    def leave(self, thread: Thread) -> float:
        """Stop being runnable; returns the service units it was due since the last `take_due`."""
        claimant, due = self._claimant(thread), self.take_due(thread)
        self._size -= 1
        if isinstance(claimant, Party):
            claimant.rise(thread)
            del claimant.marks[thread]
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
            claimant.rise(thread)
            claimant.sit(thread) if seated else claimant.waiting.update({thread: None})
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
        if isinstance(claimant, Party):
            claimant.charge(thread, units)

    def served(self, units: float) -> None:
        """Service was given, to whomever: the ideal clock advances."""
        self._fair.served(units)

    def due(self, thread: Thread) -> float:
        """Service units it was entitled to since the last `take_due`."""
        claimant = self._claimant(thread)
        if not isinstance(claimant, Party):
            return self._fair.due(thread)
        rest = self._fair.due(claimant) / len(claimant)
        return claimant.clock + rest - claimant.marks[thread]

    def take_due(self, thread: Thread) -> float:
        """Settle `due`: what follows counts from here."""
        claimant = self._claimant(thread)
        if not isinstance(claimant, Party):
            return self._fair.take_due(thread)
        self._pay(claimant)
        due = claimant.clock - claimant.marks[thread]
        claimant.marks[thread] = claimant.clock
        return due

    def standing(self, thread: Thread) -> float:
        """Its claimant's weight over the average claimant's."""
        return self._fair.weight_of(self._claimant(thread)) * len(self._fair) / self._fair.weight

    def lag(self, thread: Thread) -> float:
        """Service units that it, or its group, is owed."""
        return self._fair.lag(self._claimant(thread))

    # Order

    def pick(self) -> Thread | None:
        """The seated thread with the best claim; it stays."""
        claimant = self._fair.pick()
        return claimant.pick() if isinstance(claimant, Party) else claimant

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
        self._fair.place(party, held=party.held, waiting=bool(party.waiting))

    def _pay(self, party: Party) -> None:
        """Bring the group's clock up to date, before the number of its threads changes."""
        party.clock += self._fair.take_due(party) / len(party)
