"""The whole kernel on simulated engines, over random schedules: what fairness and signals promise."""

import re
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simkernel import SimSystem

from drivers.simmodel import SimModel
from kernel.config import KernelConfig
from kernel.device import InlineHost, QuantumEnd, Sampling, StepEvent
from kernel.errors import AdmissionRefused, UsageError
from kernel.fairness import OUTPUT_UNITS
from kernel.process import Signal, State
from kernel.spec import ProcessSpec

Op = tuple[object, ...]


PLAIN = SimModel(mean_tokens=0)
LEVEL = SimModel(mean_tokens=0, base_s=0.0, decode_s=0.0005, prompt_token_s=0.0001)
"""On this one, what a token costs does not depend on how many sequences there are."""


class CountingHost(InlineHost):
    """Sums up the service that the engine gives, for an engine on which a prompt token costs 0.4 units."""

    units = 0.0

    def poll(self, timeout_s: float | None = None) -> StepEvent | QuantumEnd | None:
        event = super().poll(timeout_s)
        if isinstance(event, StepEvent):
            for step in event.sequences:
                self.units += step.prompt_tokens * 0.4 + (step.token is not None) * OUTPUT_UNITS
        return event


class Schedule:
    """A kernel, and random things that happen to it."""

    def __init__(self, sequences: int, config: KernelConfig | None = None, model: SimModel = PLAIN) -> None:
        self.sim = SimSystem({"m": replace(model, sequences=sequences)}, config)
        self.sim.system.load("m")
        self.model = self.sim.kernel.models["m"]
        assert isinstance(self.model.host, InlineHost)
        self.host = self.model.host = CountingHost(self.model.host.engine)
        self.pids: list[int] = []
        self.killed: dict[int, int] = {}  # pid -> tokens at the acknowledgement

    def apply(self, op: Op) -> None:
        name, *arguments = op
        if name == "run":
            for _ in range(int(str(arguments[0]))):
                self.sim.dispatcher.advance()
        elif name == "spawn":
            nice, words, limit = (int(str(a)) for a in arguments)
            self.pids.append(self.sim.spawn("w " * words, nice=nice, max_tokens=limit, seed=len(self.pids)))
        else:
            self._signal(str(name), *(int(str(a)) for a in arguments))

    def _signal(self, name: str, which: int, nice: int = 0) -> None:
        alive = [pid for pid in self.pids if self.sim.system.process(pid).exit_code is None]
        if not alive:
            return
        pid = alive[which % len(alive)]
        if name == "renice":
            self.sim.system.renice(pid, nice)
        else:
            self.sim.system.signal(pid, Signal[name.upper()])
            if name == "kill":
                self.killed[pid] = self.sim.system.process(pid).output_tokens

    def check(self) -> None:
        self.sim.kernel.check_integrity()
        for pid, tokens in self.killed.items():
            assert self.sim.system.process(pid).output_tokens == tokens, "a token after the acknowledgement"
        for process in self.sim.kernel.table:
            if process.state is State.STOPPED:
                assert not any(thread in self.model.queue for thread in process.threads)

    def finish(self) -> None:
        """Let all that can end do so, and end the rest."""
        for process in list(self.sim.kernel.table):
            if process.state is State.STOPPED:
                self.sim.system.signal(process.pid, Signal.CONT)
        self.sim.kernel.pump()
        self.check()
        assert len(self.model.queue) == 0 and not self.sim.dispatcher.flights
        assert all(thread is None for thread in self.model.seats)
        assert not self.model.draining and not self.model.to_close
        for process in self.sim.kernel.table:
            assert process.threads[0].granted == 0
            assert process.exit_code in (0, 130, 137), process.error


