"""The kernel on simulated engines, stepped by hand: what each system call promises."""

from pathlib import Path

import pytest
from simkernel import SimSystem

from drivers.simmodel import SimFaults, SimModel
from kernel.config import KernelConfig
from kernel.device import EngineOptions, Sampling
from kernel.errors import (
    AdmissionRefused,
    LlmosError,
    ModelNotFound,
    NotPermitted,
    ProcessNotFound,
    UsageError,
    WorkerDied,
)
from kernel.process import Signal
from kernel.spec import ProcessSpec

WITHOUT_END = SimModel(mean_tokens=0)


def solo(seed: int, max_tokens: int, prompt: str = "one two three") -> str:
    sim = SimSystem()
    pid = sim.spawn(prompt, seed=seed, max_tokens=max_tokens)
    sim.kernel.pump()
    return sim.output(pid)


def test_a_process_runs_to_its_limit_and_says_so() -> None:
    sim = SimSystem()
    pid = sim.spawn(max_tokens=20)
    view = sim.system.wait(pid)
    assert view is not None
    assert (view.state, view.exit_code, view.output_tokens, view.items_done) == ("ZOMBIE", 0, 20, 1)
    assert len(sim.output(pid).split()) == 20
    assert view.prompt_tokens == 5  # a role, the role's name and three words
    sim.kernel.check_integrity()


def test_shares_follow_linux_weights() -> None:
    sim = SimSystem()
    nices = (-5, 0, 5, 10)
    pids = [sim.spawn(nice=nice) for nice in nices]
    sim.run_until(4000)
    tokens = [sim.system.process(pid).output_tokens for pid in pids]
    weights = [3121, 1024, 335, 110]
    for got, weight in zip(tokens, weights, strict=True):
        assert got / sum(tokens) == pytest.approx(weight / sum(weights), rel=0.05)
    for pid in pids:
        view = sim.system.process(pid)
        assert view.share_received == pytest.approx(view.share_due, rel=0.1)
    sim.kernel.check_integrity()


def test_renice_moves_the_share() -> None:
    sim = SimSystem()
    a, b = sim.spawn(), sim.spawn()
    sim.run_until(1000)
    assert sim.system.renice(b, 10) == 0
    before = sim.system.process(a).output_tokens, sim.system.process(b).output_tokens
    sim.run_until(3000)
    gained_a = sim.system.process(a).output_tokens - before[0]
    gained_b = sim.system.process(b).output_tokens - before[1]
    assert gained_a / gained_b == pytest.approx(1024 / 110, rel=0.1)


def test_a_newcomer_does_not_wait_for_the_quantum_to_end() -> None:
    sim = SimSystem()
    for _ in range(8):
        sim.spawn()
    sim.run_until(500)
    started_s = sim.clock.now_s()
    pid = sim.spawn(nice=-10)
    while sim.system.process(pid).first_token_s is None:
        sim.dispatcher.advance()
    # The step that was running, and one with its prompt: not two quanta of 50 ms.
    assert sim.clock.now_s() - started_s < 0.03


def test_stop_holds_and_cont_goes_on_with_the_same_tokens() -> None:
    sim = SimSystem()
    pid, other = sim.spawn(seed=7, max_tokens=100), sim.spawn(seed=8)
    sim.run_until(60)
    sim.system.signal(pid, Signal.STOP)
    sim.dispatcher.advance()
    held = sim.system.process(pid)
    sim.run_until(400)
    view = sim.system.process(pid)
    assert (view.state, view.waits_for) == ("STOPPED", "a CONT signal")
    assert view.output_tokens - held.output_tokens <= 1
    sim.system.signal(pid, Signal.CONT)
    while sim.system.process(pid).exit_code is None:
        sim.dispatcher.advance()
    assert sim.output(pid) == solo(7, 100)
    sim.system.signal(other, Signal.KILL)


