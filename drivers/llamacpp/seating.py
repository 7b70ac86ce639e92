"""The seats of one slab: who sits where, and what is kept on those that are free.

A sequence that ends leaves its KV on its seat until the seat is needed, so that a prompt that begins
as it did need not be computed again. Seats are chosen so that those in use follow one another: llama.cpp
computes a gap as two passes. Among those that fit, the one that was left longest ago goes first.

Owner: the engine. Not here: which slab a sequence gets (slabs.py), what it shares (sharing.py).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from drivers.llamacpp.planner import Plan, Planner
from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.slab import Slab
from kernel.errors import WorkerDied

_NEVER: Final = 0


class Seating:
    """The seats of one slab."""

    def __init__(self, slab: Slab, planner: Planner) -> None:
        self.slab = slab
        self.planner = planner
        self.by_seat: list[Sequence] = []  # those that sit, in the order of their seats
        self.kept: dict[int, Sequence] = {}  # who left a free seat, and with it a cache worth keeping
        self._left = dict.fromkeys(range(slab.seats), _NEVER)  # free seats: when they were left
        self._leaves = 0

    def enter(self, sequence: Sequence, seat: int) -> None:
        """Seat it on a seat that was taken for it."""
        sequence.sit(self.slab, seat)
        self.by_seat = sorted([*self.by_seat, sequence], key=lambda each: each.seat)

    def leave(self, sequence: Sequence, *, keep: bool) -> None:
        self.by_seat.remove(sequence)
        self._leaves += 1
        self._left[sequence.seat] = self._leaves
        if keep:
            self.kept[sequence.seat] = sequence
        else:
            self.slab.cut(sequence.seat, 0)

    def fitting(self) -> list[int]:
        """The free seats that leave no gap, the one left longest ago first."""
        fitting = list(self._left)
        if self.by_seat:
            low, high = self.by_seat[0].seat, self.by_seat[-1].seat
            gaps = [seat for seat in fitting if low < seat < high]
            fitting = gaps or [seat for seat in fitting if seat in (low - 1, high + 1)]
        return sorted(fitting, key=lambda seat: (self._left[seat], seat))

    def take(self, seat: int) -> None:
        """A free seat is for a newcomer, with what is on it."""
        del self._left[seat]
        self.kept.pop(seat, None)

    def vacate(self) -> int:
        """Take the free seat that can best be spared, and empty it."""
        seat = self.fitting()[0]
        self.take(seat)
        self.slab.cut(seat, 0)
        return seat

    def plan(self, sequences: Iterable[Sequence], quota_tokens: Mapping[int, int]) -> Plan:
        """What some of those who sit are to compute in the next pass."""
        return self.planner.plan(sequences, quota_tokens)

    def rebuild(self, make: Callable[[], Slab]) -> None:
        """Put another slab in the place of this one, with all who sit; what was kept is lost."""
        states = [self.slab.read(each.seat) if each.computed else None for each in self.by_seat]
        self.slab.free()  # before the new one is made: there is no memory for both
        self.slab = make()
        self.kept.clear()
        self._left = dict.fromkeys(range(len(self.by_seat), self.slab.seats), _NEVER)
        for seat, (sequence, state) in enumerate(zip(self.by_seat, states, strict=True)):
            sequence.sit(self.slab, seat)
            if state is not None and not self.slab.write(seat, state, sequence.computed):
                raise WorkerDied("llama.cpp did not take the state of a sequence")

    def check_integrity(self) -> None:
        """Every seat is free or taken once, and holds what its sequence says. Raises AssertionError."""
        taken = [each.seat for each in self.by_seat]
        assert taken == sorted({*taken}) and sorted([*taken, *self._left]) == list(range(self.slab.seats))
        assert self.kept.keys() <= self._left.keys()
        for sequence in (*self.by_seat, *self.kept.values()):
            assert sequence.slab is self.slab
            assert self.slab.computed(sequence.seat) == sequence.computed <= self.slab.window_tokens
