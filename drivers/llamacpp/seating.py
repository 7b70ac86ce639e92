"""Who sits where in a slab, and what is kept on the seats that are free.

A sequence that ends leaves its KV on its seat until the seat is needed, so that a prompt that begins
as it did, or as one that still runs, need not be computed again. Seats are chosen so that those in use
follow one another: llama.cpp computes a gap as two passes. Among those that fit, the one that was left
longest ago goes first.

Owner: the engine. Not here: what is computed next (planner.py), what is shared by whom (the engine says
how much at most).
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Final

from drivers.llamacpp.calibrate import Costs
from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.slab import Slab
from drivers.prefixes import BLOCK_TOKENS, Prefixes, common_tokens

_NEVER: Final = 0


@dataclass(frozen=True, slots=True)
class Seat:
    """A seat that was taken."""

    number: int
    shared_tokens: int = 0  # that its cache has already
    kin: Sequence | None = None  # a running sequence that is about to compute more of what is wanted
    kin_tokens: int = 0  # how much of it they have in common


class Seating:
    """The seats of one slab."""

    def __init__(self, slab: Slab, costs: Costs, keeps: bool) -> None:
        self.by_seat: list[Sequence] = []  # those that sit, in the order of their seats
        self._slab = slab
        self._costs = costs
        self._keeps = keeps  # whether the model's cache can be cut back to a prefix
        self._left = dict.fromkeys(range(slab.seats), _NEVER)  # free seats: when they were left
        self._kept: dict[int, Sequence] = {}  # who left a free seat, and with it a cache worth keeping
        self._prefixes = Prefixes()
        self._leaves = 0

    def enter(self, sequence: Sequence) -> None:
        """Seat it on `sequence.seat`, which was taken for it."""
        self.by_seat = sorted([*self.by_seat, sequence], key=lambda each: each.seat)

    def leave(self, sequence: Sequence) -> None:
        self.by_seat.remove(sequence)
        self._leaves += 1
        self._left[sequence.seat] = self._leaves
        self._prefixes.forget(sequence.seat)
        if self._keeps and sequence.computed >= BLOCK_TOKENS:
            del sequence.tokens[sequence.computed :]
            self._kept[sequence.seat] = sequence

    def take(self, tokens: Tokens[int], most_tokens: int) -> Seat:
        """A free seat; of these tokens its cache may have so many at most, from others."""
        holder, common = self._longest(tokens[:most_tokens])
        if holder is None:
            return Seat(self._clear(self._fitting()[0]))
        seat, shared = self._share(holder, min(common, holder.computed))
        is_kin = holder in self.by_seat and not holder.sampling.exact
        if is_kin and common - shared >= BLOCK_TOKENS and self._pays(common, common - shared):
            return Seat(seat, shared, holder, common)
        return Seat(seat, shared)

    def take_over_from(self, holder: Sequence, sequence: Sequence, tokens: int) -> None:
        """Have a sequence that sits go on from what another one has computed of the tokens they share."""
        if self._pays(holder.computed, tokens - sequence.computed):
            sequence.computed = self._copy(holder, sequence.seat, tokens)

    def _share(self, holder: Sequence, shared: int) -> tuple[int, int]:
        """A free seat, and how much of what a holder has is on it now."""
        fitting = self._fitting()
        if shared < BLOCK_TOKENS:
            return self._clear(fitting[0]), 0
        if self._is_spare(holder, shared, fitting):
            return self._take_over(holder.seat, shared)
        seat = self._clear(fitting[0])
        return seat, self._copy(holder, seat, shared) if self._pays(holder.computed, shared) else 0

    def _pays(self, copied: int, shared: int) -> bool:
        """Whether copying so many tokens is cheaper than computing so many."""
        return copied * self._costs.copy_token_s < shared * self._costs.prefill_token_s

    def _fitting(self) -> list[int]:
        """The free seats that leave no gap, the one left longest ago first."""
        fitting = list(self._left)
        if self.by_seat:
            low, high = self.by_seat[0].seat, self.by_seat[-1].seat
            gaps = [seat for seat in fitting if low < seat < high]
            fitting = gaps or [seat for seat in fitting if seat in (low - 1, high + 1)]
        return sorted(fitting, key=lambda seat: (self._left[seat], seat))

    def _longest(self, tokens: Tokens[int]) -> tuple[Sequence | None, int]:
        """Who begins with most of these tokens, computed or not yet, and with how many."""
        holders = {**self._kept, **{sequence.seat: sequence for sequence in self.by_seat}}
        for seat, holder in holders.items():
            self._prefixes.learn(seat, holder.tokens, len(holder.tokens))
        seats, likely = self._prefixes.find(tokens)
        if not seats or not self._keeps:
            return None, 0

        def claim(seat: int) -> tuple[int, bool, int]:
            held = holders[seat].tokens
            common = common_tokens(tokens, held, len(held), likely)
            return common, seat in self._kept, holders[seat].computed  # what is left needs no copy, perhaps

        best = max(seats, key=claim)
        return holders[best], claim(best)[0]

    def _is_spare(self, holder: Sequence, shared: int, fitting: list[int]) -> bool:
        """Whether a cache can be taken over: it was left, and its rest is no great loss or lost anyway."""
        seat, rest = holder.seat, holder.computed - shared
        return seat in self._kept and (seat == fitting[0] or (seat in fitting and rest <= shared))

    def _take_over(self, seat: int, shared: int) -> tuple[int, int]:
        del self._kept[seat], self._left[seat]
        self._prefixes.forget(seat)
        return seat, self._cut(seat, shared)

    def _copy(self, holder: Sequence, seat: int, shared: int) -> int:
        """Onto a seat that is taken; returns how many tokens are there."""
        state = self._slab.read(holder.seat)
        self._slab.cut(seat, 0)
        return self._cut(seat, shared) if self._slab.write(seat, state, holder.computed) else 0

    def _cut(self, seat: int, tokens: int) -> int:
        """How many tokens are left: so many, or none if the cache cannot be cut there."""
        self._slab.cut(seat, tokens)
        if self._slab.computed(seat) != tokens:
            self._slab.cut(seat, 0)
            return 0
        return tokens

    def _clear(self, seat: int) -> int:
        del self._left[seat]
        self._kept.pop(seat, None)
        self._prefixes.forget(seat)
        self._slab.cut(seat, 0)
        return seat
