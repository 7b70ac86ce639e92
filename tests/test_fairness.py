"""The fair queue against a model of EEVDF that looks at everyone every time."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.errors import UsageError
from kernel.fairness import FairQueue, weight_of
from kernel.policy import POLICIES, Terms, policy_named

REQUEST = 64.0
TERMS = Terms(request_units=REQUEST, seat_units=500.0)


@dataclass
class Account:
    weight: float
    vruntime: float


class Naive:
    """Virtual time is, by definition, the mean of the members' virtual times, weighted."""

    def __init__(self) -> None:
        self.members: dict[int, Account] = {}

    @property
    def weight(self) -> float:
        return sum(m.weight for m in self.members.values())

    @property
    def virtual(self) -> float:
        return sum(m.weight * m.vruntime for m in self.members.values()) / self.weight

    def lag(self, n: int) -> float:
        return (self.virtual - self.members[n].vruntime) * self.members[n].weight

    def join(self, n: int, weight: float, lag: float) -> None:
        if not self.members:
            self.members[n] = Account(weight, 0.0)
            return
        virtual = self.virtual - lag / self.weight
        self.members[n] = Account(weight, virtual - lag / weight)

    def reweight(self, n: int, weight: float) -> None:
        member, virtual, lag = self.members[n], self.virtual, self.lag(n)
        member.weight, member.vruntime = weight, virtual - lag / weight

    def deadline(self, n: int) -> float:
        return self.members[n].vruntime + REQUEST / self.members[n].weight

    def may_pick(self, n: int) -> bool:
        """Whether `n` is ready, eligible, and nobody eligible has a nearer deadline."""
        slack = 1e-6 * max(1.0, abs(self.virtual))
        eligible = [k for k in self.members if self.members[k].vruntime <= self.virtual - slack]
        if not eligible and self.members[n].vruntime > self.virtual + slack:
            return self.members[n].vruntime <= min(m.vruntime for m in self.members.values()) + slack
        return self.members[n].vruntime <= self.virtual + slack and all(
            self.deadline(n) <= self.deadline(k) + slack for k in eligible
        )


class Pair:
    """The queue and the naive model, driven together."""

    def __init__(self) -> None:
        self.queue: FairQueue[int] = FairQueue(terms=TERMS)
        self.naive = Naive()
        self.left: dict[int, float] = {}
        self.count = 0
        self.allowed: dict[int, float] = {}

    def join(self, nice: int, back: bool) -> None:
        lag = 0.0
        if back and self.left:
            _, lag = self.left.popitem()
        self.queue.join(self.count, weight_of(nice), lag)
        self.naive.join(self.count, weight_of(nice), lag)
        self.count += 1

    def leave(self, n: int) -> None:
        lag = self.naive.lag(n)
        assert self.queue.leave(n) == pytest.approx(lag, abs=1e-3)
        del self.naive.members[n]
        self.left[n] = lag

    def serve(self, units: float) -> None:
        n = self.queue.pick()
        assert n is not None and self.naive.may_pick(n)
        self.queue.charge(n, units)
        self.naive.members[n].vruntime += units / self.naive.members[n].weight

    def refund(self, n: int, units: float) -> None:
        self.queue.charge(n, -units)
        self.naive.members[n].vruntime -= units / self.naive.members[n].weight

    def reweight(self, n: int, nice: int) -> None:
        self.queue.reweight(n, weight_of(nice))
        self.naive.reweight(n, weight_of(nice))

    def check(self) -> None:
        self.queue.check_integrity()
        total = sum(map(self.queue.lag, self.naive.members))
        assert abs(total) < 1e-3
        for n in self.naive.members:
            assert self.queue.lag(n) == pytest.approx(self.naive.lag(n), abs=1e-3)


NICES = st.integers(-20, 19)
OPS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), NICES, st.booleans()),
        st.tuples(st.just("leave"), st.integers(0, 99)),
        st.tuples(st.just("reweight"), st.integers(0, 99), NICES),
        st.tuples(st.just("refund"), st.integers(0, 99), st.floats(0.5, REQUEST)),
        *[st.tuples(st.just("serve"), st.floats(0.5, REQUEST))] * 4,
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(OPS)
def test_it_does_what_the_naive_model_does(ops: list[tuple[object, ...]]) -> None:
    pair = Pair()
    pair.join(0, False)
    pair.join(3, False)
    for name, *arguments in ops:
        members = list(pair.naive.members)
        if name in ("leave", "reweight", "refund"):
            if len(members) < 2:
                continue
            arguments[0] = members[int(arguments[0]) % len(members)]  # type: ignore[call-overload]
        getattr(pair, str(name))(*arguments)
        pair.check()