@pytest.mark.parametrize(("signal", "code"), [(Signal.INT, 130), (Signal.KILL, 137), (Signal.TERM, 143)])
def test_a_signal_ends_a_process_at_once(signal: Signal, code: int) -> None:
    sim = SimSystem()
    pid, other = sim.spawn(), sim.spawn()
    sim.run_until(50)
    sim.system.signal(pid, signal)
    tokens = sim.system.process(pid).output_tokens
    seats = [thread for thread in sim.kernel.models["m"].seats if thread is not None]
    assert len(seats) == 1
    sim.run_until(500)
    assert sim.system.process(pid).exit_code == code
    assert sim.system.process(pid).output_tokens == tokens
    with pytest.raises(NotPermitted, match="has ended"):
        sim.system.signal(pid, Signal.TERM)
    sim.system.signal(other, Signal.KILL)
    sim.kernel.check_integrity()


def test_more_processes_than_seats_all_finish_with_their_own_text() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, sequences=2)})
    pids = [sim.spawn(seed=seed, max_tokens=300) for seed in range(7)]
    sim.kernel.pump()
    for seed, pid in enumerate(pids):
        assert sim.output(pid) == solo(seed, 300)
    sim.kernel.check_integrity()


def test_a_heavy_newcomer_takes_a_seat_from_a_light_process() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, sequences=2)})
    batch = [sim.spawn(seed=seed, nice=10, max_tokens=2000) for seed in range(3)]
    sim.run_until(300)
    chat = sim.spawn(seed=9, nice=-10, max_tokens=10)
    started_s = sim.clock.now_s()
    while sim.system.process(chat).exit_code is None:
        sim.dispatcher.advance()
    assert sim.clock.now_s() - started_s < 0.3
    sim.kernel.pump()
    assert [sim.output(pid) for pid in batch] == [solo(seed, 2000) for seed in range(3)]


def test_lines_are_answered_in_order_one_line_each() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=6)})
    prompts = tuple(f"prompt number {n}" for n in range(30))
    pid = sim.system.spawn(ProcessSpec("m", prompts, lines=True))
    view = sim.system.wait(pid)
    assert view is not None and view.exit_code == 0 and view.items_done == 30
    lines = sim.output(pid).splitlines()
    assert len(lines) == 30
    alone = SimSystem({"m": SimModel(mean_tokens=6)})
    one = alone.system.spawn(ProcessSpec("m", (prompts[17],), lines=True))
    alone.kernel.pump()
    assert alone.output(one) == lines[17] + "\n"
    assert sim.system.items(pid)[17] == (prompts[17], lines[17])


def test_one_prompt_too_long_fails_alone() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=4, context_tokens=64)})
    prompts = ("good", "far too long " * 40, "good again")
    pid = sim.system.spawn(ProcessSpec("m", prompts, lines=True, max_tokens=8))
    view = sim.system.wait(pid)
    assert view is not None
    assert view.exit_code == 1
    assert view.error.startswith("1 of 3 prompts failed; the first: ")
    lines = sim.output(pid).split("\n")
    assert lines[0] and not lines[1] and lines[2]


def test_a_full_window_is_an_error_with_the_output_kept() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, context_tokens=32)})
    pid = sim.spawn()
    view = sim.system.wait(pid)
    assert view is not None
    assert (
        view.exit_code == 1 and "context window of 32 tokens is full" in view.error and "--ctx" in view.hint
    )
    assert view.output_tokens == 27


def test_a_dead_worker_is_replaced_and_the_text_goes_on() -> None:
    faults = SimFaults(die_at_step=30, first_loads=2)
    sim = SimSystem({"m": SimModel(mean_tokens=0, faults=faults)})
    pids = [sim.spawn(seed=seed, max_tokens=80) for seed in range(3)]
    sim.kernel.pump()
    assert [sim.output(pid) for pid in pids] == [solo(seed, 80) for seed in range(3)]
    (model,) = sim.system.snapshot().models
    assert model.restarts == 2
    assert any("died" in line.text for line in sim.system.log())
    sim.kernel.check_integrity()


