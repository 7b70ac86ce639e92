"""What a prompt takes over from KV that is there already: from who sits, or from what was kept.

A prompt that begins as another did need not be computed again where copying is cheaper.
Owner: the engine. Not here: who computes a prompt that several are about to compute (convoys.py), how
much may be shared at most (the engine says).
"""

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from functools import partial
from typing import Final

from drivers.llamacpp.calibrate import Costs
from drivers.llamacpp.family import Family
from drivers.llamacpp.familysize import LEAST_TOKENS
from drivers.llamacpp.seating import Seating
from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.slab import Slab
from drivers.llamacpp.slabs import Slabs
from drivers.prefixes import BLOCK_TOKENS, Prefixes, common_tokens

_PART: Final = 3  # a part of a cache is copied by three copies: it is taken apart, and put together again


@dataclass(frozen=True, slots=True)
class Seat:
    """A seat that was taken."""

    number: int
    shared_tokens: int = 0  # that its cache has already
    kin: Sequence | None = None  # a running sequence that is about to compute more of what is wanted
    kin_tokens: int = 0  # how much of it they have in common


class Sharing:
    """For one engine: who has computed what."""

    def __init__(self, slabs: Slabs, costs: Costs, keeps: bool) -> None:
        self._slabs = slabs
        self._costs = costs
        self._keeps = keeps  # whether the model's cache can be cut back to a prefix
        self._prefixes: Prefixes[Sequence] = Prefixes()

    def leave(self, sequence: Sequence) -> None:
        """It ends; what it has computed stays on its seat until that is needed."""
        seating = self._slabs.of(sequence)
        if isinstance(seating, Family):
            seating.trim(sequence)
        keep = self._keeps and sequence.computed >= BLOCK_TOKENS
        seating.leave(sequence, keep=keep)
        self._prefixes.forget(sequence)
        if keep:
            del sequence.tokens[sequence.computed :]

    def family(self, tokens: Tokens[int], most_tokens: int, leaving: Sequence | None) -> Seating | None:
        """Where a prompt that somebody else has, too, can share its cells; made if that pays."""
        if most_tokens < LEAST_TOKENS:
            return None
        own_tokens = len(tokens) - most_tokens

        def has_room(holder: Sequence) -> bool:
            seating = self._slabs.of(holder)
            return isinstance(seating, Family) and seating.has_room(own_tokens, leaving)

        holder, common = self._longest(tokens[:most_tokens], has_room, leaving)
        if holder is None or common < most_tokens or holder.sampling.exact:
            return None
        return self._slabs.beside(holder, common, own_tokens, leaving)

    def take(self, seating: Seating, tokens: Tokens[int], most_tokens: int) -> Seat:
        """A free seat of a slab; of these tokens its cache may have so many at most, from others."""
        is_kin = partial(_shares, seating.slab)
        holder, common = self._longest(tokens[:most_tokens], is_kin)
        if holder is None:
            return Seat(seating.vacate())
        shared = min(common, holder.computed)
        if shared >= BLOCK_TOKENS and _is_spare(holder, shared, seating):
            seating.take(holder.seat)
            return Seat(holder.seat, _cut(seating.slab, holder.seat, shared))
        seat = seating.vacate()
        pays = shared >= BLOCK_TOKENS and self._copy_pays(holder, seating.slab, shared)
        shared = self._copy(holder, seating.slab, seat, shared) if pays else 0
        rest = common - shared
        if self._computes(holder) and rest >= BLOCK_TOKENS and self._pays(common, rest):
            return Seat(seat, shared, holder, common)
        return Seat(seat, shared)

    @staticmethod
    def is_free(holder: Sequence, sequence: Sequence) -> bool:
        """Whether taking over costs nothing."""
        return _shares(sequence.slab, holder)

    def take_over_from(self, holder: Sequence, sequence: Sequence, tokens: int) -> None:
        """Have a sequence that sits go on from what another one has computed of the tokens they share.

        In a family that one copies it, if there are cells for that; the others share those.
        """
        seating, is_free = self._slabs.of(sequence), self.is_free(holder, sequence)
        if isinstance(seating, Family) and not is_free and holder.computed > seating.free_cells():
            return
        if self._copy_pays(holder, sequence.slab, tokens - sequence.computed):
            sequence.computed = self._copy(holder, sequence.slab, sequence.seat, tokens)

    def _longest(
        self, tokens: Tokens[int], prefers: Callable[[Sequence], bool], leaving: Sequence | None = None
    ) -> tuple[Sequence | None, int]:
        """Who begins with most of these tokens, computed or not yet, and with how many.

        Of several it `prefers` some; one that is about to leave is left out.
        """
        if not self._keeps:
            return None, 0
        kept = [each for seating in self._slabs.in_turn for each in seating.kept.values()]
        holders = dict.fromkeys((*kept, *self._slabs))
        if leaving:
            holders.pop(leaving, None)
        self._prefixes.keep_only(holders)
        for holder in holders:
            self._prefixes.learn(holder, holder.tokens, len(holder.tokens))
        found, likely = self._prefixes.find(tokens)

        def claim(holder: Sequence) -> tuple[int, bool, bool, int, int]:
            """What was kept needs no copy, perhaps."""
            common = common_tokens(tokens, holder.tokens, len(holder.tokens), likely)
            return common, prefers(holder), holder in kept, holder.computed, -holder.seat

        best = max(found, key=claim, default=None)
        return best, claim(best)[0] if best else 0

    def _computes(self, holder: Sequence) -> bool:
        """Whether it sits, and is about to compute more; exact ones compute for themselves only."""
        return not holder.sampling.exact and holder in self._slabs.of(holder).by_seat

    def _pays(self, copied: int, shared: int) -> bool:
        """Whether copying so many tokens is cheaper than computing so many."""
        return copied * self._costs.copy_token_s < shared * self._costs.prefill_token_s

    def _copy_pays(self, holder: Sequence, slab: Slab, gained: int) -> bool:
        if _shares(slab, holder):
            return gained > 0
        fits = holder.computed <= slab.window_tokens
        if not fits and (slab.unified or holder.slab.unified):
            return False  # there are no cells for all of it; taken apart, a holder's cells would be its own
        return self._pays(holder.computed if fits else _PART * holder.computed, gained)

    @staticmethod
    def _copy(holder: Sequence, slab: Slab, seat: int, tokens: int) -> int:
        """Onto a seat that is taken; returns how many tokens are there."""
        if _shares(slab, holder):
            slab.share(holder.seat, seat, tokens)
            return tokens
        computed = holder.computed
        if computed <= slab.window_tokens:
            state = holder.slab.read(holder.seat)
        else:
            state = holder.slab.read_first(holder.seat, tokens, computed)
            computed = tokens
        slab.cut(seat, 0)
        return _cut(slab, seat, tokens) if slab.write(seat, state, computed) else 0


def _shares(slab: Slab, holder: Sequence) -> bool:
    """Whether a seat of a slab can hold a sequence's tokens in the same cells."""
    return slab.unified and slab is holder.slab


def _is_spare(holder: Sequence, shared: int, seating: Seating) -> bool:
    """Whether a cache can be taken over: it was left, and its rest is no great loss or lost anyway."""
    if seating.kept.get(holder.seat) is not holder:
        return False
    fitting, rest = seating.fitting(), holder.computed - shared
    return holder.seat == fitting[0] or (holder.seat in fitting and rest <= shared)


def _cut(slab: Slab, seat: int, tokens: int) -> int:
    """How many tokens are left: so many, or none if the cache cannot be cut there."""
    slab.cut(seat, tokens)
    if slab.computed(seat) != tokens:
        slab.cut(seat, 0)
        return 0
    return tokens
