"""^C, ^Z and narrow or dumb terminals, in a real pseudo-terminal."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest
from pty_kit import on_terminal

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from shell_kit import booted
from shell.commands import builtin_registry
from shell.interpreter import run_text
from shell.session import Shell
with booted() as system:
    shell = Shell(system, builtin_registry())
    if len(sys.argv) > 1:
        code = run_text(shell, sys.argv[1])
    else:
        from shell.repl import interact
        code = interact(shell, None)
sys.exit(code)
"""


@contextmanager
def spawned(*argv: str, columns: int = 80, **environment: str) -> Iterator[pexpect.spawn]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    base = {**os.environ, "PYTHONPATH": paths, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "NO_COLOR": "1"}
    with on_terminal(["-c", PROGRAM, *argv], {**base, **environment}, columns, 20) as child:
        yield child


def ask(child: pexpect.spawn, line: str, answer: str) -> None:
    child.send(line + "\r")
    child.expect_exact(answer)


def prompt(child: pexpect.spawn, status: str = "") -> None:
    style = r"(?:\x1b\[[\d;]*m)*"
    child.expect(rf"\[llmos\]{style}{status}{style}\$")


def leave(child: pexpect.spawn) -> int | None:
    child.send("exit 0\r")
    child.expect(pexpect.EOF)
    child.wait()
    return int(child.exitstatus) if child.exitstatus is not None else None


def test_interrupt_ends_the_job_and_not_the_shell() -> None:
    with spawned() as child:
        prompt(child)
        ask(child, "run endless hi", " ")
        child.expect("(?:[a-z]{4} ){20}")
        child.send("\x03")
        child.expect(r"⏹ stopped · \d+ tok kept")
        prompt(child, "130")
        ask(child, "ps -q; echo still $?", "still 0")
        assert leave(child) == 0


def test_stop_makes_a_job_that_can_go_on() -> None:
    with spawned() as child:
        prompt(child)
        ask(child, "run endless hi", " ")
        child.expect("(?:[a-z]{4} ){20}")
        child.send("\x1a")
        child.expect_exact("[1]+ Stopped  run endless hi")
        prompt(child, "148")
        ask(child, "jobs", "[1]+ Stopped  run endless hi")
        ask(child, "bg", "[1]+ 2  run endless hi")
        ask(child, "jobs", "[1]+ Running  run endless hi")
        ask(child, "fg", "run endless hi")
        child.expect("(?:[a-z]{4} ){20}")
        child.send("\x03")
        child.expect_exact("stopped ·")
        prompt(child, "130")
        assert leave(child) == 0


def test_a_notice_comes_above_the_line_that_is_being_typed() -> None:
    with spawned() as child:
        prompt(child)
        ask(child, "run quick hi > /dev/full &", "[1] 2")
        child.send("echo kept")
        child.expect_exact("error: [1] 2: /dev/full: No space left on device")
        child.expect(r"Ended  run quick hi > /dev/full .*rc 1\s")
        ask(child, " words", "kept words")
        assert leave(child) == 0


def test_interrupt_cancels_a_load() -> None:
    with spawned() as child:
        prompt(child)
        ask(child, "load slow-load", "GB/s")
        child.send("\x03")
        child.expect_exact("loading was cancelled")
        prompt(child, "130")
        assert leave(child) == 0


@pytest.mark.parametrize("line", ["sleep 30", "wait"])
def test_interrupt_ends_waiting(line: str) -> None:
    with spawned() as child:
        prompt(child)
        ask(child, "run endless hi > /dev/null &", "[1] 2")
        ask(child, f"echo begin; {line}", "begin\r\n")
        child.send("\x03")
        prompt(child, "130")
        ask(child, "jobs", "[1]+ ")
        child.send("exit\r")
        child.expect_exact("there is 1 job")
        assert leave(child) == 0


def test_interrupt_ends_a_script_at_once() -> None:
    with spawned("run endless hi || echo not this; echo nor this") as child:
        child.expect("(?:[a-z]{4} ){20}")
        child.send("\x03")
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 130
        assert "this" not in child.before


def test_tab_completes() -> None:
    with spawned() as child:
        prompt(child)
        child.send("run end\t")
        child.expect_exact("less")
        child.send("\x03")
        prompt(child)
        assert leave(child) == 0


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {}])
def test_a_terminal_of_20_columns(environment: dict[str, str]) -> None:
    with spawned(columns=20, **environment) as child:
        prompt(child)
        ask(child, "run quick hi >/dev/null &", "[1] 2")
        ask(child, "wait; models", "NAME")
        ask(child, "echo fine", "fine")
        assert leave(child) == 0
