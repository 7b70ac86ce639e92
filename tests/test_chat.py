"""Chats: they sleep between turns, keep their KV, and lose nothing to swaps, deaths and checkpoints."""

from pathlib import Path

import pytest

from drivers.simmodel import SimFaults, SimModel
from kernel.device import Sampling
from kernel.errors import NotPermitted, UsageError
from kernel.process import Signal
from kernel.spec import ProcessSpec
from tests.simkernel import SimSystem

MODEL = SimModel(mean_tokens=30)
TURNS = ("hello there", "tell me more", "and then")


def chat(seed: int = 1, *prompts: str) -> ProcessSpec:
    return ProcessSpec("m", prompts, program="chat", sampling=Sampling(seed=seed))


def talk(sim: SimSystem, pid: int, *turns: str) -> None:
    for turn in turns:
        sim.system.say(pid, turn)
        sim.kernel.pump()


def undisturbed(seed: int = 1, turns: tuple[str, ...] = TURNS) -> str:
    sim = SimSystem({"m": MODEL})
    pid = sim.system.spawn(chat(seed))
    talk(sim, pid, *turns)
    return sim.output(pid)


def test_a_chat_sleeps_between_turns_and_computes_only_what_is_new() -> None:
    sim = SimSystem({"m": MODEL})
    pid = sim.system.spawn(chat())
    sim.kernel.pump()
    assert sim.system.process(pid).state == "SLEEPING"
    talk(sim, pid, TURNS[0])
    first = sim.system.process(pid)
    assert (first.state, first.items_done, first.waits_for) == ("SLEEPING", 1, "its user")
    talk(sim, pid, TURNS[1])
    second = sim.system.process(pid)
    assert (
        second.prompt_tokens - first.prompt_tokens == len(TURNS[1].split()) + 2
    )  # and the marks of the turn
    assert second.context_tokens == second.prompt_tokens + second.output_tokens
    assert [asked for asked, _ in sim.system.items(pid)] == list(TURNS[:2])
    sim.system.hang_up(pid)
    assert sim.system.process(pid).exit_code == 0
    sim.kernel.check_integrity()


def test_what_is_said_while_it_answers_is_answered_next() -> None:
    sim = SimSystem({"m": MODEL})
    pid = sim.system.spawn(chat(1, TURNS[0]))
    for turn in TURNS[1:]:
        sim.system.say(pid, turn)
    sim.system.hang_up(pid)
    assert sim.system.wait(pid)
    assert sim.output(pid) == undisturbed()


def test_a_reply_that_is_cut_stays_and_the_chat_goes_on() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0)})
    pid = sim.system.spawn(chat())
    sim.system.say(pid, "hello")
    sim.run_until(20)
    sim.system.cut(pid)
    assert sim.system.process(pid).state == "SLEEPING"
    ((_, reply),) = sim.system.items(pid)
    assert len(reply.split()) >= 20
    sim.system.say(pid, "go on")
    sim.run_until(60)
    sim.system.cut(pid)
    sim.system.cut(pid)  # nothing is being said: nothing to cut
    assert len(sim.system.items(pid)) == 2


def test_sleeping_chats_give_their_seats_to_those_who_run() -> None:
    """Twelve chats on four seats: each is swapped out again and again, and none is confused."""
    sim = SimSystem({"m": SimModel(mean_tokens=30, sequences=4)})
    pids = [sim.system.spawn(chat(seed)) for seed in range(12)]
    for turn in TURNS:
        for pid in pids:
            sim.system.say(pid, turn)
        sim.kernel.pump()
        sim.kernel.check_integrity()
    assert [sim.output(pid) for pid in pids] == [undisturbed(seed) for seed in range(12)]


@pytest.mark.parametrize("after", [1, 2])
def test_a_worker_that_dies_between_or_within_turns_is_no_loss(after: int) -> None:
    faults = SimFaults(die_at_step=20 * after, first_loads=1)
    sim = SimSystem({"m": SimModel(mean_tokens=30, faults=faults)})
    pid = sim.system.spawn(chat())
    talk(sim, pid, *TURNS)
    assert sim.output(pid) == undisturbed()


@pytest.mark.parametrize("state", ["sleeping", "answering", "stopped"])
def test_a_checkpoint_of_a_chat_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.sim").write_text("{}")
    sim = SimSystem({"m": MODEL})
    pid = sim.system.spawn(chat())
    talk(sim, pid, TURNS[0])
    said = sim.system.process(pid).output_tokens
    if state != "sleeping":
        sim.system.say(pid, TURNS[1])
        sim.run_until(said + 3)
    if state == "stopped":
        sim.system.signal(pid, Signal.STOP)
    sim.system.save(pid, tmp_path / "c.ckpt")
    other = SimSystem({"m": MODEL})
    again = other.system.restore(tmp_path / "c.ckpt")
    other.kernel.pump()
    talk(other, again, *(TURNS[1:] if state == "sleeping" else TURNS[2:]))
    assert other.output(again) == undisturbed()


