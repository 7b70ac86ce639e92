"""Which sequences hold the same KV cells: how many of their first tokens each two have in common.

Cells are shared by prefix only, and a cell that is held by several is there once. So, of holders in any
order, each adds what it has in common with none of those before it.
Owner: one cache. Not here: the cells themselves (the engine's).
"""

from collections.abc import Iterable


class Commons:
    """By seat. Seats that have nothing in common with another are not in it."""

    def __init__(self) -> None:
        self._common: dict[int, dict[int, int]] = {}

    def share(self, source: int, target: int, tokens: int) -> None:
        """`target`, which was empty, has the first tokens of `source` now: the same cells."""
        row = {other: min(tokens, common) for other, common in self._common.get(source, {}).items()}
        row[source] = tokens
        for other, common in row.items():
            if common:
                self._common.setdefault(target, {})[other] = common
                self._common.setdefault(other, {})[target] = common

    def cut(self, seat: int, tokens: int) -> None:
        """A seat keeps so many of its first tokens."""
        for other, common in list(self._common.get(seat, {}).items()):
            if not tokens:
                del self._common[seat][other], self._common[other][seat]
            elif common > tokens:
                self._common[seat][other] = self._common[other][seat] = tokens

    def most(self, seat: int) -> int:
        """How many of its first tokens another one has, too."""
        return max(self._common.get(seat, {}).values(), default=0)

    def borrowed(self, seats: Iterable[int]) -> dict[int, int]:
        """Of each seat, what one before it has already; those that borrow nothing are left out."""
        before: list[int] = []
        borrowed: dict[int, int] = {}
        for seat in seats:
            row = self._common.get(seat)
            if row and (tokens := max((row.get(other, 0) for other in before), default=0)):
                borrowed[seat] = tokens
            before.append(seat)
        return borrowed
