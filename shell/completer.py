"""Completion: commands, flags, models, PIDs, jobs, files. Imports prompt-toolkit.

What an argument may be comes from its command's `CommandSpec`.
"""

from argparse import Action
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from kernel.errors import LlmosError
from kernel.units import short_bytes
from shell.lexer import Token, quote, tokenize
from shell.registry import Arguments, Completes
from shell.session import Shell
from shell.syntax import ShellSyntaxError, Text
from shell.terminal import fit, one_line


@dataclass(frozen=True, slots=True)
class Line:
    """The command before the cursor: its words, the word under the cursor, and where that begins."""

    words: tuple[str, ...]
    current: str
    start: int
    is_file: bool = False  # after a redirection


@dataclass(frozen=True, slots=True)
class Candidate:
    text: str
    meta: str = ""


def read_line(text: str) -> Line | None:
    """What is being typed at the end of the text; None where nothing can be completed."""
    for closing in ("", "'", '"'):
        try:
            tokens = tokenize(text + closing)
        except ShellSyntaxError:
            continue
        return _line(tokens, text)
    return None


def _line(tokens: list[Token], text: str) -> Line:
    current, start = "", len(text)
    if tokens and tokens[-1].word is not None and tokens[-1].span.end >= len(text):
        last = tokens.pop()
        current, start = _constant(last), last.span.start
    words: list[str] = []
    is_file = bool(tokens) and tokens[-1].text in (">", ">>", "<")
    skip = False
    for token in tokens:
        if token.word is None:
            skip = token.text in (">", ">>", "<")
            words = words if skip else []
        elif not skip:
            words.append(_constant(token))
        else:
            skip = False
    return Line(tuple(words), current, start, is_file)


def _constant(token: Token) -> str:
    assert token.word is not None
    return "".join(part.text if isinstance(part, Text) else f"${part.name}" for part in token.word.parts)


class ShellCompleter(Completer):
    """Adapts `candidates` to prompt-toolkit; runs on a thread of its own, on snapshots only."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        line = read_line(text)
        if line is None:
            return
        try:
            for candidate in candidates(self._shell, line):
                yield Completion(
                    _typed(candidate.text),
                    start_position=line.start - len(text),
                    display=one_line(candidate.text),
                    display_meta=fit(one_line(candidate.meta), 50),
                )
        except LlmosError:
            return


def _typed(text: str) -> str:
    """A candidate as it is typed. A home folder stays `~`, a folder's quote stays open to go on."""
    if text.startswith("~/") and quote(text[2:]) == text[2:]:
        return text
    return quote(text)


def candidates(shell: Shell, line: Line) -> list[Candidate]:
    """What the current word could become, best first. A plugin is never imported for it."""
    if line.is_file:
        return list(files(line.current))
    if not line.words:
        return _matching(_commands(shell), line.current)
    spec = shell.registry.entry(line.words[0]).spec if line.words[0] in shell.registry else None
    if spec is None:
        return []
    parser = spec.parser()
    words = line.words[1:]
    if parser.takes_rest and (rest := _rest(parser, words)) is not None:
        return candidates(shell, Line(rest, line.current, line.start))
    if line.current.startswith("-") and "--" not in words:
        return _matching(_options(parser), line.current)
    return list(_arguments(shell, parser, words, line.current))


def _rest(parser: Arguments, words: tuple[str, ...]) -> tuple[str, ...] | None:
    """The words of the command within a command (`nice -n 5 run …`); None if it has not begun."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if _takes_value(parser, words[at]) else 1
    return words[at:] if at <= len(words) and (at == 0 or not _takes_value(parser, words[-1])) else None


def _takes_value(parser: Arguments, word: str) -> bool:
    return any(word in action.option_strings and action.nargs != 0 for action in parser.actions)


def _arguments(shell: Shell, parser: Arguments, words: tuple[str, ...], current: str) -> Iterator[Candidate]:
    action = _action(parser, words)
    if action is None:
        return
    for kind in parser.completes.get(action.dest, ()):
        yield from files(current) if kind == "file" else _matching(_things(shell, kind), current)
    if action.choices:
        yield from _matching([Candidate(str(choice)) for choice in action.choices], current)


def _action(parser: Arguments, words: tuple[str, ...]) -> Action | None:
    """The option that waits for its value, or the positional argument whose turn it is."""
    positionals = [action for action in parser.actions if not action.option_strings]
    waiting: Action | None = None
    given = 0
    for word in words:
        if waiting is not None:
            waiting = None
            continue
        options = [action for action in parser.actions if word in action.option_strings]
        if options:
            waiting = options[0] if options[0].nargs != 0 else None
        else:
            given += 1
    if waiting is not None:
        return waiting
    if not positionals:
        return None
    last = positionals[-1]
    return positionals[given] if given < len(positionals) else (last if last.nargs in ("*", "+") else None)


def _things(shell: Shell, kind: Completes) -> list[Candidate]:
    match kind:
        case "command":
            return _commands(shell)
        case "model":
            return [Candidate(model.name, _about(model.state, model.info)) for model in shell.system.models()]
        case "pid":
            return [
                Candidate(str(p.pid), f"{p.state} {p.command}") for p in shell.system.snapshot().processes
            ]
        case "job":
            return [Candidate(f"%{job.number}", job.command) for job in shell.jobs]
    return []


def _about(state: str, info: object) -> str:
    size = getattr(info, "file_bytes", None)
    return f"{state} {short_bytes(size)}" if size is not None else state


def _commands(shell: Shell) -> list[Candidate]:
    rows = [Candidate(entry.name, entry.summary) for entry in shell.registry]
    return rows + [Candidate(alias, f"= {name}") for alias, name in sorted(shell.registry.aliases.items())]


def _options(parser: Arguments) -> list[Candidate]:
    return [
        Candidate(option, action.help or "")
        for action in parser.actions
        for option in action.option_strings
        if option.startswith("--") or len(action.option_strings) == 1
    ]


def _matching(rows: list[Candidate], current: str) -> list[Candidate]:
    """Those that begin with what was typed; failing that, those that contain it."""
    typed = current.lower()
    begin = [row for row in rows if row.text.lower().startswith(typed)]
    return begin or [row for row in rows if typed in row.text.lower()]


def files(current: str) -> Iterator[Candidate]:
    folder, _, begin = current.rpartition("/")
    shown = current[: len(current) - len(begin)]
    try:
        entries = sorted(Path(folder + "/" if shown else ".").expanduser().iterdir())
    except (OSError, ValueError, RuntimeError):
        return
    for entry in entries:
        if entry.name.startswith(begin) and (begin or not entry.name.startswith(".")):
            yield Candidate(shown + entry.name + ("/" if entry.is_dir() else ""))
