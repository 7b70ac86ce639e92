"""Prompts to tokens, checked: nothing that native code would die of gets past here.

Owner: the engine. Not here: chat templates (chat.py).
"""

from collections.abc import Sequence

from drivers.llamacpp.chat import Chat
from drivers.llamacpp.weights import Weights
from kernel.device import Prompt
from kernel.errors import ContextFull, UsageError

PIECE_CHARACTERS_MAX = 256  # longer than any vocabulary's longest piece


class Prompts:
    """Reads prompts for one model and one size of window."""

    def __init__(self, weights: Weights, window_tokens: int) -> None:
        self._weights = weights
        self._window_tokens = window_tokens
        self._chat = Chat(weights)

    def first(self, prompt: Prompt) -> tuple[list[int], int]:
        """(tokens, how many of them are prompt) of a sequence that begins."""
        _check_limit(prompt)
        self._check_length(prompt)
        if prompt.tokens:
            return self.replayed(prompt)
        if prompt.messages:
            tokens = self._chat.begin(prompt.messages)
        else:
            tokens = self._weights.tokenize(prompt.text, begins=bool(prompt.text), specials=True)
        return self._fitting(tokens, 0), len(tokens)

    def next(self, prompt: Prompt, history: Sequence[int]) -> list[int]:
        """The tokens to append to a history."""
        _check_limit(prompt)
        self._check_length(prompt)
        if prompt.tokens:
            tokens = self._known(prompt.tokens)
        elif prompt.messages:
            tokens = self._chat.go_on(prompt.messages, history[-1])
        else:
            tokens = self._weights.tokenize(prompt.text, begins=False, specials=True)
        return self._fitting(tokens, len(history))

    def replayed(self, prompt: Prompt) -> tuple[list[int], int]:
        """As `first`, for a history given as tokens. All of them are prompt if it does not say how many."""
        _check_limit(prompt)
        tokens, prompt_tokens = self._known(prompt.tokens), prompt.prompt_tokens or len(prompt.tokens)
        if not 0 < prompt_tokens <= len(tokens):
            raise UsageError(f"{prompt_tokens} prompt tokens of {len(tokens)}")
        bounds = [0, *prompt.reply_bounds, prompt_tokens]
        if len(bounds) % 2 or sorted(bounds) != bounds:
            raise UsageError(f"replies {prompt.reply_bounds} in {prompt_tokens} prompt tokens")
        self._fitting(tokens[:prompt_tokens], 0)
        if len(tokens) > self._window_tokens:
            self._fitting(tokens, 0)
        return tokens, prompt_tokens

    def _check_length(self, prompt: Prompt) -> None:
        """Refuse what cannot fit before it is tokenised: that takes a second for each MB, and all wait."""
        characters = len(prompt.text) + sum(len(content) for _, content in prompt.messages)
        if characters >= self._window_tokens * PIECE_CHARACTERS_MAX:
            raise ContextFull(
                f"{characters} characters leave no room in a context window of {self._window_tokens} tokens",
                "shorten the prompt, or load the model with a larger context",
            )

    def _known(self, tokens: tuple[int, ...]) -> list[int]:
        if tokens and (min(tokens) < 0 or max(tokens) >= self._weights.vocabulary_tokens):
            raise UsageError(f"the model's tokens are 0 to {self._weights.vocabulary_tokens - 1}")
        return list(tokens)

    def _fitting(self, tokens: list[int], used_tokens: int) -> list[int]:
        """The tokens, if there are any and they leave room for one more."""
        if not tokens:
            raise UsageError("the prompt is empty, or the model has no tokens for it")
        if (total := used_tokens + len(tokens)) >= self._window_tokens:
            raise ContextFull(
                f"{total} tokens leave no room in a context window of {self._window_tokens}",
                "shorten the prompt, or load the model with a larger context",
            )
        return tokens


def _check_limit(prompt: Prompt) -> None:
    if prompt.max_tokens < 0:
        raise UsageError(f"max_tokens {prompt.max_tokens}; it is 0 (no limit) or more")
