"""Which tokens go into the next forward pass. Touches no native code.

Continuous batching in two kinds of pass: one token each of all sequences that wait for their next token,
or chunks of prompts, of equal length. They take turns when both have something to do; a quantum whose
best claim is a prompt's begins with that. Mixed passes would not be faster (llama.cpp cuts them into
parts of equal length, and each part reads the weights again), and the parts could be single tokens:
attention over one row is computed by another kernel than over several, with other last bits, so a
prompt's logits would depend on its neighbours. For the same reason a prompt is not cut so that one token
is left. Where several passes of a few sequences each take less time than one of all, those that wait for
their next token are divided into such passes.

An exact sequence is cut by its own positions only, whatever its quota; and where the logits of a row
depend on how many rows are computed with it, each exact one has passes of its own, in turn with the others.
Not here: how much each may compute (quotas are the scheduler's).
"""

from collections.abc import Iterable, Mapping
from typing import Final

from drivers.llamacpp.curve import Curve
from drivers.llamacpp.sequence import Sequence

Plan = list[tuple[Sequence, int]]  # sequence, how many of its tokens

EXACT_CHUNK_TOKENS: Final = 32
_PROMPTS: Final = -2  # kinds of pass; one of an exact sequence alone is known by its number
_DECODING: Final = -1


class Planner:
    """Plans passes for one engine, and remembers whose turn it is."""

    def __init__(self, room_tokens: int, exact_alone: bool, curve: Curve) -> None:
        self._room_tokens = room_tokens  # of one pass; at least the number of seats
        self._curve = curve
        self._next_seat = 0  # where the round of those who draw goes on, if it is divided
        self._exact_alone = exact_alone
        self._had_turn: dict[int, int] = {}  # by kind of pass: when it was last planned
        self._passes = 0
        self._quantum: Mapping[int, int] | None = None  # the one under way

    def plan(self, sequences: Iterable[Sequence], quota_tokens: Mapping[int, int]) -> Plan:
        """Sequences (in the order of their seats) and the tokens to compute of each, all the same number."""
        prompts: Plan = []
        decoding: Plan = []
        passes: dict[int, Plan] = {}
        for sequence in sequences:
            quota = quota_tokens.get(sequence.id, 0)
            if sequence.rests or quota <= 0:
                continue
            count = _wanted(sequence, quota)
            if sequence.sampling.exact and self._exact_alone:
                passes[sequence.id] = [(sequence, count)]
            else:
                (decoding if count == 1 else prompts).append((sequence, count))
        if prompts:
            rank = {seq: number for number, seq in enumerate(quota_tokens)}
            prompts.sort(key=lambda each: rank[each[0].id])
            passes[_PROMPTS] = _chunks(prompts, quota_tokens, self._room_tokens)
            if quota_tokens is not self._quantum and rank[prompts[0][0].id] == 0:
                self._had_turn.pop(_PROMPTS, None)  # it need not wait for those who go on from before
        if decoding:
            passes[_DECODING] = decoding
        self._quantum = quota_tokens
        plan = self._next_of(passes)
        return self._part(plan) if plan is decoding and self._curve.first(len(plan)) < len(plan) else plan

    def _part(self, decoding: Plan) -> Plan:
        """The next ones of a round: neighbours, since a gap between seats costs another pass."""
        left = [each for each in decoding if each[0].seat >= self._next_seat] or decoding
        part = left[: self._curve.first(len(left))]
        self._next_seat = part[-1][0].seat + 1
        return part

    def _next_of(self, passes: Mapping[int, Plan]) -> Plan:
        """The one that has waited longest."""
        if not passes:
            return []
        kind = min(passes, key=lambda kind: (self._had_turn.get(kind, 0), kind))
        self._passes += 1
        self._had_turn[kind] = self._passes
        return passes[kind]


def _wanted(sequence: Sequence, quota: int) -> int:
    """1 if its next pass is one token; else all it could compute, or the chunk it has to."""
    if sequence.sampling.exact:
        return _exact_count(sequence)
    return 1 if quota == 1 else len(sequence.tokens) - sequence.computed


def _exact_count(sequence: Sequence) -> int:
    """A function of positions only; what was drawn is computed one by one, as it was when it was drawn.

    The last token of an earlier reply is not: it came with the next turn's prompt.
    """
    begin, end = sequence.computed, sequence.prompt_tokens
    if begin >= end:
        return 1
    bounds = sequence.reply_bounds
    for first, last in zip(bounds[::2], bounds[1::2], strict=True):
        if first <= begin < last - 1:
            return 1
        if begin < first:
            end = first
            break
    stop = min(end, begin - begin % EXACT_CHUNK_TOKENS + EXACT_CHUNK_TOKENS)
    return end - begin if end - stop == 1 else stop - begin


def _chunks(prompts: Plan, quota_tokens: Mapping[int, int], room_tokens: int) -> Plan:
    """A chunk of the first prompt, and of those others that can give as many tokens."""
    first, count = prompts[0]
    if not first.sampling.exact:
        waiting, count = count, min(count, quota_tokens[first.id], room_tokens)
        if count == waiting - 1 and count > 2:
            count -= 1
    chosen: Plan = []
    for sequence, waiting in prompts:
        if sequence.sampling.exact:
            fits = waiting == count
        else:
            fits = waiting == count or waiting > count + 1 or sequence is first
            fits = fits and count <= quota_tokens[sequence.id]
        if fits and count <= room_tokens:
            chosen.append((sequence, count))
            room_tokens -= count
    return sorted(chosen, key=lambda each: each[0].seat)
