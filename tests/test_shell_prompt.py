"""The prompt: keys, completion, colours, history; with prompt-toolkit's pipe for a keyboard."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from shell_kit import Session, session

from shell import repl
from shell.completer import ShellCompleter, candidates, read_line
from shell.highlight import styles
from shell.interpreter import run_line
from shell.repl import interact, toolbar
from shell.session import Shell


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.chdir(tmp_path)
    with session() as opened:
        yield opened


def typed(shell: Session, keys: str, history: Path | None = None) -> tuple[int, str, str]:
    """What a session says that is typed like this."""
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        keyboard.send_text(keys)
        return interact(shell.shell, history), *shell.taken()


def test_lines_run_until_end_of_input(shell: Session) -> None:
    assert typed(shell, "echo one\recho two\r\x04") == (0, "one\ntwo\n", "")


def test_exit_has_a_code(shell: Session) -> None:
    assert typed(shell, "false\rexit\r")[0] == 1
    assert typed(shell, "exit 7\r")[0] == 7


def test_an_incomplete_line_goes_on(shell: Session) -> None:
    assert typed(shell, "echo 'a\rb'\recho c \\\rd\rtrue &&\recho e\r\x04")[1] == "a\nb\nc d\ne\n"


def test_interrupt_clears_the_line(shell: Session) -> None:
    assert typed(shell, "echo no\x03echo yes\r\x04") == (0, "yes\n", "")


def test_an_interrupt_between_a_command_and_the_prompt_ends_nothing(
    shell: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is pressed while a line is taken up, or just when its command has ended."""

    def pressed(shell: Shell, text: str) -> int:
        signal.raise_signal(signal.SIGINT)
        status = run_line(shell, text)
        signal.raise_signal(signal.SIGINT)
        return status

    monkeypatch.setattr(repl, "run_line", pressed)
    before = signal.getsignal(signal.SIGINT)
    assert typed(shell, "echo one\recho no\x03echo two\r\x04") == (0, "one\ntwo\n", "")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_does_not_end_the_session(shell: Session) -> None:
    status, out, err = typed(shell, "nosuch\rps |\recho $?\r\x04")
    assert (status, out) == (0, "2\n")
    assert err.count("error:") == 2


def test_leaving_with_jobs_warns_once_and_ends_them(shell: Session) -> None:
    status, out, err = typed(shell, "run endless hi > f &\r\x04echo still here\r\x04\x04")
    assert (status, out) == (0, "still here\n")
    assert err.count("there is 1 job") == 2  # a line in between counts as staying
    assert shell.shell.system.snapshot().processes == ()


def test_a_finished_job_is_told_before_the_next_prompt(shell: Session) -> None:
    _, out, err = typed(shell, "run quick hi &\rsleep 0.3\recho next\r\x04")
    reply, following = out.strip().splitlines()
    assert reply
    assert following == "next"
    assert "[1]+  Done  run quick hi" in err


def test_a_job_that_ends_while_nothing_is_typed_is_told_at_once(shell: Session) -> None:
    """The notice comes first, what the job said waits for the next prompt."""
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        keyboard.send_text("run quick hi > f &\rrun quick --seed 1 hi &\rec")
        seen: list[tuple[str, str]] = []

        def look_then_leave() -> None:
            for _ in range(100):
                if shell.stderr.getvalue().count("Done") == 2:
                    break
                time.sleep(0.05)
            seen.append((shell.stdout.getvalue(), shell.stderr.getvalue()))
            keyboard.send_text("ho next\r\x04")

        watcher = threading.Thread(target=look_then_leave)
        watcher.start()
        assert interact(shell.shell, None) == 0
        watcher.join()
    out, err = shell.taken()
    assert seen[0][0] == ""
    assert "[1]" in seen[0][1] and "Done  run quick hi > f" in seen[0][1]
    assert err.count("Done") == 2
    first, reply = out.splitlines()
    assert first == "next" and reply


def test_stop_at_the_prompt_types_nothing(shell: Session) -> None:
    assert typed(shell, "echo a\x1ab\r\x04") == (0, "ab\n", "")


def test_exit_twice_leaves_jobs_with_success(shell: Session) -> None:
    assert typed(shell, "run endless hi > f &\rexit\rexit\r")[0] == 0


def test_f12_opens_the_monitor_and_keeps_what_was_typed(shell: Session) -> None:
    opened: list[bool] = []

    def open_monitor() -> int:
        opened.append(True)
        return 0

    shell.shell.open_monitor = open_monitor
    shell.shell.out.is_terminal = True
    assert "kept words" in typed(shell, "echo kept\x1b[24~ words\r\x04")[1]
    assert opened == [True]


