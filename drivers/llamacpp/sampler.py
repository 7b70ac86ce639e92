"""How the next token is drawn from logits.

A pure function of (sampling, token history, logits): there is no random state to save. Each draw
seeds a fresh generator with a mix of the seed and the position. Greedy picks are made in numpy, which
is faster than the native sampler; so is the repeat penalty, which then needs no state either.
Not here: where logits come from (slab.py).
"""

import math
from typing import TYPE_CHECKING, Final

from drivers.llamacpp import native
from drivers.llamacpp.native import lib
from kernel.device import Sampling
from kernel.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.intp]

PENALTY_WINDOW_TOKENS: Final = 64
_MASK64: Final = (1 << 64) - 1
_FILTERS: Final = 4  # samplers in the chain before the draw


def check(sampling: Sampling) -> None:
    """Raises UsageError for a value that makes no sense."""
    if not 0 <= sampling.temperature < math.inf:
        raise UsageError(f"temperature {sampling.temperature}; it is 0 or more")
    if not 0 <= sampling.top_k < 1 << 31:
        raise UsageError(f"top_k {sampling.top_k}; it is 0 (off) or more")
    if not 0 < sampling.top_p <= 1 or not 0 <= sampling.min_p <= 1:
        raise UsageError(f"top_p {sampling.top_p}, min_p {sampling.min_p}; they are between 0 and 1")
    if not 0 < sampling.repeat_penalty < math.inf:
        raise UsageError(f"repeat_penalty {sampling.repeat_penalty}; it is above 0, and 1 is off")


def mix(seed: int, position: int) -> int:
    """A 32-bit seed from (seed, position), by splitmix64's finaliser. Never 0xFFFFFFFF: it means random."""
    state = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK64
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _MASK64
    return ((state ^ state >> 31) >> 32) % 0xFFFFFFFF


class Sampler:
    """Draws for one sequence. Holds native memory until `free`."""

    def __init__(self, sampling: Sampling) -> None:
        check(sampling)
        self.greedy = sampling.temperature == 0
        self.edits = sampling.ignore_eos or sampling.repeat_penalty != 1
        self._sampling = sampling
        self._chain = None if self.greedy else _chain(sampling)

    def edit(self, row: "Logits", history: list[int], ends: "Ids") -> None:
        """Change logits in place: the repeat penalty, and no end of generation if it is to be ignored."""
        import numpy as np

        penalty = self._sampling.repeat_penalty
        if penalty != 1:
            recent = np.unique(history[-PENALTY_WINDOW_TOKENS:])
            values = row[recent]
            row[recent] = np.where(values > 0, values / penalty, values * penalty)
        if self._sampling.ignore_eos:
            row[ends] = -np.inf

    def draw(self, context: int, batch_index: int, position: int) -> int:
        """A random token from the logits of row `batch_index` of the last batch."""
        last = native.init_dist(mix(self._sampling.seed, position))
        native.chain_add(self._chain, last)
        token: int = native.sample(self._chain, context, batch_index)
        native.chain_remove(self._chain, _FILTERS)
        native.sampler_free(last)
        return token

    def free(self) -> None:
        if self._chain:
            native.sampler_free(self._chain)
            self._chain = None


def _chain(sampling: Sampling) -> int:
    """The filters before the draw; top_k first, or the others sort the whole vocabulary."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    native.chain_add(chain, lib.llama_sampler_init_top_k(sampling.top_k))
    native.chain_add(chain, lib.llama_sampler_init_top_p(sampling.top_p, 1))
    native.chain_add(chain, lib.llama_sampler_init_min_p(sampling.min_p, 1))
    native.chain_add(chain, lib.llama_sampler_init_temp(sampling.temperature))
    return chain  # type: ignore[no-any-return]
