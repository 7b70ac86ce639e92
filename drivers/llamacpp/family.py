"""The slab of a family: those who begin with the same long history hold its KV in the same cells.

A fork, or one more with the same prompt, gets a seat on the unified slab of whom it goes on from; if that one
sits elsewhere, it is moved to a slab that is made for it. Taking over costs microseconds and no cells. But
everybody attends over everybody's cells, so a family is good for as long as what its members have of their
own is little beside what they have in common; who has most of its own moves to an ordinary seat when the
cells are used up.

Measured, 61 M parameters on one Zen 4 core, 8 members, 1000 tokens in common: a pass takes 0.7 of what it
takes on streams of their own while each has 100 tokens of its own, as much with 250, and 1.3 times as much
with 500; that is, until their own tokens together are twice the common ones.
Owner: none, pure arithmetic. Not here: the native cells (slab.py), who sits where (seating.py, slabs.py).
"""

from typing import Final

from drivers.llamacpp.layout import WINDOW_STEP_TOKENS

SEATS: Final = 16
LEAST_TOKENS: Final = (
    512  # in common; fewer are copied: making a slab takes longer than several copies of them
)
SPARE_TOKENS: Final = 32  # cells that a newcomer must find beside those it needs at once
_OWN_PART: Final = 2  # all members' own tokens together, as a multiple of the common ones
_MOST_OWN_TOKENS: Final = 512  # per seat: what an ordinary seat has for an answer at first


def cells(common_tokens: int) -> int:
    """Of the slab of a family that has so many tokens in common."""
    own = min(_OWN_PART * common_tokens, SEATS * _MOST_OWN_TOKENS)
    return -(-(common_tokens + own) // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS


def pays(common_tokens: int, own_tokens: int) -> bool:
    """Whether to make one for the first two, who have so many tokens of their own."""
    return common_tokens >= LEAST_TOKENS and 2 * own_tokens <= common_tokens
