"""More models than memory: who makes room, who waits, and that nothing that runs is lost."""

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shell_kit import session
from simkernel import SimCatalog, SimSystem

from drivers.sim import SimDriver
from drivers.simmodel import SimFaults, SimModel
from kernel.clock import RealClock
from kernel.config import KernelConfig
from kernel.device import DeviceInfo, Driver, EngineOptions, Sampling
from kernel.errors import AdmissionRefused, Interrupted, LlmosError, NotPermitted
from kernel.kernel import Kernel, Parts
from kernel.process import Signal
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls
from plugins.benchmarks import eviction, offline

MIB = 1 << 20
ONE = SimModel(
    mean_tokens=0, weights_bytes=400 * MIB, context_tokens=1024, sequences=4, compute_bytes=MIB, load_s=2.0
)
EACH = 405 * MIB  # with its KV and buffers


def machine(places: float = 2, models: dict[str, SimModel] | None = None, patience: float = 4.0) -> SimSystem:
    device = DeviceInfo("sim0", "sim", "simulated", int(places * EACH))
    models = models or dict.fromkeys("abcd", ONE)
    return SimSystem(models, KernelConfig(patience=patience), device=device)


def states(sim: SimSystem) -> dict[str, str]:
    return {model.name: model.state for model in sim.system.models()}


def loaded(sim: SimSystem) -> str:
    return "".join(sorted(name for name, state in states(sim).items() if state == "loaded"))


def run(sim: SimSystem, model: str, tokens: int = 20, **fields: object) -> int:
    spec = ProcessSpec(model, ("go on",), max_tokens=tokens, **fields)  # type: ignore[arg-type]
    return sim.system.spawn(spec)


def finish(sim: SimSystem) -> None:
    """All that can be done, also what takes patience."""
    sim.kernel.pump()
    while sim.kernel.admission.line:
        sim.clock.sleep(0.25)
        sim.kernel.admission.settle()
        sim.kernel.pump()


def alone(tokens: int) -> str:
    sim = machine(1)
    pid = run(sim, "a", tokens)
    sim.kernel.pump()
    return sim.output(pid)


def test_an_idle_model_makes_room_and_a_pinned_one_does_not() -> None:
    sim = machine()
    sim.system.load("a")
    sim.system.load("b")
    sim.system.pin("a")
    sim.system.load("c")
    assert loaded(sim) == "ac"
    assert [m.pinned for m in sim.system.models() if m.name == "a"] == [True]
    sim.system.pin("c")
    with pytest.raises(AdmissionRefused, match=r"d needs 405 MiB on sim0, 405 MiB more than is free") as e:
        sim.system.load("d")
    assert "held by" in e.value.hint and "--wait" in e.value.hint and states(sim)["d"] == "disk"
    assert "pinned are a, c: `unpin` lets them make room" in e.value.hint
    sim.system.pin("a", False)
    sim.system.load("d")
    assert loaded(sim) == "cd"
    with pytest.raises(NotPermitted, match="not loaded"):
        sim.system.pin("b")


def test_the_cheapest_to_reload_per_byte_goes_first() -> None:
    """All equally used: `quick` loads in half the time of the others, `big` has twice their bytes."""
    models = {
        "a": ONE,
        "slow": replace(ONE, load_s=8.0),
        "quick": replace(ONE, load_s=1.0),
        "big": replace(ONE, weights_bytes=800 * MIB),
        "new": ONE,
        "newer": ONE,
    }
    sim = machine(5.1, models)
    for name in ("a", "slow", "quick", "big"):
        sim.system.load(name)
        usage = sim.kernel.models[name].usage
        usage.last_s, usage.gap_s = -1000.0, 10.0
    sim.system.load("new")
    assert states(sim)["quick"] == "disk"
    sim.system.pin("new")
    sim.system.load("newer")
    assert [name for name, state in states(sim).items() if state == "disk"] == ["quick", "big"]


def test_the_one_whose_next_use_is_farther_off_goes() -> None:
    sim = machine()
    for _ in range(5):
        run(sim, "a")
        sim.kernel.pump()
        sim.clock.sleep(30.0)
        run(sim, "b")
        sim.kernel.pump()
        sim.clock.sleep(60.0)
        run(sim, "b")
        sim.kernel.pump()
    sim.clock.sleep(5.0)  # a comes every 90 s, b every 30 and 60: now a is due in 25 s
    sim.kernel.models["b"].usage.gap_s = 200.0
    sim.system.load("c")
    assert loaded(sim) == "ac"


