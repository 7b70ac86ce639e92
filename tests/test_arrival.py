"""One who comes while others compute: what he waits for, and for whom a pass is cut short."""

import ctypes
from collections.abc import Callable
from dataclasses import replace

import pytest
from simkernel import SimSystem

from drivers.sim import SimEngine
from drivers.simmodel import SimModel
from kernel.device import EngineOptions, InlineHost, QuantumEnd, Sampling, StepEvent
from kernel.process import Thread
from kernel.spec import ProcessSpec

MODEL = SimModel(mean_tokens=0, base_s=0.01, decode_s=0.002, prompt_token_s=0.0005)
JOBS = 4
WORDS = 120  # of the newcomer's prompt: two pieces, as the scheduler cuts


class Host(InlineHost):
    """Obeys hard interrupts as a worker does, counts passes, and lets something happen within one."""

    def __init__(self, sim: SimSystem, model: SimModel) -> None:
        self.flag = (ctypes.c_char * 2)()
        super().__init__(SimEngine(model, EngineOptions(), self._sleep, abort_flag=self.flag))
        self.sim = sim
        self.hards: list[bool] = []
        self.passes = 0  # that were finished
        self.prompt_tokens = 0
        self.due: tuple[float, Callable[[], object]] | None = None

    def _sleep(self, duration_s: float) -> None:
        self.sim.clock.sleep(duration_s)
        if self.due and self.sim.clock.now_s() >= self.due[0]:
            act, self.due = self.due[1], None
            act()

    def interrupt(self, quantum: int, *, hard: bool = False) -> None:
        self.hards.append(hard)
        if hard:
            self.flag[0] = b"x"
        super().interrupt(quantum)

    def poll(self, timeout_s: float | None = None) -> StepEvent | QuantumEnd | None:
        self.flag[0] = b"\0"
        event = super().poll(timeout_s)
        if isinstance(event, StepEvent):
            self.passes += any(step.token or step.prompt_tokens for step in event.sequences)
            self.prompt_tokens += sum(step.prompt_tokens for step in event.sequences)
        return event


class Crowd:
    """A batch at work, and the newcomer."""

    def __init__(self, seats: int, nice: int = 10) -> None:
        model = replace(MODEL, sequences=seats)
        self.sim = SimSystem({"m": model})
        self.sim.system.load("m")
        self.model = self.sim.kernel.models["m"]
        self.host = self.model.host = Host(self.sim, model)
        self.chat = self.sim.system.spawn(ProcessSpec("m", (), program="chat", nice=-10))
        self.jobs = [self.sim.spawn("w " * 400, nice=nice, seed=n) for n in range(JOBS)]

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            assert self.sim.dispatcher.advance()

    def within_a_pass(self, after_s: float, act: Callable[[], object]) -> None:
        self.host.due = (self.sim.clock.now_s() + after_s, act)
        while self.host.due:
            self.run(1)

    def spawn(self, nice: int = -10) -> int:
        spec = ProcessSpec("m", ("w " * WORDS,), nice=nice, max_tokens=8, sampling=Sampling(seed=9))
        return self.sim.system.spawn(spec)

    def passes_to_next_token(self, pid: int) -> int:
        before, tokens = self.host.passes, self.sim.system.process(pid).output_tokens
        while self.sim.system.process(pid).output_tokens == tokens:
            self.run(1)
        return self.host.passes - before


@pytest.mark.parametrize("seats", [JOBS, JOBS + 1])
@pytest.mark.parametrize("after_s", [0.0, 0.021, 0.055, 0.11, 0.3, 0.7, 1.5])
def test_one_who_outweighs_all_computes_at_once(seats: int, after_s: float) -> None:
    """Whatever pass he comes in, of prompts or of output, and with or without a seat to be freed for him."""
    crowd, pids = Crowd(seats), []
    crowd.within_a_pass(after_s, lambda: pids.append(crowd.spawn()))
    assert crowd.host.hards[0] is True
    assert crowd.passes_to_next_token(pids[0]) == 1
    crowd.sim.kernel.check_integrity()


