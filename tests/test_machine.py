"""System calls in any order: a state machine that Hypothesis drives, against a small model of what must be.

The model knows of each process what it will have said when it ends, for a simulated engine says the same
whoever runs beside it, and after every stop, swap, checkpoint, fork, crash and death of its worker. Of the
ledger it knows which claims there have to be, and no others.
"""

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simkernel import SimSystem

from drivers.simmodel import SimModel
from kernel.device import InlineHost, Sampling
from kernel.errors import NotPermitted, WorkerDied
from kernel.models import ModelState
from kernel.process import Signal
from kernel.snapshot import ProcessView
from kernel.spec import ProcessSpec

MODELS = {
    "few": SimModel(mean_tokens=0, sequences=2),
    "more": SimModel(mean_tokens=12, sequences=3, seed=4, shares_prefixes=True),
}
RAM_BYTES = 48 << 10  # for a little swapped KV; the rest goes to the disk
PROMPTS = ("one", "one two three", "another one altogether " * 20)


@cache
def solo(spec: ProcessSpec, turns: tuple[str, ...]) -> str:
    """What a process says when nothing else is there."""
    sim = SimSystem(MODELS)
    pid = sim.system.spawn(spec)
    for text in turns:
        sim.system.say(pid, text)
    if spec.program == "chat":
        sim.system.hang_up(pid)
    sim.kernel.pump()
    return sim.output(pid)


@dataclass
class Row:
    """What is known of a process."""

    spec: ProcessSpec
    turns: tuple[str, ...] = ()  # of a chat, after the prompts of its specification
    held: bool = False  # stopped or swapped out by hand
    killed: tuple[int, str] | None = None  # tokens drawn and said when it was killed