def test_stopped_it_listens_and_answers_when_it_goes_on() -> None:
    sim = SimSystem({"m": MODEL})
    pid = sim.system.spawn(chat())
    talk(sim, pid, TURNS[0])
    sim.system.signal(pid, Signal.STOP)
    talk(sim, pid, TURNS[1])
    assert sim.system.process(pid).items_done == 1
    sim.system.signal(pid, Signal.CONT)
    talk(sim, pid, TURNS[2])
    assert sim.output(pid) == undisturbed()


def test_swapped_out_by_hand_while_it_sleeps_it_still_hears() -> None:
    sim = SimSystem({"m": MODEL})
    pid = sim.system.spawn(chat())
    talk(sim, pid, TURNS[0])
    assert sim.system.swap_out(pid) > 0
    talk(sim, pid, *TURNS[1:])
    assert sim.output(pid) == undisturbed()


def test_what_is_no_chat_cannot_be_talked_to() -> None:
    sim = SimSystem({"m": MODEL})
    job, dumb = sim.spawn(max_tokens=4000), sim.system.spawn(chat())
    for call in (sim.system.cut, sim.system.hang_up, lambda pid: sim.system.say(pid, "hello")):
        with pytest.raises(NotPermitted, match="not a chat"):
            call(job)
    with pytest.raises(UsageError, match="nothing in"):
        sim.system.say(dumb, " ")
    sim.system.say(dumb, "hello")
    sim.system.hang_up(dumb)
    with pytest.raises(NotPermitted, match="nothing more"):
        sim.system.say(dumb, "hello")
    with pytest.raises(UsageError, match="one thread"):
        sim.system.spawn(ProcessSpec("m", (), program="chat", threads=2))


@pytest.mark.parametrize("state", ["sleeping", "answering"])
def test_a_chat_outlives_its_llmos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.sim").write_text("{}")
    sim = SimSystem({"m": MODEL}, journal=tmp_path / "journal")
    pid = sim.system.spawn(chat())
    talk(sim, pid, TURNS[0])
    if state == "answering":
        sim.system.say(pid, TURNS[1])
        sim.run_until(sim.system.process(pid).output_tokens + 3)
    assert sim.kernel.recovery.journal
    sim.kernel.recovery.journal.flush()
    sim.system.freeze()
    sim.system.shutdown()
    other = SimSystem({"m": MODEL}, journal=tmp_path / "journal")
    (orphan,) = other.system.orphans()
    again = other.system.resume(orphan)
    other.kernel.pump()
    talk(other, again, *(TURNS[1:] if state == "sleeping" else TURNS[2:]))
    assert other.output(again) == undisturbed()
    other.system.shutdown()


def test_a_turn_that_was_not_begun_is_taken_back() -> None:
    sim = SimSystem({"m": MODEL})
    pid = sim.system.spawn(chat(1, "never mind"))  # its model is still to be loaded
    sim.system.cut(pid)
    assert sim.system.process(pid).state == "SLEEPING"
    talk(sim, pid, *TURNS)
    assert sim.output(pid) == "\n" + undisturbed()
    sim.kernel.check_integrity()


def test_a_reply_that_is_cut_while_it_is_stopped_leaves_it_stopped() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0)})
    pid = sim.system.spawn(chat(1, TURNS[0]))
    sim.run_until(20)
    sim.system.signal(pid, Signal.STOP)
    sim.system.cut(pid)
    assert sim.system.process(pid).state == "STOPPED"
    sim.system.signal(pid, Signal.CONT)
    sim.kernel.pump()
    assert sim.system.process(pid).state == "SLEEPING"


@pytest.mark.parametrize("way", ["checkpoint", "journal"])
def test_hung_up_it_stays_hung_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """All was said when it was saved, or when LLMOS died: it answers the rest, and ends."""
    monkeypatch.chdir(tmp_path)
    Path("m.sim").write_text("{}")
    sim = SimSystem({"m": MODEL}, journal=tmp_path / "journal")
    pid = sim.system.spawn(chat(1, *TURNS))
    sim.system.hang_up(pid)
    sim.run_until(3)
    sim.system.save(pid, tmp_path / "c.ckpt")
    assert sim.kernel.recovery.journal
    sim.kernel.recovery.journal.flush()
    sim.system.freeze()
    sim.system.shutdown()
    other = SimSystem({"m": MODEL}, journal=tmp_path / "journal")
    if way == "journal":
        (orphan,) = other.system.orphans()
        again = other.system.resume(orphan)
    else:
        again = other.system.restore(tmp_path / "c.ckpt")
    ended = other.system.wait(again, 0.0)
    assert ended and ended.exit_code == 0
    assert other.output(again) == undisturbed()
    other.system.shutdown()


def test_a_turn_that_does_not_fit_is_told_and_the_chat_goes_on() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=10, context_tokens=100)})
    pid = sim.system.spawn(chat())
    talk(sim, pid, "word " * 200)
    view = sim.system.process(pid)
    assert (view.state, view.items_failed) == ("SLEEPING", 1)
    assert "window" in view.error
    talk(sim, pid, "short")
    view = sim.system.process(pid)
    assert (view.items_done, view.items_failed) == (2, 1)
    assert sim.system.items(pid)[1][1]
