"""Prompts that begin alike and are computed at the same time: what they share is computed once.

Of a convoy, one member at a time goes ahead; the others wait, and take its KV over when it has come to
the end of what they share. Who goes ahead needs a quota: if the first one has none in this quantum, the
next takes over from where it is, so nobody waits for one that does not run, and each pays its part.

Owner: the engine. Not here: who has what in common (sharing.py), exact sequences (they share nothing).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from drivers.llamacpp.sequence import Sequence
from drivers.llamacpp.sharing import Sharing


@dataclass(slots=True, eq=False)
class Convoy:
    """`common_tokens`: what any two members have in common, at least."""

    members: list[Sequence]
    common_tokens: int

    def behind(self) -> list[Sequence]:
        return [each for each in self.members if not each.rests and each.computed < self.end(each)]

    def end(self, member: Sequence) -> int:
        """How far a member may take over what another has computed."""
        return min(self.common_tokens, member.shareable_tokens)

    def source(self, member: Sequence, tokens: int) -> Sequence:
        """Who has computed so many tokens, and is the cheapest to take them over from."""
        able = (each for each in self.members if each.computed >= tokens)
        return min(able, key=lambda each: (each.slab is not member.slab, each.computed))


class Convoys:
    """All convoys of one engine; a sequence is in one of them at most."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        self._of: dict[int, Convoy] = {}  # by sequence

    def join(self, sequence: Sequence, kin: Sequence, common_tokens: int) -> None:
        """A new sequence has so many tokens in common with one that is not through with its prompt."""
        convoy = self._of.get(kin.id) or Convoy([kin], common_tokens)
        if 2 * common_tokens < convoy.common_tokens:
            return  # the others have more in common than is worth giving up
        convoy.common_tokens = min(common_tokens, convoy.common_tokens)
        convoy.members.append(sequence)
        self._of[kin.id] = self._of[sequence.id] = convoy

    def leave(self, sequence: Sequence) -> None:
        convoy = self._of.pop(sequence.id, None)
        if convoy:
            convoy.members.remove(sequence)

    def prepare(self, quota_tokens: Mapping[int, int]) -> tuple[dict[int, int], set[int]]:
        """Before a pass: (tokens taken over, by sequence; the sequences that wait)."""
        if not self._of:
            return {}, set()
        taken: dict[int, int] = {}
        waiting: set[int] = set()
        for convoy in dict.fromkeys(self._of.values()):
            self._prepare(convoy, quota_tokens, taken, waiting)
            if len(convoy.members) < 2 or not convoy.behind():
                for member in convoy.members:
                    del self._of[member.id]
        return taken, waiting

    def _prepare(
        self, convoy: Convoy, quota_tokens: Mapping[int, int], taken: dict[int, int], waiting: set[int]
    ) -> None:
        first = max(convoy.members, key=lambda member: member.computed)
        through: list[Sequence] = []
        others: list[Sequence] = []
        for member in convoy.behind():
            runs, end = quota_tokens.get(member.id, 0) > 0, convoy.end(member)
            is_through = end <= first.computed
            if is_through and (runs or self._sharing.is_free(convoy.source(member, end), member)):
                through.append(member)
            elif runs:
                others.append(member)
        if others and first not in others:
            through.append(others.pop(0))  # goes ahead from here
        waiting.update(member.id for member in others if member is not first)
        for member in through:
            before, tokens = member.computed, min(convoy.end(member), first.computed)
            self._sharing.take_over_from(convoy.source(member, tokens), member, tokens)
            if member.computed > before:
                taken[member.id] = member.computed - before
