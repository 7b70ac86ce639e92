"""Conversations: at a prompt, in scripts, as jobs; and one with the built-in model in a real terminal."""

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pexpect
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from pty_kit import on_terminal
from shell_kit import Session, session

from kernel.bus import Mailbox
from kernel.errors import WouldBlock
from kernel.snapshot import ProcessView
from kernel.syscall import ProcessSpec, Signal
from shell import conversation
from shell.chat_prompt import ChatCompleter
from shell.jobs import Job
from shell.repl import interact
from shell.session import Shell

TURNS = ("hello there", "tell me more", "and then")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.chdir(tmp_path)
    Path("turns").write_text("\n\n".join(TURNS) + "\n")
    with session() as opened:
        yield opened


def typed(shell: Session, *lines: str) -> tuple[int, str, str]:
    """What a session says, in which these lines are typed."""
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        keyboard.send_text("".join(line + "\r" for line in lines) + "\x04")
        return interact(shell.shell, None), *shell.taken()


def expected(shell: Session, options: str = "") -> str:
    """What a chat answers to the turns."""
    status, out, _ = shell.script(f"chat quick {options} < turns")
    assert status == 0
    assert out.count("\n") == len(TURNS)
    return out


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Do something on another thread."""
    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()


def await_process(
    shell: Session, is_so: Callable[[ProcessView], bool], within_s: float = 20.0
) -> ProcessView | None:
    """The one process there is, when it is so; None if it was not."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        for view in shell.shell.system.snapshot().processes:
            if is_so(view):
                return view
        time.sleep(0.01)
    return None


def press(shell: Session, key: signal.Signals, is_done: Callable[[ProcessView], bool]) -> None:
    """^C or ^Z for the main thread; again, if it came before anybody asked for it."""
    main = threading.main_thread().ident
    assert main is not None
    told = shell.shell.system.subscribe("process")  # what was typed next may undo it before one looks
    for _ in range(20):
        signal.pthread_kill(main, key)
        if await_process(shell, lambda view: is_done(view) or has_become(told, key), within_s=1.0):
            return
        if has_become(told, key):  # there is no process any more
            return


def has_become(told: Mailbox, key: signal.Signals) -> bool:
    """Whether one has stopped, or ended, since the mailbox was opened."""
    with suppress(WouldBlock):
        while told.receive_nowait().body["state"] != ("STOPPED" if key is signal.SIGTSTP else "ZOMBIE"):
            pass
        return True
    return False


# At a prompt


def test_each_line_is_answered_and_end_of_input_ends_it(shell: Session) -> None:
    status, out, err = typed(shell, "chat quick", *TURNS, "\x04", "echo left $?; ps -q", "exit 0")
    assert status == 0
    assert out == expected(shell) + "left 0\n"
    assert err.count(" tok · TTFT ") == 3
    assert "2 ended · 3 turns · " in err


def test_words_are_the_first_turn(shell: Session) -> None:
    first, *rest = TURNS
    assert typed(shell, f"chat quick {first}", *rest, "/bye")[1] == expected(shell)


