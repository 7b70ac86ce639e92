"""`save` in all its forms, USR1, and files when names, disks and folders are not what they were."""

import io
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kernel.errors import Interrupted, NotPermitted
from llmos.boot import Machine, boot
from llmos.export import export
from shell.interpreter import run_line
from shell.terminal import Output

NANO = Path(__file__).parent.parent / "llmos" / "builtin" / "nano.gguf"
REQUESTS = Path(__file__).parent.parent / "examples" / "requests.txt"
LLMOS = [sys.executable, "-m", "llmos"]
ENDLESS = "run nano --ignore-eos --max-tokens 100000 --ctx 100k hello > /dev/null &"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.chdir(tmp_path)
    made = boot({}, plugins=False)
    made.shell.out, made.shell.err = Output(io.StringIO()), Output(io.StringIO())
    yield made
    made.system.shutdown()


def say(machine: Machine, line: str) -> tuple[int, str]:
    """Exit code, and what went to both streams."""
    streams = io.StringIO()
    machine.shell.out = machine.shell.err = Output(streams)
    return run_line(machine.shell, line), streams.getvalue()


@contextmanager
def small_disk(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_save_all_saves_what_lives_and_one_bad_one_does_not_stop_the_others(machine: Machine) -> None:
    folder = Path("saved")
    assert say(machine, f"save --all {folder}")[0] == 0 and folder.is_dir()  # made: there is no `mkdir`
    assert say(machine, f"{ENDLESS} {ENDLESS} {ENDLESS} run nano --temp 0 hello > /dev/null")[0] == 0
    (folder / "3.ckpt").write_text("precious notes")
    status, said = say(machine, f"save --all {folder}")
    assert status == 1
    assert said.count("error:") == 1 and "3.ckpt exists and is not a checkpoint" in said
    assert sorted(file.name for file in folder.iterdir()) == ["2.ckpt", "3.ckpt", "4.ckpt"]
    assert (folder / "3.ckpt").read_text() == "precious notes"
    (folder / "3.ckpt").unlink()
    assert say(machine, f"save --all {folder}")[0] == 0
    assert len(list(folder.iterdir())) == 3
    assert say(machine, f"load {folder}/3.ckpt > /dev/null & sleep 0.1; kill %4")[0] == 0


def test_usr1_writes_a_checkpoint_and_the_log_tells_where(machine: Machine) -> None:
    say(machine, f"{ENDLESS} sleep 0.3")
    for _ in range(2):
        assert say(machine, "kill -USR1 2") == (0, "")
    files = sorted(machine.paths.checkpoints.iterdir())
    assert len(files) == 2 and all(file.name.startswith("2-") for file in files)
    said = [line.text for line in machine.system.log() if line.source == "save"]
    assert len(said) == 2 and str(files[0]) in said[0]
    assert machine.system.process(2).exit_code is None
    assert say(machine, f"load {files[0]} > /dev/null & sleep 0.1; kill %1 %2")[0] == 0
    status, text = say(machine, "kill -10 2")
    assert status == 1 and "has ended" in text
    assert "10 USR1" in say(machine, "kill -l")[1]


def test_a_model_is_saved_to_a_file_whole_or_not_at_all(machine: Machine, tmp_path: Path) -> None:
    assert say(machine, "save nano copy.gguf")[0] == 0
    assert Path("copy.gguf").read_bytes() == NANO.read_bytes()
    assert (
        say(machine, "save nano copy.gguf; run ./copy.gguf --temp 0 hello")[0] == 0
    )  # an old model is replaced
    notes, link = Path("notes.txt"), Path("link.gguf")
    notes.write_text("precious")
    link.symlink_to(notes)
    for target, words in (
        ("notes.txt", "exists and is not a model"),
        ("link.gguf", "not a regular file"),
        (str(tmp_path), "not a regular file"),
        ("no/such/folder", "No such file"),
        (str(NANO), "is that model already"),
        ('""', "name of the file is empty"),
    ):
        status, said = say(machine, f"save nano {target}")
        assert status in (1, 2) and words in said, (target, said)
    assert notes.read_text() == "precious" and link.is_symlink()
    with small_disk(1 << 20):
        status, said = say(machine, "save nano big.gguf")
    assert status == 1 and "cannot write big.gguf: File too large" in said
    assert say(machine, "save nanno x.gguf")[0] == 127
    assert say(machine, "save nano")[0] == 2
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp") or "big" in file.name]


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        raise Interrupted("^C")

    (tmp_path / "old.gguf").write_bytes(b"GGUF, an old one")
    with pytest.raises(Interrupted):
        export(NANO, tmp_path / "old.gguf", stop)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"GGUF, an old one"]
    with pytest.raises(NotPermitted):
        export(NANO, NANO, stop)