def test_a_process_does_not_go_on_with_another_file_of_the_same_name(tmp_path: Path) -> None:
    sim = SimSystem(
        {"m": SimModel(mean_tokens=0, faults=SimFaults(die_at_step=30, first_loads=1))}, folder=tmp_path
    )
    pid = sim.spawn(max_tokens=80)
    sim.run_until(5)
    (tmp_path / "m.sim").write_text("other weights")
    sim.kernel.pump()
    view = sim.system.process(pid)
    assert view.exit_code == 126 and view.output_tokens < 80
    assert "is not the file any more that m was loaded from" in view.error
    again = sim.spawn(max_tokens=5)  # whoever comes now gets what is there now
    sim.kernel.pump()
    assert sim.system.process(again).exit_code == 0
    sim.kernel.check_integrity()


def test_a_worker_that_dies_again_and_again_is_quarantined() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, faults=SimFaults(die_at_step=1))})
    pid = sim.spawn()
    view = sim.system.wait(pid)
    assert view is not None and view.exit_code == 125 and "quarantined" in view.error
    with pytest.raises(LlmosError, match="quarantined"):
        sim.spawn()
    sim.system.unload("m")
    (on_disk,) = sim.system.models()
    assert on_disk.state == "disk"


def test_a_prompt_that_kills_the_engine_twice_ends_alone() -> None:
    """The engine dies at its second open, whoever loads it: the neighbour lives, the culprit does not."""
    faults = SimFaults(fail_open_at=2, fail_with="WorkerDied", first_loads=2)
    sim = SimSystem({"m": SimModel(mean_tokens=0, faults=faults)})
    good = sim.spawn(seed=1, max_tokens=300)
    sim.run_until(20)
    bad = sim.spawn(seed=2, max_tokens=300)
    sim.kernel.pump()
    view = sim.system.process(bad)
    assert view.exit_code == 125 and "died twice on this prompt" in view.error
    assert sim.output(good) == solo(1, 300)
    sim.kernel.check_integrity()


def test_a_death_while_it_is_opened_again_counts_as_one_more_restart() -> None:
    sim = SimSystem({"m": SimModel(mean_tokens=0, faults=SimFaults(die_at_step=9, first_loads=1))})
    driver, loads = sim.kernel.residency.driver(Path("m.sim")), []
    real = driver.open

    def dying_once(*arguments: object) -> object:
        loads.append(1)
        if len(loads) == 2:
            raise WorkerDied("killed while it loaded")
        return real(*arguments)  # type: ignore[arg-type]

    driver.open = dying_once  # type: ignore[method-assign, assignment]
    pid = sim.spawn(seed=3, max_tokens=60)
    sim.kernel.pump()
    assert sim.output(pid) == solo(3, 60)
    assert [model.restarts for model in sim.system.snapshot().models] == [2]


def test_a_model_that_is_open_is_not_silently_opened_otherwise() -> None:
    sim = SimSystem()
    sim.system.load("m", EngineOptions(context_tokens=128))
    sim.system.load("m", EngineOptions(context_tokens=128))
    with pytest.raises(NotPermitted, match="loaded with --ctx 128, not 256"):
        sim.system.load("m", EngineOptions(context_tokens=256))
    with pytest.raises(NotPermitted, match="not 64"):
        sim.system.spawn(ProcessSpec("m", ("x",), context_tokens=64))


def test_two_models_share_the_devices_time() -> None:
    slow = SimModel(mean_tokens=0, base_s=0.008)
    sim = SimSystem({"fast": WITHOUT_END, "slow": slow})
    a, b = sim.spawn(model="fast"), sim.spawn(model="slow")
    sim.run_until(3000)
    fast, slow_view = sim.system.process(a), sim.system.process(b)
    assert fast.device_s == pytest.approx(slow_view.device_s, rel=0.05)
    assert fast.output_tokens > 2 * slow_view.output_tokens