NICES = st.integers(-20, 19)
PROMPTS = st.sampled_from([1, 3, 60, 300, 700])
OPS = st.lists(
    st.one_of(
        st.tuples(st.just("spawn"), NICES, PROMPTS, st.sampled_from([1, 2, 30, 80])),
        st.tuples(st.sampled_from(["stop", "cont", "kill", "int"]), st.integers(0, 9)),
        st.tuples(st.just("renice"), st.integers(0, 9), NICES),
        *[st.tuples(st.just("run"), st.integers(1, 30))] * 3,
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(OPS, st.sampled_from([1, 2, 5, 64]), st.sampled_from(["fair", "fifo", "rr", "priority"]))
def test_random_schedules_end_well_under_every_policy(ops: list[Op], sequences: int, policy: str) -> None:
    schedule = Schedule(sequences, KernelConfig(policy=policy, seat_slice_s=0.05))
    for op in ops:
        schedule.apply(op)
        schedule.check()
    schedule.finish()
    used_s = sum(process.device_s for process in schedule.sim.kernel.table)  # not what was for the dead
    assert used_s <= schedule.sim.clock.now_s() + 1e-9


@settings(max_examples=40, deadline=None)
@given(OPS)
def test_service_received_is_what_the_engine_gave(ops: list[Op]) -> None:
    schedule = Schedule(4, KernelConfig(seat_slice_s=0.05), LEVEL)
    for op in ops:
        if op[0] not in ("kill", "int"):
            schedule.apply(op)
    schedule.finish()
    received = sum(process.share_received for process in schedule.sim.kernel.table)
    assert received == pytest.approx(schedule.host.units)
    device_s = sum(process.device_s for process in schedule.sim.kernel.table)
    assert device_s == pytest.approx(schedule.sim.clock.now_s())


@settings(max_examples=60, deadline=None)
@given(OPS)
def test_by_the_ledger_nobody_is_further_from_its_share_than_one_request(ops: list[Op]) -> None:
    """With a seat for everyone. The ledger counts service as it is granted.

    Where others leave, stop, come back or are reniced, virtual time jumps: a member's lag moves by the
    jump times its weight, and is worked off from there. What was granted and is taken back counts too.
    """
    schedule = Schedule(64)
    queue, allowed = schedule.model.queue, {}
    request = queue.request_units + OUTPUT_UNITS  # a prompt's last piece draws a token, too
    for op in ops:
        before = {thread: queue.lag(thread) for thread in queue}
        schedule.apply(op)
        for thread in queue:
            moved = abs(queue.lag(thread) - before.get(thread, 0.0)) if op[0] != "run" else 0.0
            allowed[thread] = allowed.get(thread, request) + moved
            assert abs(queue.lag(thread)) <= allowed[thread] + 1e-6, (op, thread.process.pid)
            if abs(queue.lag(thread)) <= request:
                allowed[thread] = request


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(NICES, PROMPTS), min_size=1, max_size=6), st.integers(1, 60), st.integers(0, 30))
def test_the_ledger_agrees_with_the_engine_when_nothing_is_in_flight(
    processes: list[tuple[int, int]], rounds: int, interrupt_after: int
) -> None:
    """What was granted and not used has come back: virtual time is what was served, over the weight."""
    schedule = Schedule(8, model=LEVEL)
    for nice, words in processes:
        schedule.apply(("spawn", nice, words, 0))
    for n in range(rounds):
        schedule.sim.dispatcher.advance()
        if n == interrupt_after:
            schedule.sim.dispatcher.interrupt()
    schedule.sim.dispatcher.drain()
    threads, accounts = list(schedule.model.queue), schedule.model.queue._turns
    for thread in threads:
        assert accounts.vruntime(thread) * thread.weight == pytest.approx(thread.process.share_received)
    assert sum(t.process.share_received for t in threads) == pytest.approx(schedule.host.units)


@settings(max_examples=25, deadline=None)
@given(OPS, st.sampled_from([2, 64]))
def test_one_schedule_gives_one_history(ops: list[Op], sequences: int) -> None:
    def history() -> list[object]:
        schedule = Schedule(sequences, KernelConfig(seat_slice_s=0.05))
        for op in ops:
            schedule.apply(op)
        schedule.finish()
        return [schedule.sim.system.process(pid) for pid in schedule.pids]

    assert history() == history()


