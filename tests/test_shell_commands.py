"""Scripts and commands on a real kernel with simulated models."""

import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from shell_kit import Session, interrupted, session

from kernel.sanitise import sanitise
from kernel.snapshot import ProcessView
from shell.check import check_text
from shell.registry import CommandSpec


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.chdir(tmp_path)
    with session() as opened:
        yield opened


# run


def test_run_prints_the_reply_and_leaves_nothing_behind(shell: Session) -> None:
    status, out, err = shell.script("run quick hello")
    assert status == 0
    assert out.split()
    assert out.endswith("\n")
    assert err == ""
    assert shell.shell.system.snapshot().processes == ()


def test_words_then_a_blank_line_then_the_file(shell: Session) -> None:
    Path("in.txt").write_text("the content")
    for line in ("run quick sum up -f in.txt", "run quick -f in.txt sum up", "run quick sum up < in.txt"):
        assert prompts_of(shell, line) == [("sum up\n\nthe content",)]


def test_lines_are_one_prompt_each_and_blank_ones_are_skipped(shell: Session) -> None:
    Path("in.txt").write_text("one\n\n two \n")
    assert prompts_of(shell, "run quick --lines < in.txt") == [("one", "two")]
    assert prompts_of(shell, "run quick --lines name it < in.txt") == [("name it\n\none", "name it\n\ntwo")]
    _, out, _ = shell.script("run quick --lines --max-tokens 3 < in.txt")
    assert out.count("\n") == 2


def test_standard_input_is_the_prompt_where_there_are_no_words(shell: Session) -> None:
    shell.shell.stdin = io.BytesIO(b"from a pipe")
    assert prompts_of(shell, "run quick") == [("from a pipe",)]
    shell.shell.stdin = io.BytesIO(b"unread")
    assert prompts_of(shell, "run quick words") == [("words",)]


def test_bytes_that_are_not_text_reach_the_kernel_undamaged(shell: Session) -> None:
    Path("in.bin").write_bytes(b"\xff\xfe ok")
    assert prompts_of(shell, "run quick -f in.bin") == [("\udcff\udcfe ok",)]
    status, _, err = shell.argv("run", "quick", "caf\udce9")
    assert (status, err) == (0, "")


def test_options_reach_the_process(shell: Session) -> None:
    specs = specs_of(shell, "nice -n 5 run quick --temp 0 --top-k 3 --seed 7 --max-tokens 2 --raw -- -x *")
    (spec,) = specs
    assert (spec.sampling.temperature, spec.sampling.top_k, spec.sampling.seed) == (0.0, 3, 7)
    assert (spec.nice, spec.max_tokens, spec.raw, spec.prompts) == (5, 2, True, ("-x *",))
    assert spec.command.startswith("nice -n 5 run quick")


def specs_of(shell: Session, text: str):  # type: ignore[no-untyped-def]
    """The specs that a script spawns."""
    system, seen = shell.shell.system, []
    spawn = type(system).spawn

    def record(spec):  # type: ignore[no-untyped-def]
        seen.append(spec)
        return spawn(system, spec)

    system.spawn = record  # type: ignore[method-assign]
    status, _, err = shell.script(text)
    assert (status, err) == (0, "")
    return seen


def prompts_of(shell: Session, text: str) -> list[tuple[str, ...]]:
    return [spec.prompts for spec in specs_of(shell, text)]


# Errors: one line, a hint, the exit code


