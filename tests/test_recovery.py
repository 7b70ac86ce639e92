"""Nothing lost: what `--resume` finds after a crash, and what it does not (campaigns: test_kill9)."""

import contextlib
import fcntl
import json
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from shell_kit import Session
from simkernel import SimSystem

from kernel import journal
from kernel.errors import CheckpointInvalid
from kernel.orphans import read, sweep
from kernel.spec import ProcessSpec
from kernel.syscall import Signal

REQUESTS = Path(__file__).parent.parent / "examples" / "requests.txt"
LLMOS = [sys.executable, "-m", "llmos"]


def job(lines: Path, out: Path) -> str:
    return f"run nano --lines --temp 0.9 --seed 3 -f {lines} > {out}"


def killed_once(words: list[str], file: Path) -> None:
    """Start LLMOS, and kill it as soon as there is something in a file."""
    child = subprocess.Popen([*LLMOS, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (file.exists() and file.stat().st_size):
        time.sleep(0.01)
    child.kill()
    child.wait()


def orphans() -> int:
    listed = subprocess.run([*LLMOS, "resume", "-l"], check=True, capture_output=True, timeout=60)
    return len(listed.stdout.splitlines()) - 1


def test_who_was_killed_stays_killed(tmp_path: Path) -> None:
    """Killed by its user, and not yet reaped when LLMOS died: its output is completed, it does not go on."""
    out, ready = tmp_path / "out.txt", tmp_path / "ready"
    words = f"{job(REQUESTS, out)} & sleep 0.2; kill %1; sleep 0.5; echo yes > {ready}; sleep 20"
    killed_once(["-c", words], ready)
    assert orphans() == 1
    subprocess.run([*LLMOS, "--resume"], timeout=60, capture_output=True, check=False)
    assert len(out.read_text().splitlines()) < 400
    assert orphans() == 0


def test_output_files_that_were_removed_or_emptied_meanwhile_are_whole_in_the_end(tmp_path: Path) -> None:
    removed, emptied, expected = tmp_path / "removed", tmp_path / "emptied", tmp_path / "expected"
    emptied.write_text("what was there before\n")
    subprocess.run([*LLMOS, "-c", job(REQUESTS, expected)], check=True, timeout=60, capture_output=True)
    appended = job(REQUESTS, emptied).replace(" > ", " >> ")
    killed_once(["-c", f"{job(REQUESTS, removed)} & {appended} & sleep 20"], removed)
    removed.unlink()
    emptied.write_text("")
    subprocess.run([*LLMOS, "--resume"], timeout=60, capture_output=True, check=True)
    assert removed.read_bytes() == emptied.read_bytes() == expected.read_bytes()
    assert orphans() == 0


def test_who_comes_second_to_resume_a_process_leaves_its_file_alone(tmp_path: Path) -> None:
    out, gone = tmp_path / "out", tmp_path / "no-such-folder" / "out"
    first = SimSystem(folder=tmp_path)
    for file in (out, gone):
        sink = json.dumps({"path": str(file), "offset": 0})
        first.system.spawn(ProcessSpec("m", ("go on",), max_tokens=50, sink=sink, command=f"run m > {file}"))
    first.run_until(20)
    assert first.kernel.recovery.journal is not None and first.kernel.recovery.journal.flush()
    first.system.freeze()
    first.system.shutdown()
    second, third = SimSystem(folder=tmp_path), SimSystem(folder=tmp_path)
    left = second.system.orphans()
    third.system.resume(left[0])
    out.write_text("what the third wrote\n")
    second.system.orphans = lambda: left  # type: ignore[method-assign]  # as it was a moment ago
    status, _, said = Session(second.system, terminal=False, environment={}).script("resume")
    assert status == 1 and out.read_text() == "what the third wrote\n"
    assert (
        "error: 2, `run m > " in said and "process 2 of an earlier LLMOS is being continued elsewhere" in said
    )
    assert "error: 3, `run m > " in said and f"{gone}: No such file or directory" in said
    assert "--forget" in said
    for sim in (second, third):
        sim.system.shutdown()


def test_a_clean_end_leaves_nothing_to_resume(tmp_path: Path, llmos_home: Path) -> None:
    subprocess.run([*LLMOS, "-c", "run nano --temp 0 hello"], check=True, timeout=60, capture_output=True)
    assert not list((llmos_home / "journal").glob("*"))
    assert not orphans()


def test_a_living_llmos_is_not_an_orphan_and_forget_forgets(tmp_path: Path, llmos_home: Path) -> None:
    child = subprocess.Popen([*LLMOS, "-c", f"{job(REQUESTS, tmp_path / 'out')} & sleep 30"])
    try:
        until = time.monotonic() + 20
        while not list((llmos_home / "journal").glob("*.db")) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        assert orphans() == 0
    finally:
        child.kill()
        child.wait()
    assert orphans() == 1
    subprocess.run([*LLMOS, "resume", "--forget"], check=True, timeout=60, capture_output=True)
    assert orphans() == 0


def test_a_damaged_journal_is_no_obstacle(llmos_home: Path) -> None:
    folder = llmos_home / "journal"
    folder.mkdir(parents=True)
    for name, content in (("1-0", b""), ("2-0", os.urandom(5000)), ("3-0", b"SQLite format 3\0" + b"x" * 90)):
        (folder / f"{name}.db").write_bytes(content)
        (folder / f"{name}.lock").write_bytes(b"")
    assert orphans() == 0
    answer = subprocess.run(
        [*LLMOS, "-c", "run nano --temp 0 'what is running?'; ps -a --json"], capture_output=True, timeout=60
    )
    first, _, views = answer.stdout.decode().partition("\n")
    assert (answer.returncode, first) == (0, "ps"), answer.stderr
    assert json.loads(views)[0]["exit_code"] == 0


def test_a_lock_without_a_journal_is_swept_unless_somebody_holds_it(tmp_path: Path) -> None:
    for name in ("dead", "living"):
        (tmp_path / f"{name}.lock").touch()
    with (tmp_path / "living.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sweep(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["living.lock"]


def test_what_cannot_be_read_of_a_journal_is_told(tmp_path: Path) -> None:
    file, told = tmp_path / "1-0.db", list[str]()
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.executescript(journal._SCHEMA)
        for pid, spec in ((2, json.dumps(asdict(ProcessSpec("m", ("go",))))), (3, "{}"), (4, "no JSON")):
            database.execute(journal._NEW_PROCESS, (pid, 0, spec, "digest", f"uid {pid}", ""))
        database.commit()
    assert [orphan.pid for orphan in read(file, told.append)] == [2]
    assert [line.split(" in ")[0] for line in told] == ["process 3", "process 4"]
    file.write_bytes(os.urandom(5000))
    assert not read(file, told.append) and "not a database" in told[-1]


def test_what_is_kept_belongs_to_the_file_that_was_loaded(tmp_path: Path) -> None:
    """Another file of that name has come since: it is not the one that the tokens are of."""
    sim = SimSystem(folder=tmp_path)
    sim.system.load("m")
    (tmp_path / "m.sim").write_bytes(b"another model")
    pid = sim.spawn("one two three")
    sim.dispatcher.advance()
    sim.system.signal(pid, Signal.STOP)
    sim.system.save(pid, tmp_path / "c.ckpt")
    again = sim.system.restore(tmp_path / "c.ckpt")  # the right one is open
    assert sim.system.process(again).exit_code is None
    sim.system.freeze()
    sim.kernel.shutdown()
    next_boot = SimSystem(folder=tmp_path)
    orphan = next(iter(next_boot.system.orphans()))
    with pytest.raises(CheckpointInvalid, match="another file"):
        next_boot.system.resume(orphan)