pick = st.integers(0, 1000)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="llmos-machine-"))
        self.rows: dict[int, Row] = {}
        self.reaped: dict[int, Row] = {}  # since boot; the journal hears of it a little later
        self.checkpoints: list[Row] = []
        self.boot()

    def boot(self) -> None:
        self.sim = SimSystem(MODELS, folder=self.folder, swap=self.folder / "swap", ram_bytes=RAM_BYTES)
        self.system = self.sim.system

    def view(self, pid: int) -> ProcessView:
        return self.system.process(pid)

    def alive(self) -> list[int]:
        return [pid for pid in self.rows if self.view(pid).exit_code is None]

    def one(self, choice: int) -> int:
        pids = self.alive()
        return pids[choice % len(pids)]

    def some_alive(self) -> bool:
        return bool(self.alive())

    # What users do

    @rule(
        model=st.sampled_from(tuple(MODELS)),
        prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3),
        tokens=st.integers(1, 60),
        nice=st.integers(-20, 19),
        seed=st.integers(0, 5),
        samples=st.integers(1, 3),
        threads=st.integers(1, 3),
        group=st.sampled_from(("", "", "team")),
    )
    def spawn(
        self,
        model: str,
        prompts: list[str],
        tokens: int,
        nice: int,
        seed: int,
        samples: int,
        threads: int,
        group: str,
    ) -> None:
        spec = ProcessSpec(
            model,
            tuple(prompts),
            lines=True,
            max_tokens=tokens,
            nice=nice,
            samples=samples,
            threads=threads,
            group=group,
            sampling=Sampling(seed=seed),
        )
        self.rows[self.system.spawn(spec)] = Row(spec)

    @rule(model=st.sampled_from(tuple(MODELS)), tokens=st.integers(1, 20), seed=st.integers(0, 5))
    def begin_chat(self, model: str, tokens: int, seed: int) -> None:
        sampling = Sampling(seed=seed)
        spec = ProcessSpec(model, ("hello",), program="chat", max_tokens=tokens, sampling=sampling)
        self.rows[self.system.spawn(spec)] = Row(spec)

    def chats(self) -> list[int]:
        return [pid for pid in self.alive() if self.rows[pid].spec.program == "chat"]

    @precondition(lambda self: self.chats())
    @rule(choice=pick, text=st.sampled_from(PROMPTS), last=st.booleans())
    def say(self, choice: int, text: str, last: bool) -> None:
        pids = self.chats()
        pid = pids[choice % len(pids)]
        try:
            self.system.say(pid, text)
        except NotPermitted:  # hung up
            return
        self.rows[pid].turns += (text,)
        if last:
            self.system.hang_up(pid)

    @precondition(some_alive)
    @rule(choice=pick, signal=st.sampled_from((Signal.KILL, Signal.TERM, Signal.INT)))
    def kill(self, choice: int, signal: Signal) -> None:
        pid = self.one(choice)
        self.system.signal(pid, signal)
        self.rows[pid].killed = (self.view(pid).output_tokens, self.sim.output(pid))
        assert self.view(pid).exit_code == 128 + signal

    @precondition(some_alive)
    @rule(choice=pick)
    def stop(self, choice: int) -> None:
        pid = self.one(choice)
        self.system.signal(pid, Signal.STOP)
        self.rows[pid].held = True

    @precondition(some_alive)
    @rule(choice=pick)
    def go_on(self, choice: int) -> None:
        pid = self.one(choice)
        self.system.signal(pid, Signal.CONT)
        self.system.swap_in(pid)
        self.rows[pid].held = False

    @precondition(some_alive)
    @rule(choice=pick)
    def swap_out(self, choice: int) -> None:
        pid = self.one(choice)
        try:
            self.system.swap_out(pid)
            self.rows[pid].held = True
        except NotPermitted:
            assert self.view(pid).exit_code is not None  # its last token was in flight

    @precondition(some_alive)
    @rule(choice=pick, nice=st.integers(-20, 19))
    def renice(self, choice: int, nice: int) -> None:
        pid = self.one(choice)
        self.system.renice(pid, nice)
        assert self.view(pid).nice == nice

    @rule(name=st.sampled_from(("fair", "fifo", "rr", "priority")))
    def set_policy(self, name: str) -> None:
        self.system.set_policy(name)

    @rule(weight=st.sampled_from((0.1, 1.0, 30.0)))
    def set_group(self, weight: float) -> None:
        self.system.set_group("team", weight)

    @precondition(some_alive)
    @rule(choice=pick)
    def fork(self, choice: int) -> None:
        pid = self.one(choice)
        try:
            twin = self.system.fork(pid)
        except NotPermitted:
            assert self.view(pid).exit_code is not None
            return
        self.rows[twin] = Row(self.rows[pid].spec, self.rows[pid].turns)

    @precondition(some_alive)
    @rule(choice=pick)
    def save(self, choice: int) -> None:
        pid = self.one(choice)
        try:
            self.system.save(pid, self.folder / f"{len(self.checkpoints)}.ckpt")
        except NotPermitted:
            assert self.view(pid).exit_code is not None
            return
        self.checkpoints.append(Row(self.rows[pid].spec, self.rows[pid].turns))

    @precondition(lambda self: self.checkpoints)
    @rule(choice=pick)
    def restore(self, choice: int) -> None:
        number = choice % len(self.checkpoints)
        pid = self.system.restore(self.folder / f"{number}.ckpt")
        self.rows[pid] = replace(self.checkpoints[number])

    @rule(model=st.sampled_from(tuple(MODELS)))
    def load(self, model: str) -> None:
        self.system.load(model)
        assert self.system.wait_load(model, 0) is not None

    @rule(model=st.sampled_from(tuple(MODELS)))
    def unload(self, model: str) -> None:
        used = [pid for pid in self.alive() if self.rows[pid].spec.model == model]
        loaded = [view for view in self.system.models() if view.name == model and view.state == "loaded"]
        if used or not loaded:
            with pytest.raises(NotPermitted):
                self.system.unload(model)
        else:
            assert self.system.unload(model) > 0

    @rule()
    def reap(self) -> None:
        for pid in [pid for pid in self.rows if self.view(pid).exit_code is not None]:
            self.check_ended(pid)
            self.system.reap(pid)
            self.reaped[pid] = self.rows.pop(pid)

    # What happens to them

    @rule(rounds=st.integers(1, 60))
    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.sim.dispatcher.advance()

    @rule(seconds=st.sampled_from((0.001, 0.5, 100.0)))
    def time_passes(self, seconds: float) -> None:
        self.sim.clock.sleep(seconds)

    @rule(model=st.sampled_from(tuple(MODELS)))
    def a_worker_dies(self, model: str) -> None:
        record = self.sim.kernel.models.get(model)
        if record is not None and isinstance(record.host, InlineHost):

            def dead(*_: object) -> None:
                raise WorkerDied("dead, as planned")

            record.host.engine.step = dead  # type: ignore[method-assign, assignment]
            self.sim.clock.sleep(100.0)  # it is not the worker's habit

    @rule(written=st.booleans())
    def llmos_is_killed(self, written: bool) -> None:
        """And goes on, with what its journal knows."""
        journal = self.sim.kernel.recovery.journal
        if written and journal is not None:
            journal.flush()
        self.system.freeze()
        self.system.shutdown()
        old = self.rows
        self.rows = {}
        self.boot()
        reaped, self.reaped = self.reaped, {}
        for orphan in self.system.orphans():
            pid = self.system.resume(orphan)
            assert orphan.pid in old or not written
            row = old.pop(orphan.pid, None) or reaped[orphan.pid]
            ended = self.view(pid).exit_code
            killed = (self.view(pid).output_tokens, self.sim.output(pid)) if ended else None
            turns = tuple(orphan.state.turns)
            assert turns == row.turns or (row.turns[: len(turns)] == turns and not written)
            self.rows[pid] = Row(row.spec, turns, killed=killed)
        assert not old
        assert not self.system.orphans()

    # What must be

    @invariant()
    def the_tables_are_in_order(self) -> None:
        self.sim.kernel.check_integrity()

    @invariant()
    def the_ledger_holds_what_it_must_and_no_more(self) -> None:
        expected = {
            name
            for name, model in self.sim.kernel.models.items()
            if model.state in (ModelState.LOADED, ModelState.LOADING)
        }
        for process in self.sim.kernel.table:
            for thread in process.threads:
                if thread.kv is not None:
                    owner = f"process {process.pid}"
                    expected.add(f"{owner}.{thread.index}" if thread.index else owner)
        claims = [claim for pool in self.system.snapshot().pools for claim in pool.claims]
        assert {claim.owner for claim in claims if claim.kind != "other"} == expected

    @invariant()
    def what_sequences_hold_together_is_known(self) -> None:
        for model in self.sim.kernel.models.values():
            if model.host is None or model.to_close or self.sim.kernel.dispatcher_of(model).flights:
                continue
            borrowed = {seat: tokens for seat, tokens in model.borrowed.items() if model.seats[seat]}
            assert borrowed == model.host.borrowed_tokens()

    @invariant()
    def who_is_killed_gets_no_token(self) -> None:
        for pid, row in self.rows.items():
            if row.killed is not None:
                assert row.killed == (self.view(pid).output_tokens, self.sim.output(pid))

    def check_ended(self, pid: int) -> None:
        row, said = self.rows[pid], self.sim.output(pid)
        if row.killed is not None:
            assert solo(row.spec, row.turns).startswith(said)
        else:
            assert self.view(pid).exit_code == 0, self.view(pid)
            assert said == solo(row.spec, row.turns)

    def teardown(self) -> None:
        """Everything goes on to its end, and leaves nothing."""
        try:
            for pid in self.alive():
                self.system.signal(pid, Signal.CONT)
                self.system.swap_in(pid)
            for pid in self.chats():
                with suppress(NotPermitted):
                    self.system.hang_up(pid)
            self.sim.kernel.pump()
            self.the_tables_are_in_order()
            self.reap()
            assert not self.rows
            for view in self.system.snapshot().models:
                if view.state == "loaded":
                    self.system.unload(view.name)
            assert not [c for pool in self.system.snapshot().pools for c in pool.claims if c.kind != "other"]
        finally:
            self.system.shutdown()
            shutil.rmtree(self.folder)


@pytest.fixture(autouse=True)
def journal_in_our_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes when `llmos_is_killed` says so: Hypothesis wants the same again from the same choices."""
    monkeypatch.setattr("kernel.journal.GROUP_COMMIT_S", 3600.0)


def play(examples: int, steps: int, *, derandomize: bool) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_system_calls_in_any_order() -> None:
    play(examples=30, steps=30, derandomize=True)


@pytest.mark.soak
def test_system_calls_in_any_order_for_long() -> None:
    play(examples=1500, steps=60, derandomize=False)
