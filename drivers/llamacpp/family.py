"""The slab of a family: those who begin with the same long history hold its KV in the same cells.

A fork, or one more with the same prompt, gets a seat on the unified slab of whom it goes on from; if that one
sits elsewhere, it is moved to a slab that is made for it. Taking over costs microseconds and no cells. But
everybody attends over everybody's cells, so a family is good for as long as what its members have of their
own is little beside what they have in common; who has most of its own moves to an ordinary seat when the
cells are used up.

Owner: the engine. Not here: the native cells (slab.py), how many there are (familysize.py), when one is made
(slabs.py).
"""

from collections.abc import Iterable, Mapping
from typing import Final

from drivers.llamacpp.planner import Plan
from drivers.llamacpp.seating import Seating
from drivers.llamacpp.sequence import Sequence

_SPARE_TOKENS: Final = 32  # cells that a newcomer must find beside those it needs at once


class Family(Seating):
    """The seats of a unified slab. llama.cpp refuses a pass that finds no cells, so they are counted."""

    def free_cells(self) -> int:
        held = {each.seat: each.computed for each in (*self.by_seat, *self.kept.values())}
        borrowed = sum(self.slab.commons.borrowed(held).values())
        return self.slab.window_tokens - sum(held.values()) + borrowed

    def has_room(self, own_tokens: int, leaving: Sequence | None) -> bool:
        """For one more, with so many tokens of its own, once `leaving` has left."""
        has_seat = len(self.by_seat) < self.slab.seats or leaving in self.by_seat
        return has_seat and own_tokens + _SPARE_TOKENS <= self.free_cells()

    def trim(self, sequence: Sequence) -> None:
        """It is about to leave: what nobody else has of it is not worth its cells."""
        sequence.computed = min(sequence.computed, self.slab.commons.most(sequence.seat))
        self.slab.cut(sequence.seat, sequence.computed)

    def forget(self) -> None:
        """Nothing is kept any more."""
        for seat in self.kept:
            self.slab.cut(seat, 0)
        self.kept.clear()

    def crowded_out(self, quota_tokens: Mapping[int, int]) -> Sequence | None:
        """Who is to leave so that all find cells in the next pass: who has most of its own.

        None if nobody has to, or somebody is about to.
        """
        ready = [each for each in self.by_seat if not each.rests and quota_tokens.get(each.id, 0) > 0]
        wanted = sum(min(len(each.tokens) - each.computed, quota_tokens[each.id]) for each in ready)
        wanted = min(wanted, self.slab.capacity_tokens)
        if self.kept and wanted > self.free_cells():
            self.forget()
        if wanted <= self.free_cells() or any(each.stuck for each in self.by_seat):
            return None
        return max(ready, key=lambda each: each.computed - self.slab.commons.most(each.seat))

    def plan(self, sequences: Iterable[Sequence], quota_tokens: Mapping[int, int]) -> Plan:
        """As far as there are cells: not for all, while one that is stuck still has its own."""
        free, fitting = self.free_cells(), []
        for sequence, count in super().plan(sequences, quota_tokens):
            if count <= free:
                fitting.append((sequence, count))
                free -= count
        return fitting