def test_a_turn_of_a_chat_is_as_welcome() -> None:
    crowd = Crowd(JOBS + 1)
    crowd.sim.system.say(crowd.chat, "w " * 20)
    crowd.passes_to_next_token(crowd.chat)
    assert crowd.model.seats.count(None) == 0  # it keeps its seat
    crowd.sim.system.cut(crowd.chat)
    crowd.run(20)
    crowd.host.hards.clear()
    crowd.within_a_pass(0.02, lambda: crowd.sim.system.say(crowd.chat, "w " * WORDS))
    assert crowd.host.hards[0] is True
    assert crowd.passes_to_next_token(crowd.chat) == 1


def equal(crowd: Crowd) -> int:
    return crowd.spawn(nice=10)


def under_fifo(crowd: Crowd) -> int:
    crowd.sim.system.set_policy("fifo")
    crowd.host.hards.clear()
    return crowd.spawn()


def where_it_costs_more(crowd: Crowd) -> int:
    crowd.host.engine.info = replace(crowd.host.info, abortable=False)
    return crowd.spawn()


def where_one_is_owed(crowd: Crowd) -> int:
    queue = crowd.model.queue
    thread: Thread = next(iter(crowd.sim.dispatcher.flights[0].grants))
    queue.charge(thread, -3 * queue.request_units)
    return crowd.spawn()


@pytest.mark.parametrize("come", [equal, under_fifo, where_it_costs_more, where_one_is_owed])
def test_for_others_the_pass_is_finished(come: Callable[[Crowd], int]) -> None:
    crowd = Crowd(JOBS + 1)
    crowd.run(5)
    crowd.within_a_pass(0.02, lambda: come(crowd))
    assert crowd.host.hards == [False]


def test_light_prompts_do_not_go_before_a_heavy_ones_tokens() -> None:
    """Between two of his tokens, a piece of one: not all short prompts there are."""
    crowd = Crowd(2 * JOBS + 1)
    heavy = crowd.spawn()
    crowd.passes_to_next_token(heavy)
    for n in range(JOBS):
        crowd.sim.spawn("w " * 30, nice=10, seed=n)
    prompts: list[int] = []
    while crowd.sim.system.process(heavy).exit_code is None:
        before = crowd.host.prompt_tokens
        crowd.passes_to_next_token(heavy)
        prompts.append(crowd.host.prompt_tokens - before)
    assert 0 < max(prompts) <= 32, prompts


def test_a_model_is_not_cut_short_twice_in_a_row() -> None:
    """Those in the pass would get nowhere, however short the newcomers are."""
    crowd = Crowd(JOBS + 2)
    crowd.run(5)
    crowd.within_a_pass(0.02, lambda: [crowd.spawn(-10), crowd.spawn(-15)])
    assert crowd.host.hards == [True, False]
    crowd.run(5)
    crowd.host.hards.clear()
    crowd.within_a_pass(0.02, lambda: crowd.spawn(-20))
    assert crowd.host.hards == [True], "something has been computed since"


def test_the_threads_of_a_process_weigh_as_one() -> None:
    crowd = Crowd(JOBS + 6)
    crowd.sim.system.spawn(ProcessSpec("m", ("w",), samples=4, threads=4, sampling=Sampling(seed=9)))
    crowd.run(10)
    crowd.host.hards.clear()
    crowd.within_a_pass(0.02, lambda: crowd.spawn(-5))
    assert crowd.host.hards == [True]


def test_a_long_prompt_leaves_another_model_its_turns() -> None:
    """Alone on its model it outweighs all others there; but the device is not its own."""
    sim = SimSystem({"a": MODEL, "b": MODEL})
    for name in "ab":
        sim.system.load(name)
    other = sim.spawn("w", model="b")
    for _ in range(20):
        sim.dispatcher.advance()
    long = sim.spawn("w " * 4000, model="a")
    process, last_s, tokens, waits_s = sim.system.process, sim.clock.now_s(), 0, []
    while process(long).output_tokens == 0:
        assert sim.dispatcher.advance()
        if process(other).output_tokens > tokens:
            waits_s.append(sim.clock.now_s() - last_s)
            last_s, tokens = sim.clock.now_s(), process(other).output_tokens
    assert len(waits_s) > 20
    assert max(waits_s) < 3 * sim.kernel.config.quantum_s
