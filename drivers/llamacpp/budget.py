"""How many seats each class of window gets, within a fixed number of bytes. Pure arithmetic.

A slab's memory is committed when it is made, so windows come in classes, each four times the one below,
up to the engine's own; there is one slab of a class at most, and it is made again when it needs more seats,
or when another class needs its memory. Making it anew costs a copy of what is on it: cheap beside
computing (some 14 ms per thousand tokens of a model of 500 M parameters), and in return all sequences of
a class are computed in one pass.
Not here: who sits where (seating.py), the native memory (slabs.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from drivers.llamacpp.layout import SHORTEST_TOKENS

CLASS_STEP: Final = 4
FIRST_SEATS: Final = 16  # of a slab that is made, if its share of the memory allows
SHARE: Final = 4  # where there are several classes, none gets more than this part of all memory at first

SlabBytes = Callable[[int, int], int]
"""(window, seats) of a slab -> the bytes it takes, compute buffer included."""


@dataclass(frozen=True, slots=True)
class Use:
    """A slab's seats, and how many of them are taken by open sequences."""

    seats: int
    taken: int


@dataclass(frozen=True, slots=True)
class Room:
    """Where a sequence can sit: on a free seat of this class, once classes have these numbers of seats."""

    window_tokens: int
    resize: Mapping[int, int]  # in this order: those that give up seats first; 0 is no slab


def classes(window_tokens: int) -> tuple[int, ...]:
    """The windows that slabs may have, for an engine with this window."""
    windows = []
    size = SHORTEST_TOKENS
    while size < window_tokens:
        windows.append(size)
        size *= CLASS_STEP
    return (*windows, window_tokens)


class Budget:
    """Plans within `limit_bytes`. One sequence alone always has room: the limit holds the largest window."""

    def __init__(
        self, windows: tuple[int, ...], most_seats: int, limit_bytes: int, slab_bytes: SlabBytes
    ) -> None:
        self.windows = windows
        self.limit_bytes = limit_bytes
        self.slab_bytes = slab_bytes
        self.most_seats = most_seats

    def first_seats(self, window_tokens: int) -> int:
        """Seats of a new slab."""
        share_bytes = self.limit_bytes // SHARE if len(self.windows) > 1 else self.limit_bytes
        fitting = self._fitting(window_tokens, share_bytes, 1, FIRST_SEATS)
        return min(self.most_seats, max(1, fitting))

    def window_for(self, tokens: int) -> int:
        """The smallest class that holds so many tokens, or the largest."""
        return next((window for window in self.windows if window >= tokens), self.windows[-1])

    def used_bytes(self, slabs: Mapping[int, Use]) -> int:
        return sum(self.slab_bytes(window, use.seats) for window, use in slabs.items() if use.seats)

    def room(self, tokens: int, slabs: Mapping[int, Use], taken_bytes: int = 0) -> Room | None:
        """For one more sequence of so many tokens; None if those that are open leave none.

        `taken_bytes` are those of slabs that are of no class.
        """
        window = self.window_for(tokens)
        have = slabs.get(window, Use(0, 0))
        if have.taken < have.seats:
            return Room(window, {})
        resize = self._enlarged(window, have, dict(slabs), self.limit_bytes - taken_bytes)
        if resize is not None:
            return Room(window, resize)
        larger = (each for each in self.windows if each > window and each in slabs)
        free = next((each for each in larger if slabs[each].taken < slabs[each].seats), None)
        return None if free is None else Room(free, {})

    def _enlarged(
        self, window: int, have: Use, slabs: dict[int, Use], limit_bytes: int
    ) -> dict[int, int] | None:
        """Seats for this class to have a free one: with memory that is left, or that others can spare."""
        least = have.taken + 1
        wanted = min(self.most_seats, max(least, 2 * have.seats or self.first_seats(window)))
        slabs.pop(window, None)
        resize: dict[int, int] = {}
        while True:
            left_bytes = limit_bytes - self.used_bytes(slabs)
            if seats := self._fitting(window, left_bytes, least, wanted):
                return {**resize, window: seats}
            spare = {
                each: self._spare_bytes(each, use) for each, use in slabs.items() if use.taken < use.seats
            }
            if not spare:
                return None
            victim = min(spare, key=lambda each: (slabs[each].taken > 0, -spare[each]))
            resize[victim] = slabs[victim].taken
            slabs[victim] = replace(slabs[victim], seats=slabs[victim].taken)

    def _spare_bytes(self, window: int, use: Use) -> int:
        kept_bytes = self.slab_bytes(window, use.taken) if use.taken else 0
        return self.slab_bytes(window, use.seats) - kept_bytes

    def _fitting(self, window: int, left_bytes: int, least: int, most: int) -> int:
        """The most seats that fit; 0 if fewer than `least` do."""
        low, high = least - 1, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.slab_bytes(window, middle) <= left_bytes else (low, middle - 1)
        return low if low >= least else 0
