"""Exact chats on llama.cpp: whatever is lost between two turns or within one, the same tokens are said."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from ggufs import NANO

from drivers.llamacpp.driver import LlamaCppDriver
from kernel.clock import RealClock
from kernel.device import EngineOptions, Sampling
from kernel.errors import WorkerDied
from kernel.kernel import Kernel, Parts
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls
from llmos.paths import find_paths
from llmos.store import Store

TURNS = ("list the files here, all of them, with their sizes", "show what runs", "make job 3 less important")
ANSWER_TOKENS = 120
SEEDS = (5, 6, 7)  # of which last bits change a token


class Machine:
    """An LLMOS, and then the next one, stepped by hand, with chats on a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.boot()

    def boot(self) -> None:
        """Each has a key of its own: it uses no KV state of the one before."""
        parts = Parts(
            clock=RealClock(),
            drivers={".gguf": LlamaCppDriver()},
            catalog=Store(find_paths()),
            key=os.urandom(32),
            options=EngineOptions(context_tokens=512, sequences=len(SEEDS)),
            threaded=False,
            journal=self.folder,
        )
        self.kernel = Kernel(parts)
        self.system = Syscalls(self.kernel)

    def spawn(self, seed: int) -> int:
        sampling = Sampling(temperature=1.5, seed=seed, exact=True, ignore_eos=True)
        spec = ProcessSpec(str(NANO), (), program="chat", sampling=sampling, max_tokens=ANSWER_TOKENS)
        return self.system.spawn(spec)

    def say(self, pid: int, turn: str) -> None:
        self.system.say(pid, turn)
        self.kernel.pump()

    def begin_to_say(self, pid: int, turn: str, tokens: int) -> None:
        """It is in the middle of its answer then."""
        until = self.system.process(pid).output_tokens + tokens
        self.system.say(pid, turn)
        while self.system.process(pid).output_tokens < until:
            for dispatcher in self.kernel.dispatchers.values():
                dispatcher.advance()

    def computed_again(self, pids: list[int]) -> list[int]:
        """Swapped out where moving the KV state would cost more."""
        self.kernel.swap.pays = lambda _info, _tokens: False  # type: ignore[method-assign]
        for pid in pids:
            assert self.system.swap_out(pid) == 0
        for pid in pids:
            self.system.swap_in(pid)
        return pids

    def worker_dies(self, pids: list[int]) -> list[int]:
        (model,) = self.system.models()
        assert model.worker_pid is not None
        os.kill(model.worker_pid, signal.SIGKILL)
        return pids

    def llmos_dies(self, _pids: list[int]) -> list[int]:
        assert self.kernel.recovery.journal
        self.kernel.recovery.journal.flush()
        self.system.freeze()
        self.system.shutdown()
        self.boot()
        return [self.system.resume(orphan) for orphan in self.system.orphans()]

    def saved_without_kv(self, pids: list[int]) -> list[int]:
        files = [self.folder / f"{pid}.ckpt" for pid in pids]
        for pid, file in zip(pids, files, strict=True):
            self.system.save(pid, file)
        self.system.shutdown()
        self.boot()
        return [self.system.restore(file) for file in files]


Mishap = Callable[[Machine, list[int]], list[int]]


def talk(folder: Path, mishap: Mishap | None, tokens: int) -> list[list[int]]:
    """The tokens of some chats of three turns; a mishap comes after so many of the last answer."""
    machine = Machine(folder)
    try:
        pids = [machine.spawn(seed) for seed in SEEDS]
        for pid in pids:
            machine.say(pid, TURNS[0])
            machine.say(pid, TURNS[1])
        for pid in pids if tokens else ():
            machine.begin_to_say(pid, TURNS[2], tokens)
        for pid in mishap(machine, pids) if mishap else pids:
            if not tokens:
                machine.say(pid, TURNS[2])
        machine.kernel.pump()
        chats = [process for process in machine.kernel.table if process.alive]
        assert [chat.items_done for chat in chats] == [3] * len(SEEDS)
        return [list(chat.threads[0].tokens) for chat in chats]
    finally:
        machine.system.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    return talk(tmp_path_factory.mktemp("journal"), None, 0)


@pytest.mark.parametrize("tokens", [0, 20], ids=["between", "within"])
@pytest.mark.parametrize(
    "mishap", [Machine.computed_again, Machine.worker_dies, Machine.llmos_dies, Machine.saved_without_kv]
)
def test_a_chat_says_the_same(
    tmp_path: Path, undisturbed: list[list[int]], mishap: Mishap, tokens: int
) -> None:
    assert talk(tmp_path, mishap, tokens) == undisturbed


def test_a_worker_may_die_under_a_sleeping_chat_again_and_again(tmp_path: Path) -> None:
    """The first one who needs it finds out; no prompt is to blame, and nothing else on the device ends."""
    machine = Machine(tmp_path)
    try:
        pid, other = machine.spawn(1), machine.spawn(2)
        for turn in TURNS:
            machine.say(pid, turn)
            machine.worker_dies([pid])
        with pytest.raises(WorkerDied):
            machine.system.save(pid, tmp_path / "chat.ckpt")
        assert machine.system.save(pid, tmp_path / "chat.ckpt")
        assert machine.system.process(pid).items_done == len(TURNS)
        assert machine.system.process(other).state == "SLEEPING"
        machine.kernel.check_integrity()
    finally:
        machine.system.shutdown()
