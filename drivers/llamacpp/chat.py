"""Chat messages to prompt text, by the model file's own template, and on to tokens.

llama.cpp knows the common templates; others are rendered by jinja2 in its sandbox (in the worker: a
template that never ends is stopped by the supervisor). A message cannot smuggle in control tokens: if
its text would be read as one, the template around it and the message are tokenised apart, control
tokens being recognised in the template only. Where a template rewrites such a message, so that its
place in the result cannot be found, it is refused.
Not here: which turn comes when; the history is the kernel's.
"""

import ctypes
import re
from collections.abc import Sequence

from drivers.llamacpp.native import lib
from drivers.llamacpp.weights import Weights, encode
from kernel.errors import ModelInvalid, UsageError

Message = tuple[str, str]  # role, content
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,32}")
_MARK = "7f3Qz{}Zq9k"  # stands for a message while its template is rendered


class Chat:
    """Renders and tokenises messages for one model."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def begin(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation, up to where the model's answer begins."""
        tokens = self._tokens(messages, skip=0, begins=True)
        bos = self._weights.bos
        return tokens[1:] if tokens[:2] == [bos, bos] else tokens  # the template had written one as well

    def go_on(self, messages: Sequence[Message], last: int) -> list[int]:
        """Tokens that follow an answer ending in token `last`: its end, if missing, and the new messages."""
        if not self._weights.chat_template:
            return self._tokens([("", ""), *messages], skip=1, begins=False)
        tokens = self._tokens([("user", "-"), ("assistant", "-"), *messages], skip=2, begins=False)
        return tokens[1:] if tokens[:1] == [last] and last in self._weights.ends else tokens

    def _tokens(self, messages: Sequence[Message], skip: int, begins: bool) -> list[int]:
        """Tokenise what follows message number `skip` (1 is the first; 0: everything)."""
        for role, _ in messages:
            if role and not _ROLE.fullmatch(role):
                raise UsageError(f"{role!r} is no role")
        clean = all(self._is_clean(content) for _, content in messages[skip:])
        if clean and not skip:
            return self._weights.tokenize(self._render(messages), begins=begins, specials=True)
        parts = self._cut(messages)[skip:]
        contents = [content for _, content in messages[skip:]]
        if clean:
            joined = parts[0] + "".join(a + b for a, b in zip(contents, parts[1:], strict=True))
            return self._weights.tokenize(joined, begins=begins, specials=True)
        tokens = self._weights.tokenize(parts[0], begins=begins, specials=True)
        for content, part in zip(contents, parts[1:], strict=True):
            tokens += self._weights.tokenize(content, begins=False, specials=False)
            tokens += self._weights.tokenize(part, begins=False, specials=True)
        return tokens

    def _is_clean(self, content: str) -> bool:
        """Whether nothing in the text reads as a control token (NUL would end it in C)."""
        tokenize = self._weights.tokenize
        return "\0" not in content and (
            tokenize(content, begins=False, specials=True) == tokenize(content, begins=False, specials=False)
        )

    def _cut(self, messages: Sequence[Message]) -> list[str]:
        """The text before, between and after the messages' contents."""
        marks = [_MARK.format(number) for number in range(len(messages))]
        text = self._render([(role, mark) for (role, _), mark in zip(messages, marks, strict=True)])
        parts = re.split("|".join(map(re.escape, marks)), text)
        if len(parts) != len(messages) + 1 or re.findall("|".join(map(re.escape, marks)), text) != marks:
            raise UsageError("this model's chat template rewrites messages; it cannot take this one safely")
        return parts

    def _render(self, messages: Sequence[Message]) -> str:
        template = self._weights.chat_template
        if not template:
            return "\n".join(content for _, content in messages)
        known = _render_native(template, messages)
        return self._render_jinja(template, messages) if known is None else known

    def _render_jinja(self, template: str, messages: Sequence[Message]) -> str:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        vocabulary = lib.llama_model_get_vocab(self._weights.handle)
        bos, eos = (
            (lib.llama_vocab_get_text(vocabulary, token) or b"").decode("utf-8", "replace")
            if token >= 0
            else ""
            for token in (self._weights.bos, lib.llama_vocab_eos(vocabulary))
        )
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        sandbox.globals["raise_exception"] = _raise_exception
        try:
            return sandbox.from_string(template).render(
                messages=[{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=eos,
            )
        except UsageError:
            raise
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as reason:
            raise ModelInvalid(f"the model's chat template fails: {reason}"[:300]) from None


def _raise_exception(message: str) -> None:
    """What templates call on a conversation they do not take."""
    raise UsageError(f"the model's chat template refuses: {message}"[:300])


def _render_native(template: str, messages: Sequence[Message]) -> str | None:
    """By llama.cpp's list of known templates; None if this is not one of them."""
    chat = (lib.llama_chat_message * len(messages))()
    for slot, (role, content) in zip(chat, messages, strict=True):
        slot.role, slot.content = encode(role), encode(content)
    size = lib.llama_chat_apply_template(encode(template), chat, len(messages), True, None, 0)
    if size < 0:
        return None
    buffer = ctypes.create_string_buffer(size + 1)
    lib.llama_chat_apply_template(encode(template), chat, len(messages), True, buffer, size + 1)
    return buffer.raw[:size].decode("utf-8", "surrogateescape")
