"""The slabs of one engine: made, resized and dropped within a fixed number of bytes.

Owner: the engine. There is one of each class of window at most, and unified ones beside them, one for each
family. A slab that is to have another number of seats is freed and made again: the KV of those who sit on it
waits outside meanwhile, what was kept on its free seats is lost.
Not here: how many seats a class gets (budget.py), which seat of a slab (seating.py).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from drivers.llamacpp.budget import Budget, Room, SlabBytes, Use
from drivers.llamacpp.calibrate import measure_more
from drivers.llamacpp.curve import Curve
from drivers.llamacpp.family import Family
from drivers.llamacpp.familysize import SEATS, cells_for, pays
from drivers.llamacpp.planner import Planner
from drivers.llamacpp.seating import Seating
from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.slab import Slab, State
from kernel.errors import AdmissionRefused, WorkerDied

MIB: Final = 1 << 20


class MakeSlab(Protocol):
    """Makes an empty slab. Raises AdmissionRefused."""

    def __call__(self, window_tokens: int, seats: int, unified: bool = False) -> Slab: ...


class Slabs:
    """All seats of one engine."""

    def __init__(
        self,
        first: Slab,
        make: MakeSlab,
        budget: Budget,
        unified_bytes: SlabBytes,
        free_bytes: Callable[[], int],
        curve: Curve,
        exact_alone: bool,
    ) -> None:
        self.in_turn: list[Seating] = []  # the one whose last pass was longest ago first
        self._make = make
        self._budget = budget
        self._unified_bytes = unified_bytes
        self._free_bytes = free_bytes  # of the device
        self.unites = first.plain  # where KV can be moved, families get slabs of their own
        self._curve = curve
        self._exact_alone = exact_alone
        self._add(first)

    def __iter__(self) -> Iterator[Sequence]:
        """All who sit."""
        return (sequence for seating in self.in_turn for sequence in seating.by_seat)

    def of(self, sequence: Sequence) -> Seating:
        return next(each for each in self.in_turn if each.slab is sequence.slab)

    def had_turn(self, seating: Seating) -> None:
        if len(self.in_turn) > 1:
            self.in_turn.remove(seating)
            self.in_turn.append(seating)

    def room(self, tokens: int, leaving: Sequence | None = None) -> Room:
        """For one more sequence of so many tokens, once `leaving` has left. Changes nothing.

        Raises AdmissionRefused, at once.
        """
        uses = self._uses(leaving)
        room = self._budget.room(tokens, uses, self._family_bytes(leaving))
        if room is None:
            raise AdmissionRefused(
                f"no room for a sequence of {tokens} tokens beside those that are open",
                "there is when some of them have ended",
            )
        self._check_free(room, uses)
        return room

    def _check_free(self, room: Room, uses: dict[int, Use]) -> None:
        """The memory was promised at the load, but other programs may have taken it since."""
        if not room.resize:
            return
        after_bytes = self._after_bytes(room, uses)
        more_bytes = after_bytes - self._budget.used_bytes(uses)
        if more_bytes <= 0:
            return
        free_bytes = self._free_bytes() + self._spared_bytes(self._budget.limit_bytes - after_bytes)
        if more_bytes > free_bytes:
            raise AdmissionRefused(
                f"needs {more_bytes // MIB} MiB; {free_bytes // MIB} MiB are free",
                "other programs have taken what was promised",
            )

    def _after_bytes(self, room: Room, uses: dict[int, Use]) -> int:
        """What the classes take once there is this room."""
        after = uses | {window: Use(seats, 0) for window, seats in room.resize.items()}
        return self._budget.used_bytes(after)

    def arrange(self, room: Room | Seating) -> Seating:
        """Do what a room needs; returns the slab that has a free seat now."""
        if isinstance(room, Seating):
            return room
        by_window = self._classes()
        self._spare(self._budget.limit_bytes - self._after_bytes(room, self._uses(None)))
        for window, seats in room.resize.items():
            self._resize(window, seats, by_window.get(window))
        return self._classes()[room.window_tokens]

    def beside(
        self, holder: Sequence, common_tokens: int, own_tokens: int, leaving: Sequence | None
    ) -> Seating | None:
        """A unified slab with a free seat, once `leaving` has left, for one who begins as a holder does.

        Made for the two of them, if that pays and there is memory; None if a copy is to be made.
        """
        seating = self.of(holder)
        if isinstance(seating, Family) and seating.has_room(own_tokens, leaving):
            return seating
        if holder is leaving or holder not in seating.by_seat or not self.unites:
            return None
        own_tokens += len(holder.tokens) - common_tokens
        return self._found(holder, common_tokens) if pays(common_tokens, own_tokens) else None

    def _found(self, holder: Sequence, common_tokens: int) -> Family | None:
        """Move one who sits to a slab for its family. With memory that nobody uses, or not at all."""
        cells = cells_for(common_tokens)
        seating = self._idle(cells) or self._new_family(cells)
        if seating is not None:
            state = holder.slab.read(holder.seat) if holder.computed else None
            self.of(holder).leave(holder, keep=False)
            self._settle(holder, seating, state)
        return seating

    def _idle(self, cells: int) -> Family | None:
        """One that nobody sits on any more, emptied."""
        for family in self.families():
            if not family.by_seat and cells <= family.slab.window_tokens <= 2 * cells:
                family.forget()
                return family
        return None

    def _new_family(self, cells: int) -> Family | None:
        seats = min(SEATS, self._budget.most_seats)
        left_bytes = self._budget.limit_bytes - self._budget.used_bytes(self._uses(None))
        need_bytes = self._unified_bytes(cells, seats)
        free_bytes = self._free_bytes() + self._spared_bytes(left_bytes - need_bytes)
        if need_bytes > min(left_bytes - self._family_bytes(None), free_bytes):
            return None
        self._spare(left_bytes - need_bytes)
        try:
            slab = self._make(cells, seats, unified=True)
        except AdmissionRefused:
            return None
        self.in_turn.insert(0, seating := Family(slab, self._planner(slab)))
        return seating

    def _uses(self, leaving: Sequence | None) -> dict[int, Use]:
        return {window: _use(each, leaving) for window, each in self._classes().items()}

    def _classes(self) -> dict[int, Seating]:
        """By window."""
        return {each.slab.window_tokens: each for each in self.in_turn if not isinstance(each, Family)}

    def families(self) -> list[Family]:
        return [each for each in self.in_turn if isinstance(each, Family)]

    def _family_bytes(self, leaving: Sequence | None) -> int:
        """Of the slabs of families, but for those that nobody sits on, once `leaving` has left."""
        return self._bytes(
            each for each in self.families() if any(one is not leaving for one in each.by_seat)
        )

    def _bytes(self, families: Iterable[Seating]) -> int:
        return sum(self._unified_bytes(each.slab.window_tokens, each.slab.seats) for each in families)

    def _spared_bytes(self, most_bytes: int) -> int:
        """What `_spare` gives back, at least, where enough of them can be dropped."""
        return max(0, self._bytes(self.families()) - most_bytes)

    def _spare(self, most_bytes: int) -> None:
        """Drop slabs of families that nobody sits on any more until they take so many bytes at most."""
        for family in self.families():
            if not family.by_seat and self._bytes(self.families()) > most_bytes:
                self.in_turn.remove(family)
                family.slab.free()

    def _resize(self, window: int, seats: int, seating: Seating | None) -> None:
        if seating is not None and seats == 0:
            self.in_turn.remove(seating)
            seating.slab.free()
        elif seating is not None:
            seating.rebuild(lambda: self._made(window, seats))
            seating.planner = self._planner(seating.slab)
        else:
            self._add(self._made(window, seats))

    def _made(self, window: int, seats: int) -> Slab:
        """Once others have made room there is no way back."""
        try:
            slab = self._make(window, seats)
            measure_more(slab, self._curve)
            return slab
        except AdmissionRefused as error:
            raise WorkerDied(error.message, error.hint) from error

    def _add(self, slab: Slab) -> None:
        self.in_turn.insert(0, Seating(slab, self._planner(slab)))

    def _planner(self, slab: Slab) -> Planner:
        return Planner(slab.capacity_tokens, self._exact_alone, self._curve)

    def move(self, sequence: Sequence, tokens: int) -> None:
        """To a seat for so many tokens. Raises AdmissionRefused; then it sits where it was."""
        room = self.room(tokens, sequence)
        state = sequence.slab.read(sequence.seat) if sequence.computed else None
        self.of(sequence).leave(sequence, keep=False)
        self._settle(sequence, self.arrange(room), state)

    @staticmethod
    def _settle(sequence: Sequence, seating: Seating, state: State | None) -> None:
        seat = seating.vacate()
        seating.enter(sequence, seat)
        if state is not None and not seating.slab.write(seat, state, sequence.computed):
            raise WorkerDied("llama.cpp did not take the state of a sequence")

    def check_integrity(self) -> None:
        """What is committed is within the limit, and every seat is in order. Raises AssertionError."""
        uses, families = self._uses(None), self.families()
        assert len(uses) + len(families) == len(self.in_turn) and {*uses} <= {*self._budget.windows}
        assert self._budget.used_bytes(uses) + self._bytes(families) <= self._budget.limit_bytes
        for seating in self.in_turn:
            seating.check_integrity()

    def free(self) -> None:
        for seating in self.in_turn:
            seating.slab.free()
        self.in_turn.clear()


def _use(seating: Seating, leaving: Sequence | None) -> Use:
    taken = len(seating.by_seat) - (leaving is not None and leaving.slab is seating.slab)
    return Use(seating.slab.seats, taken)