def test_nobody_starves_at_nice_19() -> None:
    """Even for a seat it waits only until it is owed a seat's slice."""
    model = SimModel(mean_tokens=0, sequences=2, context_tokens=1 << 16)
    sim = SimSystem({"m": model}, KernelConfig(seat_slice_s=0.05))
    heavy = [sim.spawn(seed=n) for n in range(4)]
    light = sim.spawn(nice=19, seed=9)
    seat_units = 0.05 / sim.kernel.models["m"].decode_s(2) * OUTPUT_UNITS
    worst = 0.0
    while sum(process.output_tokens for process in sim.kernel.table) < 10_000:
        assert sim.dispatcher.advance()
        view = sim.system.process(light)
        worst = max(worst, view.share_due - view.share_received)
    assert view.output_tokens > 0 and view.share_due > seat_units
    assert worst <= seat_units + sim.kernel.models["m"].queue.request_units
    for pid in heavy:
        view = sim.system.process(pid)
        assert view.share_received == pytest.approx(view.share_due, rel=0.05)
    sim.kernel.check_integrity()


@pytest.mark.parametrize("policy", ["fifo", "rr", "priority"])
def test_policies_at_boot(policy: str) -> None:
    sim = SimSystem(
        {"m": SimModel(mean_tokens=0, sequences=2)}, KernelConfig(policy=policy, seat_slice_s=0.05)
    )
    assert sim.system.snapshot().policy == policy
    pids = [sim.spawn(nice=nice, seed=nice, max_tokens=400) for nice in (5, 5, 0, 0)]
    sim.run_until(400)
    tokens = [sim.system.process(pid).output_tokens for pid in pids]
    if policy == "fifo":
        assert tokens[2:] == [0, 0] and tokens[0] == pytest.approx(tokens[1], abs=20)
    elif policy == "rr":
        assert min(tokens) > 40
    else:
        assert tokens[:2] == [0, 0] and tokens[2] == pytest.approx(tokens[3], abs=20)
    sim.kernel.pump()
    assert all(sim.system.process(pid).output_tokens == 400 for pid in pids)
    sim.kernel.check_integrity()


def test_policy_can_be_changed_while_processes_run() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, sequences=2)})
    pids = [sim.spawn(nice=nice, seed=nice, max_tokens=300) for nice in (10, 0, 0, 0)]
    sim.run_until(100)
    for name in ("fifo", "rr", "priority", "fair"):
        old = sim.system.snapshot().policy
        assert sim.system.set_policy(name) == old
        sim.run_until(100)
        for _ in range(20):
            sim.dispatcher.advance()
        sim.kernel.check_integrity()
    with pytest.raises(UsageError, match="no policy lottery"):
        sim.system.set_policy("lottery")
    assert sim.system.snapshot().policy == "fair"
    sim.kernel.pump()
    assert all(sim.system.process(pid).output_tokens == 300 for pid in pids)


def test_why_tells_how_far_a_prompt_is_and_whose_turn_it_is() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, sequences=2, context_tokens=10_000)})
    long = sim.spawn("word " * 2000)
    while not sim.system.process(long).context_tokens:
        assert sim.dispatcher.advance()
    while "computes its prompt" not in (said := sim.system.why(long)[0]) or ": 0 of" in said:
        assert sim.dispatcher.advance()
    done, known = map(int, re.findall(r"\d+", said))
    assert 0 < done < known == sim.system.process(long).prompt_tokens
    while not sim.system.process(long).output_tokens:
        assert sim.dispatcher.advance()
    assert "It runs: " in sim.system.why(long)[0] and not any(
        "prompt" in line for line in sim.system.why(long)
    )
    sim.system.set_policy("priority")
    sim.spawn(nice=-5)
    third = sim.spawn(nice=5)
    for _ in range(400):
        sim.dispatcher.advance()
    sim.clock.sleep(10.0)  # its rate of old is over
    assert "It waits for its turn, under the policy priority." in sim.system.why(long)[0]
    assert "the one with the lowest nice value is next" in sim.system.why(third)[0]
    assert not any("is due" in line for line in sim.system.why(long))  # not by weight


