"""One sequence of an engine: its tokens, how far they are computed, and the text they make.

Owner: the engine. Everything but the sampler's native memory is plain data and can be copied.
Not here: the KV cache (slab.py), who gets which seat (slabs.py).
"""

import codecs
from dataclasses import dataclass, field

from drivers.llamacpp.sampler import Sampler
from drivers.llamacpp.slab import Slab
from drivers.llamacpp.weights import Weights
from kernel.device import Finish, Sampling

_new_decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens[:computed]` are in the KV cache. The last token drawn is computed by the next step."""

    id: int
    tokens: list[int]
    prompt_tokens: int  # where the present answer begins
    max_tokens: int  # of the present answer; 0: no limit
    window_tokens: int  # of the engine
    sampling: Sampling
    sampler: Sampler
    computed: int = 0
    given_tokens: int = 0  # tokens that were not drawn here: computing them counts as prompt
    finish: Finish | None = None
    reported: bool = False  # whether a step has told `finish`
    stuck: bool = False  # whether a step has told that its slab has no room for it
    reply_bounds: tuple[int, ...] = ()  # where earlier replies begin and end, in turn
    shareable_tokens: int = 0  # how many of its first tokens may be computed by another sequence
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _new_decoder("replace"))
    rests: bool = field(default=False, init=False)  # it has finished, or outgrown its slab
    slab: Slab = field(init=False)
    seat: int = field(default=-1, init=False)
    _limit_tokens: int = field(default=0, init=False)  # from so many on, it may have finished or outgrown

    def sit(self, slab: Slab, seat: int) -> None:
        """It has a seat now, or another one; of the KV, `computed` tokens are there."""
        self.slab, self.seat = slab, seat
        self._set_limit()

    def append(self, token: int, weights: Weights) -> str:
        """Take a drawn token; returns the characters it completes and sets `finish` if it is the last."""
        self.tokens.append(token)
        if token in weights.ends and not self.sampling.ignore_eos:
            self.finish, self.rests = "stop", True
            return self.decoder.decode(b"", True)
        if len(self.tokens) >= self._limit_tokens:
            self._set_limit()
        return self.decoder.decode(weights.piece(token), self.finish is not None)

    def begin_answer(self, prompt_tokens: int, max_tokens: int, weights: Weights) -> None:
        """Say where the answer begins. What follows was emitted before: only its open character is kept.

        Sets `finish` if the history is complete already.
        """
        self.prompt_tokens, self.max_tokens = prompt_tokens, max_tokens
        self.given_tokens = len(self.tokens)
        self.finish, self.reported = None, False
        self.decoder.reset()
        answer = self.tokens[prompt_tokens:]
        for token in answer:
            self.decoder.decode(weights.piece(token))
        if answer and answer[-1] in weights.ends and not self.sampling.ignore_eos:
            self.finish = "stop"
        self._set_limit()

    def copy(self, target: int, sampling: Sampling, sampler: Sampler) -> "Sequence":
        twin = Sequence(
            target,
            self.tokens.copy(),
            self.prompt_tokens,
            self.max_tokens,
            self.window_tokens,
            sampling,
            sampler,
            self.computed,
            self.given_tokens,
            self.finish,
            self.reported,
            reply_bounds=self.reply_bounds,
        )
        twin.decoder.setstate(self.decoder.getstate())
        return twin

    def _set_limit(self) -> None:
        """Look at the limits: `finish`, `rests`, and when to look again."""
        tokens, room = len(self.tokens), self.slab.window_tokens
        length = self.prompt_tokens + self.max_tokens if self.max_tokens else self.window_tokens
        if self.finish is None and tokens >= min(length, self.window_tokens):
            self.finish = "length" if self.max_tokens and tokens >= length else "context"
        self._limit_tokens = min(length, self.window_tokens, room + 1)
        self.rests = self.finish is not None or tokens > room