@pytest.mark.parametrize(
    ("line", "status", "about"),
    [
        ("run quick", 2, "no prompt"),
        ("run nosuch hi", 127, "no model nosuch"),
        ("run huge hi", 75, "needs"),
        ("run broken hi", 126, "refused, as planned"),
        ("load broken", 126, "refused, as planned"),
        ("run quick --foo hi", 2, "no option `--foo`"),
        ("run quick --temp hot hi", 2, "--temp"),
        ("run quick --temp=nan hi", 2, "nan"),
        ("run quick --nice 99 hi", 2, "99"),
        ("nice", 2, "which command"),
        ("nice 99 run quick hi", 2, "nice -n 99 run …"),
        ("nice -5 run quick hi", 2, "nice -n -5 run …"),
        ("nice 3", 2, "`3` is not a command"),
        ("kill", 2, "which process"),
        ("kill -sFOO 3", 2, "no signal `FOO`"),
        ('cat ""', 2, "name of the file is empty"),
        ('run quick hi -f ""', 2, "name of the file is empty"),
        ('ps > ""', 2, "name of the file is empty"),
        ('save 2 ""', 2, "name of the file is empty"),
        ("cat .", 1, ".: Is a directory"),
        ("run quick -f .", 1, ".: Is a directory"),
        ("cd /nonexistent", 1, "/nonexistent: No such file"),
        ("export", 127, "`help` lists the commands"),
        ("alias", 127, "`help` lists the commands"),
        ("kill 99", 1, "no process 99"),
        ("kill abc", 2, "not a PID"),
        ("kill %1", 2, "no job"),
        ("kill -FOO 3", 2, "no signal"),
        ("renice 99 2", 2, "99"),
        ("wait 99", 1, "no process 99"),
        ("fg", 2, "no job"),
        ("pss", 127, "no command `pss`"),
        ("ps --sort nothing", 2, "no column"),
        ("ps > /nonexistent/x", 1, "/nonexistent/x: No such file"),
        ("cat < /nonexistent", 1, "/nonexistent: No such file"),
        ("ps > 'a\x00b'", 1, "null"),
        ("ps > /dev/full", 1, "/dev/full: No space left"),
        ("run quick hi > /dev/full", 1, "/dev/full: No space left"),
        ("run quick hi -f /nonexistent", 1, "/nonexistent: No such file"),
        ("save 99 x", 1, "no process 99"),
        ("load nosuch", 127, "no model"),
        ("unload quick", 1, "not loaded"),
        ("unload", 2, "which model"),
        ("echo $nope", 2, "nope is not set"),
        ("sleep -1", 2, "sleep"),
        ("sleep 1 &", 2, "cannot run in the background"),
        ("ps | cat", 2, "unexpected `|`"),
        ("top", 0, ""),
    ],
)
def test_each_error_is_one_line_with_its_exit_code(
    shell: Session, line: str, status: int, about: str
) -> None:
    found, _, err = shell.script(line)
    assert found == status
    assert about in err
    assert err.count("error:") == (1 if status else 0)
    assert "Traceback" not in err
    assert shell.script("echo alive") == (0, "alive\n", "")


def test_did_you_mean(shell: Session) -> None:
    assert "did you mean `kill`?" in shell.script("kil 4")[2]


def test_errors_as_json(shell: Session) -> None:
    status, out, err = shell.argv("ps", "--json", "--sort", "nothing")
    assert (status, out) == (2, "")
    error = json.loads(err)["error"]
    assert error["code"] == "usage_error"
    assert "nothing" in error["message"]
    assert error["hint"]


def test_an_unforeseen_exception_is_one_line_and_kept(shell: Session) -> None:
    shell.shell.system.snapshot = lambda: 1 / 0  # type: ignore
    status, _, err = shell.script("ps")
    assert status == 125
    assert err.startswith("error: internal: ZeroDivisionError")
    assert "Traceback" not in err
    assert "ZeroDivisionError" in shell.shell.last_traceback


# Scripts


def test_a_script_stops_at_the_first_failure_and_says_where(shell: Session) -> None:
    status, out, err = shell.script("echo one\n\nkill 99\necho two", "tour.llm")
    assert (status, out) == (1, "one\n")
    assert err.startswith("error: tour.llm:3: no process 99")
    assert shell.script("\nfalse\necho two", "tour.llm") == (1, "", "tour.llm:2: ended with code 1\n")


def test_conditions_are_exempt(shell: Session) -> None:
    assert shell.script("false || echo b; false && echo c; echo d")[:2] == (0, "b\nd\n")
    assert shell.script("true && false; echo no")[:2] == (1, "")
    assert shell.script("false || false || echo yes")[:2] == (0, "yes\n")


def test_variables(shell: Session) -> None:
    shell.shell.arguments = ("a b", "c")
    status, out, _ = shell.script("x='1  2'; y=$x!; echo $y $1 $# \"$@\"; false || echo $?")
    assert (status, out) == (0, "1  2! a b 2 a b c\n1\n")
    _, out, _ = shell.script("run quick hi > o & echo $!; wait $!")
    assert int(out) > 1


def test_a_syntax_error_runs_nothing_and_shows_the_place(shell: Session) -> None:
    status, out, err = shell.script("echo one\necho two | three", "x.llm")
    assert (status, out) == (2, "")
    assert "x.llm:2: unexpected `|`" in err
    assert "\n           ^" in err