def test_a_full_disk_during_save_keeps_the_old_checkpoint(machine: Machine, tmp_path: Path) -> None:
    say(machine, f"{ENDLESS} sleep 0.3; save 2 a.ckpt")
    before = Path("a.ckpt").read_bytes()
    with small_disk(100):
        status, said = say(machine, "save 2 a.ckpt")
    assert status == 1 and "cannot write a.ckpt: File too large" in said
    assert Path("a.ckpt").read_bytes() == before
    assert [file.name for file in tmp_path.glob("*.ckpt*")] == ["a.ckpt"]
    assert not list(tmp_path.glob(".a.ckpt*"))
    assert machine.system.process(2).exit_code is None


def test_a_checkpoint_does_not_lead_out_through_links(machine: Machine, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("")
    Path("via.ckpt").symlink_to(outside)
    say(machine, f"{ENDLESS} sleep 0.2")
    status, said = say(machine, "save 2 via.ckpt")
    assert status == 1 and "not a regular file" in said
    assert outside.read_text() == ""
    Path("real.ckpt").mkdir()
    assert say(machine, "save 2 real.ckpt")[0] == 1
    status, said = say(machine, "load via.ckpt")
    assert status == 126 and "empty" in said


@pytest.mark.parametrize(
    "name", ["../evil", "a/b", "..", ".hidden", "-x", "~root", "a\\b", "x" * 300, "\x1b[31m"]
)
def test_no_model_name_leads_out_of_the_store(machine: Machine, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    shell = machine.shell
    from shell.interpreter import run_argv

    shell.out = shell.err = Output(io.StringIO())
    assert run_argv(shell, ["cp", "nano", "--", name]) == 2
    assert [file for file in sorted(tmp_path.rglob("*")) if file not in before and file.is_file()] == []


def test_a_store_behind_a_link_is_not_written_through(machine: Machine, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    machine.paths.models.mkdir(parents=True)
    (machine.paths.models / "stolen.gguf").symlink_to(outside / "stolen.gguf")
    assert say(machine, "cp nano stolen")[0] == 1
    assert not list(outside.iterdir())


def test_a_full_disk_under_the_journal_is_told_and_the_work_goes_on(tmp_path: Path) -> None:
    """A limit that SQLite's shared memory fits under, and what it writes of this job does not."""
    job = f"run nano --lines --temp 0 -f {REQUESTS} > {tmp_path}/out; dmesg"
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *LLMOS, "-c", job]
    done = subprocess.run(limited, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"the journal cannot be written") == 1
    assert len((tmp_path / "out").read_text().splitlines()) == 400
    assert b"Traceback" not in done.stderr


def test_two_llmos_on_one_home_do_not_disturb_each_other(tmp_path: Path, llmos_home: Path) -> None:
    job = "run nano --lines --temp 0 --exact -f {} > {}"
    lines = tmp_path / "lines"
    lines.write_text("".join(REQUESTS.read_text().splitlines(keepends=True)[:80]))
    outs = [tmp_path / "a", tmp_path / "b"]
    both = [subprocess.Popen([*LLMOS, "-c", job.format(lines, out)]) for out in outs]
    assert [child.wait(120) for child in both] == [0, 0]
    assert outs[0].read_text() == outs[1].read_text() and outs[0].read_text().count("\n") == 80
    assert not list((llmos_home / "journal").iterdir())


def test_a_home_that_vanishes_while_it_runs(machine: Machine, tmp_path: Path, llmos_home: Path) -> None:
    say(machine, f"{ENDLESS} sleep 0.2")
    shutil.rmtree(llmos_home)
    status, said = say(machine, "run nano --temp 0 'what is running?'; sleep 0.3; dmesg")
    assert status == 0 and "ps\n" in said
    assert said.count("warning: ") == 1 and said.count(".db was removed: a crash would lose what runs") == 2
    assert (
        say(machine, "save 2 a.ckpt; kill -USR1 2; load a.ckpt > /dev/null & kill %1 %2; wait || true")[0]
        == 0
    )
    assert say(machine, "models; swapout 2; resume -l; cp nano mine; rm -y mine")[0] in (0, 1)
    status, said = say(machine, "run mine hello")
    assert status == 127 and said.count("error:") == 1
    until = time.monotonic() + 20
    while machine.system.process(2).exit_code is None and time.monotonic() < until:
        time.sleep(0.01)
    assert (tmp_path / "a.ckpt").exists()