def test_save_and_restore_continue_with_the_same_text(tmp_path: Path) -> None:
    for name in ("m.sim",):
        (tmp_path / name).write_text('{"mean_tokens": 0}')
    sim = SimSystem()
    sim.kernel.catalog = _Folder(tmp_path)
    pid, other = sim.spawn(seed=5, max_tokens=90), sim.spawn(seed=6)
    sim.run_until(70)
    saved = tmp_path / "p.ckpt"
    size = sim.system.save(pid, saved)
    assert saved.stat().st_size == size and saved.stat().st_mode & 0o777 == 0o600
    at = sim.system.process(pid).output_tokens
    copy = sim.system.restore(saved)
    assert sim.system.process(copy).output_tokens == at
    for each in (pid, copy):
        while sim.system.process(each).exit_code is None:
            sim.dispatcher.advance()
    assert sim.output(pid) == sim.output(copy) == solo(5, 90)
    assert sim.system.process(copy).output_tokens == 90
    sim.system.signal(other, Signal.KILL)
    with pytest.raises(NotPermitted):
        sim.system.save(pid, saved)
    with pytest.raises(LlmosError, match="cannot write"):
        sim.system.save(sim.spawn(), tmp_path / "no" / "such" / "folder")


def test_a_fork_goes_on_beside_its_parent(tmp_path: Path) -> None:
    (tmp_path / "m.sim").write_text('{"mean_tokens": 0}')
    sim = SimSystem()
    sim.kernel.catalog = _Folder(tmp_path)  # type: ignore[assignment]
    pid = sim.spawn(seed=5, max_tokens=90)
    sim.run_until(30)
    said = sim.output(pid)
    twin, other = sim.system.fork(pid), sim.system.fork(pid, seed=6)
    sim.kernel.pump()
    assert sim.output(pid) == sim.output(twin) == solo(5, 90)
    assert sim.output(other).startswith(said) and sim.output(other) != sim.output(pid)
    assert sim.system.process(twin).ppid == pid
    with pytest.raises(NotPermitted):
        sim.system.fork(pid)


def test_ps_charges_what_a_parent_and_its_children_share_once() -> None:
    sim = SimSystem()
    token_bytes = sim.models["m"].kv_bytes_per_token
    pid = sim.spawn(prompt="word " * 100)
    sim.run_until(30)
    sim.system.signal(pid, Signal.STOP)
    twins = [sim.system.fork(pid) for _ in range(3)]
    whole = sim.system.process(pid).kv_bytes
    assert whole == token_bytes * (sim.system.process(pid).context_tokens - 1)
    assert [sim.system.process(each).kv_bytes for each in twins] == [0, 0, 0]
    sim.run_until(4 * 30 + 40)
    sim.dispatcher.drain()
    sim.system.signal(pid, Signal.KILL)
    sim.dispatcher.seats.fill(sim.kernel.models["m"])
    views = [sim.system.process(each) for each in twins]
    drawn = sum(view.context_tokens for view in views) * token_bytes - 3 * (whole + token_bytes)
    assert drawn > 0 and sum(view.kv_bytes for view in views) == whole + drawn