def test_check_reports_every_line_and_runs_nothing(shell: Session) -> None:
    text = (
        "nosuch\necho hi > made\nrun --foo quick $x\nps --sort\nnice run --bar q\nkill -9 %1\nrun quick hi &"
    )
    status = check_text(shell.shell, text, "x.llm")
    _, err = shell.taken()
    assert status == 2
    assert [line.split(": ")[1] for line in err.splitlines() if "error:" in line] == [
        "x.llm:1",
        "x.llm:3",
        "x.llm:4",
        "x.llm:5",
    ]
    assert not Path("made").exists()


# Redirections and jobs


def test_output_goes_to_files(shell: Session) -> None:
    assert shell.script("echo one > f; echo two >> f; cat f; cat < f")[:2] == (0, "one\ntwo\none\ntwo\n")
    assert shell.script("run quick --seed 1 hi > g; cat g")[1] == shell.script("run quick --seed 1 hi")[1]


def test_background_output_is_held_back_until_the_wait(shell: Session) -> None:
    reply = shell.script("run quick --seed 1 hi")[1]
    status, out, err = shell.script(
        "run quick --seed 1 hi & run quick --seed 1 hi & sleep 0.2; echo before; wait"
    )
    assert (status, out) == (0, "before\n" + reply * 2)
    assert err.startswith("[1] ")


def test_a_script_waits_for_what_it_left_behind(shell: Session) -> None:
    status, _, _ = shell.script("run quick hi > f &")
    assert status == 0
    assert Path("f").read_text().endswith("\n")


def test_a_script_that_fails_ends_its_jobs(shell: Session) -> None:
    assert shell.script("run endless hi > f & false")[0] == 1
    assert shell.shell.system.snapshot().processes == ()
    assert list(shell.shell.jobs) == []


def test_stop_cont_kill_and_wait(shell: Session) -> None:
    script = "run endless hi > f & sleep 0.1; stop %1; ps -o state; cont %1; kill %1; wait %1 || echo rc $?"
    status, out, _ = shell.script(script)
    assert status == 0
    assert out.splitlines()[1:] == ["STOPPED", "rc 143"]
    assert shell.script("run endless hi & kill -9 $!; wait")[0] == 137
    assert shell.script("run endless hi > f & kill -INT $!; wait || echo rc $?")[1] == "rc 130\n"
    assert shell.script("run endless hi & stop $!; wait")[0] == 148


def test_renice_shows_old_and_new(shell: Session) -> None:
    status, out, err = shell.script(
        "run endless hi > f & renice 7 %1; renice -n -3 $!; ps -o nice; kill %1; wait || true"
    )
    assert status == 0
    assert out.split() == ["nice", "-3"]
    assert "nice 0 → 7" in err
    assert "nice 7 → -3" in err


def test_a_checkpoint_goes_on(shell: Session) -> None:
    script = """
        run endless hi > a & sleep 0.2; stop %1; save %1 w.ckpt
        load w.ckpt > b & sleep 0.2; stop $!
        ps -o output_tokens; kill %1 %2
    """
    status, out, _ = shell.script(script)
    before, after = map(int, out.split()[1:])
    assert status == 0
    assert after > before > 0
    assert Path("b").read_text().startswith(Path("a").read_text().strip("\n"))
    for option in ("--dry-run", "--ctx 1k", "--seats 2", "--threads 1", "--device cpu"):
        status, _, err = shell.line(f"load w.ckpt {option}")
        assert status == 2 and f"w.ckpt is a checkpoint; {option.split()[0]} is for models" in err


def test_a_broken_pipe_is_quiet_and_ends_the_process(shell: Session, tmp_path: Path) -> None:
    import os

    reader, writer = os.pipe()
    os.close(reader)
    from shell.terminal import Output

    with os.fdopen(writer, "w") as stream:
        shell.shell.out = Output(stream)
        status, _, err = shell.script("run endless hi")
        assert (status, err) == (141, "")
    assert shell.shell.system.snapshot().processes == ()


