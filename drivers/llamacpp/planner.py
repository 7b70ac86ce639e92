"""Which tokens go into the next forward pass. Pure.

Continuous batching in two kinds of pass: one token each of all sequences that wait for their next
token, or chunks of prompts, of equal length. They alternate when both have something to do. Mixed
passes would not be faster (llama.cpp cuts them into parts of equal length, and each part reads the
weights again), and the parts could be single tokens: attention over one row is computed by another
kernel than over several, with other last bits, so a prompt's logits would depend on its neighbours.
For the same reason a prompt is not cut so that one token is left.
Not here: how much each may compute (quotas are the scheduler's).
"""

from collections.abc import Iterable, Mapping

from drivers.llamacpp.sequence import Sequence

Plan = list[tuple[Sequence, int]]  # sequence, how many of its tokens


def plan(
    sequences: Iterable[Sequence], quota_tokens: Mapping[int, int], room_tokens: int, prompts_first: bool
) -> Plan:
    """Sequences (in the order of their seats) and the tokens to compute of each, all the same number.

    `room_tokens` is at least the number of sequences.
    """
    decoding: Plan = []
    prompts: Plan = []
    for sequence in sequences:
        quota = quota_tokens.get(sequence.id, 0)
        if sequence.finish is None and quota > 0:
            waiting = len(sequence.tokens) - sequence.computed
            if waiting == 1 or quota == 1:
                decoding.append((sequence, 1))
            else:
                prompts.append((sequence, waiting))
    if prompts and (prompts_first or not decoding):
        return _chunks(prompts, quota_tokens, room_tokens)
    return decoding


def _chunks(prompts: Plan, quota_tokens: Mapping[int, int], room_tokens: int) -> Plan:
    """A chunk of the first prompt, and of those others that can give as many tokens."""
    first, waiting = prompts[0]
    count = min(waiting, quota_tokens[first.id], room_tokens)
    if count == waiting - 1 and count > 2:
        count -= 1
    chosen: Plan = []
    for sequence, waiting in prompts:
        fits = waiting == count or waiting > count + 1 or sequence is first
        if fits and count <= min(quota_tokens[sequence.id], room_tokens):
            chosen.append((sequence, count))
            room_tokens -= count
    return chosen