def test_a_reply_that_was_quicker_than_the_conversation_is_shown_alike(
    shell: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first turn is not repeated to who has just typed it."""
    first, *rest = TURNS
    begin = conversation.converse

    def late(opened: Shell, job: Job, *, asked: bool = False) -> int:
        while not opened.system.process(job.pid).items_done:
            time.sleep(0.01)
        return begin(opened, job, asked=asked)

    monkeypatch.setattr(conversation, "converse", late)
    assert typed(shell, f"chat quick {first}", *rest, "/bye")[1] == expected(shell)


def test_interrupt_ends_the_reply_and_not_the_chat(shell: Session) -> None:
    def interrupt() -> None:
        await_process(shell, lambda view: view.output_tokens > 50)
        press(shell, signal.SIGINT, lambda view: view.items_done == 1)

    with meanwhile(interrupt):
        status, out, err = typed(shell, "chat endless hi", "/ctx", "/bye", "echo left $?")
    assert status == 0
    assert len(out.split()) > 50
    assert "⏹ stopped · " in err
    assert "1 turn · KV" in err
    assert out.endswith("\nleft 0\n")


def test_interrupt_while_the_model_loads_takes_the_turn_back(shell: Session) -> None:
    def interrupt() -> None:
        await_process(shell, lambda view: view.items_total == 1)
        press(shell, signal.SIGINT, lambda view: view.items_done == 1)

    with meanwhile(interrupt):
        _, out, err = typed(shell, "chat slow-load hi", "/bye", "echo left")
    assert out == "left\n"
    assert "⏹ stopped · 0 tok kept" in err
    until = time.monotonic() + 20
    while "loading" in [model.state for model in shell.shell.system.models()]:  # nobody else wants it
        assert time.monotonic() < until
        time.sleep(0.01)


def test_stopped_and_brought_back_it_goes_on_with_what_was_typed(shell: Session) -> None:
    keys = ("chat quick", TURNS[0], TURNS[1] + "\x1ajobs", "fg", "", TURNS[2], "/bye")
    _, out, err = typed(shell, *keys)
    first, second, third = expected(shell).splitlines()
    assert out == f"{first}\n[1]+ Stopped  chat quick\n{second}\n{third}\n"
    assert "[1]+ Stopped  chat quick" in err


def test_stopped_in_a_reply_it_goes_on_in_it(shell: Session) -> None:
    def stop_and_cut() -> None:
        await_process(shell, lambda view: view.output_tokens > 50)
        press(shell, signal.SIGTSTP, lambda view: view.state == "STOPPED")
        await_process(shell, lambda view: view.state != "STOPPED" and view.output_tokens > 500)
        press(shell, signal.SIGINT, lambda view: view.items_done == 1)

    with meanwhile(stop_and_cut):
        _, out, err = typed(shell, "chat endless hi", "jobs", "fg", "/bye")
    assert "[1]+ Stopped  chat endless hi" in out
    assert "⏹ stopped · " in err
    assert len(out.split()) > 500


def test_left_behind_it_sleeps_as_a_job(shell: Session) -> None:
    lines = ("chat quick", TURNS[0], "/bg", "jobs", "wait", "echo $?", "kill %1", "exit 0")
    _, out, err = typed(shell, *lines)
    assert out.splitlines()[1:] == ["[1]+ Sleeping chat quick", "148"]
    assert "rc 143" in err
    assert "waits for you: `fg %1` goes on with it" in err


def test_in_the_background_it_answers_and_waits(shell: Session) -> None:
    _, out, _ = typed(shell, f"chat quick {TURNS[0]} &", "wait", "fg", *TURNS[1:], "/bye")
    first, _, rest = expected(shell).partition("\n")
    assert out == f"you> {TURNS[0]}\n{first}\n{rest}"


def test_a_copy_is_a_job_that_goes_its_own_way(shell: Session) -> None:
    _, out, _ = typed(shell, "chat quick", TURNS[0], "/fork", "/bye", "fg", *TURNS[1:], "/bye")
    assert out == expected(shell)


def test_leaving_the_shell_asks_once_for_a_sleeping_chat(shell: Session) -> None:
    _, _, err = typed(shell, "chat quick", "/bg", "exit", "exit")
    assert "there is 1 job" in err
    assert shell.shell.system.snapshot().processes == ()


def test_killed_at_its_prompt_it_says_so_and_the_shell_goes_on(shell: Session) -> None:
    def kill() -> None:
        view = await_process(shell, lambda view: view.items_done == 1)
        assert view
        time.sleep(0.2)
        shell.shell.system.signal(view.pid, Signal.KILL)
        for _ in range(2000):  # the keys are for the prompt after it
            time.sleep(0.01 if shell.shell.jobs else 0)
        keyboard.send_text("echo $?\r\x04")

    with (
        create_pipe_input() as keyboard,
        create_app_session(input=keyboard, output=DummyOutput()),
        meanwhile(kill),
    ):
        keyboard.send_text(f"chat quick {TURNS[0]}\r")
        interact(shell.shell, None)
    out, err = shell.taken()
    assert out.endswith("\n137\n")
    assert "2 was ended (exit code 137)" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/help", "/save FILE   write a checkpoint"),
        ("/nice 7", "2: nice 0 → 7"),
        ("/nice x", "error: `x` is not a nice value"),
        ("/nice 70", "error: nice value 70 is out of range"),
        ("/why", "It waits for its user to speak."),
        ("/system", "be brief"),
        ("/save", "error: the name of the file is empty"),
        ("/save /", "error: "),
        ("/save two words", "`load 'two words'` goes on with it"),
        ("/nosuch", "error: no command `/nosuch`"),
    ],
)
def test_commands(shell: Session, line: str, said: str) -> None:
    status, _, err = typed(shell, "chat quick --system 'be brief' hi", line, "/bye", "exit 0")
    assert status == 0
    assert said in err
    assert "1 turn · " in err  # it was not said to the model


def test_what_begins_with_a_blank_is_said(shell: Session) -> None:
    assert "1 turn · " in typed(shell, "chat quick", " /etc/passwd: what is it", "/bye", "exit 0")[2]


def test_a_saved_chat_is_taken_up_again(shell: Session) -> None:
    typed(shell, "chat quick", *TURNS[:2], "/save c.ckpt", "/bye")
    _, out, _ = typed(shell, "load c.ckpt", TURNS[2], "/bye")
    replies = expected(shell).splitlines()
    assert out.splitlines() == [
        f"you> {TURNS[0]}", replies[0], f"you> {TURNS[1]}", replies[1], replies[2]
    ]  # fmt: skip


def test_a_full_window_is_told_and_the_chat_can_be_left(shell: Session) -> None:
    Path("small.sim").write_text(json.dumps({"mean_tokens": 8, "context_tokens": 64}))
    _, out, err = typed(shell, "chat ./small.sim", "word " * 100, TURNS[0], "/bye", "echo $?")
    assert err.count("error: ") == 1
    assert "window of 64" in err
    assert out.endswith("\n1\n")
    assert len(out.splitlines()) == 2


def test_completion_knows_the_commands_and_files(shell: Session) -> None:
    def offered(text: str) -> list[str]:
        return [c.text for c in ChatCompleter().get_completions(Document(text), CompleteEvent())]

    assert offered("/b") == ["/bg", "/bye"]
    assert offered("/save tu") == ["turns"]
    assert offered("list /b") == offered("/nice ") == []


# Without a terminal


def test_lines_of_a_pipe_are_turns(shell: Session) -> None:
    turns = Path("turns").read_bytes()
    shell.shell.stdin = io.BytesIO(turns)
    assert shell.argv("chat", "quick")[:2] == (0, expected(shell))
    shell.shell.stdin = io.BytesIO(turns.partition(b"\n")[2])
    assert shell.argv("chat", "quick", TURNS[0])[:2] == (0, expected(shell))


def test_into_a_file_and_in_the_background(shell: Session) -> None:
    assert shell.script("chat quick < turns > a & chat quick < turns >> b; wait")[0] == 0
    assert Path("a").read_text() == Path("b").read_text() == expected(shell)


def test_a_script_does_not_wait_for_a_user_that_it_does_not_have(shell: Session) -> None:
    typed(shell, "chat quick", *TURNS, "/save c.ckpt", "/bye")
    shell.shell.interactive = False
    assert shell.script("load c.ckpt & load c.ckpt > f & fork %1 > g & wait %1; jobs")[0] == 0
    assert Path("f").read_text() == Path("g").read_text() == expected(shell)
    assert shell.script("load c.ckpt")[:2] == (0, expected(shell))


def test_to_a_loaded_chat_the_lines_of_the_input_are_said(shell: Session) -> None:
    rest = "\n".join(TURNS[1:]).encode()
    typed(shell, "chat quick", TURNS[0], "/save c.ckpt", "/bye")
    shell.shell.interactive = False
    shell.shell.stdin = io.BytesIO(rest)
    assert shell.argv("load", "c.ckpt") == (0, expected(shell), "")
    Path("rest").write_bytes(rest)
    assert shell.script("load c.ckpt < rest > a & load c.ckpt < rest > b; wait")[0] == 0
    assert Path("a").read_text() == Path("b").read_text() == expected(shell)
    status, out, err = shell.script("load c.ckpt")
    assert (status, out.splitlines()) == (0, expected(shell).splitlines()[:1])
    assert "ends: nobody talks to it. `load c.ckpt < FILE` says each line of it" in err


@pytest.mark.parametrize("line", ["chat quick", "chat quick &", "chat quick < /dev/null", "chat quick > f"])
def test_nobody_to_talk_to_is_an_error(shell: Session, line: str) -> None:
    status, _, err = shell.script(line)
    assert status == 2
    assert err.startswith("error: chat: nothing to say")


def test_turns_that_fail_make_the_exit_code(shell: Session) -> None:
    Path("small.sim").write_text(json.dumps({"mean_tokens": 8, "context_tokens": 64}))
    Path("long").write_text("one\n" + "word " * 100 + "\ntwo\n")
    status, out, err = shell.script("chat ./small.sim < long")
    assert status == 1
    assert out.count("\n") == 3
    assert "1 of 3 prompts failed" in err


def test_what_was_said_before_passes_the_sanitiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("turns").write_bytes(b"red \x1b[31m \xff word\n")
    with session(terminal=True) as shell:
        shell.shell.interactive = True
        pid = shell.shell.system.spawn(ProcessSpec("quick", ("red \x1b[31m\udcff word",), program="chat"))
        shell.shell.jobs.add(pid, "chat quick", None)
        _, out, _ = typed(shell, "wait", "fg", "/bye")
    assert "you> red [31m\ufffd word\n" in out


def test_system_goes_to_the_model_with_run_too(shell: Session) -> None:
    plain, told = (shell.script(f"run quick {option} hi")[1] for option in ("", "--system brief"))
    assert plain != told
    assert shell.script("run quick --raw --system brief hi")[0] == 2


# In a terminal, with the built-in model


@contextmanager
def llmos(*words: str) -> Iterator[pexpect.spawn]:
    environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "NO_COLOR": "1"}
    with on_terminal(["-m", "llmos", *words], environment, 70, 30) as child:
        yield child


def say(child: pexpect.spawn, text: str, answer: str) -> None:
    child.send(text + "\r")
    child.expect(answer)
    child.expect_exact("you>")


def test_a_conversation_outlives_its_llmos() -> None:
    """Paste, ^C at the empty prompt, kill -9; a script leaves it alone; the next shell takes it up."""
    with llmos("chat", "nano", "--temp", "0") as child:
        child.expect_exact("you>")
        say(child, "list the processes", r"ps.*\d tok · TTFT")
        say(child, "\x1b[200~free\nmemory\x1b[201~", r"\d tok · TTFT")
        child.send("\x03")
        child.expect_exact("^D leaves · /help")
        child.expect_exact("you>")
        time.sleep(0.6)  # the journal's group commit
        child.kill(signal.SIGKILL)
        child.expect(pexpect.EOF)
    with llmos("--resume") as child:
        child.expect_exact("waits for its user, `chat nano --temp 0`: `resume` in a shell")
        child.expect(pexpect.EOF)
    with llmos() as child:
        child.expect_exact("[llmos]")
        child.send("resume\r")
        child.expect_exact("chat nano --temp 0")
        child.send("fg\r")
        child.expect(r"you> list the processes\s+ps")
        child.expect(r"you> free\s+memory\s+\w")
        say(child, "list the models", r"models.*\d tok · TTFT")
        child.send("\x04")
        child.expect(r"ended · 3 turns")
        child.expect_exact("[llmos]")
        child.send("exit\r")
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0


def test_needs_reach_the_process_and_are_checked(shell: Session) -> None:
    status, _, told = shell.line("chat quick --cpus 100000 hello < turns")
    assert status == 75 and "cpus" in told
    assert shell.line("chat quick --mem 1000T --no-wait hello < turns")[0] == 75