def test_a_job_whose_output_cannot_be_kept_has_failed(shell: Session) -> None:
    shell.shell.interactive = True
    shell.line("run endless hi > /dev/full &")
    shell.shell.system.wait(2)
    status, out, _ = shell.line("jobs")
    assert (status, out) == (
        0,
        "[1]+ Exit 1   run endless hi > /dev/full   (/dev/full: No space left on device)\n",
    )
    assert json.loads(shell.line("jobs --json")[1])[0]["exit_code"] == 1
    status, _, err = shell.line("wait %1")
    assert status == 1
    assert "error: [1] 2: /dev/full: No space left on device" in err
    assert "Ended  run endless hi > /dev/full" in err
    assert "rc 1\n" in err


def test_jobs_tell_how_each_ended(shell: Session) -> None:
    shell.line("run quick hi & run endless hi & kill %2")
    for pid in (2, 3):
        shell.shell.system.wait(pid)
    assert [line.split()[1] for line in shell.line("jobs")[1].splitlines()] == ["Done", "Exit"]
    assert "Exit 143 run endless" in shell.line("jobs")[1]


@pytest.mark.parametrize("columns", [40, 150])
def test_a_jobs_command_is_cut_where_the_terminal_ends(columns: int) -> None:
    with session(terminal=True, environment={"COLUMNS": str(columns), "NO_COLOR": "1"}) as shell:
        _, _, err = shell.line("run endless " + "word " * 40 + "&")
        assert len(err.rstrip("\n")) == columns
        assert {len(line) for line in shell.line("jobs")[1].splitlines()} == {columns}