def test_no_model_goes_for_nothing() -> None:
    """Two idle ones would not be enough: they stay."""
    sim = machine(3, {"a": ONE, "b": ONE, "huge": replace(ONE, weights_bytes=1150 * MIB), "c": ONE})
    sim.system.load("a")
    sim.system.load("b")
    sim.system.load("c")
    pid = run(sim, "c", 1000)
    sim.run_until(10)
    with pytest.raises(AdmissionRefused):
        sim.system.load("huge")
    assert loaded(sim) == "abc"
    sim.system.signal(pid, Signal.KILL)
    sim.system.load("huge")
    assert loaded(sim) == "huge"


def test_a_process_of_a_third_model_waits_for_what_runs_and_then_gets_its_place() -> None:
    sim = machine()
    a, b = run(sim, "a", 300), run(sim, "b", 1000)
    sim.run_until(50)
    c = run(sim, "c")
    assert states(sim)["c"] == "waiting"
    assert sim.system.process(c).waits_for == "405 MiB on sim0 for c"
    assert "It is the next." in " ".join(sim.system.why(c))
    while sim.system.process(a).exit_code is None:
        assert sim.system.process(c).state == "NEW"
        sim.dispatcher.advance()
    finish(sim)
    assert [sim.system.process(pid).exit_code for pid in (a, b, c)] == [0, 0, 0]
    assert sim.output(a) == alone(300)
    assert any("evicted" in line.text and line.source == "a" for line in sim.system.log())


def test_loads_wait_in_order_and_can_be_given_up() -> None:
    sim = machine(1)
    a = run(sim, "a", 300)
    sim.run_until(5)
    for name in ("b", "c"):
        assert sim.system.load(name, wait=True).state == "waiting"
    sim.system.cancel_load("b")
    with pytest.raises(Interrupted):
        sim.system.wait_load("b")
    finish(sim)
    assert sim.system.process(a).exit_code == 0 and loaded(sim) == "c"
    waiting = run(sim, "d", 500)
    sim.kernel.dispatchers["sim0"].advance()
    sim.system.load("a", wait=True)
    assert sim.system.unload("a") == 0  # it only waited
    sim.system.signal(waiting, Signal.KILL)
    assert "a" not in sim.kernel.models


def test_one_that_waits_and_is_killed_leaves_nothing_behind() -> None:
    sim = machine(1)
    a = run(sim, "a", 200)
    b = run(sim, "b")
    sim.run_until(5)
    sim.system.signal(b, Signal.KILL)
    assert "b" not in sim.kernel.models and not sim.kernel.admission.line
    sim.kernel.pump()
    assert sim.system.process(a).exit_code == 0 and loaded(sim) == "a"


def test_a_stopped_process_gives_its_models_place_up_and_goes_on_with_the_same_text() -> None:
    sim = machine(1)
    a = run(sim, "a", 200)
    sim.run_until(60)
    sim.system.signal(a, Signal.STOP)
    c = run(sim, "c", 30)
    finish(sim)
    assert sim.system.process(c).exit_code == 0 and states(sim)["a"] == "waiting"
    assert sim.system.process(a).state == "STOPPED" and sim.system.process(a).kv_bytes > 0
    sim.system.signal(a, Signal.CONT)
    finish(sim)
    assert sim.output(a) == alone(200)


@pytest.mark.parametrize(
    ("rest", "go_on"),
    [
        (
            lambda system, pid: system.signal(pid, Signal.STOP),
            lambda system, pid: system.signal(pid, Signal.CONT),
        ),
        (Syscalls.swap_out, Syscalls.swap_in),
    ],
    ids=["stopped", "swapped"],
)
def test_one_that_rested_waits_for_its_model_though_it_was_not_to_wait_at_its_start(
    rest: Callable[[Syscalls, int], object], go_on: Callable[[Syscalls, int], None]
) -> None:
    sim = machine(1)
    pid = run(sim, "a", 200, wait=False)
    sim.run_until(60)
    rest(sim.system, pid)
    sim.kernel.pump()
    other = run(sim, "b", 200)
    sim.run_until(90)
    assert states(sim)["b"] == "loaded"
    go_on(sim.system, pid)
    assert sim.system.process(pid).state == "NEW" and "405 MiB on sim0" in sim.system.why(pid)[0]
    finish(sim)
    assert [sim.system.process(each).exit_code for each in (pid, other)] == [0, 0]
    assert sim.output(pid) == alone(200)
    sim.kernel.check_integrity()


