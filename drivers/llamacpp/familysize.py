"""How many cells the slab of a family has, and for whom to make one: arithmetic, which loads nothing native.

Measured, 61 M parameters in Q8_0 on one Zen 4 core, 1000 tokens in common, the time of a pass over that on
streams of their own, by how many tokens each member has of its own:

    own      50    100   170   240   300   370   430   500
    2 seats  0.93  0.95  0.99  0.94  1.04  1.01  1.11  1.09
    4 seats  0.79  0.84  0.88  0.96  0.98  1.02  1.10  1.07
    8 seats  0.71  0.77  0.84  0.95  1.03  1.10  1.25  1.29

With 512 in common, 8 members are even at 170. So the cells for what is own are twice the common ones: full
when 8 have become as slow as on streams; two or four that stay longer lose a tenth. Making such a slab
takes 12 to 17 ms, a copy of 1000 tokens 3.5 ms, a share 0.05 ms.
Owner: none, these are functions. Not here: what a family is, and who sits on its slab (family.py).
"""

from typing import Final

from drivers.llamacpp.layout import WINDOW_STEP_TOKENS

SEATS: Final = 16
LEAST_TOKENS: Final = 512  # in common; of fewer, several copies are made sooner than a slab
_OWN_PART: Final = 2  # all members' own tokens together, as a multiple of the common ones
_MOST_OWN_TOKENS: Final = 512  # per seat: what an ordinary seat has for an answer at first
_FIRST_PART: Final = 4  # of the cells for what is own, the first two may fill this part


def cells_for(common_tokens: int) -> int:
    """Of the slab of a family that has so many tokens in common."""
    return -(-(common_tokens + _own_cells(common_tokens)) // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS


def pays(common_tokens: int, own_tokens: int) -> bool:
    """Whether to make one for the first two, who have so many tokens of their own."""
    return common_tokens >= LEAST_TOKENS and _FIRST_PART * own_tokens <= _own_cells(common_tokens)


def _own_cells(common_tokens: int) -> int:
    return min(_OWN_PART * common_tokens, SEATS * _MOST_OWN_TOKENS)
