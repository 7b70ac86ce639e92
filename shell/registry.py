"""Commands by name. One `CommandSpec` feeds arguments, help, checking and completion.

A plugin's command is registered by name and imported at its first use; what goes wrong inside it
becomes one line, and the shell lives on.
"""

from __future__ import annotations

import argparse
import difflib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from kernel.errors import CommandNotFound, LlmosError, UsageError
from shell.interrupts import ToldToGo

if TYPE_CHECKING:
    from shell.session import Shell

Completes = Literal["model", "pid", "job", "file", "command"]
Group = Literal["processes", "models", "system", "shell", "plugins"]

_NEAR = 0.75  # likeness of what is suggested; below it, `export` is like `report`
_NOT_ITS_OWN = ("shell", "llmos", "importlib")  # modules that a plugin's code is called through


class Arguments(argparse.ArgumentParser):
    """An argument parser that never exits or prints, and knows what each argument completes to."""

    def __init__(self, name: str) -> None:
        super().__init__(prog=name, add_help=False, exit_on_error=False, allow_abbrev=False)
        self.completes: dict[str, tuple[Completes, ...]] = {}

    def add(self, *names: str, completes: tuple[Completes, ...] = (), **options: Any) -> None:
        """`add_argument`, and the kinds of thing that the argument names."""
        action = self.add_argument(*names, **options)
        if completes:
            self.completes[action.dest] = completes

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("-")]
        if message.startswith("unrecognized arguments") and unknown:
            hint = f"`{self.prog} -h` lists them; after `--` every word is plain text"
            raise UsageError(f"{self.prog}: no option `{unknown[0]}`", hint)
        raise UsageError(f"{self.prog}: {message}", f"`{self.prog} -h` shows how to use it")

    @property
    def actions(self) -> list[argparse.Action]:
        return self._actions

    @property
    def takes_rest(self) -> bool:
        """The last argument is a whole command: nothing after its first word is an option of ours."""
        return any(action.nargs == argparse.REMAINDER for action in self._actions)


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """A command. `run` returns its exit code; it raises LlmosError for what the user can be told."""

    name: str
    summary: str
    run: Callable[[Shell, argparse.Namespace], int]
    arguments: Callable[[Arguments], None] | None = None
    examples: tuple[str, ...] = ()
    notes: str = ""
    group: Group = "plugins"
    aliases: tuple[str, ...] = ()
    background: bool = False  # it can start a process, so `&` means something
    patterns: bool = True  # a bare `*.md` among its words becomes file names
    rewrite: Callable[[list[str]], list[str]] | None = None  # spellings that argparse cannot read (`-9`)

    def parser(self) -> Arguments:
        parser = Arguments(self.name)
        if self.arguments:
            self.arguments(parser)
        return parser

    def parse(self, words: list[str]) -> argparse.Namespace | None:
        """The arguments; None if help is asked for. Raises UsageError."""
        parser = self.parser()
        if _asks_help(words, parser):
            return None
        if self.rewrite:
            words = self.rewrite(words)
        try:
            if parser.takes_rest:
                return parser.parse_args(words)
            return parser.parse_intermixed_args(words)
        except argparse.ArgumentError as error:
            parser.error(_readable(error))


def _asks_help(words: list[str], parser: Arguments) -> bool:
    if parser.takes_rest:
        words = words[:1]
    elif "--" in words:
        words = words[: words.index("--")]
    return "-h" in words or "--help" in words


def _readable(error: argparse.ArgumentError) -> str:
    message = error.message.replace("argument ", "")
    return f"{error.argument_name}: {message}" if error.argument_name else message


@dataclass(slots=True)
class Entry:
    """A name's row: the command, or how to get it."""

    name: str
    summary: str
    spec: CommandSpec | None = None
    loader: Callable[[], CommandSpec] | None = None

    @property
    def plugin(self) -> bool:
        return self.loader is not None

    def load(self) -> CommandSpec:
        """The command, imported if need be. Raises PluginFailed."""
        if self.spec is None:
            assert self.loader is not None
            try:
                self.spec = self.loader()
            except LlmosError as error:
                raise PluginFailed(f"plugin {self.name}: {error.message}", error.hint) from error
            except ToldToGo:
                raise
            except (Exception, SystemExit) as error:
                hint = "LLMOS_DEBUG=1 shows all of it"
                raise PluginFailed(f"plugin {self.name}: {place_of(error)}{describe(error)}", hint) from error
            if not isinstance(self.spec, CommandSpec):
                kind, self.spec = type(self.spec).__name__, None
                raise PluginFailed(f"plugin {self.name}: it gave a {kind}, not a CommandSpec")
        return self.spec


class PluginFailed(LlmosError):
    """A plugin could not be imported."""

    exit_code = 126


@dataclass(slots=True)
class Registry:
    """All commands. A later command of the same name replaces an earlier one."""

    entries: dict[str, Entry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    # Adds plugins: asked once a name is unknown, or all are listed.
    find_more: Callable[[Registry], None] | None = None
    _warnings: list[str] = field(default_factory=list)

    def add(self, spec: CommandSpec) -> None:
        self.entries[spec.name] = Entry(spec.name, spec.summary, spec)
        self.aliases.update(dict.fromkeys(spec.aliases, spec.name))

    def add_lazy(self, name: str, summary: str | None, loader: Callable[[], CommandSpec]) -> None:
        """Register a plugin's command; `loader` is called at its first use."""
        self.entries[name] = Entry(name, summary or "(a plugin; not loaded yet)", None, loader)

    def complete(self) -> None:
        """Look for plugins, if that was put off."""
        if self.find_more is not None:
            find_more, self.find_more = self.find_more, None
            find_more(self)

    @property
    def warnings(self) -> list[str]:
        """Of plugins that are not used."""
        self.complete()
        return self._warnings

    def __contains__(self, name: str) -> bool:
        return self._found(name) is not None

    def __iter__(self) -> Iterator[Entry]:
        self.complete()
        return iter(sorted(self.entries.values(), key=lambda entry: entry.name))

    def _found(self, name: str) -> Entry | None:
        if name not in self.entries and name not in self.aliases:
            self.complete()
        return self.entries.get(self.aliases.get(name, name))

    def names(self) -> list[str]:
        self.complete()
        return sorted([*self.entries, *self.aliases])

    def entry(self, name: str) -> Entry:
        """The row of a name or alias. Raises CommandNotFound with the nearest name as a hint."""
        found = self._found(name)
        if found is None:
            near = difflib.get_close_matches(name, self.names(), n=1, cutoff=_NEAR)
            hint = f"did you mean `{near[0]}`?" if near else "`help` lists the commands"
            raise CommandNotFound(f"no command `{name}`", hint)
        return found

    def find(self, name: str) -> CommandSpec:
        """The command itself. Raises CommandNotFound, PluginFailed."""
        return self.entry(name).load()


def place_of(error: BaseException) -> str:
    """`plugin.py:3: `, where a plugin's own code was when this happened; "" if it was not."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    for frame, line_number in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_ITS_OWN:
            return f"{frame.f_code.co_filename}:{line_number}: "
    return ""


def describe(error: BaseException) -> str:
    """An unexpected exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
