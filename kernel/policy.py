"""Policies: who takes the next turn, and who the next seat. Pure.

A policy is five functions of members' accounts; the fair queue keeps the accounts and the heaps, so that
what is due and what was received can be told under every policy. A plugin adds one to `POLICIES`.
Not here: the accounts (fairness), what a turn or a seat is worth (scheduler, dispatcher).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kernel.errors import UsageError

Key = tuple[float, float]
"""Smaller comes first. A member's key never falls while it is only being served."""


class Account(Protocol):
    """What a policy sees of a member: a process, or a group of them."""

    @property
    def weight(self) -> float: ...
    @property
    def vruntime(self) -> float:
        """Virtual time up to which it has been served; level with the queue's, it is owed nothing."""

    @property
    def order(self) -> int:
        """Number of its joining."""

    @property
    def turn(self) -> int:
        """Number of its last turn (or of its joining)."""

    @property
    def held(self) -> int:
        """Seats it has."""

    @property
    def spent_units(self) -> float:
        """Service since it last got a seat."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Sizes that claims are measured by, in service units."""

    request_units: float = 128.0  # a quantum of device time, the largest request; deadlines come from it
    seat_units: float = 1000.0  # likewise of seats, which change hands more slowly


@dataclass(frozen=True, slots=True)
class Policy:
    """`grouped`: it goes by shares, and a group has one account; otherwise each process has its own."""

    name: str
    grouped: bool
    eligible: Callable[[Account, float], bool]  # may it take a turn at this virtual time?
    turn: Callable[[Account, Terms], Key]  # the order of those that may
    # May it draw beside the first, of that weight, at this virtual time, so many units ahead at most?
    rides: Callable[[Account, float, float, float], bool]
    seat: Callable[[Account, Terms], Key]  # the order of those that wait for a seat
    outranks: Callable[
        [Account, Account, float, Terms], bool
    ]  # does a waiting one take a seated one's place?


# Fair: earliest eligible virtual deadline first.


def _not_ahead(member: Account, virtual: float) -> bool:
    return member.vruntime <= virtual + 1e-9


def _turn_deadline(member: Account, terms: Terms) -> Key:
    return member.vruntime + terms.request_units / member.weight, 0.0


def _not_far_ahead(member: Account, head_weight: float, virtual: float, lead_units: float) -> bool:
    """In virtual time: so a light one's lead is small in units."""
    return (member.vruntime - virtual) * max(member.weight, head_weight) <= lead_units


def _seat_deadline(member: Account, terms: Terms) -> Key:
    """A group's next seat is the request after those for the seats it has: seats go by weight too."""
    return member.vruntime + terms.seat_units * (member.held + 1) / member.weight, member.order


def _outweighs_or_is_owed(waiting: Account, seated: Account, virtual: float, terms: Terms) -> bool:
    if (seated.vruntime - waiting.vruntime) * waiting.weight > terms.seat_units:
        return True
    # Twice, so that near equals do not swap in turn; and who was let in because he is owed gets it first.
    outweighs = seated.held * waiting.weight >= 2 * (waiting.held + 1) * seated.weight
    return outweighs and (virtual - seated.vruntime) * seated.weight <= terms.request_units


# First come, first served; round robin; strict priority.


def _always(member: Account, virtual: float) -> bool:
    return True


def _beside(member: Account, head_weight: float, virtual: float, lead_units: float) -> bool:
    return True


def _never(waiting: Account, seated: Account, virtual: float, terms: Terms) -> bool:
    return False


def _longest_ago(member: Account, terms: Terms) -> Key:
    return member.turn, 0.0


def _first_come(member: Account, terms: Terms) -> Key:
    return member.order, 0.0


def _slice_is_over(waiting: Account, seated: Account, virtual: float, terms: Terms) -> bool:
    return seated.spent_units >= terms.seat_units


def _heaviest(member: Account, terms: Terms) -> Key:
    return -member.weight, member.turn


def _as_heavy(member: Account, head_weight: float, virtual: float, lead_units: float) -> bool:
    return member.weight == head_weight


def _heaviest_first_come(member: Account, terms: Terms) -> Key:
    return -member.weight, member.order


def _outweighs(waiting: Account, seated: Account, virtual: float, terms: Terms) -> bool:
    return waiting.weight > seated.weight


FAIR = Policy("fair", True, _not_ahead, _turn_deadline, _not_far_ahead, _seat_deadline, _outweighs_or_is_owed)

POLICIES = {
    policy.name: policy
    for policy in (
        FAIR,
        Policy("fifo", False, _always, _longest_ago, _beside, _first_come, _never),
        Policy("rr", False, _always, _longest_ago, _beside, _longest_ago, _slice_is_over),
        Policy("priority", False, _always, _heaviest, _as_heavy, _heaviest_first_come, _outweighs),
    )
}


def policy_named(name: str) -> Policy:
    """Raises UsageError."""
    try:
        return POLICIES[name]
    except KeyError:
        raise UsageError(f"no policy {name}", "known: " + ", ".join(POLICIES)) from None
