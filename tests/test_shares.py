"""Shares on several devices with several models at once, and what the light and the new may expect."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simkernel import Entry, SimSystem

from drivers.sim import SimDriver
from drivers.simmodel import SimModel
from kernel.clock import ManualClock
from kernel.config import KernelConfig
from kernel.device import DeviceInfo, InlineHost, QuantumEnd, Sampling, StepEvent
from kernel.errors import ModelNotFound
from kernel.fairness import OUTPUT_UNITS, prompt_units
from kernel.kernel import Kernel, Parts
from kernel.process import Signal, Thread
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls

Op = tuple[object, ...]
MODELS = {
    "a.sim0": SimModel(mean_tokens=0, sequences=64),
    "b.sim0": SimModel(mean_tokens=0, sequences=64, base_s=0.006, prompt_token_s=0.0004),
    "c.sim1": SimModel(mean_tokens=0, sequences=64, base_s=0.0005, decode_s=0.0001, prompt_token_s=0.00002),
}


class Shelf:
    """A catalog of models whose suffix names their driver, and so their device."""

    def list(self) -> tuple[Entry, ...]:
        return tuple(Entry(name, Path(name)) for name in MODELS)

    def resolve(self, name: str) -> Entry:
        if name not in MODELS:
            raise ModelNotFound(f"no model {name}")
        return Entry(name, Path(name))


class TimedHost(InlineHost):
    """Sums up the seconds that the engine takes."""

    busy_s = 0.0

    def poll(self, timeout_s: float | None = None) -> StepEvent | QuantumEnd | None:
        event = super().poll(timeout_s)
        if isinstance(event, StepEvent):
            self.busy_s += event.step_s
        return event


class Machine:
    """A kernel on two devices, of which the first has two models."""

    def __init__(self) -> None:
        clock, drivers = ManualClock(), {}
        for name in ("sim0", "sim1"):
            device = DeviceInfo(name, "sim", "a simulated device", 64 << 30)
            drivers[f".{name}"] = SimDriver([device], sleep=clock.sleep, models=MODELS)
        parts = Parts(clock=clock, drivers=drivers, catalog=Shelf(), key=b"k" * 32, threaded=False)
        self.kernel = Kernel(parts)
        self.system = Syscalls(self.kernel)
        self.hosts: dict[str, TimedHost] = {}
        for name in MODELS:
            self.system.load(name)
            model = self.kernel.models[name]
            assert isinstance(model.host, InlineHost)
            self.hosts[name] = model.host = TimedHost(model.host.engine)
        self.pids: list[int] = []
        self.killed: dict[int, int] = {}  # pid -> tokens at the acknowledgement
        self.allowed: dict[Thread, float] = {}

    def apply(self, op: Op) -> None:
        name, *numbers = str(op[0]), *(int(str(n)) for n in op[1:])
        if name == "run":
            for _ in range(numbers[0]):
                for dispatcher in self.kernel.dispatchers.values():
                    dispatcher.advance()
        elif name == "spawn":
            which, nice, words, limit = numbers
            sampling = Sampling(seed=len(self.pids))
            spec = ProcessSpec(
                list(MODELS)[which], ("w " * words,), nice=nice, max_tokens=limit, sampling=sampling
            )
            self.pids.append(self.system.spawn(spec))
        else:
            self._signal(name, *numbers)

    def _signal(self, name: str, which: int, nice: int = 0) -> None:
        alive = [pid for pid in self.pids if self.system.process(pid).exit_code is None]
        if not alive:
            return
        pid = alive[which % len(alive)]
        if name == "renice":
            self.system.renice(pid, nice)
            return
        self.system.signal(pid, Signal[name.upper()])
        if name == "kill":
            self.killed[pid] = self.system.process(pid).output_tokens

    def lags(self) -> dict[Thread, float]:
        return {t: model.queue.lag(t) for model in self.kernel.models.values() for t in model.queue}

    def check(self, op: Op, before: dict[Thread, float]) -> None:
        self.kernel.check_integrity()
        for pid, tokens in self.killed.items():
            assert self.system.process(pid).output_tokens == tokens, "a token after the acknowledgement"
        for thread, lag in self.lags().items():
            request = self.kernel.models[thread.process.model].queue.request_units + OUTPUT_UNITS
            moved = abs(lag - before.get(thread, 0.0)) if op[0] != "run" else 0.0
            allowed = self.allowed.get(thread, request) + moved
            assert abs(lag) <= allowed + 1e-6, (op, thread.process.pid, lag)
            self.allowed[thread] = request if abs(lag) <= request else allowed

    def device_s(self, model: str) -> float:
        return sum(p.device_s for p in self.kernel.table if p.model == model)


NICES = st.integers(-20, 19)
OPS = st.lists(
    st.one_of(
        *[
            st.tuples(
                st.just("spawn"),
                st.integers(0, 2),
                NICES,
                st.sampled_from([1, 60, 700]),
                st.sampled_from([2, 600]),
            )
        ]
        * 2,
        st.tuples(st.sampled_from(["stop", "cont", "kill"]), st.integers(0, 9)),
        st.tuples(st.just("renice"), st.integers(0, 9), NICES),
        *[st.tuples(st.just("run"), st.integers(1, 80))] * 3,
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(OPS)
def test_on_every_device_nobody_is_further_from_its_share_than_one_request(ops: list[Op]) -> None:
    """And no second of a device is booked twice, nor to the wrong model; to none, if it was for the dead."""
    machine = Machine()
    for op in ops:
        before = machine.lags()
        machine.apply(op)
        machine.check(op, before)
    for pid in machine.pids:
        if machine.system.process(pid).state == "STOPPED":
            machine.system.signal(pid, Signal.CONT)
    machine.kernel.pump()
    assert all(machine.system.process(pid).exit_code in (0, 137) for pid in machine.pids)
    for name, host in machine.hosts.items():
        if machine.killed:
            assert machine.device_s(name) <= host.busy_s + 1e-9
        else:
            assert machine.device_s(name) == pytest.approx(host.busy_s)


def test_two_models_share_their_device_by_time_and_leave_the_other_alone() -> None:
    machine = Machine()
    for which, nice in ((0, 0), (0, 0), (1, 0), (2, 19)):
        machine.apply(("spawn", which, nice, 300, 0))
    machine.apply(("run", 4_000))
    used = {name: host.busy_s for name, host in machine.hosts.items()}
    quantum_s = KernelConfig().quantum_s
    ahead_s = used["a.sim0"] - 2 * used["b.sim0"]  # it has twice the weight
    assert abs(ahead_s) <= 4 * quantum_s, used
    assert used["c.sim1"] > 0.0


def test_who_rides_along_is_never_a_request_ahead() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, sequences=8, context_tokens=1 << 14)})
    pids = [sim.spawn(nice=nice, seed=nice) for nice in (0, 0, 5, 10, 19)]
    queue = sim.kernel.models["m"].queue
    while sim.clock.now_s() < 10.0:
        assert sim.dispatcher.advance()
        assert max(map(abs, map(queue.lag, queue))) <= queue.request_units + OUTPUT_UNITS
    views = [sim.system.process(pid) for pid in pids]
    assert all(abs(v.share_received - v.share_due) <= 2 * queue.request_units for v in views)
    assert views[0].share_received > 2.5 * views[2].share_received > 6 * views[3].share_received


def test_a_light_newcomers_long_prompt_does_not_put_it_far_ahead() -> None:
    """At nice 19 a full piece would be paid back in the time of a thousand rounds."""
    sim = SimSystem({"m": SimModel(mean_tokens=0, sequences=8)})
    for n in range(3):
        sim.spawn(seed=n)
    sim.run_until(60)
    light = sim.kernel.table.get(sim.spawn("w " * 900, nice=19, seed=9)).threads[0]
    model, worst = sim.kernel.models["m"], 0.0
    piece_units = KernelConfig().prefill_chunk_min_tokens * prompt_units(
        model.open_host().info.prefill_token_s, model.decode_s(8)
    )
    while sim.clock.now_s() < 20.0:
        assert sim.dispatcher.advance()
        worst = min(worst, model.queue.lag(light))
    assert light.computed > 0
    assert worst >= -piece_units - 1e-6


def test_a_short_prompt_goes_before_long_ones_and_before_those_who_draw() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, sequences=8, context_tokens=1 << 14)})
    old = [sim.spawn("w " * 3_000, seed=n) for n in range(3)] + [sim.spawn(seed=n) for n in range(3, 6)]
    while sim.clock.now_s() < 0.2:
        sim.dispatcher.advance()
    newcomer = sim.spawn("w " * 400, seed=9)
    while not sim.system.process(newcomer).output_tokens:
        assert sim.dispatcher.advance()
    waited_s = sim.clock.now_s() - sim.kernel.table.get(newcomer).started_s
    assert waited_s <= 3 * KernelConfig().quantum_s  # its share alone would take seven times its 40 ms
    assert not any(sim.system.process(pid).output_tokens for pid in old[:3])