def test_kv_that_cannot_be_saved_is_computed_again() -> None:
    broken = replace(ONE, faults=SimFaults(fail_dump_at=1))
    sim = machine(1, {"a": broken, "c": ONE})
    a = run(sim, "a", 200)
    sim.run_until(60)
    sim.system.signal(a, Signal.STOP)
    run(sim, "c", 30)
    finish(sim)
    sim.system.signal(a, Signal.CONT)
    finish(sim)
    assert sim.output(a) == alone(200)


def test_nobody_starves_while_others_keep_coming() -> None:
    """a and b never run dry by themselves; after its patience c gets a place, and those who came wait."""
    sim = machine(patience=3.0)
    for model in "ab":
        run(sim, model, 200)
    sim.run_until(20)
    c, came_s = run(sim, "c"), sim.clock.now_s()
    busy: list[int] = []
    while sim.system.process(c).first_token_s is None:
        for model in "ab":
            view = [p for p in sim.system.snapshot().processes if p.model == model and p.exit_code is None]
            if len(view) < 3:
                busy.append(run(sim, model, 200))
        sim.dispatcher.advance()
        sim.kernel.admission.settle()
        assert sim.clock.now_s() - came_s < 30.0
    patience_s = 3.0 * sim.kernel.models["c"].reload_s()
    assert sim.clock.now_s() - came_s > patience_s * 0.2
    finish(sim)
    assert all(sim.system.process(pid).exit_code == 0 for pid in busy)


def test_a_model_used_at_intervals_is_kept_for_a_while_but_not_for_ever() -> None:
    """Both are used every second: c waits its patience (4 loads of a guessed 0.4 s), no longer."""
    sim = machine()
    for _ in range(6):
        for model in "ab":
            run(sim, model, 5)
            sim.kernel.pump()
            sim.clock.sleep(0.5)
    came_s = sim.clock.now_s()
    c = run(sim, "c", 5)
    sim.kernel.pump()
    assert loaded(sim) == "ab"
    finish(sim)
    patience_s = 4 * EACH / 1e9
    assert sim.system.process(c).exit_code == 0
    assert patience_s < sim.clock.now_s() - came_s < patience_s + 2.0 + 1.0  # and its load
    impatient = run(sim, "d", 5, wait=False)
    sim.kernel.pump()
    assert sim.system.process(impatient).exit_code == 0


def test_a_failed_load_gives_its_place_to_the_next() -> None:
    bad = replace(ONE, faults=SimFaults(refuse_load="ModelInvalid"))
    sim = machine(1, {"a": ONE, "bad": bad, "c": ONE})
    run(sim, "a", 100)
    broken, c = run(sim, "bad"), run(sim, "c")
    finish(sim)
    assert sim.system.process(broken).exit_code == 126
    assert sim.system.process(c).exit_code == 0


def test_a_worker_that_dies_again_and_again_frees_its_memory_for_who_waits() -> None:
    dying = replace(ONE, load_s=0.1, faults=SimFaults(die_at_step=1))
    sim = machine(1, {"a": dying, "c": ONE})
    a = run(sim, "a")
    c = run(sim, "c")
    finish(sim)
    assert sim.system.process(a).exit_code == 125 and sim.system.process(c).exit_code == 0


def test_what_never_fits_is_refused_also_to_who_waits() -> None:
    sim = machine(2, {"a": ONE, "huge": replace(ONE, weights_bytes=1 << 30)})
    for wait in (True, False):
        with pytest.raises(AdmissionRefused, match="more than can ever be free"):
            run(sim, "huge", wait=wait)
        with pytest.raises(AdmissionRefused, match="more than can ever be free"):
            sim.system.load("huge", wait=wait)
    with pytest.raises(AdmissionRefused):
        sim.system.load("a", EngineOptions(sequences=4000))
    assert states(sim) == {"a": "disk", "huge": "disk"}


def test_the_ledger_holds_what_each_engine_measured() -> None:
    sim = machine()
    sim.system.load("a", EngineOptions(sequences=2))
    pid = run(sim, "b")
    sim.run_until(3)
    view = sim.system.snapshot()
    for model in view.models:
        engine = model.engine
        assert engine is not None
        claims = {c.kind: c.size_bytes for c in view.pools[0].claims if c.owner == model.name}
        assert claims == {
            "weights": engine.weights_bytes,
            "kv": engine.kv_bytes,
            "compute": engine.compute_bytes,
        }
        assert sum(p.kv_bytes for p in view.processes if p.model == model.name) <= claims["kv"]
    sim.system.signal(pid, Signal.KILL)
    assert sim.system.unload("a") + sim.system.unload("b") == view.pools[0].used_bytes


