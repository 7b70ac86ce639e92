"""Text to tokens: the one tokenizer for running, highlighting and completion. Pure.

Words keep their parts (quoted text, bare text, variables), because what a part means depends on how
it was quoted. What the grammar will have one day (`|`, `$(`, `<<`, `2>`) is refused with its place,
never read as something else.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shell.syntax import Incomplete, Part, ShellSyntaxError, Span, Text, Variable, Word

OPERATORS = ("&&", "||", ">>", ";", "&", ">", "<")
_REFUSED = ("&>", "<<", ">&", "<&", ">|", "|", "(", ")", "`")
_METACHARACTERS = frozenset(" \t\r\n;&|<>()")
_BARE = re.compile(r"[^ \t\r\n;&|<>()'\"\\$`]+")
_IN_DOUBLE_QUOTES = re.compile(r'[^"\\$`]+')
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[?!#@]|[0-9]")
_BRACED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*|[?!#@]|[0-9]+)(\}|:-)")
_BARE_DEFAULT = re.compile(r"[^}'\"\\$`]+")
_DOUBLE_QUOTED_DEFAULT = re.compile(r'[^}"\\$`]+')
_SAFE = re.compile(r"[A-Za-z0-9_@%+:,./^-]+")


@dataclass(frozen=True, slots=True)
class Token:
    """kind "operator" has its text; "word" has its parts in `word`."""

    kind: Literal["word", "operator", "newline", "comment"]
    text: str
    span: Span
    word: Word | None = None


def tokenize(text: str) -> list[Token]:
    """All tokens but comments. Raises ShellSyntaxError; Incomplete if more text could mend it."""
    return [token for token in scan(text) if token.kind != "comment"]


def scan(text: str) -> Iterator[Token]:
    """Tokens one by one, comments too: a highlighter keeps those before the error."""
    return _Lexer(text).tokens()


def quote(word: str) -> str:
    """The word as one would type it, so that it is read back as exactly this word."""
    if _SAFE.fullmatch(word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"


class _Lexer:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def tokens(self) -> Iterator[Token]:
        while True:
            self._skip_blanks()
            if self.at == len(self.text):
                return
            yield self._token()

    def _skip_blanks(self) -> None:
        while self.at < len(self.text):
            if self.text[self.at] in " \t\r":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            else:
                return

    def _token(self) -> Token:
        start = self.at
        character = self.text[start]
        if character == "\n":
            self.at += 1
            return Token("newline", "\n", Span(start, self.at))
        if character == "#":
            end = self.text.find("\n", start)
            self.at = len(self.text) if end < 0 else end
            return Token("comment", self.text[start : self.at], Span(start, self.at))
        return self._operator() or self._word()

    def _operator(self) -> Token | None:
        start = self.at
        for operator in OPERATORS:
            if self.text.startswith(operator, start):
                self._refuse(start)
                self.at += len(operator)
                return Token("operator", operator, Span(start, self.at))
        self._refuse(start)
        return None

    def _refuse(self, start: int) -> None:
        if self.text.startswith(("||", "&&"), start):
            return
        for refused in _REFUSED:
            if self.text.startswith(refused, start):
                raise self._error(
                    f"unexpected `{refused}`", start, len(refused), "to use it as text, put it in quotes"
                )

    def _word(self) -> Token:
        start = self.at
        parts: list[Part] = []
        while self.at < len(self.text) and self.text[self.at] not in _METACHARACTERS:
            parts.extend(self._part())
        span = Span(start, self.at)
        text = self.text[start : self.at]
        if text.isdecimal() and self.text.startswith((">", "<"), self.at):
            message = f"unexpected `{text}{self.text[self.at]}`: a stream cannot be chosen by number"
            raise self._error(message, start, len(text) + 1)
        return Token("word", text, span, Word(tuple(parts), span))

    def _part(self) -> Iterator[Part]:
        match self.text[self.at]:
            case "'":
                yield self._single_quoted()
            case '"':
                yield from self._double_quoted()
            case "\\":
                yield from self._escaped()
            case "$":
                yield self._dollar(quoted=False)
            case "`":
                self._refuse(self.at)
            case _:
                yield self._run(_BARE, quoted=False)

    def _run(self, pattern: re.Pattern[str], *, quoted: bool) -> Text:
        start = self.at
        found = pattern.match(self.text, start)
        assert found is not None
        self.at = found.end()
        return Text(found.group(), quoted, Span(start, self.at))

    def _single_quoted(self) -> Text:
        start = self.at
        end = self.text.find("'", start + 1)
        if end < 0:
            raise self._incomplete("the quote ' is not closed", start)
        self.at = end + 1
        return Text(self.text[start + 1 : end], True, Span(start, self.at))

    def _double_quoted(self) -> Iterator[Part]:
        start = self.at
        self.at += 1
        yield Text("", True, Span(start, self.at))  # `""` is a word too
        while self.at < len(self.text):
            match self.text[self.at]:
                case '"':
                    self.at += 1
                    return
                case "\\":
                    yield from self._escaped(only='$"\\`\n')
                case "$":
                    yield self._dollar(quoted=True)
                case "`":
                    self._refuse(self.at)
                case _:
                    yield self._run(_IN_DOUBLE_QUOTES, quoted=True)
        raise self._incomplete('the quote " is not closed', start)

    def _escaped(self, only: str = "") -> Iterator[Part]:
        """A backslash and the next character; with `only`, others keep their backslash."""
        start = self.at
        if start + 1 == len(self.text):
            raise self._incomplete("nothing follows the backslash", start)
        following = self.text[start + 1]
        self.at += 2
        if following == "\n":
            return
        text = following if not only or following in only else "\\" + following
        yield Text(text, True, Span(start, self.at))

    def _dollar(self, *, quoted: bool) -> Part:
        start = self.at
        if self.text.startswith("$(", start):
            raise self._error("unexpected `$(`", start, 2, "to use it as text, put it in single quotes")
        if self.text.startswith("${", start):
            return self._braced(quoted=quoted)
        found = _NAME.match(self.text, start + 1)
        if found is None:
            self.at += 1
            return Text("$", quoted, Span(start, self.at))
        self.at = found.end()
        return Variable(found.group(), quoted, Span(start, self.at))

    def _braced(self, *, quoted: bool) -> Variable:
        start = self.at
        found = _BRACED.match(self.text, start + 1)
        if found is None:
            if "}" not in self.text[start:]:
                raise self._incomplete("the brace { is not closed", start)
            raise self._error("not a variable's name", start, 2, "write ${NAME} or ${NAME:-default}")
        self.at = found.end()
        default = self._default(start, quoted=quoted) if found.group(2) == ":-" else None
        return Variable(found.group(1), quoted, Span(start, self.at), default)

    def _default(self, brace: int, *, quoted: bool) -> Word:
        """What stands between `:-` and `}`: blanks too, for expansions never split."""
        start = self.at
        parts: list[Part] = []
        while not self.text.startswith("}", self.at):
            if self.at == len(self.text):
                raise self._incomplete("the brace { is not closed", brace)
            parts.extend(self._default_part(quoted=quoted))
        self.at += 1
        return Word(tuple(parts), Span(start, self.at - 1))

    def _default_part(self, *, quoted: bool) -> Iterator[Part]:
        match self.text[self.at]:
            case "'" if not quoted:
                yield self._single_quoted()
            case '"' if not quoted:
                yield from self._double_quoted()
            case '"':
                raise self._error('unexpected `"` inside the braces', self.at, 1)
            case "\\":
                yield from self._escaped(only='$"\\`}\n' if quoted else "")
            case "$":
                yield self._dollar(quoted=quoted)
            case "`":
                self._refuse(self.at)
            case _:
                yield self._run(_DOUBLE_QUOTED_DEFAULT if quoted else _BARE_DEFAULT, quoted=True)

    def _error(self, message: str, start: int, length: int, hint: str = "") -> ShellSyntaxError:
        return ShellSyntaxError(message, self.text, Span(start, start + length), hint)

    def _incomplete(self, message: str, start: int) -> Incomplete:
        return Incomplete(message, self.text, Span(start, len(self.text)))
