"""The tree that the parser makes and the interpreter runs. Frozen values with spans; no behaviour.

Not here: how text becomes a tree (lexer, parser), what a tree does (interpreter).
"""

from dataclasses import dataclass
from typing import Literal

from kernel.errors import UsageError


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the text: characters start to end, end excluded."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Text:
    """Characters that stand for themselves. Quoted ones are never a pattern, a `~` or a `NAME=`."""

    text: str
    quoted: bool
    span: Span


@dataclass(frozen=True, slots=True)
class Variable:
    """`$x`, `${x}`, `${x:-default}`, `$?`, `$!`, `$#`, `$@`, `$1`."""

    name: str
    quoted: bool
    span: Span
    default: "Word | None" = None  # stands for a variable that is not set or empty


Part = Text | Variable


@dataclass(frozen=True, slots=True)
class Word:
    parts: tuple[Part, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Assignment:
    """`NAME=value`."""

    name: str
    value: Word
    span: Span


@dataclass(frozen=True, slots=True)
class Redirection:
    operator: Literal[">", ">>", "<"]
    target: Word
    span: Span


@dataclass(frozen=True, slots=True)
class Command:
    """Words with redirections, or assignments alone."""

    words: tuple[Word, ...]
    assignments: tuple[Assignment, ...]
    redirections: tuple[Redirection, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class AndOr:
    """`first && second || third`: each later command with the operator before it."""

    first: Command
    rest: tuple[tuple[Literal["&&", "||"], Command], ...]
    background: bool
    span: Span


@dataclass(frozen=True, slots=True)
class Script:
    items: tuple[AndOr, ...]


class ShellSyntaxError(UsageError):
    """The text is not a command line; `span` says where."""

    def __init__(self, message: str, text: str, span: Span, hint: str = "") -> None:
        super().__init__(message, hint)
        self.text = text
        self.span = span

    @property
    def line_number(self) -> int:
        return self.text.count("\n", 0, self.span.start) + 1

    def excerpt(self) -> str:
        """The line in question, and a caret under the place."""
        begin = self.text.rfind("\n", 0, self.span.start) + 1
        end = self.text.find("\n", begin)
        line = self.text[begin : None if end < 0 else end].replace("\t", " ")
        return f"{line}\n{' ' * (self.span.start - begin)}^"


class Incomplete(ShellSyntaxError):
    """Right so far, and more is needed: an open quote, a last backslash, `&&` at the end."""
