"""Which tokens go into a pass of the llama.cpp engine: whose prompt is first."""

from dataclasses import dataclass, field

import pytest

from kernel.device import Sampling

pytest.importorskip("llama_cpp")

from drivers.llamacpp.curve import Curve
from drivers.llamacpp.planner import Planner


@dataclass
class Seated:
    """As much of a sequence as the planner looks at."""

    seat: int
    waiting: int
    computed: int = 0
    rests: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def id(self) -> int:
        return self.seat

    @property
    def tokens(self) -> range:
        return range(self.computed + self.waiting)


def planned(planner: Planner, seated: list[Seated], quota: dict[int, int]) -> list[tuple[int, int]]:
    """One pass: (seat, tokens) of each in it, deducted."""
    plan = [(each.id, count) for each, count in planner.plan(seated, quota)]  # type: ignore[misc,arg-type]
    for seat, count in plan:
        quota[seat] -= count
        seated[seat].computed += count
        seated[seat].waiting = max(1, seated[seat].waiting - count)
    return plan


@pytest.fixture
def planner() -> Planner:
    return Planner(128, False, Curve([{1: 1.0, 8: 2.0}]))


def test_the_prompt_that_was_granted_first_goes_first_and_whole(planner: Planner) -> None:
    seated = [Seated(0, 60), Seated(1, 60), Seated(2, 64)]
    quota = {2: 64, 0: 32, 1: 32}
    assert planned(planner, seated, quota) == [(2, 64)]
    assert planned(planner, seated, quota) == [(0, 32), (1, 32)]


def test_a_quantum_begins_with_it_whoever_had_the_last_turn(planner: Planner) -> None:
    seated = [Seated(0, 100), Seated(1, 1), Seated(2, 64)]
    assert planned(planner, seated, {0: 50, 1: 1}) == [(0, 50)]
    quota = {2: 40, 1: 2, 0: 20}
    passes = [planned(planner, seated, quota) for _ in range(4)]
    assert passes == [[(2, 40)], [(1, 1)], [(0, 20)], [(1, 1)]]  # then in turn


def test_who_draws_with_the_best_claim_keeps_his_turn(planner: Planner) -> None:
    seated = [Seated(0, 100), Seated(1, 1)]
    assert planned(planner, seated, {0: 50}) == [(0, 50)]
    assert planned(planner, seated, {1: 1, 0: 50}) == [(1, 1)]