def test_an_unknown_policy_is_refused_at_boot() -> None:
    with pytest.raises(UsageError, match="no policy lottery"):
        SimSystem(config=KernelConfig(policy="lottery"))


@dataclass(frozen=True)
class Job:
    group: str
    words: int = 3


def spawn(sim: SimSystem, job: Job, seed: int) -> int:
    sampling = Sampling(seed=seed)
    return sim.system.spawn(ProcessSpec("m", ("w " * job.words,), group=job.group, sampling=sampling))


def test_a_group_shares_one_weight() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, context_tokens=1 << 16)})
    sim.system.set_group("many", 2.0)
    many = [spawn(sim, Job("many", words=1 + 50 * n), n) for n in range(6)]
    alone = spawn(sim, Job(""), 9)
    sim.run_until(6000)
    shares = {pid: sim.system.process(pid).share_received for pid in (*many, alone)}
    ahead = sum(shares[pid] for pid in many) - 2 / 3 * sum(shares.values())
    assert abs(ahead) <= 2 * sim.kernel.models["m"].queue.request_units  # a request, and what is in flight
    for pid in many:
        assert shares[pid] == pytest.approx(sum(shares[p] for p in many) / 6, rel=0.1)
        view = sim.system.process(pid)
        assert view.share_received == pytest.approx(view.share_due, rel=0.1)
    sim.system.set_group("many", 0.5)
    sim.run_until(12_000)
    gained = {pid: sim.system.process(pid).share_received - shares[pid] for pid in shares}
    assert sum(gained[pid] for pid in many) / gained[alone] == pytest.approx(0.5, rel=0.06)
    sim.kernel.check_integrity()


def test_a_group_may_stop_go_on_and_end() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, sequences=3)})
    jobs = [spawn(sim, Job("a" if n % 2 else "b", words=1 + 90 * n), n) for n in range(8)]
    sim.run_until(200)
    for pid in jobs[:5]:
        sim.system.signal(pid, Signal.STOP)
    sim.run_until(600)
    sim.system.set_policy("fifo")
    for pid in jobs[:5]:
        sim.system.signal(pid, Signal.CONT)
    sim.run_until(900)
    sim.system.set_policy("fair")
    sim.run_until(1400)
    sim.kernel.check_integrity()
    for pid in jobs:
        sim.system.signal(pid, Signal.KILL)
    sim.kernel.pump()
    assert len(sim.kernel.models["m"].queue) == 0
    sim.kernel.check_integrity()


def test_groups_are_checked_and_bounded() -> None:
    sim = SimSystem(config=KernelConfig(groups_max=1))
    for name, weight in (("", 1.0), ("a", 0.0), ("a", float("nan")), ("a", 1e6)):
        with pytest.raises(UsageError, match="a group has a name, and a weight"):
            sim.system.set_group(name, weight)
    spawn(sim, Job("a"), 0)
    with pytest.raises(AdmissionRefused, match="1 groups already"):
        spawn(sim, Job("b"), 1)


def test_a_newcomer_that_gets_no_seat_does_not_end_the_quantum() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, sequences=1)})
    sim.spawn()
    sim.run_until(50)
    assert isinstance(sim.kernel.models["m"].host, InlineHost)
    flights = [flight.id for flight in sim.dispatcher.flights]
    sim.spawn()
    event = sim.kernel.models["m"].host.poll()
    assert isinstance(event, StepEvent) and event.quantum == flights[0]
