"""Which KV cache begins as a prompt does: an index of token prefixes, in blocks.

Owner: one engine. A block is known by a hash of itself and of all before it, so a look-up
costs one step per block of the prompt that is known, however many seats there are. Hashes may collide:
`common_tokens` compares. Not here: what is done with what was found (the engine).
"""

from collections.abc import Iterator, Sequence
from typing import Final

BLOCK_TOKENS: Final = 16


class Prefixes:
    """The blocks that each seat's KV cache begins with."""

    def __init__(self) -> None:
        self._chains: dict[int, list[int]] = {}  # by seat: the hash of each of its blocks, in order
        self._seats: dict[int, set[int]] = {}  # by hash: the seats that have this block; none is empty

    def learn(self, seat: int, tokens: Sequence[int], computed: int) -> None:
        """A seat's cache has grown to the first `computed` of these tokens."""
        chain = self._chains.setdefault(seat, [])
        at = len(chain) * BLOCK_TOKENS
        if computed - at >= BLOCK_TOKENS:
            for link in _links(tokens, at, computed, chain[-1] if chain else 0):
                chain.append(link)
                self._seats.setdefault(link, set()).add(seat)

    def forget(self, seat: int) -> None:
        """A seat's cache is to be overwritten."""
        for link in self._chains.pop(seat, ()):
            self._seats[link].discard(seat)
            if not self._seats[link]:
                del self._seats[link]

    def find(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The seats that have most blocks in common with these tokens, and the tokens in those blocks."""
        found: set[int] = set()
        common = 0
        for link in _links(tokens, 0, len(tokens), 0):
            if link not in self._seats:
                break
            found = self._seats[link]
            common += BLOCK_TOKENS
        return sorted(found), common


def _links(tokens: Sequence[int], begin: int, end: int, before: int) -> Iterator[int]:
    """The chained hashes of the whole blocks from `begin` to `end`."""
    link = before
    for at in range(begin, end - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        link = hash((link, *tokens[at : at + BLOCK_TOKENS]))
        yield link


def common_tokens(tokens: Sequence[int], held: Sequence[int], computed: int, likely: int) -> int:
    """How many tokens the two have in common, of the `computed` that are held; `likely`: as `find` says."""
    most = min(len(tokens), computed)
    common = min(likely, most)
    if tokens[:common] != held[:common]:
        return 0  # a hash collided
    while common < most and tokens[common] == held[common]:
        common += 1
    return common
