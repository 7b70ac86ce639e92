"""Which KV cache begins as a prompt does: an index of token prefixes, in blocks.

Owner: one engine. A block is known by a hash of itself and of all before it, so a look-up
costs one step per block of the prompt that is known, however many seats there are. Hashes may collide:
`common_tokens` compares. Not here: what is done with what was found (the engine).
"""

from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Final, Generic, TypeVar

BLOCK_TOKENS: Final = 16

Holder = TypeVar("Holder", bound=Hashable)


class Prefixes(Generic[Holder]):
    """The blocks that each holder's KV cache begins with."""

    def __init__(self) -> None:
        self._chains: dict[Holder, list[int]] = {}  # the hash of each of its blocks, in order
        self._holders: dict[int, dict[Holder, None]] = {}  # by hash: who has this block; none is empty

    def learn(self, holder: Holder, tokens: Sequence[int], computed: int) -> None:
        """A holder's cache has grown to the first `computed` of these tokens."""
        chain = self._chains.setdefault(holder, [])
        at = len(chain) * BLOCK_TOKENS
        if computed - at >= BLOCK_TOKENS:
            for link in _links(tokens, at, computed, chain[-1] if chain else 0):
                chain.append(link)
                self._holders.setdefault(link, {})[holder] = None

    def forget(self, holder: Holder) -> None:
        """A holder's cache is to be overwritten, or cut."""
        for link in self._chains.pop(holder, ()):
            self._holders[link].pop(holder, None)
            if not self._holders[link]:
                del self._holders[link]

    def keep_only(self, holders: Collection[Holder]) -> None:
        """All others' caches are gone."""
        for gone in [each for each in self._chains if each not in holders]:
            self.forget(gone)

    def find(self, tokens: Sequence[int]) -> tuple[list[Holder], int]:
        """Who has most blocks in common with these tokens, and the tokens in those blocks."""
        found: dict[Holder, None] = {}
        common = 0
        for link in _links(tokens, 0, len(tokens), 0):
            if link not in self._holders:
                break
            found = self._holders[link]
            common += BLOCK_TOKENS
        return list(found), common


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