def do_to_a_model(sim: SimSystem, what: str, name: str) -> None:
    if what == "load":
        sim.system.load(name, wait=True)
    elif what == "unload":
        sim.system.unload(name)
    else:
        sim.system.pin(name, what == "pin")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("run"), st.sampled_from("abcd"), st.integers(1, 60)),
            st.tuples(st.sampled_from(["stop", "cont", "kill"]), st.integers(0, 6), st.just(0)),
            st.tuples(
                st.sampled_from(["pin", "unpin", "load", "unload"]), st.sampled_from("abcd"), st.just(0)
            ),
            st.tuples(st.just("steps"), st.integers(1, 8), st.just(0)),
        ),
        max_size=40,
    )
)
def test_whatever_is_done_the_books_are_right_and_all_end_well(
    steps: list[tuple[str, str | int, int]],
) -> None:
    sim = machine(2, patience=2.0)
    pids: list[int] = []
    for what, which, tokens in steps:
        with suppress(NotPermitted, AdmissionRefused):
            if what == "run":
                pids.append(run(sim, str(which), tokens))
            elif isinstance(which, str):
                do_to_a_model(sim, what, which)
            elif what == "steps":
                for _ in range(which):
                    sim.dispatcher.advance()
            elif which < len(pids):
                sim.system.signal(pids[which], Signal[what.upper()])
        sim.kernel.check_integrity()
        assert sim.system.snapshot().pools[0].used_bytes <= 2 * EACH
    for name in list(sim.kernel.models):
        if states(sim)[name] == "loaded":
            sim.system.pin(name, False)
    for pid in pids:
        if sim.system.process(pid).state == "STOPPED":
            sim.system.signal(pid, Signal.CONT)
    finish(sim)
    assert {sim.system.process(pid).exit_code for pid in pids} <= {0, 137}


# At the prompt


def test_wait_is_the_default_of_scripts_and_a_person_is_told(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.sim").write_text('{"weights_bytes": 42949672960, "mean_tokens": 0}')
    one, two = tmp_path / "one.sim", tmp_path / "two.sim"
    with session() as shell:
        assert shell.line(f"run {one} --max-tokens 200 go on > /dev/null &")[0] == 0
        status, _, err = shell.line(f"load --no-wait {two}")
        assert status == 75 and "held by one" in err and "--wait" in err
        status, _, err = shell.line(f"run {two} --max-tokens 3 hello")
        assert status == 0, err
        assert shell.line("pin two")[0] == 0
        _, out, _ = shell.line("models")
        assert any(line.split()[:2] == ["two", "pinned"] for line in out.splitlines())
        assert shell.line(f"load --no-wait {one}")[0] == 75
        assert shell.line("unload two")[0] == 1 and shell.line("unload --all")[0] == 1
        assert [model.name for model in shell.shell.system.models() if model.state == "loaded"] == ["two"]
        assert shell.line("unpin two")[0] == 0
        assert shell.line(f"load --no-wait {one}")[0] == 0
        assert shell.line("pin nothing")[0] in (1, 127)
    with session(interactive=True) as shell:
        shell.line(f"run {one} go on > /dev/null &")
        assert shell.line(f"run {two} hello")[0] == 75


# Against the optimum


def fewest(trace: offline.Trace, places: int, wait_s: float) -> int:
    """By trying every set of models in memory at every half second."""
    models = sorted({model for _, model in trace})
    times = sorted({at_s + extra for at_s, _ in trace for extra in (0.0, wait_s)})
    best: dict[tuple[frozenset[int], frozenset[int]], int] = {(frozenset(), frozenset()): 0}
    for now_s in times:
        came = {n for n, (at_s, _) in enumerate(trace) if at_s <= now_s}
        reached = dict(best)
        frontier = list(best.items())
        while frontier:  # any number of loads in a row at one moment
            (here, served), cost = frontier.pop()
            served = served | {n for n in came if trace[n][1] in here}
            options = [((here, served), cost)]
            for model in set(models) - here:
                kept = [here] if len(here) < places else [here - {old} for old in here]
                options += [((k | {model}, served), cost + 1) for k in kept]
            for state, price in options:
                if price < reached.get(state, 99):
                    reached[state] = price
                    frontier.append((state, price))
        late = {n for n, (at_s, _) in enumerate(trace) if at_s + wait_s <= now_s}
        best = {state: cost for state, cost in reached.items() if late <= state[1]}
    return min(best.values())


@settings(max_examples=60, deadline=None)
@example([(0, 0), (0, 1), (1, 2), (2, 0), (2, 1)], 0)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=7), st.integers(0, 4))
def test_the_reordered_optimum_is_exact(arrivals: list[tuple[int, int]], wait_s: int) -> None:
    trace = sorted((float(at_s), model) for at_s, model in arrivals)
    assert offline.reordered(trace, 2, float(wait_s)) == fewest(trace, 2, float(wait_s))


