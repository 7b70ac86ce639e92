"""The command line: `llmos [options] [-c TEXT | -f FILE | - | COMMAND …] [arguments]`.

Not here: what commands do (shell), how things are put together (boot).
"""

import argparse
import contextlib
import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kernel.errors import LlmosError, UsageError

if TYPE_CHECKING:
    from llmos.boot import Machine

VERSION = "0.1.0"

EPILOG = """\
examples:
  llmos                          an interactive shell
  llmos run nano list processes  one command, then out
  llmos -c 'ps --json; free'     a line of commands
  llmos -f nightly.llm a b       a script, with $1 and $2
  echo 'free ram' | llmos run nano --lines
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmos",
        description="An operating environment for large language models on one workstation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"LLMOS {VERSION}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-c", metavar="TEXT", dest="text", help="run commands given as text")
    what.add_argument("-f", metavar="FILE", dest="file", help="run a script")
    parser.add_argument("-n", "--check", action="store_true", help="check a script, run nothing")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables, where there are lists")
    parser.add_argument("--resume", action="store_true", help="first finish what a crash ended")
    parser.add_argument("--record", metavar="FILE", help="write every scheduling decision, as JSON lines")
    parser.add_argument("--config", metavar="FILE", help="configuration instead of the user's own")
    parser.add_argument("--no-plugins", action="store_true", help="built-in commands only")
    parser.add_argument("words", metavar="COMMAND", nargs=argparse.REMAINDER, help="`llmos help` lists them")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    for name in ("stdout", "stderr"):  # closed by whoever started us
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except LlmosError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as bug:
        if os.environ.get("LLMOS_DEBUG"):
            raise
        print(f"error: internal: {type(bug).__name__}: {bug}", file=sys.stderr)
        print("  hint: LLMOS_DEBUG=1 shows where it happened", file=sys.stderr)
        return 125


def _unwind_on_signals(machine: "Machine") -> None:
    """Told to go: leave the terminal as it was, and what runs in the journal, for `resume`."""

    from shell.interrupts import ToldToGo

    def leave(number: int, _: object) -> None:
        machine.system.freeze()
        raise ToldToGo(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def _run(options: argparse.Namespace) -> int:
    from llmos.boot import boot

    script = _script(options)
    arguments = tuple(options.words) if script is not None else ()
    machine = boot(
        {"config": options.config},
        plugins=not options.no_plugins,
        arguments=arguments,
        record=None if options.record is None else Path(options.record),
    )
    gc.freeze()  # what a boot leaves stays: to look through it again takes 50 ms, and everything waits
    machine.shell.json = options.json
    _unwind_on_signals(machine)
    try:
        return _serve(machine, options, script)
    finally:
        machine.system.shutdown()
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            machine.shell.tell_alerts()


def _greet(machine: "Machine") -> None:
    """Two lines: what there is, and how to go on."""
    from kernel.units import human_bytes

    view, models = machine.system.snapshot(), machine.system.models()
    devices = " · ".join(f"{device.info.name} {device.info.description}" for device in view.devices)
    pools = " · ".join(
        f"{pool.name} {human_bytes(pool.free_bytes)} of {human_bytes(pool.capacity_bytes)} free"
        for pool in view.pools
    )
    machine.shell.note(f"LLMOS {VERSION}  ready in {view.uptime_s:.2f} s · {devices} · {pools}")
    plural = "" if len(models) == 1 else "s"
    machine.shell.note(
        f"{len(models)} model{plural} · `help` lists the commands · F12 or `top` is the monitor"
    )


def _script(options: argparse.Namespace) -> tuple[str, str] | None:
    """Text to run and its name; None for an interactive shell or a single command."""
    if options.text is not None:
        return options.text, ""
    if options.file is not None and options.file != "-":
        return _read(Path(options.file)), options.file
    if options.words[:1] == ["-"]:
        options.words = options.words[1:]
    elif (
        options.words
        or options.resume
        or (sys.stdin is not None and sys.stdin.isatty() and options.file is None)
    ):
        return None
    if sys.stdin is None:
        raise UsageError("there is no standard input", "llmos -c TEXT, llmos -f FILE or llmos COMMAND")
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape"), "standard input"


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error


def _serve(machine: "Machine", options: argparse.Namespace, script: tuple[str, str] | None) -> int:
    from shell import interpreter

    if options.check:
        from shell.check import check_text

        if script is None:
            raise UsageError("-n checks a script", "llmos -n -f FILE")
        return check_text(machine.shell, *script)
    if options.resume:
        # One that cannot go on must not end the others: a script that fails kills what it left behind.
        interpreter.run_text(machine.shell, "resume || failed=1", "--resume")
        if "failed" in machine.shell.variables or not (script or options.words):
            return int("failed" in machine.shell.variables)
    if script is not None:
        return interpreter.run_text(machine.shell, *script)
    if options.words:
        return interpreter.run_argv(machine.shell, options.words)
    from shell.repl import interact

    _greet(machine)
    if orphans := machine.system.orphans():
        machine.shell.note(
            f"{len(orphans)} processes ran when LLMOS was killed: `resume` goes on with them, "
            "`resume --forget` does not"
        )
    return interact(machine.shell, machine.paths.history_file)


if __name__ == "__main__":
    sys.exit(main())
