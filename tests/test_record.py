"""Recordings: one script gives one file, byte for byte; and what is in it is what happened.

Run as a program (`python tests/test_record.py FILE SEED`) it plays a scene and records it.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from simkernel import Entry, SimCatalog

from drivers.sim import SimDriver
from drivers.simmodel import SimFaults, SimModel
from kernel.clock import ManualClock
from kernel.device import DeviceInfo, Sampling
from kernel.errors import LlmosError
from kernel.kernel import Kernel, Parts
from kernel.process import Signal
from kernel.record import Recorder
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls

LLMOS = [sys.executable, "-m", "llmos"]
MODELS = {
    "crowded.sim": SimModel(mean_tokens=60, sequences=3, seed=5),
    "frail.sim": SimModel(mean_tokens=80, sequences=4, faults=SimFaults(die_at_step=40, first_loads=1)),
    "other.gguf": SimModel(mean_tokens=50, sequences=2, decode_s=0.003),
}


class Catalog(SimCatalog):
    def list(self) -> tuple[Entry, ...]:
        return tuple(Entry(Path(name).stem, Path(name)) for name in self.names)


def machine(record: Path) -> Kernel:
    """Two devices, three models."""
    clock = ManualClock()
    drivers = {
        suffix: SimDriver(
            [DeviceInfo(device, "sim", "simulated", 64 << 30)], sleep=clock.sleep, models=MODELS
        )
        for suffix, device in ((".sim", "sim0"), (".gguf", "sim1"))
    }
    return Kernel(Parts(clock, drivers, Catalog(*MODELS), threaded=False, record=record))


def play(record: Path, seed: int) -> Kernel:
    """Everything that a scheduler can be asked for."""
    kernel = machine(record)
    system = Syscalls(kernel)

    def spawn(model: str, count: int, **more: Any) -> list[int]:
        specs = [
            ProcessSpec(
                model, (f"prompt {n}", *["another one"] * 8), sampling=Sampling(seed=seed + n), **more
            )
            for n in range(count)
        ]
        return [system.spawn(spec) for spec in specs]

    def step(rounds: int) -> None:
        for _ in range(rounds):
            for dispatcher in kernel.dispatchers.values():
                dispatcher.advance()

    system.set_group("team", 3.0)
    crowd = spawn("crowded", 5) + spawn("crowded", 3, group="team") + spawn("crowded", 1, nice=-10)
    step(40)
    frail, other = spawn("frail", 4, nice=5), spawn("other", 4)
    step(60)
    system.renice(crowd[0], 15)
    system.renice(other[0], -5)
    system.signal(crowd[1], Signal.STOP)
    system.signal(frail[0], Signal.KILL)
    system.set_group("team", 0.5)
    step(60)
    system.set_policy("rr")
    system.signal(crowd[1], Signal.CONT)
    step(50)
    system.set_policy("fair")
    kernel.pump()
    kernel.check_integrity()
    assert not [p for p in kernel.table if p.alive]
    system.shutdown()
    return kernel


def recorded(file: Path, seed: int, hash_seed: str) -> bytes:
    """The scene, played by a process of its own."""
    environ = os.environ | {"PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, __file__, file, str(seed)], env=environ, check=True, timeout=60)
    return file.read_bytes()


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def test_one_script_gives_one_file_and_another_seed_another(tmp_path: Path) -> None:
    first, second = recorded(tmp_path / "a", 7, "1"), recorded(tmp_path / "b", 7, "2")
    assert first == second
    assert recorded(tmp_path / "c", 8, "1") != first
    kinds = Counter(line.get("kind") for line in lines_of(tmp_path / "a"))
    everything = {"open", "lost", "policy", "spawn", "join", "leave", "weight", "seat", "swap", "plan", "end"}
    assert everything | {"exit", None} == set(kinds)


def test_the_file_adds_up_to_what_the_processes_received(tmp_path: Path) -> None:
    """Replayed from the file alone: grants end once each, tokens used are tokens received, time goes on."""
    kernel = play(tmp_path / "r", 3)
    _, *lines = lines_of(tmp_path / "r")
    used: Counter[int] = Counter()
    open_quanta: set[tuple[str, int]] = set()
    for line in lines:
        key = (line["device"], line.get("quantum", 0))
        if line["kind"] == "plan":
            assert key not in open_quanta and all(grant["tokens"] > 0 for grant in line["grants"])
            open_quanta.add(key)
        elif line["kind"] == "end":
            open_quanta.remove(key)
            used.update({share["pid"]: share["tokens"] for share in line["used"]})
    assert not open_quanta
    assert [line["t_s"] for line in lines] == sorted(line["t_s"] for line in lines)
    steady = [p for p in kernel.table if p.model == "other" and p.exit_code == 0]
    assert steady and all(used[p.pid] >= p.output_tokens + p.prompt_tokens for p in steady)
    ends = {line["pid"]: line["exit_code"] for line in lines if line["kind"] == "exit"}
    assert ends == {p.pid: p.exit_code for p in kernel.table}


def test_a_kernel_that_is_not_recorded_has_no_observer(tmp_path: Path) -> None:
    kernel = Kernel(Parts(ManualClock(), {}, SimCatalog(), threaded=False))
    assert kernel.recorder is None and all(d.scheduler.record is None for d in kernel.dispatchers.values())


def test_an_old_recording_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "r"
    play(file, 1)
    size = file.stat().st_size
    machine(file).shutdown()
    assert 0 < file.stat().st_size < size
    notes = tmp_path / "notes"
    notes.write_text("precious")
    for target, words in (
        (notes, "not a recording"),
        (tmp_path, "directory"),
        (tmp_path / "no" / "x", "No such file"),
        (Path("/dev/full"), "No space left"),
        (Path(), "needs a file name"),
        (Path("a\0b"), "null byte"),
    ):
        with pytest.raises(LlmosError, match=words):
            machine(target)
    assert notes.read_text() == "precious"


def test_two_do_not_write_one_file(tmp_path: Path) -> None:
    kernel = machine(tmp_path / "r")
    with pytest.raises(LlmosError, match="another LLMOS is writing"):
        machine(tmp_path / "r")
    kernel.shutdown()
    machine(tmp_path / "r").shutdown()


def test_a_full_disk_ends_the_recording_with_a_whole_line_and_the_work_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    recorder = Recorder(tmp_path / "r", ManualClock(), said.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        for n in range(500):
            recorder.note("sim0", "exit", {"pid": n, "exit_code": 0})
        until = time.monotonic() + 20
        while not said and time.monotonic() < until:
            time.sleep(0.01)
        recorder.note("sim0", "exit", {"pid": 0, "exit_code": 0})
        recorder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and "the recording ends here" in said[0] and "File too large" in said[0]
    content = (tmp_path / "r").read_bytes()
    assert content.endswith(b"\n") and len(content) > 9_000
    assert [line["pid"] for line in lines_of(tmp_path / "r")[1:]] == list(
        range(len(lines_of(tmp_path / "r")) - 1)
    )


def test_lines_of_many_threads_are_whole(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", ManualClock(), print)

    def decide(device: str) -> None:
        for n in range(300):
            recorder.note(device, "exit", {"pid": n, "exit_code": 0})

    threads = [threading.Thread(target=decide, args=(f"sim{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    lines = lines_of(tmp_path / "r")[1:]
    for n in range(4):
        assert [line["pid"] for line in lines if line["device"] == f"sim{n}"] == list(range(300))


def test_llmos_records_and_kill_9_leaves_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    job = "run nano --ignore-eos --max-tokens 100000 hello > /dev/null & wait"
    child = subprocess.Popen([*LLMOS, "--record", file, "-c", job], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while time.monotonic() < until and not (file.exists() and b'"end"' in file.read_bytes()):
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert file.read_bytes().endswith(b"\n")
    assert {"spawn", "join", "open", "seat", "plan", "end"} <= {line.get("kind") for line in lines_of(file)}
    refused = subprocess.run(
        [*LLMOS, "--record", "/dev/full", "-c", "echo hi"], capture_output=True, timeout=60, check=False
    )
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert refused.stderr.startswith(b"error: cannot write /dev/full") and refused.stderr.count(b"\n") == 1


if __name__ == "__main__":
    play(Path(sys.argv[1]), int(sys.argv[2]))