@pytest.mark.parametrize("length", [4, 5])
def test_the_optimum_in_order_is_belady(length: int) -> None:
    """Against every choice of victims there is."""
    for models in product(range(3), repeat=length):
        trace = [(float(n), model) for n, model in enumerate(models)]
        costs = {frozenset[int](): 0}
        for model in models:
            after: dict[frozenset[int], int] = {}
            for here, cost in costs.items():
                kept = [here] if model in here or len(here) < 2 else [here - {old} for old in here]
                for left in kept:
                    key = left | {model}
                    after[key] = min(after.get(key, 99), cost + (model not in here))
            costs = after
        assert offline.in_order(trace, 2) == min(costs.values()), models


@pytest.mark.parametrize("models", [3, 4])
@pytest.mark.parametrize("name", ["skewed", "alternating"])
def test_loads_are_near_the_optimum_and_fewer_than_a_simple_servers(name: str, models: int) -> None:
    row = eviction.compare(eviction.TRACES[name](models, seed=2, count=70))
    assert row["loads_ratio"] <= 1.15
    assert row["llmos_loads"] < row["lru_loads"]
    assert row["llmos_makespan_s"] <= 1.05 * row["lru_makespan_s"]


def test_a_batch_of_everything_loads_each_model_once() -> None:
    row = eviction.compare(eviction.queued(6, seed=3, count=80))
    assert row["llmos_loads"] == row["optimum_reordered_loads"] == 6 < row["lru_loads"]
    assert row["llmos_makespan_s"] < row["lru_makespan_s"] / 2


def test_errors_of_a_load_that_waited_reach_who_asked() -> None:
    bad = replace(ONE, faults=SimFaults(refuse_load="ModelInvalid"))
    sim = machine(1, {"a": ONE, "bad": bad})
    run(sim, "a", 50)
    sim.system.load("bad", wait=True)
    finish(sim)
    with pytest.raises(LlmosError, match="refused, as planned"):
        sim.system.wait_load("bad")