def test_an_input_without_end_is_refused(shell: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shell.commands.run._INPUT_MAX_BYTES", 1000)
    Path("fits").write_text("a\n" * 500)
    assert shell.script("run quick --lines < fits > f")[0] == 0
    for words in ("--lines < /dev/zero", "-f /dev/zero"):
        status, _, err = shell.script(f"run quick {words}")
        assert status == 1
        assert "more than 1.0 KiB" in err
    shell.shell.stdin = io.BytesIO(b"a" * 1001)
    assert "standard input: more than" in shell.script("run quick")[2]


def test_interrupt_ends_a_read_that_blocks(shell: Session) -> None:
    os.mkfifo("pipe")
    for line in ("cat pipe", "run quick -f pipe", "run quick < pipe", "cat /dev/zero > /dev/null"):
        with interrupted():
            assert shell.line(line)[0] == 130


def test_unload_all_says_what_it_kept_and_why(shell: Session) -> None:
    assert shell.line("unload --all") == (0, "", "no model is loaded\n")
    shell.line("load quick; run endless hi & run endless hi &")
    status, _, err = shell.line("unload --all")
    assert status == 1
    assert "unloaded quick" in err
    assert "kept: endless is in use by 2, 3" in err


def test_signals_by_name_and_number(shell: Session) -> None:
    assert shell.line("kill -l")[1].split()[:4] == ["2", "INT", "9", "KILL"]
    for flag, state in (("-stop", "STOPPED"), ("-sCONT", "RUN"), ("-s stop", "STOPPED"), ("-SIGCONT", "RUN")):
        shell.line("run endless hi > f &" if flag == "-stop" else "true")
        assert shell.line(f"kill {flag} %1")[0] == 0
        assert shell.shell.system.process(2).state.startswith((state, "NEW"))
    shell.line("kill -sTERM %1")
    assert shell.line("wait %1")[0] == 143


def test_an_empty_file_and_a_cut_one_are_no_checkpoints(shell: Session) -> None:
    Path("empty.ckpt").touch()
    Path("cut.ckpt").write_bytes(b"LLMOS")
    status, _, err = shell.script("load empty.ckpt")
    assert status == 126
    assert "empty.ckpt is empty: neither a model nor a checkpoint" in err
    status, _, err = shell.script("load cut.ckpt")
    assert status == 1
    assert "cut.ckpt ends after 5 bytes" in err
    Path("notes").write_text("to do")
    status, _, err = shell.script("load notes")
    assert status == 126 and "notes is neither a model nor a checkpoint" in err
    Path("quick").touch()
    assert shell.script("load quick")[0] == 0  # a model's name comes first


def test_folders(shell: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    assert shell.script("cd sub; pwd")[1] == f"{tmp_path}/sub\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shell.script("cd; pwd")[1] == f"{tmp_path}\n"


def test_clear_is_for_terminals() -> None:
    with session(terminal=True) as shell:
        assert shell.line("clear")[1] == "\x1b[H\x1b[2J\x1b[3J"
    with session() as shell:
        assert shell.line("clear")[1] == ""


def test_defaults_of_variables(shell: Session) -> None:
    assert shell.script("echo ${1:-none} ${x:-${y:-a b}}; x=1; echo ${x:-2}")[1] == "none a b\n1\n"


# Lists


def test_help_and_history_for_programs(shell: Session) -> None:
    shell.shell.history.extend(["echo one", "ps"])
    assert json.loads(shell.line("history --json 1")[1]) == [{"number": 2, "line": "ps"}]
    rows = {row["name"]: row for row in json.loads(shell.line("help --json")[1])}
    assert rows["kill"]["summary"]
    assert rows["kill"]["group"] == "processes"
    page = json.loads(shell.line("help kill --json")[1])
    assert page["usage"].startswith("kill [options]")
    assert {"name": "-l, --list", "help": "list the signals"} in page["options"]


def test_dmesg_leaves_out_what_engines_say_while_all_is_well(shell: Session) -> None:
    shell.line("load quick")
    assert "sim engine" not in shell.line("dmesg")[1]
    assert "sim engine" in shell.line("dmesg --level info")[1]
    assert "sim engine" in shell.line("dmesg --json")[1]
    shell.line("load broken")
    assert "refused, as planned" in shell.line("dmesg")[1]


def test_ps_json_has_exactly_the_fields_of_the_view(shell: Session) -> None:
    shell.line("run endless hi &")
    status, out, _ = shell.line("ps --json")
    (row,) = json.loads(out)
    assert status == 0
    assert list(row) == [field.name for field in fields(ProcessView)]
    assert (row["model"], row["command"]) == ("endless", "run endless hi")


def test_ps_selects_sorts_and_shows_finished_ones(shell: Session) -> None:
    shell.line("run quick hi; run endless --nice 3 a & run endless b &")
    assert [line.split() for line in shell.line("ps --sort -pid -o pid,nice")[1].splitlines()] == [
        ["PID", "nice"],
        ["4", "0"],
        ["3", "3"],
    ]
    assert shell.line("ps -q")[1] == "3\n4\n"
    assert "2" in shell.line("ps -a -q")[1].split()


@pytest.mark.parametrize("command", ["ps", "models", "free", "jobs", "dmesg", "uptime", "top -1"])
def test_every_list_speaks_json(shell: Session, command: str) -> None:
    shell.line("load quick; run endless hi &")
    status, out, _ = shell.line(f"{command} --json")
    assert status == 0
    assert json.loads(out)


@pytest.mark.parametrize("columns", [1, 8, 20, 40, 80, 120])
def test_tables_fit_the_terminal(columns: int) -> None:
    with session(terminal=True, environment={"COLUMNS": str(columns), "NO_COLOR": "1"}) as shell:
        shell.line("run endless a rather long prompt that says very much 漢字 &")
        for command in ("ps", "models", "free"):
            _, out, _ = shell.line(command)
            widths = {len(line) + sum(c in "漢字" for c in line) for line in out.splitlines()}
            assert 0 < max(widths) <= columns


def test_help_is_short_and_complete(shell: Session) -> None:
    overview = shell.script("help")[1]
    for entry in shell.shell.registry:
        assert f"  {entry.name} " in overview
        page = shell.script(f"{entry.name} -h")[1] if entry.name != "echo" else "\n"
        assert page.count("\n") <= 25
        assert max(map(len, page.splitlines()), default=0) <= 100


# What reaches a terminal


def test_control_characters_do_not_reach_a_terminal(tmp_path: Path) -> None:
    evil = "a\x1b[2Jb\x07\x9bc\u202ed\u2066e\U000e0041f\x7f\r\tg\n"
    (tmp_path / "evil").write_text(evil)
    with session(terminal=True) as shell:
        assert shell.line(f"cat {tmp_path}/evil")[1] == "a[2Jbcdef\tg\n"
        assert "\x1b[2J" not in shell.line("echo '\x1b[2J'; nosuch'\x1b[2J'")[1:][1]
    with session() as shell:
        assert shell.line(f"cat {tmp_path}/evil")[1] == evil
    assert sanitise("\udcff") == "\ufffd"


# Plugins


def broken_import() -> CommandSpec:
    raise ImportError("no module named nothing")


def test_a_plugin_is_imported_at_first_use_and_cannot_hurt(shell: Session) -> None:
    imported = []

    def load(name: str, run) -> CommandSpec:  # type: ignore[no-untyped-def]
        imported.append(name)
        return CommandSpec(name, "a plugin", run)

    registry = shell.shell.registry
    registry.add_lazy("good", "works", lambda: load("good", lambda shell, args: shell.out.line("good") or 0))
    registry.add_lazy("raises", None, lambda: load("raises", lambda shell, args: int("no")))
    registry.add_lazy("leaves", None, lambda: load("leaves", lambda shell, args: exit(3)))
    registry.add_lazy("broken", None, broken_import)
    registry.add_lazy("wrong", None, lambda: 42)  # type: ignore
    shell.script("help")
    assert imported == []
    assert shell.script("good; good") == (0, "good\ngood\n", "")
    assert imported == ["good"]
    for name, status, about in [
        ("raises", 1, "ValueError: invalid literal"),
        ("leaves", 1, "SystemExit: 3"),
        ("broken", 126, "test_shell_commands.py"),
        ("broken", 126, "ImportError: no module named nothing"),
        ("wrong", 126, "it gave a int"),
    ]:
        found, _, err = shell.script(name)
        assert (found, about in err, "Traceback" in err) == (status, True, False)


def test_exit_codes_and_jobs_at_the_prompt(shell: Session) -> None:
    assert shell.script("exit 3; echo no")[:2] == (3, "")
    shell.shell.interactive = True
    shell.line("run endless hi &")
    assert "there is 1 job" in shell.line("exit")[2]
    assert shell.shell.status == 0  # or the second `exit` would leave with the refusal's code
    assert shell.line("(")[0] == 2
    shell.shell.exit_warned = False
    assert shell.line("exit")[0] == 2


def test_swapout_and_swapin(shell: Session) -> None:
    shell.line("run endless hi &")
    shell.line("sleep 0.05")
    status, _, told = shell.line("swapout %1")
    assert status == 0 and "is swapped out" in told
    assert "swapped out by hand" in shell.line("why %1")[1]
    assert shell.line("swapin %1")[0] == 0
    assert "swapped out" not in shell.line("why %1")[1]
    assert shell.line("swapout 999")[0] == 1
    shell.line("kill %1")


@pytest.mark.parametrize("ending", ["wait", ""])
def test_a_script_does_not_wait_for_what_it_swapped_out(shell: Session, ending: str) -> None:
    status, _, told = shell.script(f"run endless hi > a & sleep 0.1; swapout %1; {ending}")
    assert status == (148 if ending else 0)
    assert "`swapin %1` lets it go on" in told


def test_a_job_that_is_brought_back_is_swapped_in(shell: Session) -> None:
    shell.line("run endless hi &")
    shell.line("sleep 0.05; swapout %1; bg %1")
    assert "swapped out" not in shell.line("why %1")[1]
    shell.line("kill %1")


def test_a_command_without_words_names_only_what_is_missing(shell: Session) -> None:
    for command in ("run", "chat"):
        assert shell.line(command)[2].splitlines()[0].endswith("are required: MODEL")


def test_the_rate_of_a_copy_is_of_what_it_said_itself(shell: Session) -> None:
    shell.line("run endless --max-tokens 200 hi > a & sleep 0.1; stop %1; fork %1 > b; cont %1; wait")
    original, copy = shell.shell.system.finished()[::-1]
    assert copy.ppid == original.pid and copy.output_tokens == original.output_tokens == 200
    assert copy.tokens_per_s * copy.elapsed_s < 200


def test_save_all_makes_its_folder_and_says_what_is_in_the_way(shell: Session) -> None:
    shell.line("run endless hi &")
    assert shell.line("save --all new")[0] == 0
    assert len(list(Path("new").iterdir())) == 1
    Path("file").touch()
    assert "file: not a folder" in shell.line("save --all file")[2]
    assert "No such file" in shell.line("save --all deep/er")[2]
    shell.line("kill %1")


def test_a_load_that_was_given_up_has_not_failed(shell: Session) -> None:
    shell.line("run slow-load hi &")
    assert shell.line("kill %1")[0] == 0
    until, state = time.monotonic() + 20, "loading"
    while state == "loading" and time.monotonic() < until:
        (row,) = [row for row in json.loads(shell.line("models --json")[1]) if row["name"] == "slow-load"]
        state = row["state"]
    assert (state, row["error"]) == ("disk", "")
