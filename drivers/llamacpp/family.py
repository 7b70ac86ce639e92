"""The slab of a family: those who begin with the same long history hold its KV in the same cells.

A fork, or one more with the same prompt, gets a seat on the unified slab of whom it goes on from; if that one
sits elsewhere, it is moved to a slab that is made for it. Taking over costs microseconds and no cells. But
everybody attends over everybody's cells, so a family is good for as long as what its members have of their
own is little beside what they have in common; who has most of its own moves to an ordinary seat when the
cells are used up.

Measured, 61 M parameters in Q8_0 on one Zen 4 core, 1000 tokens in common, the time of a pass over that on
streams of their own, by how many tokens each member has of its own:

    own      50    100   170   240   300   370   430   500
    2 seats  0.93  0.95  0.99  0.94  1.04  1.01  1.11  1.09
    4 seats  0.79  0.84  0.88  0.96  0.98  1.02  1.10  1.07
    8 seats  0.71  0.77  0.84  0.95  1.03  1.10  1.25  1.29

With 512 in common, 8 members are even at 170. So the cells for what is own are twice the common ones: full
when 8 have become as slow as on streams; two or four that stay longer lose a tenth. Making such a slab
takes 12 to 17 ms, a copy of 1000 tokens 3.5 ms, a share 0.05 ms.
Owner: the engine. Not here: the native cells (slab.py), when one is made (slabs.py).
"""

from collections.abc import Iterable, Mapping
from typing import Final

from drivers.llamacpp.layout import WINDOW_STEP_TOKENS
from drivers.llamacpp.planner import Plan
from drivers.llamacpp.seating import Seating
from drivers.llamacpp.sequence import Sequence

SEATS: Final = 16
LEAST_TOKENS: Final = 512  # in common; of fewer, several copies are made sooner than a slab
_SPARE_TOKENS: Final = 32  # cells that a newcomer must find beside those it needs at once
_OWN_PART: Final = 2  # all members' own tokens together, as a multiple of the common ones
_MOST_OWN_TOKENS: Final = 512  # per seat: what an ordinary seat has for an answer at first


def cells_for(common_tokens: int) -> int:
    """Of the slab of a family that has so many tokens in common."""
    own = min(_OWN_PART * common_tokens, SEATS * _MOST_OWN_TOKENS)
    return -(-(common_tokens + own) // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS


def pays(common_tokens: int, own_tokens: int) -> bool:
    """Whether to make one for the first two, who have so many tokens of their own."""
    return common_tokens >= LEAST_TOKENS and 2 * own_tokens <= common_tokens


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