def test_threads_in_earnest() -> None:
    """The threaded kernel: four users, four models, memory for two; stops, signals and loads in between."""
    models = {f"{name}.sim": replace(ONE, load_s=0.01, base_s=1e-3, decode_s=1e-4) for name in "abcd"}
    device = DeviceInfo("sim0", "sim", "simulated", 2 * EACH)
    drivers: dict[str, Driver] = {".sim": SimDriver([device], models=models)}
    config = KernelConfig(patience=1.0, waiting_poll_s=0.02)
    kernel = Kernel(Parts(RealClock(), drivers, SimCatalog(*"abcd"), config=config))
    system, pids = Syscalls(kernel), list[int]()

    def user(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(12):
            spec = ProcessSpec(draw.choice("abcd"), ("go on",), max_tokens=draw.randrange(1, 60))
            with suppress(NotPermitted):  # unloaded by another one, this very moment
                pids.append(system.spawn(spec))
            with suppress(LlmosError):
                system.signal(draw.choice(pids), draw.choice([Signal.STOP, Signal.CONT, Signal.KILL]))
            with suppress(LlmosError):
                system.unload(draw.choice("abcd"))
            with suppress(LlmosError):
                system.load(draw.choice("abcd"), wait=draw.random() < 0.5)
            kernel.check_integrity()

    users = [threading.Thread(target=user, args=(seed,)) for seed in range(4)]
    for each in users:
        each.start()
    for each in users:
        each.join()
    for pid in pids:
        with suppress(LlmosError):
            system.signal(pid, Signal.CONT)
    ended = [system.wait(pid, 60.0) for pid in pids]
    kernel.check_integrity()
    system.shutdown()
    assert len(pids) > 40
    assert {view.exit_code for view in ended if view is not None} <= {0, 137} and None not in ended


def test_a_chat_whose_model_was_evicted_while_it_slept_goes_on_when_its_user_speaks() -> None:
    talker = ProcessSpec("a", (), program="chat", sampling=Sampling(seed=4), max_tokens=30)

    def talk(sim: SimSystem, between: bool) -> str:
        pid = sim.system.spawn(talker)
        sim.system.say(pid, "one two")
        finish(sim)
        assert sim.system.process(pid).state == "SLEEPING"
        if between:
            run(sim, "b", 5)
            finish(sim)
            assert states(sim)["a"] == "waiting" and loaded(sim) == "b"
            other = run(sim, "b", 200)
            sim.run_until(80)
        sim.system.say(pid, "three")
        sim.system.say(pid, "four")
        if between:
            assert sim.system.process(pid).waits_for == "405 MiB on sim0 for a"
            assert sim.system.process(other).exit_code is None
        finish(sim)
        sim.system.hang_up(pid)
        view = sim.system.process(pid)
        assert (view.exit_code, view.output_tokens) == (0, 90)
        return sim.output(pid)

    assert talk(machine(1), True) == talk(machine(2), False)


def test_what_is_swapped_out_and_what_is_declared_are_booked_apart() -> None:
    """Both are one process's bytes in RAM; giving back the one leaves the other."""
    sim = machine(1)
    pid = run(sim, "a", 300, mem_bytes=1000)
    sim.run_until(40)
    sim.kernel.check_integrity()
    swapped = sim.system.swap_out(pid)
    ram = sim.kernel.ledger.held(f"process {pid}")["ram"]
    assert ram == ({"declared": 1000, "kv": swapped} if swapped else {"declared": 1000})
    sim.system.swap_in(pid)
    finish(sim)
    assert sim.output(pid) == alone(300) and sim.kernel.ledger.held(f"process {pid}") == {}


@pytest.mark.parametrize("spoken", [0, 5])
def test_a_chat_that_falls_asleep_makes_room_at_once(spoken: int) -> None:
    """Nobody looks after the line here: what it says last lets the other in.

    If it has not begun (0), its model counts as idle and goes first; then it waits, and speaks after.
    """
    sim = machine(1)
    chat = sim.system.spawn(ProcessSpec("a", ("hello",), program="chat", max_tokens=20))
    sim.run_until(spoken)
    other = run(sim, "b")
    sim.kernel.pump()
    assert sim.system.process(chat).state == "SLEEPING" and sim.system.process(chat).items_done == 1
    assert sim.system.process(other).exit_code == 0
    sim.kernel.check_integrity()


def test_a_load_that_gets_no_thread_is_refused_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceInfo("sim0", "sim", "simulated", EACH)
    driver = SimDriver([device], sleep=lambda _: None, models={"a.sim": ONE})
    start = threading.Thread.start

    def fails(thread: threading.Thread) -> None:
        if thread.name.startswith("load"):
            raise RuntimeError("can't start new thread")
        start(thread)

    kernel = Kernel(Parts(RealClock(), {".sim": driver}, SimCatalog("a")))
    system = Syscalls(kernel)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails)
            ended = system.wait(system.spawn(ProcessSpec("a", ("go on",))), 10)
            system.load("a")
            with pytest.raises(AdmissionRefused, match="can't start new thread"):
                system.wait_load("a")
        assert ended and ended.exit_code == 75 and "new thread" in ended.error
        kernel.check_integrity()
        assert not any(pool.claims for pool in system.snapshot().pools if pool.name == "sim0")
        again = system.wait(system.spawn(ProcessSpec("a", ("go on",), max_tokens=5)), 10)
        assert again and again.exit_code == 0
        kernel.check_integrity()
    finally:
        system.shutdown()


def test_who_waits_beside_a_victim_that_never_runs_dry_gets_another_ones_place() -> None:
    """a, the first to go, has a job for hours, and b is never idle: without a second victim c starves."""
    sim = machine(models=dict.fromkeys("abc", replace(ONE, base_s=0.1)))
    sim.system.spawn(ProcessSpec("a", ("go on",) * 1000, max_tokens=500, lines=True))
    run(sim, "b", 50)
    sim.run_until(20)
    c = run(sim, "c", 5)
    while sim.clock.now_s() < 40.0 and sim.system.process(c).exit_code is None:
        busy = [p for p in sim.system.snapshot().processes if p.model == "b" and p.exit_code is None]
        for _ in range(3 - len(busy)):
            run(sim, "b", 50)
        sim.dispatcher.advance()
        sim.kernel.admission.settle()
    assert sim.system.process(c).exit_code == 0