@pytest.mark.parametrize("seed", range(6))
def test_it_still_does_after_many_turns(seed: int) -> None:
    rng, pair = random.Random(seed), Pair()
    for _ in range(6):
        pair.join(rng.randint(-10, 10), False)
    for _ in range(1_000):
        n = rng.choice(list(pair.naive.members))
        turn = rng.random()
        if turn < 0.9:
            pair.serve(rng.choice((1.0, 2.0, 8.0, REQUEST)))
        elif turn < 0.94:
            pair.refund(n, 2.0)
        elif turn < 0.97:
            pair.reweight(n, rng.randint(-20, 19))
        else:
            pair.leave(n)
            pair.join(rng.randint(-10, 10), True)
        pair.check()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(NICES, min_size=2, max_size=8),
    st.lists(st.sampled_from([1.0, 2.0, 9.0, REQUEST]), min_size=10, max_size=200),
)
def test_nobody_is_further_from_its_share_than_one_request(nices: list[int], requests: list[float]) -> None:
    queue: FairQueue[int] = FairQueue(terms=TERMS)
    for n, nice in enumerate(nices):
        queue.join(n, weight_of(nice))
    for units in requests:
        n = queue.pick()
        assert n is not None
        queue.charge(n, units)
        assert all(abs(queue.lag(k)) <= REQUEST + 1e-6 for k in range(len(nices)))


@settings(max_examples=100, deadline=None)
@given(OPS)
def test_what_leavers_leave_is_all_that_adds_to_that(ops: list[tuple[object, ...]]) -> None:
    """A jump of virtual time by d moves a member's lag by d times its weight; serving never adds to it."""
    pair = Pair()
    for nice in (0, 5, -5):
        pair.join(nice, False)
    allowed = dict.fromkeys(pair.naive.members, REQUEST)
    for name, *arguments in ops:
        members = list(pair.naive.members)
        if name in ("refund", "reweight") or (name == "leave" and len(members) < 3):
            continue
        before = pair.queue.virtual
        if name == "leave":
            arguments[0] = members[int(arguments[0]) % len(members)]  # type: ignore[call-overload]
        getattr(pair, str(name))(*arguments)
        jump = 0.0 if name == "serve" else abs(pair.queue.virtual - before)
        for n, member in pair.naive.members.items():
            allowed[n] = allowed.get(n, REQUEST) + jump * member.weight
            assert abs(pair.queue.lag(n)) <= allowed[n] + 1e-3
            if abs(pair.queue.lag(n)) <= REQUEST:
                allowed[n] = REQUEST


def test_garbage_is_swept() -> None:
    queue: FairQueue[int] = FairQueue(terms=TERMS)
    for n in range(100):
        queue.join(n, 1.0)
        queue.place(n, held=n % 2, waiting=n % 2 == 0)
    for turn in range(5_000):
        queue.charge(turn % 100, 1.0)
        queue.charge(turn % 100, -1.0)  # a refund makes a new entry, and leaves a dead one
        queue.reweight(turn % 100, 1.0 + turn % 3)
    queue.check_integrity()
    for n in range(100):
        queue.leave(n)
    queue.check_integrity()


def test_seats_go_by_weight_too() -> None:
    queue: FairQueue[str] = FairQueue(terms=TERMS)
    held = {"one": 0, "three": 0}
    queue.join("one", 1.0)
    queue.join("three", 3.0)
    for name in held:
        queue.place(name, held=0, waiting=True)
    for _ in range(16):
        name = queue.first_waiting()
        assert name is not None
        held[name] += 1
        queue.place(name, held=held[name], waiting=True)
    assert held == {"one": 4, "three": 12}


def test_fifo_seats_in_order_of_arrival_and_never_takes_one_back() -> None:
    queue: FairQueue[int] = FairQueue(POLICIES["fifo"], TERMS)
    for n, weight in enumerate((1.0, 9.0, 2.0)):
        queue.join(n, weight)
        queue.place(n, held=0, waiting=True)
    assert queue.first_waiting() == 0
    queue.place(0, held=1, waiting=False)
    queue.charge(0, 1e6)
    assert queue.first_waiting() == 1 and not queue.outranks(1, 0)


def test_rr_gives_equal_turns_and_takes_a_seat_after_a_slice() -> None:
    queue: FairQueue[int] = FairQueue(POLICIES["rr"], TERMS)
    for n, weight in enumerate((1.0, 9.0, 2.0)):
        queue.join(n, weight, ready=n < 2)
    turns = []
    for _ in range(6):
        n = queue.pick()
        assert n is not None
        turns.append(n)
        queue.charge(n, 2.0)
    assert turns == [0, 1] * 3
    assert not queue.outranks(2, 0)
    queue.charge(0, TERMS.seat_units)
    assert queue.outranks(2, 0) and not queue.outranks(2, 1)


def test_priority_serves_the_heaviest_and_equals_in_turn() -> None:
    queue: FairQueue[int] = FairQueue(POLICIES["priority"], TERMS)
    for n, weight in enumerate((1.0, 2.0, 2.0)):
        queue.join(n, weight)
    turns = []
    for _ in range(4):
        n = queue.pick()
        assert n is not None
        turns.append(n)
        queue.charge(n, 5.0)
    assert turns == [1, 2, 1, 2]
    queue.leave(1)
    queue.leave(2)
    assert queue.pick() == 0


def test_an_unknown_policy_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="no policy lottery") as caught:
        policy_named("lottery")
    assert caught.value.hint == "known: fair, fifo, rr, priority"
