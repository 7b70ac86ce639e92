"""One sequence of an engine: its tokens, how far they are computed, and the text they make.

Owner: the engine. Everything but the sampler's native memory is plain data and can be copied.
Not here: the KV cache (slab.py).
"""

import codecs
from dataclasses import dataclass, field

from drivers.llamacpp.sampler import Sampler
from drivers.llamacpp.weights import Weights
from kernel.device import Finish, Sampling

_new_decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(slots=True)
class Sequence:
    """`tokens[:computed]` are in the KV cache. The last token drawn is computed by the next step."""

    id: int
    seat: int
    tokens: list[int]
    prompt_tokens: int  # where the present answer begins
    max_tokens: int  # of the present answer; 0: no limit
    window_tokens: int
    sampling: Sampling
    sampler: Sampler
    computed: int = 0
    given_tokens: int = 0  # tokens that were not drawn here: computing them counts as prompt
    finish: Finish | None = None
    reported: bool = False  # whether a step has told `finish`
    shareable_tokens: int = 0  # how many of its first tokens may be computed by another sequence
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _new_decoder("replace"))

    def append(self, token: int, weights: Weights) -> str:
        """Take a drawn token; returns the characters it completes and sets `finish` if it is the last."""
        self.tokens.append(token)
        if token in weights.ends and not self.sampling.ignore_eos:
            self.finish = "stop"
            return self.decoder.decode(b"", True)
        self.finish = finish = self._limit()
        return self.decoder.decode(weights.piece(token), finish is not None)

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
        if answer:
            ended = answer[-1] in weights.ends and not self.sampling.ignore_eos
            self.finish = "stop" if ended else self._limit()

    def copy(self, target: int, seat: int, sampling: Sampling, sampler: Sampler) -> "Sequence":
        twin = Sequence(
            target,
            seat,
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
        )
        twin.decoder.setstate(self.decoder.getstate())
        return twin

    def _limit(self) -> Finish | None:
        if self.max_tokens and len(self.tokens) - self.prompt_tokens >= self.max_tokens:
            return "length"
        return "context" if len(self.tokens) >= self.window_tokens else None
