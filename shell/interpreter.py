"""Runs a tree: lists, conditions, redirections, errors. The doors for the command line are at the top.

A script is strict: the first command that fails ends it, except to the left of `&&` and `||`. Whatever a
command does, the caller gets an exit code: nothing but `Exit` passes through here.
Not here: what a command does (commands), job control (jobs).
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Literal

from kernel.errors import KernelFault, LlmosError, UsageError
from shell import jobs
from shell.expand import expand_word, expand_words
from shell.files import open_file
from shell.help import command_help
from shell.interrupts import ToldToGo
from shell.lexer import quote
from shell.parser import parse
from shell.registry import CommandSpec, PluginFailed, describe, place_of
from shell.session import Exit, Frame, Place, Shell
from shell.syntax import AndOr, Command, Redirection, ShellSyntaxError

_BROKEN_PIPE = 141
_INTERRUPTED = 130
_MODES: dict[str, Literal["rb", "wb", "ab"]] = {"<": "rb", ">": "wb", ">>": "ab"}


def run_text(shell: Shell, text: str, name: str = "") -> int:
    """Run a script (`-c`, `-f`, standard input); returns its exit code.

    `name` is the file's, for error messages; "" or one that begins with `-` gives none. Background jobs
    that still run at the end are waited for; those of a script that failed are killed.
    """
    return _concluded(shell, lambda: _run_script(shell, text, name))


def run_argv(shell: Shell, argv: list[str]) -> int:
    """Run one command whose words are taken as they are (`llmos ps --json`)."""
    frame = Frame(line=" ".join(map(quote, argv)), words=argv)

    def run() -> int:
        with shell.framed(frame):
            return invoke(shell, argv)

    return _concluded(shell, lambda: _guarded(shell, frame, run))


def run_line(shell: Shell, text: str) -> int:
    """Run what was typed at the prompt; sets `$?`. Raises only Exit."""
    try:
        script = parse(text)
    except ShellSyntaxError as error:
        shell.report(error)
        shell.status = error.exit_code
        return shell.status
    try:
        with shell.interrupts.noted(stop=True):
            for item in script.items:
                _run_and_or(shell, item, text)
                if shell.interrupts.pressed:
                    break
    except BrokenPipeError:
        shell.status = _BROKEN_PIPE
    return shell.status


def invoke(shell: Shell, words: list[str]) -> int:
    """Run a command by its words, within the frame that is set. Raises LlmosError."""
    spec, plugin = shell.command(words[0]), shell.registry.entry(words[0]).plugin
    if shell.frame.background and not spec.background:
        raise UsageError(
            f"`{spec.name}` cannot run in the background", "only a command that starts a process can"
        )
    args = spec.parse(words[1:])
    if args is None:
        shell.out.lines(command_help(spec))
        return 0
    return _run_plugin(shell, spec, args) if plugin else spec.run(shell, args)


def _run_plugin(shell: Shell, spec: CommandSpec, args: Namespace) -> int:
    """Run code that is not ours: whatever it does becomes an exit code or one line."""
    try:
        with shell.interrupts.raised():
            status: object = spec.run(shell, args)
    except (LlmosError, BrokenPipeError, Exit, ToldToGo):
        raise
    except (Exception, SystemExit) as error:
        shell.report_internal(error, f"plugin {spec.name}: {place_of(error)}{describe(error)}")
        return 1
    if not isinstance(status, int):
        kind = type(status).__name__
        raise PluginFailed(f"plugin {spec.name}: its run returned a {kind}, not an exit code", "0 is success")
    return int(status)


def _concluded(shell: Shell, run: Callable[[], int]) -> int:
    """Run; wait for what was left in the background if all went well, else kill it."""
    try:
        with shell.interrupts.noted(stop=False):
            status = run()
            for job in shell.jobs:
                if status == 0:
                    jobs.wait_job(shell, job)
                    status = _INTERRUPTED if shell.interrupts.pressed else 0
    except Exit as leave:
        status = leave.code
    except BrokenPipeError:
        shell.out.discard()
        status = _BROKEN_PIPE
    finally:
        jobs.close(shell)
    return status


def _run_script(shell: Shell, text: str, name: str) -> int:
    shell.place = Place("" if name.startswith("-") else name)
    try:
        script = parse(text)
    except ShellSyntaxError as error:
        shell.report(error)
        return error.exit_code
    for item in script.items:
        counts = _run_and_or(shell, item, text)
        if shell.interrupts.pressed or (shell.status and counts):
            _say_where(shell)
            break
    return shell.status


def _say_where(shell: Shell) -> None:
    """A failure that no error message located, as of `false`."""
    if shell.place.name and not shell.place.reported:
        shell.note(f"{shell.place.name}:{shell.place.line_number}: ended with code {shell.status}")


def _run_and_or(shell: Shell, item: AndOr, text: str) -> bool:
    """Run a list of conditions; whether its failure is one that ends a strict script."""
    _run_command(shell, item, item.first, text)
    counts = not item.rest
    for operator, command in item.rest:
        if shell.interrupts.pressed:
            return True
        if (shell.status == 0) == (operator == "&&"):
            _run_command(shell, item, command, text)
            counts = command is item.rest[-1][1]
    return counts


def _run_command(shell: Shell, item: AndOr, command: Command, text: str) -> None:
    """Run one command of a list; its exit code goes to `shell.status`."""
    shell.place.line_number = text.count("\n", 0, command.span.start) + 1
    shell.place.reported = False
    frame = Frame(line=text[command.span.start : command.span.end], background=item.background)

    def run() -> int:
        if item.background and item.rest:
            raise UsageError("only a single command can run in the background")
        for assignment in command.assignments:
            shell.variables[assignment.name] = expand_word(assignment.value, shell.lookup)
        if not command.words:
            return 0
        frame.words = _words(shell, command)
        for redirection in command.redirections:
            _redirect(shell, frame, redirection)
        with shell.framed(frame):
            return invoke(shell, frame.words)

    shell.status = _guarded(shell, frame, run)


def _words(shell: Shell, command: Command) -> list[str]:
    """The expanded words; file patterns are left alone for a command that reads prose."""
    name = expand_words(command.words[:1], shell.lookup, shell.arguments, patterns=False)
    patterns = not name or name[0] not in shell.registry or shell.command(name[0]).patterns
    return name + expand_words(command.words[1:], shell.lookup, shell.arguments, patterns=patterns)


def _redirect(shell: Shell, frame: Frame, redirection: Redirection) -> None:
    """Open a file for a command, before anything is started. Raises UsageError, LlmosError."""
    name = expand_word(redirection.target, shell.lookup)
    with shell.interrupts.raised():  # a pipe may have nobody at its other end
        file = open_file(name, _MODES[redirection.operator])
    if redirection.operator == "<":
        before, frame.stdin = frame.stdin, file
    else:
        before, frame.stdout, frame.target = frame.stdout, file, name
    if before is not None:
        before.close()


def _guarded(shell: Shell, frame: Frame, run: Callable[[], int]) -> int:
    """Run a command; whatever it raises becomes one line and an exit code."""
    try:
        status = run()
        return _INTERRUPTED if shell.interrupts.pressed else status
    except (Exit, BrokenPipeError):
        raise
    except KeyboardInterrupt:  # a plugin's code was interrupted
        shell.interrupts.pressed = True
        shell.out_line_done()
        return _INTERRUPTED
    except LlmosError as error:
        shell.report(error, json=_wants_json(shell, frame.words))
        if isinstance(error, PluginFailed) and error.__cause__ is not None:
            shell.keep_traceback(error.__cause__)
        return error.exit_code
    except OSError as error:
        name = error.filename or frame.target
        shell.report(
            LlmosError(f"{name}: {error.strerror or error}" if name else str(error.strerror or error))
        )
        return LlmosError.exit_code
    except Exception as error:
        shell.report_internal(error, f"internal: {describe(error)}")
        return KernelFault.exit_code
    finally:
        frame.close()


def _wants_json(shell: Shell, words: list[str]) -> bool:
    if "--json" not in words[1:] or words[0] not in shell.registry:
        return False
    spec = shell.registry.entry(words[0]).spec  # None: a plugin that could not be imported
    return spec is not None and any("--json" in action.option_strings for action in spec.parser().actions)
