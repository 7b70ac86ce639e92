"""Tokens to a tree, by recursive descent. Pure.

list    := and_or ((';' | '&' | newline) and_or)*
and_or  := command (('&&' | '||') command)*
command := NAME=word+ | word+ with redirections anywhere
"""

import re
from typing import Literal, cast

from shell.lexer import Token, tokenize
from shell.syntax import (
    AndOr,
    Assignment,
    Command,
    Incomplete,
    Redirection,
    Script,
    ShellSyntaxError,
    Span,
    Text,
    Word,
)

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=")


def parse(text: str) -> Script:
    """The tree of a text. Raises ShellSyntaxError; Incomplete if more text could mend it."""
    return _Parser(text).script()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokenize(text)
        self.at = 0

    def script(self) -> Script:
        items: list[AndOr] = []
        self._skip_newlines()
        while self._peek() is not None:
            items.append(self._and_or())
            self._skip_newlines()
        return Script(tuple(items))

    def _and_or(self) -> AndOr:
        first = self._command()
        rest: list[tuple[Literal["&&", "||"], Command]] = []
        while (operator := self._take("&&", "||")) is not None:
            self._skip_newlines()
            if self._peek() is None:
                raise Incomplete(f"nothing follows `{operator.text}`", self.text, operator.span)
            rest.append((cast(Literal["&&", "||"], operator.text), self._command()))
        end = rest[-1][1].span.end if rest else first.span.end
        terminator = self._take(";", "&")
        if terminator is None and (token := self._peek()) is not None and token.kind != "newline":
            raise self._unexpected(token)
        background = terminator is not None and terminator.text == "&"
        return AndOr(first, tuple(rest), background, Span(first.span.start, end))

    def _command(self) -> Command:
        assignments: list[Assignment] = []
        words: list[Word] = []
        redirections: list[Redirection] = []
        begin = self._peek()
        while (token := self._peek()) is not None:
            if token.word is not None:
                self.at += 1
                assignment = None if words else _assignment(token.word)
                if assignment:
                    assignments.append(assignment)
                else:
                    words.append(token.word)
            elif token.text in (">", ">>", "<"):
                redirections.append(self._redirection())
            else:
                break
        return self._checked(begin, assignments, words, redirections)

    def _checked(
        self,
        begin: Token | None,
        assignments: list[Assignment],
        words: list[Word],
        redirections: list[Redirection],
    ) -> Command:
        assert begin is not None
        if not words and not assignments and not redirections:
            raise self._unexpected(begin)
        span = Span(begin.span.start, self.tokens[self.at - 1].span.end)
        if assignments and words:
            message = (
                f"a variable cannot be set for one command alone: write `{assignments[-1].name}=…;` first"
            )
            raise ShellSyntaxError(message, self.text, words[0].span)
        if not words and redirections:
            raise ShellSyntaxError("no command to redirect", self.text, redirections[0].span)
        return Command(tuple(words), tuple(assignments), tuple(redirections), span)

    def _redirection(self) -> Redirection:
        operator = self.tokens[self.at]
        self.at += 1
        target = self._peek()
        if target is None or target.word is None:
            raise ShellSyntaxError(f"`{operator.text}` needs a file name", self.text, operator.span)
        self.at += 1
        kind = cast(Literal[">", ">>", "<"], operator.text)
        return Redirection(kind, target.word, Span(operator.span.start, target.span.end))

    def _peek(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _take(self, *operators: str) -> Token | None:
        token = self._peek()
        if token is None or token.kind != "operator" or token.text not in operators:
            return None
        self.at += 1
        return token

    def _skip_newlines(self) -> None:
        while (token := self._peek()) is not None and token.kind == "newline":
            self.at += 1

    def _unexpected(self, token: Token) -> ShellSyntaxError:
        shown = "newline" if token.kind == "newline" else token.text
        return ShellSyntaxError(f"unexpected `{shown}`", self.text, token.span)


def _assignment(word: Word) -> Assignment | None:
    """`NAME=` must stand bare; the value may be anything, also nothing."""
    first = word.parts[0] if word.parts else None
    if not isinstance(first, Text) or first.quoted:
        return None
    found = _ASSIGNMENT.match(first.text)
    if found is None:
        return None
    after = first.span.start + found.end()
    rest = Text(first.text[found.end() :], False, Span(after, first.span.end))
    value = Word(((rest,) if rest.text else ()) + word.parts[1:], Span(after, word.span.end))
    return Assignment(found.group(1), value, word.span)
