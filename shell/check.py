"""`-n`: what can be known to be wrong with a script before it runs."""

from collections.abc import Iterator

from kernel.errors import LlmosError, UsageError
from shell.parser import parse
from shell.registry import CommandSpec
from shell.session import Place, Shell
from shell.syntax import AndOr, Command, ShellSyntaxError, Text, Word


def check_text(shell: Shell, text: str, name: str = "") -> int:
    """Report every syntax error, unknown command and bad flag; 0 or 2. Nothing is run."""
    shell.place = Place("" if name.startswith("-") else name)
    try:
        script = parse(text)
    except ShellSyntaxError as error:
        shell.report(error)
        return error.exit_code
    status = 0
    for item in script.items:
        for command in (item.first, *(command for _, command in item.rest)):
            shell.place.line_number = text.count("\n", 0, command.span.start) + 1
            try:
                _check(shell, item, command)
            except LlmosError as error:
                shell.report(error)
                status = UsageError.exit_code
    return status


def _check(shell: Shell, item: AndOr, command: Command) -> None:
    """Raises CommandNotFound, UsageError, PluginFailed."""
    words = [_constant(word) for word in command.words]
    if not words or words[0] is None:
        return
    spec = shell.command(words[0])
    if item.background and (item.rest or not spec.background):
        raise UsageError(f"`{shell.place.name}` cannot run in the background: `{words[0]}`")
    constants = [word for word in words[1:] if word is not None]
    if len(constants) == len(words) - 1:
        _check_words(shell, spec, constants)
    else:
        _check_flags(spec, constants)


def _constant(word: Word) -> str | None:
    """A word's text; None if it depends on a variable."""
    texts = [part.text for part in word.parts if isinstance(part, Text)]
    return "".join(texts) if len(texts) == len(word.parts) else None


def _check_words(shell: Shell, spec: CommandSpec, words: list[str]) -> None:
    args = spec.parse(words)
    if args is not None and spec.parser().takes_rest:
        rest = next(iter(_rest(vars(args))), [])
        if rest:
            shell.command(rest[0]).parse(rest[1:])


def _rest(arguments: dict[str, object]) -> Iterator[list[str]]:
    return (value for value in arguments.values() if isinstance(value, list))


def _check_flags(spec: CommandSpec, words: list[str]) -> None:
    """Some words are known only later: of the others, look at the long options."""
    known = {option for action in spec.parser().actions for option in action.option_strings}
    if spec.rewrite or spec.parser().takes_rest:
        return
    for word in words:
        if word == "--":
            return
        if word.startswith("--") and word.partition("=")[0] not in {*known, "--help"}:
            raise UsageError(f"{spec.name}: no option `{word}`", f"`{spec.name} -h` lists them")
