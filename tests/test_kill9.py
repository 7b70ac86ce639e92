"""`kill -9` at random instants: of LLMOS, and of a worker. Nothing is lost, and nothing is said twice."""

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from drivers.llamacpp.driver import LlamaCppDriver
from kernel.clock import RealClock
from kernel.config import KernelConfig
from kernel.device import Sampling
from kernel.kernel import Kernel, Parts
from kernel.orphans import Orphan, find, forget, sweep
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls
from llmos.paths import find_paths
from llmos.store import Store

REQUESTS = Path(__file__).parent.parent / "examples" / "requests.txt"
NANO = Path(__file__).parent.parent / "llmos" / "builtin" / "nano.gguf"
LLMOS = [sys.executable, "-m", "llmos"]
LINES = 100  # of a job: some three lives long, when each is cut short
BEFORE = "what was there before\n"


def run(*words: str) -> None:
    subprocess.run([*LLMOS, *words], check=True, timeout=120, capture_output=True)


@dataclass
class Campaign:
    """Two jobs, killed again and again wherever they are, until they are done; then from the beginning."""

    folder: Path
    journals: Path
    source: random.Random
    spans: tuple[float, ...]  # how far into its life one may get, as parts of an undisturbed one
    kills: int = 0
    at_work: int = 0  # kills that hit processes that the journal knows
    finished: int = 0  # jobs that came to their end
    expected: str = ""
    life_s: float = 0.0  # of an LLMOS with one of the jobs, that nobody kills
    out: Path = field(init=False)
    appended: Path = field(init=False)

    def __post_init__(self) -> None:
        self.out, self.appended = self.folder / "out.txt", self.folder / "appended.txt"
        lines = REQUESTS.read_text().splitlines(keepends=True)
        (self.folder / "lines.txt").write_text("".join(lines[:LINES]))
        began_s = time.monotonic()
        run("-c", f"{self.job()} {self.out}")
        self.life_s = time.monotonic() - began_s
        self.expected = self.out.read_text()
        self.begin()

    def job(self) -> str:
        return f"run nano --lines --temp 0.9 --seed 3 -f {self.folder / 'lines.txt'} >"

    def begin(self) -> None:
        self.out.unlink(missing_ok=True)
        self.appended.write_text(BEFORE)
        self.words = ["-c", f"{self.job()} {self.out} & {self.job()}> {self.appended}"]

    def go(self, kills: int) -> None:
        while self.kills < kills:
            if not self.life():
                self.check_end()
        self.life(to_the_end=True)
        self.check_end()

    def life(self, *, to_the_end: bool = False) -> bool:
        """One LLMOS, killed at a random instant; False if it had ended by then."""
        child = subprocess.Popen([*LLMOS, *self.words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            limit_s = self.source.choice(self.spans) * self.life_s
            child.wait(120 if to_the_end else self.source.uniform(0.0, limit_s))
        except subprocess.TimeoutExpired:
            workers = psutil.Process(child.pid).children(recursive=True)
            child.send_signal(signal.SIGKILL)
            child.wait()
            self.kills += 1
            self.check_killed(workers)
            return True
        assert child.returncode == 0
        return False

    def orphans(self) -> list[Orphan]:
        return find(self.journals, pytest.fail)

    def check_killed(self, workers: list[psutil.Process]) -> None:
        """What is on the disk is a beginning of what it should be; no worker is left behind."""
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive
        orphans = self.orphans()
        assert len({orphan.state.spec.sink for orphan in orphans}) == len(orphans) <= 2
        for orphan in orphans:
            said = "".join(f"{reply}\n" for _, reply in sorted(orphan.state.replies.items()))
            said += "".join(thread.reply for thread in orphan.state.threads)
            assert self.expected.startswith(said)
        written = self.out.read_text() if self.out.exists() else ""
        assert self.expected.startswith(written)
        assert (BEFORE + self.expected).startswith(self.appended.read_text())
        self.at_work += bool(orphans)
        if self.words[0] == "--resume" or len(orphans) == 2:
            self.words = ["--resume"]
        else:  # killed before both were written down: the user, too, would begin again
            forget(self.journals)
            self.begin()

    def check_end(self) -> None:
        """Both files are as if nothing had happened."""
        assert self.out.read_text() == self.expected
        assert self.appended.read_text() == BEFORE + self.expected
        sweep(self.journals)  # as the next LLMOS will
        assert not list(self.journals.glob("*"))
        self.finished += 1
        self.begin()


def killed(folder: Path, home: Path, kills: int, seed: int, spans: tuple[float, ...]) -> None:
    campaign = Campaign(folder, home / "journal", random.Random(seed), spans)
    campaign.go(kills)
    print(f"{campaign.kills} kills, {campaign.at_work} at work, {campaign.finished} jobs finished")
    assert campaign.at_work > kills / 5 and campaign.finished


def test_killed_at_25_random_instants_the_output_is_exact(tmp_path: Path, llmos_home: Path) -> None:
    killed(tmp_path, llmos_home, kills=25, seed=1, spans=(0.5,))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_1000_random_instants(tmp_path: Path, llmos_home: Path, seed: int) -> None:
    killed(tmp_path, llmos_home, kills=100, seed=100 + seed, spans=(0.6, 1.2))


class Workers:
    """Two models in a worker each, one process on either; one worker is killed, and the other not."""

    def __init__(self, folder: Path) -> None:
        shutil.copyfile(NANO, folder / "hit.gguf")
        shutil.copyfile(NANO, folder / "spared.gguf")
        driver = LlamaCppDriver()
        config = KernelConfig(restart_window_s=0.01, restarts_max=1_000)  # each death is the first
        self.kernel = Kernel(
            Parts(RealClock(), {".gguf": driver}, Store(find_paths(), (folder,)), config=config)
        )
        self.system = Syscalls(self.kernel)
        self.load_s = [self.load("hit"), self.load("spared")]

    def load(self, name: str) -> float:
        began_s = time.monotonic()
        self.system.load(name)
        assert self.system.wait_load(name, 60) is not None
        return time.monotonic() - began_s

    def spawn(self, model: str, prompts: int) -> int:
        requests = tuple(REQUESTS.read_text().splitlines()[:prompts])
        sampling = Sampling(temperature=0.9, seed=3, exact=True)
        return self.system.spawn(ProcessSpec(model, requests, lines=True, sampling=sampling))

    def worker(self, model: str) -> int | None:
        views = [view for view in self.system.models() if view.name == model]
        return views[0].worker_pid if views else None

    def kill_worker(self, pid: int) -> float:
        """Seconds from the kill to the process's next token; 0 if it ended before."""
        worker = self.worker("hit")
        if worker is None:
            return 0.0
        tokens = self.system.process(pid).output_tokens
        os.kill(worker, signal.SIGKILL)
        began_s = time.monotonic()
        while self.worker("hit") in (worker, None) or self.system.process(pid).output_tokens <= tokens:
            if self.system.process(pid).exit_code is not None:
                return 0.0
            time.sleep(0.005)
        return time.monotonic() - began_s


def workers_killed(folder: Path, kills: int, prompts: int, seed: int) -> None:
    source, machine = random.Random(seed), Workers(folder)
    try:
        quiet = machine.spawn("hit", prompts)
        machine.system.wait(quiet, 120)
        expected = machine.system.read(quiet, 0).text
        recoveries_s: list[float] = []
        while len(recoveries_s) < kills:
            spared, pid = machine.spawn("spared", prompts), machine.spawn("hit", prompts)
            while machine.system.process(pid).exit_code is None and len(recoveries_s) < kills:
                time.sleep(source.uniform(0.0, 0.3))
                if took_s := machine.kill_worker(pid):
                    recoveries_s.append(took_s)
            for each in (spared, pid):
                view = machine.system.wait(each, 120)
                assert view is not None and view.exit_code == 0, view
                assert machine.system.read(each, 0).text == expected
        machine.kernel.check_integrity()
        (beside,) = [view for view in machine.system.models() if view.name == "spared"]
        assert (beside.restarts, beside.error) == (0, "")
        beyond_s = statistics.median(recoveries_s) - statistics.median(machine.load_s)
        print(f"{kills} worker kills: back after {statistics.median(recoveries_s):.2f} s (median), "
              f"{max(recoveries_s):.2f} s (worst); a load takes {statistics.median(machine.load_s):.2f} s; "
              f"beyond it {beyond_s:.2f} s")  # fmt: skip
    finally:
        machine.system.shutdown()


def test_a_killed_workers_processes_go_on_and_others_do_not_notice(tmp_path: Path) -> None:
    workers_killed(tmp_path, kills=4, prompts=150, seed=1)


@pytest.mark.soak
def test_workers_killed_at_200_random_instants(tmp_path: Path) -> None:
    workers_killed(tmp_path, kills=200, prompts=400, seed=2)


def test_no_thread_is_left_behind_by_a_kernel(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    machine = Workers(tmp_path)
    machine.system.wait(machine.spawn("hit", 3), 60)
    machine.system.shutdown()
    assert set(threading.enumerate()) <= before
