"""KV memory that is short: nobody fails, everybody comes to his end with the right text."""

from pathlib import Path

import pytest

from drivers.simmodel import SimModel
from kernel.process import Signal
from kernel.spec import ProcessSpec
from tests.simkernel import SimSystem

CHATS = 12
TOKENS = 300


def alone(number: int) -> str:
    sim = SimSystem({"m": SimModel(mean_tokens=0)})
    pid = sim.spawn(f"chat {number}", max_tokens=TOKENS, seed=number)
    assert sim.system.wait(pid)
    return sim.output(pid)


def crowd(
    model: SimModel, swap: Path | None = None, ram_bytes: int = 64 << 30
) -> tuple[SimSystem, list[int]]:
    sim = SimSystem({"m": model}, swap=swap, ram_bytes=ram_bytes)
    return sim, [sim.spawn(f"chat {n}", max_tokens=TOKENS, seed=n) for n in range(CHATS)]


POOL = SimModel(mean_tokens=0, context_tokens=400, kv_pool_tokens=CHATS * TOKENS // 3)


@pytest.mark.parametrize("copy_token_s", [0.0, 1.0])
def test_sequences_that_need_three_times_the_kv_pool_all_end_well(copy_token_s: float) -> None:
    """Swapped out and in, or, where a copy costs more, computed again."""
    model = SimModel(mean_tokens=0, context_tokens=400, kv_pool_tokens=1200, copy_token_s=copy_token_s)
    sim, pids = crowd(model)
    moved = False
    while any(sim.system.process(pid).exit_code is None for pid in pids):
        assert sim.dispatcher.advance()
        sim.kernel.check_integrity()
        moved |= any(claim.kind == "kv" and claim.owner.startswith("process") for claim in claims(sim))
    assert moved == (copy_token_s == 0.0)
    assert [sim.output(pid) for pid in pids] == [alone(number) for number in range(CHATS)]
    assert not [claim for claim in claims(sim) if claim.owner.startswith("process")]


def claims(sim: SimSystem) -> list:  # type: ignore[type-arg]
    return [claim for pool in sim.system.snapshot().pools for claim in pool.claims]


def test_when_ram_is_short_too_state_goes_to_disk(tmp_path: Path) -> None:
    sim, pids = crowd(POOL, swap=tmp_path / "swap", ram_bytes=(1 << 30) + 200_000)  # 1 GiB is left alone
    pools = set()
    while any(sim.system.process(pid).exit_code is None for pid in pids):
        assert sim.dispatcher.advance()
        pools |= {
            pool.name
            for pool in sim.system.snapshot().pools
            for claim in pool.claims
            if claim.owner.startswith("process")
        }
    assert pools == {"ram", "disk"}
    assert [sim.output(pid) for pid in pids] == [alone(number) for number in range(CHATS)]
    assert not list((tmp_path / "swap").iterdir()), "a swap file has a name"


def test_a_disk_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "swap").write_text("a file where the folder should be")
    sim, pids = crowd(POOL, swap=tmp_path / "swap", ram_bytes=1 << 30)
    assert all(sim.system.wait(pid) for pid in pids)
    assert [sim.output(pid) for pid in pids] == [alone(number) for number in range(CHATS)]


def test_swapped_out_by_hand_it_stays_out_until_it_is_swapped_in() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0)})
    pid = sim.spawn("chat 0", max_tokens=TOKENS)
    sim.run_until(50)
    assert sim.system.swap_out(pid) > 50 * 1024
    view = sim.system.process(pid)
    assert view.state == "SWAPPED" and sim.kernel.models["m"].seats.count(None) == 16
    assert not sim.dispatcher.advance(), "it still runs"
    sim.system.swap_in(pid)
    assert sim.system.wait(pid)
    assert sim.output(pid) == alone(0)
    sim.kernel.check_integrity()


def test_a_stopped_process_that_was_swapped_out_goes_on_with_cont() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0)})
    pid = sim.spawn("chat 0", max_tokens=TOKENS)
    sim.run_until(50)
    sim.system.signal(pid, Signal.STOP)
    sim.system.swap_out(pid)
    assert sim.system.process(pid).state == "STOPPED"
    sim.system.swap_in(pid)  # nothing to do: it is stopped
    assert sim.system.process(pid).state == "STOPPED"
    sim.system.signal(pid, Signal.CONT)
    assert sim.system.wait(pid)
    assert sim.output(pid) == alone(0)


def test_killed_while_it_is_swapped_out_it_leaves_nothing() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0)})
    pid = sim.spawn("chat 0", max_tokens=TOKENS)
    sim.run_until(50)
    sim.system.swap_out(pid)
    sim.system.signal(pid, Signal.KILL)
    assert not [claim for claim in claims(sim) if claim.owner.startswith("process")]


def test_the_stopped_give_way_before_the_sleeping_and_these_before_the_running() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=30, sequences=3)})
    sleeping = sim.system.spawn(ProcessSpec("m", ("hello",), program="chat"))
    sim.kernel.pump()
    running = sim.spawn("a", max_tokens=100_000)
    stopped = sim.spawn("b", max_tokens=4000)
    sim.run_until(80)
    sim.system.signal(stopped, Signal.STOP)
    seats = sim.kernel.models["m"].seats

    def seated() -> set[int]:
        return {thread.process.pid for thread in seats if thread is not None}

    assert seated() == {sleeping, running, stopped}
    first = sim.spawn("c", max_tokens=4000)
    sim.dispatcher.advance()
    assert seated() == {sleeping, running, first}
    second = sim.spawn("d", max_tokens=4000)
    sim.dispatcher.advance()
    assert seated() == {running, first, second}


@pytest.mark.parametrize("threads", [1, 3])
def test_jobs_whose_next_prompt_finds_no_room_answer_it_later(threads: int) -> None:
    """The engine begins a job's next prompt by itself; when it cannot for want of memory, nothing is lost."""
    lines = tuple("word " * (10 + 37 * n % 90) + str(n) for n in range(20))
    spec = ProcessSpec("m", lines, lines=True, max_tokens=60, threads=threads)
    roomy = SimSystem({"m": SimModel(mean_tokens=30)})
    expected = roomy.system.spawn(spec)
    assert roomy.system.wait(expected)
    sim = SimSystem({"m": SimModel(mean_tokens=30, context_tokens=200, kv_pool_tokens=260)})
    pids = [sim.system.spawn(spec) for _ in range(4)]
    assert all(sim.system.wait(pid) for pid in pids)
    assert {sim.output(pid) for pid in pids} == {roomy.output(expected)}
    sim.kernel.check_integrity()