class _Folder:
    """A catalog of real files, so that a checkpoint can name the one it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list(self) -> tuple[()]:
        return ()

    def resolve(self, name: str) -> object:
        from simkernel import Entry

        return Entry(name, self.folder / f"{name}.sim")


def test_unload_frees_what_load_took_and_refuses_a_model_in_use() -> None:
    sim = SimSystem()
    pid = sim.spawn()
    sim.run_until(10)
    pool = sim.system.snapshot().pools[0]
    assert {claim.kind for claim in pool.claims} == {"weights", "kv", "compute"}
    with pytest.raises(NotPermitted, match=f"in use by {pid}"):
        sim.system.unload("m")
    sim.system.signal(pid, Signal.KILL)
    assert sim.system.unload("m") == pool.used_bytes
    assert sim.system.snapshot().pools[0].used_bytes == 0
    with pytest.raises(NotPermitted, match="not loaded"):
        sim.system.unload("m")


def test_what_cannot_fit_is_refused_naming_the_bytes() -> None:
    sim = SimSystem({"big": SimModel(weights_bytes=100 << 30), "m": WITHOUT_END})
    sim.system.load("m")
    with pytest.raises(AdmissionRefused, match=r"big needs 100 GiB on sim0, 36 GiB more") as caught:
        sim.spawn(model="big")
    assert "held by m" in caught.value.hint
    assert caught.value.exit_code == 75
    assert [m.state for m in sim.system.models() if m.name == "big"] == ["disk"]


def test_load_errors_reach_the_process_and_the_caller() -> None:
    sim = SimSystem({"bad": SimModel(faults=SimFaults(refuse_load="ModelInvalid"))})
    view = sim.system.wait(sim.spawn(model="bad"))
    assert view is not None and view.exit_code == 126 and "refused" in view.error
    sim.system.load("bad")
    with pytest.raises(LlmosError, match="refused"):
        sim.system.wait_load("bad")


@pytest.mark.parametrize(
    "spec",
    [
        ProcessSpec("m", ()),
        ProcessSpec("m", ("  ",)),
        ProcessSpec("m", ("x",), nice=20),
        ProcessSpec("m", ("x",), nice=-21),
        ProcessSpec("m", ("x",), max_tokens=-1),
        ProcessSpec("m", ("x",), sampling=Sampling(temperature=-0.1)),
        ProcessSpec("m", ("x",), sampling=Sampling(top_p=1.5)),
        ProcessSpec("m", ("x",), sampling=Sampling(seed=-1)),
    ],
)
def test_a_senseless_spec_is_refused(spec: ProcessSpec) -> None:
    sim = SimSystem()
    with pytest.raises(UsageError):
        sim.system.spawn(spec)
    assert sim.system.snapshot().processes == ()


def test_wrong_names() -> None:
    sim = SimSystem()
    with pytest.raises(ModelNotFound):
        sim.spawn(model="nope")
    for call in (sim.system.process, sim.system.reap, sim.system.items):
        with pytest.raises(ProcessNotFound, match="no process 99"):
            call(99)
    pid = sim.spawn(max_tokens=3)
    with pytest.raises(NotPermitted, match="has not ended"):
        sim.system.reap(pid)
    with pytest.raises(UsageError, match="out of range"):
        sim.system.renice(pid, 40)


def test_reaped_processes_are_kept_for_a_while() -> None:
    sim = SimSystem(config=KernelConfig(finished_max=2))
    pids = [sim.spawn(max_tokens=2) for _ in range(3)]
    sim.kernel.pump()
    for pid in pids:
        sim.system.reap(pid)
    assert [view.pid for view in sim.system.finished()] == pids[1:]
    assert sim.system.snapshot().processes == ()
    with pytest.raises(ProcessNotFound):
        sim.system.process(pids[0])


def test_the_process_table_is_bounded() -> None:
    sim = SimSystem(config=KernelConfig(processes_max=3))
    for _ in range(3):
        sim.spawn()
    with pytest.raises(AdmissionRefused, match="process table is full"):
        sim.spawn()


def test_subscribers_hear_of_exits() -> None:
    sim = SimSystem()
    mailbox = sim.system.subscribe("process")
    pid = sim.spawn(max_tokens=2)
    sim.kernel.pump()
    states = [mailbox.receive_nowait().body["state"] for _ in range(len(mailbox))]
    assert states[-1] == "ZOMBIE" and mailbox.dropped == 0
    sim.system.unsubscribe(mailbox)
    assert sim.system.process(pid).exit_code == 0


def test_one_seed_gives_one_history() -> None:
    def history() -> list[object]:
        sim = SimSystem({"m": SimModel(mean_tokens=40, sequences=3)})
        for n in range(12):
            sim.spawn(f"prompt {n}", seed=n, nice=n - 6)
        sim.kernel.pump()
        return [sim.system.process(pid) for pid in range(2, 14)]

    assert history() == history()


def test_options_reach_the_engine() -> None:
    sim = SimSystem()
    view = sim.system.load("m", EngineOptions(context_tokens=128, sequences=3))
    assert view.engine is not None
    assert (view.engine.context_tokens, view.engine.sequences) == (128, 3)
