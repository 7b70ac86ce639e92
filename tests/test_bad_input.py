"""Bad input, end to end: each gives one clear line, the right exit code, and the shell lives on."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from pty_kit import started

from drivers.llamacpp.writer import Recipe, write_random

REQUESTS = Path(__file__).parent.parent / "examples" / "requests.txt"
NANO = Path(__file__).parent.parent / "llmos" / "builtin" / "nano.gguf"
LLMOS = [sys.executable, "-m", "llmos"]


def llmos(*words: str | bytes, stdin: bytes | None = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*LLMOS, *words], input=stdin, capture_output=True, timeout=60, env=os.environ | env, check=False
    )


def one_error(done: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    """Exit code, one error line that names these words, perhaps a hint, and never a traceback."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if not line.startswith("  hint: ")]
    assert len([line for line in lines if line.startswith("error: ")]) == 1, text
    for word in words:
        assert word in text


def test_a_home_that_is_none_is_told_once_on_standard_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = llmos(
        "-c", "run nano --temp 0 hello; run nano --temp 0 hello; ps", LLMOS_HOME=str(tmp_path / "file")
    )
    assert done.returncode == 0 and b"journal" not in done.stdout
    assert done.stderr.decode() == (
        f"warning: no journal in {tmp_path}/file/journal: Not a directory: a crash would lose what runs\n"
    )


