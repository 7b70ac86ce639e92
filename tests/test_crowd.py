"""Twelve chats that need three times the KV memory, on llama.cpp: all complete, with the right text."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ggufs import NANO

from drivers.llamacpp import layout
from drivers.llamacpp.driver import LlamaCppDriver
from kernel.clock import RealClock
from kernel.device import EngineOptions, Sampling
from kernel.kernel import Kernel, Parts
from kernel.snapshot import ClaimView
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls
from llmos.paths import find_paths
from llmos.store import Store

CHATS, SEATS, TURNS = 12, 4, ("list the files here", "show what runs", "make job 3 less important")


@contextmanager
def system(seats: int) -> Iterator[Syscalls]:
    parts = Parts(
        clock=RealClock(),
        drivers={".gguf": LlamaCppDriver()},
        catalog=Store(find_paths()),
        options=EngineOptions(context_tokens=256, sequences=seats),
        ram_available=layout.free_ram_bytes,
    )
    kernel = Kernel(parts)
    try:
        yield Syscalls(kernel)
    finally:
        kernel.check_integrity()
        kernel.shutdown()


def chat(seed: int) -> ProcessSpec:
    sampling = Sampling(temperature=1.2, seed=seed, exact=True, ignore_eos=True)
    return ProcessSpec(str(NANO), (), program="chat", sampling=sampling, max_tokens=40)


def said(kernel: Syscalls, pid: int) -> str:
    """All that a chat said, once it has ended."""
    kernel.hang_up(pid)
    view = kernel.wait(pid, 60)
    assert view is not None and view.exit_code == 0, view
    return kernel.read(pid, 0).text


def test_all_complete_with_the_text_that_each_says_alone() -> None:
    """Sampled and exact, three turns each: half of them said one by one, half all at once."""
    with system(1) as kernel:
        alone = []
        for seed in range(CHATS):
            pid = kernel.spawn(chat(seed))
            for turn in TURNS:
                kernel.say(pid, turn)
            alone.append(said(kernel, pid))
    with system(SEATS) as kernel:
        pids = [kernel.spawn(chat(seed)) for seed in range(CHATS)]
        for pid in pids[::2]:
            for turn in TURNS:
                kernel.say(pid, turn)
        moved = 0
        for number, turn in enumerate(TURNS):
            for pid in pids[1::2]:
                kernel.say(pid, turn)
            for pid in pids[1::2]:
                while kernel.process(pid).items_done <= number:
                    moved = max(moved, sum(c.kind == "kv" and "process" in c.owner for c in claims(kernel)))
                    time.sleep(0.002)
        assert [said(kernel, pid) for pid in pids] == alone
    assert len({*alone}) == CHATS, "the same text for every seed proves little"
    assert moved, "nobody was swapped out"


def claims(kernel: Syscalls) -> list[ClaimView]:
    return [claim for pool in kernel.snapshot().pools for claim in pool.claims]
