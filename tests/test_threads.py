"""Processes with several threads: order of output, shares, recovery of each of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from drivers.simmodel import SimModel
from kernel.device import Sampling
from kernel.errors import UsageError
from kernel.process import Signal
from kernel.spec import ProcessSpec
from tests.simkernel import SimSystem

LINES = tuple(f"line {number}" for number in range(12))
JOB = ProcessSpec("m", LINES, lines=True, sampling=Sampling(seed=3))
MODEL = {"m": SimModel(mean_tokens=20)}


def output_of(spec: ProcessSpec) -> str:
    sim = SimSystem(MODEL)
    pid = sim.system.spawn(spec)
    assert sim.system.wait(pid)
    return sim.output(pid)


@pytest.mark.parametrize("threads", [2, 5, 12, 30])
def test_output_is_in_order_however_many_threads_there_are(threads: int) -> None:
    assert output_of(replace(JOB, threads=threads)) == output_of(JOB)


def test_threads_work_at_the_same_time() -> None:
    elapsed = {}
    for threads in (1, 4):
        sim = SimSystem(MODEL)
        pid = sim.system.spawn(replace(JOB, threads=threads))
        ended = sim.system.wait(pid)
        assert ended
        elapsed[threads] = ended.elapsed_s
    assert elapsed[4] < elapsed[1] / 2


def test_samples_are_drawn_with_one_seed_after_another() -> None:
    def alone(seed: int) -> str:
        return output_of(ProcessSpec("m", ("a prompt",), sampling=Sampling(seed=seed)))

    text = output_of(ProcessSpec("m", ("a prompt",), sampling=Sampling(seed=5), samples=3, threads=3))
    assert text == f"==> 1 <==\n{alone(5)}\n\n==> 2 <==\n{alone(6)}\n\n==> 3 <==\n{alone(7)}\n"


def test_the_windows_of_all_threads_are_the_limit() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, context_tokens=500)})
    pid = sim.system.spawn(ProcessSpec("m", ("a", "b", "c", "d"), max_tokens=400, threads=4, lines=True))
    sim.run_until(1200)
    view = sim.system.process(pid)
    assert 500 < view.context_tokens < view.context_limit_tokens == 4 * 500


def test_a_weight_is_divided_among_threads() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0)})
    alone = sim.spawn(max_tokens=4000)
    many = sim.system.spawn(
        ProcessSpec("m", ("one", "two", "three", "four"), max_tokens=4000, threads=4, lines=True)
    )
    sim.run_until(1000)  # by then the light ones have the lead that they may have: a request
    early = {pid: sim.system.process(pid).output_tokens for pid in (alone, many)}
    sim.run_until(3000)
    gained = {pid: sim.system.process(pid).output_tokens - early[pid] for pid in (alone, many)}
    assert abs(gained[alone] - gained[many]) < 100


def test_one_with_a_thread_for_every_seat_keeps_no_other_out() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=30, sequences=8)})
    job = ProcessSpec("m", tuple(f"line {number}" for number in range(2000)), threads=16, lines=True)
    first = sim.system.spawn(job)
    sim.run_until(500)
    second = sim.system.spawn(job)
    early = sim.system.process(first).output_tokens
    sim.run_until(early + 4000)
    gained = sim.system.process(first).output_tokens - early, sim.system.process(second).output_tokens
    assert min(gained) > 0.8 * max(gained)


def test_what_a_finished_thread_had_goes_to_the_others() -> None:
    """A job whose threads run out of lines keeps its whole weight to the end."""
    sim = SimSystem({"m": SimModel(mean_tokens=0)})
    job = ProcessSpec("m", ("one", "two", "three"), max_tokens=300, threads=2, lines=True)
    many = sim.system.spawn(job)
    sim.run_until(600)  # two are answered; one thread has the last
    beside = sim.spawn(max_tokens=4000)
    while sim.system.process(many).items_done < 3:
        assert sim.dispatcher.advance()
    assert sim.system.process(many).threads == 1
    assert abs(sim.system.process(beside).output_tokens - 300) < 40


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint knows its model by its file."""
    monkeypatch.chdir(tmp_path)
    Path("m.sim").write_text("{}")


@pytest.mark.usefixtures("model_file")
@pytest.mark.parametrize("after", [1, 30, 100, 180])
def test_a_checkpoint_holds_every_thread(tmp_path: Path, after: int) -> None:
    spec, file = replace(JOB, threads=4), tmp_path / "p.ckpt"
    sim = SimSystem(MODEL)
    pid = sim.system.spawn(spec)
    sim.run_until(after)
    sim.system.save(pid, file)
    sim.system.signal(pid, Signal.KILL)
    other = SimSystem(MODEL)
    again = other.system.restore(file)
    assert other.system.process(again).output_tokens >= after
    assert other.system.wait(again)
    assert other.output(again) == output_of(JOB)
    other.kernel.check_integrity()


@pytest.mark.usefixtures("model_file")
def test_a_fork_goes_on_with_every_thread() -> None:
    sim = SimSystem(MODEL)
    pid = sim.system.spawn(replace(JOB, threads=3))
    sim.run_until(50)
    twin = sim.system.fork(pid)
    assert sim.system.wait(pid) and sim.system.wait(twin)
    assert sim.output(pid) == sim.output(twin) == output_of(JOB)


@pytest.mark.parametrize("change", [{"threads": 0}, {"threads": 257}, {"samples": 0}, {"samples": 10_001}])
def test_numbers_out_of_range_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        SimSystem(MODEL).system.spawn(replace(JOB, **change))  # type: ignore[arg-type]