def shell(columns: int = 100, **env: str) -> "pexpect.spawn[str]":
    """An interactive shell at its prompt."""
    settings = {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm-256color", "LLMOS_NOHISTORY": "1"}
    child = started(["-m", "llmos"], os.environ | settings | env, columns, 30)
    child.expect(r"\[llmos\]")
    child.send("m=MARK\r")
    return child


def ask(child: "pexpect.spawn[str]", line: str) -> tuple[str, int]:
    """Type a line; returns what it printed and its exit code."""
    end = " " if line.endswith("&") else "; "
    child.send(f"{line}{end}echo ${{m}}$?:\r")
    return answer(child)


def answer(child: "pexpect.spawn[str]") -> tuple[str, int]:
    child.expect(r"MARK(\d+):")
    return str(child.before), int(str(child.match[1]))


def leave(child: "pexpect.spawn[str]") -> None:
    child.expect(r"\[llmos\]")
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_missing_model_file() -> None:
    one_error(llmos("run", "./no-such.gguf", "hello"), 127, "no-such.gguf")


def test_a_missing_model_name() -> None:
    one_error(llmos("run", "nanno", "hello"), 127, "nanno", "nano")


def test_a_truncated_model(tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(NANO.read_bytes()[:-1000])
    one_error(llmos("run", str(file), "hello"), 126, "cut.gguf")


def test_random_bytes_as_a_model(tmp_path: Path) -> None:
    file = tmp_path / "noise.gguf"
    file.write_bytes(random.Random(1).randbytes(50_000))
    one_error(llmos("run", str(file), "hello"), 126, "noise.gguf")


def test_a_pipe_as_a_model_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    one_error(llmos("run", str(tmp_path / "pipe.gguf"), "hello"), 126, "pipe.gguf")


def test_a_wrong_pid() -> None:
    one_error(llmos("kill", "4711"), 1, "4711")
    one_error(llmos("kill", "seven"), 2, "seven")


@pytest.mark.parametrize("nice", ["20", "-21", "much"])
def test_a_bad_nice_value(nice: str) -> None:
    one_error(llmos("run", "nano", "hello", f"--nice={nice}"), 2, nice)


def test_a_full_context(tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("words and words " * 2000)
    one_error(llmos("run", "nano", "-f", str(long)), 1, "tokens")
    overflow = llmos("run", "nano", "hello", "--ignore-eos", "--ctx", "256")
    one_error(overflow, 1, "context window of 256 tokens is full", "--ctx")
    assert len(overflow.stdout) > 100  # what was said before is kept


def test_a_prompt_of_many_megabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    """Not by its tokens: to count those would hold up every process on the model for seconds."""
    huge = tmp_path / "huge.txt"
    huge.write_text("words " * 2_000_000)
    one_error(llmos("run", "nano", "-f", str(huge)), 1, "12000000 characters", "window of 512 tokens")


def test_a_prompt_of_invalid_utf8() -> None:
    done = llmos("run", "nano", "--temp", "0", b"\xff\xfe\x80 list processes")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert done.stdout.strip()
    piped = llmos("run", "nano", "--lines", "--temp", "0", stdin=b"what is running?\n\xff\xfe\n")
    assert piped.returncode == 0 and piped.stdout.splitlines()[0] == b"ps"
    assert len(piped.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    "prompt", [b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xed\xa0\x80 ps", b"\xc0\xaf"]
)
def test_bytes_that_look_like_utf8_do_not_hurt_the_engine(prompt: bytes) -> None:
    done = llmos("run", "nano", "--temp", "0", "--lines", stdin=prompt + b"\nwhat is running?\n")
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, [b"ps"]), done.stderr


def test_two_files_of_one_name_are_two_models(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_random(tmp_path / folder / "twin.gguf", Recipe(seed=ord(folder)))
    a, b = tmp_path / "a" / "twin.gguf", tmp_path / "b" / "twin.gguf"
    run = "--temp 0 --max-tokens 8 --ignore-eos x"
    done = llmos("-c", f"load {a}; load {b}; run {a} {run}; run {b} {run}; unload {b}; unload twin")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first != second


def test_told_to_go_it_leaves_its_work_for_resume(tmp_path: Path) -> None:
    child = subprocess.Popen([*LLMOS, "-c", f"run nano --lines --temp 0 -f {REQUESTS} > {tmp_path}/out.txt"])
    time.sleep(1.2)
    child.terminate()
    assert child.wait(20) == 143
    done = llmos("--resume")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 400


def test_a_worker_killed_from_outside_during_generation(tmp_path: Path) -> None:
    """Its job goes on by itself, with the same 400 answers; 318 of them are known to be right."""
    child = shell()
    ask(child, f"run nano --lines --temp 0 -f {REQUESTS} > {tmp_path}/out.txt &")
    row = re.search(r'"worker_pid": (\d+)', ask(child, "load nano; models --json")[0])
    assert row is not None
    os.kill(int(row[1]), signal.SIGKILL)
    assert ask(child, "wait")[1] == 0
    assert '"restarts": 1' in ask(child, "models --json")[0]
    assert "signal 9" in ask(child, "dmesg --level error")[0]
    leave(child)
    replies = (tmp_path / "out.txt").read_text().splitlines()
    rows = [line.split("\t") for line in REQUESTS.with_suffix(".tsv").read_text().splitlines()[1:]]
    assert len(replies) == 400
    assert sum(reply == right for reply, (_, right) in zip(replies, rows, strict=True)) == 318


def test_interrupt_during_a_load(tmp_path: Path) -> None:
    """^C cancels the load; the shell lives and can load again."""
    model = tmp_path / "big.gguf"
    write_random(model, Recipe(width=512, layers=8, heads=8, kv_heads=4, ffn=1536, vocabulary=16000))
    child = shell()
    child.send(f"load {model}\r")
    time.sleep(0.3)
    child.send("\x03")
    text, code = ask(child, "x=$?; models; exit_code=$x")
    assert "Traceback" not in text
    assert "loaded" not in text or code == 0
    assert ask(child, "run nano --temp 0 what is running?")[0].count("ps")
    leave(child)


def test_a_read_only_home(tmp_path: Path) -> None:
    home = Path("/proc/llmos-home")  # nobody, not even root, can make a folder there
    done = llmos("run", "nano", "--temp", "0", "what is running?", LLMOS_HOME=str(home))
    assert (done.returncode, done.stdout) == (0, b"ps\n"), done.stderr
    child = shell(LLMOS_HOME=str(home))
    assert "ps" in ask(child, "run nano --temp 0 what is running?")[0]
    leave(child)


def test_a_full_disk_at_the_first_boot_is_no_obstacle_and_leaves_nothing_behind(tmp_path: Path) -> None:
    limited = "import resource as r, runpy; r.setrlimit(r.RLIMIT_FSIZE, (0, 0)); runpy.run_module('llmos')"
    command = [sys.executable, "-c", limited, "true"]
    env = os.environ | {"LLMOS_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not list(tmp_path.rglob("key*"))
    llmos("true", LLMOS_HOME=str(tmp_path))
    (key,) = tmp_path.rglob("key*")
    assert key.stat().st_size == 32
    key.write_bytes(b"")  # an LLMOS of before left this on a full disk
    llmos("true", LLMOS_HOME=str(tmp_path))
    assert key.stat().st_size == 32


def test_a_terminal_of_20_columns() -> None:
    child = shell(columns=20)
    for line in ("run nano --temp 0 hi", "ps -a", "models", "free", "help", "jobs"):
        text, code = ask(child, line)
        assert code == 0
        assert "Traceback" not in text and "error: internal" not in text
    leave(child)


def test_the_interrupt_key_ends_the_job_and_keeps_the_shell() -> None:
    child = shell()
    child.send(f"run nano --ignore-eos --lines -f {REQUESTS}\r")
    time.sleep(1.5)
    child.send("\x03")
    child.expect("stopped")
    child.send("echo ${m}$?:\r")
    assert answer(child)[1] == 130
    child.send("half a line\x03")
    assert "ps" in ask(child, "run nano --temp 0 what is running?")[0]
    leave(child)