def test_a_terminal_that_cannot_move_its_cursor_gets_one_frame() -> None:
    with session(terminal=True, environment={"TERM": "dumb"}) as dumb:
        dumb.shell.open_monitor = lambda: 99
        status, out, _ = dumb.line("top")
    assert status == 0 and "0 processes" in out


# History


def test_history_is_kept_but_not_for_lines_that_begin_with_a_blank(shell: Session, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "history"
    typed(shell, "echo one\r echo secret\r\x04", file)
    assert "echo one" in file.read_text()
    assert "secret" not in file.read_text()
    shell.shell.history.clear()
    assert "    1  echo one\n" in typed(shell, "history\r\x04", file)[1]


def test_a_history_that_cannot_be_written_is_one_warning(shell: Session, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, out, err = typed(shell, "echo one\r\x04", tmp_path / "file" / "history")
    assert (status, out) == (0, "one\n")
    assert err.count("warning: history is not kept") == 1


# Completion


def offered(shell: Session, text: str) -> list[str]:
    line = read_line(text)
    assert line is not None
    return [candidate.text for candidate in candidates(shell.shell, line)]


def test_commands_and_flags_complete(shell: Session) -> None:
    assert offered(shell, "ren") == ["renice"]
    assert offered(shell, "echo x; ki") == ["kill"]
    assert offered(shell, "true && ki") == ["kill"]
    assert offered(shell, "run --max") == ["--max-tokens"]
    assert "--sort" in offered(shell, "ps --")
    assert offered(shell, "help unl") == ["unload"]
    assert offered(shell, "nosuch x") == []


def test_models_pids_and_jobs_complete(shell: Session) -> None:
    shell.line("run endless hi > f &")
    assert offered(shell, "run qui") == ["quick"]
    assert offered(shell, "nice -n 5 run qui") == ["quick"]
    assert offered(shell, "run 'qui") == ["quick"]
    assert offered(shell, "kill ") == ["2", "%1"]
    assert offered(shell, "kill -s KILL %") == ["%1"]
    assert offered(shell, "run quick --seed ") == []
    row = read_line("kill ")
    assert row is not None
    assert "run endless hi > f" in candidates(shell.shell, row)[0].meta


def test_files_complete(shell: Session) -> None:
    Path("notes.txt").touch()
    Path("dir").mkdir()
    Path("dir/in side").touch()
    assert offered(shell, "cat n") == ["notes.txt"]
    assert offered(shell, "ps > no") == ["notes.txt"]
    assert offered(shell, "run quick -f d") == ["dir/"]
    assert offered(shell, "cat dir/") == ["dir/in side"]
    assert offered(shell, "cat /nonexistent/") == []


def test_a_completion_can_be_read_back(shell: Session) -> None:
    Path("two words.txt").write_text("content\n")
    document = Document("cat two")
    (completion,) = ShellCompleter(shell.shell).get_completions(document, CompleteEvent())
    line = document.text[: len(document.text) + completion.start_position] + completion.text
    assert shell.line(line)[1] == "content\n"


# Colours


def coloured(shell: Session, text: str) -> dict[str, str]:
    return {
        text[span.start : span.end]: style.removeprefix("class:")
        for span, style in styles(text, shell.shell.registry)
    }


def test_colours_come_from_the_lexer(shell: Session) -> None:
    assert coloured(shell, "run q --temp \"$x\" 'y' # z") == {
        "run": "command",
        "--temp": "option",
        "$x": "variable",
        "'y'": "string",
        "# z": "comment",
        '"': "string",
    }
    assert coloured(shell, "nosuch; ps && kil") == {
        "nosuch": "unknown",
        ";": "operator",
        "ps": "command",
        "&&": "operator",
        "kil": "unknown",
    }
    assert coloured(shell, "ps | x")["|"] == "error"
    assert coloured(shell, "echo 'open")["'open"] == "string"


def test_the_toolbar_is_empty_unless_something_runs(shell: Session) -> None:
    assert toolbar(shell.shell) == ""
    shell.line("run endless hi > f &")
    until = time.monotonic() + 10
    while not toolbar(shell.shell).startswith("1R · "):  # it loads, and waits for a seat, first
        assert time.monotonic() < until, toolbar(shell.shell)
        time.sleep(0.01)
    shell.line("stop %1")
    assert toolbar(shell.shell).startswith("1T · ")
    shell.line("run slow-load hi > f &")
    assert toolbar(shell.shell).startswith("1Q 1T · ")


def test_a_session_without_a_terminal_needs_no_terminal_file() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader, "rb") as stdin, session(stdin=stdin) as shell:
        assert shell.script("run quick")[0] == 2
    with session(stdin=io.BytesIO(b"hi")) as shell:
        assert shell.script("cat")[1] == "hi"
