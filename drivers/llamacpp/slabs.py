"""The slabs of one engine: made, resized and dropped within a fixed number of bytes.

Owner: the engine. A slab that is to have another number of seats is freed and made again: the KV of
those who sit on it waits outside meanwhile, what was kept on its free seats is lost.
Not here: how many seats a class gets (budget.py), which seat of a slab (seating.py).
"""

from collections.abc import Callable, Iterator
from typing import Final

from drivers.llamacpp.budget import Budget, Room, Use
from drivers.llamacpp.calibrate import measure_more
from drivers.llamacpp.curve import Curve
from drivers.llamacpp.planner import Planner
from drivers.llamacpp.seating import Seating
from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.slab import Slab
from kernel.errors import AdmissionRefused, WorkerDied

MIB: Final = 1 << 20

MakeSlab = Callable[[int, int], Slab]
"""(window, seats) -> an empty slab. Raises AdmissionRefused."""


class Slabs:
    """All seats of one engine."""

    def __init__(
        self,
        first: Slab,
        make: MakeSlab,
        budget: Budget,
        free_bytes: Callable[[], int],
        curve: Curve,
        exact_alone: bool,
    ) -> None:
        self.in_turn: list[Seating] = []  # the one whose last pass was longest ago first
        self._make = make
        self._budget = budget
        self._free_bytes = free_bytes  # of the device
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
        uses = {each.slab.window_tokens: _use(each, leaving) for each in self.in_turn}
        room = self._budget.room(tokens, uses)
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
        after = uses | {window: Use(seats, 0) for window, seats in room.resize.items()}
        more_bytes = self._budget.used_bytes(after) - self._budget.used_bytes(uses)
        if more_bytes > 0 and more_bytes > (free_bytes := self._free_bytes()):
            raise AdmissionRefused(
                f"needs {more_bytes // MIB} MiB; {free_bytes // MIB} MiB are free",
                "other programs have taken what was promised",
            )

    def arrange(self, room: Room) -> Seating:
        """Do what a room needs; returns the slab that has a free seat now."""
        by_window = {each.slab.window_tokens: each for each in self.in_turn}
        for window, seats in room.resize.items():
            self._resize(window, seats, by_window.get(window))
        return next(each for each in self.in_turn if each.slab.window_tokens == room.window_tokens)

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
        seating = self.arrange(room)
        seat = seating.vacate()
        seating.enter(sequence, seat)
        if state is not None and not seating.slab.write(seat, state, sequence.computed):
            raise WorkerDied("llama.cpp did not take the state of a sequence")

    def check_integrity(self) -> None:
        """What is committed is within the limit, and every seat is in order. Raises AssertionError."""
        windows = [each.slab.window_tokens for each in self.in_turn]
        assert len(windows) == len({*windows}) and {*windows} <= {*self._budget.windows}
        uses = {each.slab.window_tokens: _use(each, None) for each in self.in_turn}
        assert self._budget.used_bytes(uses) <= self._budget.limit_bytes
        for seating in self.in_turn:
            seating.check_integrity()

    def free(self) -> None:
        for seating in self.in_turn:
            seating.slab.free()
        self.in_turn.clear()


def _use(seating: Seating, leaving: Sequence | None) -> Use:
    taken = len(seating.by_seat) - (leaving is not None and leaving.slab is seating.slab)
    return Use(seating.slab.seats, taken)
