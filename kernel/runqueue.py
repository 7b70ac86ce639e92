"""The run queue of a model: its runnable threads, alone or in groups.

Service is shared out among *claimants*: a thread that stands for itself, or a group. There are two accounts.
*Claims* are of all that are runnable, and decide who gets a seat in the KV cache: who waits for one is owed
more and more. *Turns* are of those who have one, and decide who runs: what one was owed for waiting is not
paid all at once, for a batch of one is slow; he keeps his seat for longer. While there are seats for all,
the two agree. Within a group, a queue of its own divides turns equally among the threads that have seats;
seats within a group are first come, first served.
Owner: the model. Lock: the process table's. Every operation is O(log n), amortised, but for `victim`
(O(seats)), `set_policy` and `set_terms`.
Not here: how claims are weighed (fairness, policy).
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from kernel.fairness import FairQueue
from kernel.policy import Policy, Terms
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

    def rides(self, thread: Thread) -> bool:
        """Not if it is ahead of the others."""
        return thread in self.prompts or self._turns.rides(thread, 1.0, 0.0)

    def charge(self, thread: Thread, units: float) -> None:
        member = None if thread in self.prompts else thread
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
        elif None in turns:
            self._pool_lag = turns.leave(None)


Claimant = Thread | Party


class RunQueue:
    """Who is runnable on one model, and who is next."""

    __slots__ = ("_claims", "_parties", "_size", "_turns")

    def __init__(self) -> None:
        self._claims: FairQueue[Claimant] = FairQueue()  # of all
        self._turns: FairQueue[Claimant] = FairQueue()  # of those with seats
        self._parties: dict[Group, Party] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, thread: Thread) -> bool:
        claimant = self._claimant(thread)
        return thread in claimant if isinstance(claimant, Party) else claimant in self._claims

    def __iter__(self) -> Iterator[Thread]:
        for claimant in self._claims:
            if isinstance(claimant, Party):
                yield from claimant.marks
            else:
                yield claimant

    @property
    def weight(self) -> float:
        return self._claims.weight

    @property
    def request_units(self) -> float:
        """The largest request."""
        return self._turns.terms.request_units

    @property
    def policy(self) -> Policy:
        return self._claims.policy

    # Members

    def join(self, thread: Thread, *, seated: bool) -> None:
        """Become runnable, with the lag kept from the last `leave`."""
        claimant = self._claimant(thread)
        self._size += 1
        if isinstance(claimant, Party):
            if claimant:
                self._pay(claimant)
            else:
                self._claims.join(claimant, claimant.group.weight, claimant.lag, ready=False)
            claimant.marks[thread] = claimant.clock
            claimant.sit(thread) if seated else claimant.waiting.update({thread: None})
            self._place(claimant, claimant.held, waiting=bool(claimant.waiting))
        else:
            self._claims.join(thread, thread.weight, thread.lag, ready=False)
            self._place(thread, int(seated), waiting=not seated)

    def leave(self, thread: Thread) -> float:
        """Stop being runnable; returns the service units it was due since the last `take_due`."""
        claimant, due = self._claimant(thread), self.take_due(thread)
        self._size -= 1
        if isinstance(claimant, Party):
            claimant.rise(thread)
            del claimant.marks[thread]
            if claimant:
                self._place(claimant, claimant.held, waiting=bool(claimant.waiting))
                return due
        if claimant in self._turns:
            self._turns.leave(claimant)
        claimant.lag = self._claims.leave(claimant)
        return due

    def reweight(self, thread: Thread) -> None:
        """The weight of its process or group has changed."""
        claimant = self._claimant(thread)
        weight = claimant.group.weight if isinstance(claimant, Party) else thread.weight
        if isinstance(claimant, Party):
            self._pay(claimant)
        self._claims.reweight(claimant, weight)
        if claimant in self._turns:
            self._turns.reweight(claimant, weight)

    def seat(self, thread: Thread, seated: bool) -> None:
        """It got its seat, or lost it."""
        claimant = self._claimant(thread)
        if isinstance(claimant, Party):
            claimant.rise(thread)
            claimant.sit(thread) if seated else claimant.waiting.update({thread: None})
            self._place(claimant, claimant.held, waiting=bool(claimant.waiting))
        else:
            self._place(thread, int(seated), waiting=not seated)

    def set_policy(self, policy: Policy) -> None:
        """Go on under another policy; what is owed is forgotten. Call `take_due` before."""
        old, terms = list(self), self._claims.terms
        self._claims, self._turns = FairQueue(policy, terms), FairQueue(policy, terms)
        seated = [thread.seat is not None for thread in old]
        self._parties.clear()
        self._size = 0
        for thread, has_seat in zip(old, seated, strict=True):
            thread.lag = 0.0
            self.join(thread, seated=has_seat)

    def set_terms(self, terms: Terms) -> None:
        self._claims.set_terms(terms)
        self._turns.set_terms(terms)

    # Accounts

    def charge(self, thread: Thread, units: float) -> None:
        """Count service, as it is granted; a negative charge gives back what was not used."""
        claimant = self._claimant(thread)
        if not self._claims.charge(claimant, units):
            claimant.lag -= units
            return
        self._turns.charge(claimant, units)
        if isinstance(claimant, Party):
            claimant.charge(thread, units)

    def served(self, units: float) -> None:
        """Service was given, to whomever: the ideal clock advances."""
        self._claims.served(units)

    def due(self, thread: Thread) -> float:
        """Service units it was entitled to since the last `take_due`."""
        claimant = self._claimant(thread)
        if not isinstance(claimant, Party):
            return self._claims.due(thread)
        rest = self._claims.due(claimant) / len(claimant)
        return claimant.clock + rest - claimant.marks[thread]

    def take_due(self, thread: Thread) -> float:
        """Settle `due`: what follows counts from here."""
        claimant = self._claimant(thread)
        if not isinstance(claimant, Party):
            return self._claims.take_due(thread)
        self._pay(claimant)
        due = claimant.clock - claimant.marks[thread]
        claimant.marks[thread] = claimant.clock
        return due

    def standing(self, thread: Thread) -> float:
        """The weight of its claimant over the average of those with seats."""
        turns = self._turns
        return turns.weight_of(self._claimant(thread)) * len(turns) / turns.weight

    def lag(self, thread: Thread) -> float:
        """Service units that it, or its group, is owed: of its turns, or for waiting if it has no seat."""
        claimant = self._claimant(thread)
        return (self._turns if claimant in self._turns else self._claims).lag(claimant)

    def weight_of(self, thread: Thread) -> float:
        """Of its claimant."""
        return self._claims.weight_of(self._claimant(thread))

    def rides(self, thread: Thread, head_weight: float, units: float) -> bool:
        """Whether it may have so many units beside the one with the best claim, who weighs so much."""
        claimant = self._claimant(thread)
        if isinstance(claimant, Party) and not claimant.rides(thread):
            return False
        return self._turns.rides(claimant, head_weight, units)

    # Order

    def pick(self) -> Thread | None:
        """The seated thread with the best claim; it stays."""
        claimant = self._turns.pick()
        return claimant.pick() if isinstance(claimant, Party) else claimant

    def first_waiting(self) -> Thread | None:
        """The thread with the best claim to a seat, of those that wait for one."""
        claimant = self._claims.first_waiting()
        return next(iter(claimant.waiting)) if isinstance(claimant, Party) else claimant

    def victim(self, waiting: Thread, seated: Iterable[Thread]) -> Thread | None:
        """Of runnable threads, the one whose seat should go to one that waits: the most ahead."""
        claimant, claims = self._claimant(waiting), self._claims
        others = [(self._claimant(thread), thread) for thread in seated]
        outranked = [
            pair for pair in others if pair[0] is not claimant and claims.outranks(claimant, pair[0])
        ]
        if not outranked:
            return None
        return max(outranked, key=lambda pair: (claims.vruntime(pair[0]), -pair[1].computed))[1]

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        self._claims.check_integrity()
        self._turns.check_integrity()
        assert sum(1 for _ in self) == self._size
        for party in self._parties.values():
            assert bool(party) == (party in self._claims), party.group

    def _claimant(self, thread: Thread) -> Claimant:
        group = thread.process.group
        if group is None or not self.policy.grouped:
            return thread
        party = self._parties.get(group)
        if party is None:
            party = self._parties[group] = Party(group)
        return party

    def _place(self, claimant: Claimant, held: int, *, waiting: bool) -> None:
        """Its seats have changed: those with seats take turns."""
        claims, turns = self._claims, self._turns
        claims.place(claimant, held=held, waiting=waiting)
        if held and claimant not in turns:
            request = claims.terms.request_units
            lag = max(-request, min(request, claims.lag(claimant)))
            turns.join(claimant, claims.weight_of(claimant), lag)
        elif not held and claimant in turns:
            turns.leave(claimant)

    def _pay(self, party: Party) -> None:
        """Bring the group's clock up to date, before the number of its threads changes."""
        party.clock += self._claims.take_due(party) / len(party)
