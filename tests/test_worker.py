"""An engine in a child process: the same events as on a thread, and no way to take the parent down."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from drivers.brake import Brake
from drivers.sim import SimEngine
from drivers.simmodel import read_model
from drivers.wire import Frame, Kind
from drivers.worker import WorkerHost
from drivers.worker_main import HOLD_S, Worker
from kernel.device import (
    EngineHost,
    EngineOptions,
    InlineHost,
    LogLine,
    Prompt,
    Quantum,
    QuantumEnd,
    Sampling,
    SequenceStep,
    StepEvent,
)
from kernel.errors import CheckpointInvalid, ContextFull, Interrupted, KernelFault, ModelInvalid, WorkerDied

SIM = "drivers.sim:open_engine"
FAST = {"base_s": 0.0002, "decode_s": 0.0, "prompt_token_s": 0.0, "mean_tokens": 40}
SLOW = {"base_s": 0.01, "mean_tokens": 0}
PATIENCE_S = 20.0

Spawn = Callable[..., WorkerHost]
logged: list[tuple[str, str]] = []


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Starts workers on a sim model of these fields; ends them after the test."""
    hosts: list[WorkerHost] = []

    def start(
        factory: str = SIM,
        *,
        deadline_s: float = PATIENCE_S,
        log: LogLine = lambda level, line: logged.append((level, line)),
        **fields: object,
    ) -> WorkerHost:
        path = tmp_path / "nano.sim"
        path.write_text(json.dumps(fields))
        host = WorkerHost.spawn(
            factory, path, EngineOptions(), lambda fraction: True, log, deadline_s=deadline_s
        )
        hosts.append(host)
        return host

    logged.clear()
    yield start
    for host in hosts:
        host.shutdown()
        assert not psutil.pid_exists(host.pid)


def prompt(words: int = 3, **fields: int) -> Prompt:
    return Prompt(text="word " * words, **fields)


def events_until_end(host: EngineHost, quantum: int) -> list[StepEvent | QuantumEnd]:
    events: list[StepEvent | QuantumEnd] = []
    while True:
        event = host.poll(PATIENCE_S)
        assert event is not None
        events.append(event)
        assert len(events) < 100_000
        if isinstance(event, QuantumEnd) and event.quantum == quantum:
            return events


def wait_for_death(host: WorkerHost) -> WorkerDied:
    with pytest.raises(WorkerDied) as caught:
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            host.poll(0.05)
    return caught.value


def script(host: EngineHost) -> list[object]:
    """Something of everything, between and after quanta. Returns all that the host said."""
    said: list[object] = [host.info]
    said += [host.open(seq, prompt(seq * 100 + 1), Sampling(seed=seq)) for seq in range(4)]
    host.start(Quantum(1, {0: 5, 1: 300, 2: 40, 3: 9}))
    host.start(Quantum(2, {0: 50, 1: 50, 3: 50, 9: 50}))
    said += events_until_end(host, 2)
    kv = host.dump(1)
    host.fork(1, 5)
    host.close(0)
    said += [kv, host.borrowed_tokens(), host.feed(3, Prompt(messages=(("user", "and then"),), max_tokens=4))]
    host.start(Quantum(3, {1: 10, 3: 10, 5: 10}))
    said += events_until_end(host, 3)
    return said


def test_worker_says_what_an_inline_host_says(spawn: Spawn, tmp_path: Path) -> None:
    worker = spawn(**FAST)
    engine = SimEngine(read_model(tmp_path / "nano.sim"), EngineOptions(), lambda seconds: None)
    assert script(worker) == script(InlineHost(engine))


def test_restored_sequence_goes_on_as_if_nothing_had_been(spawn: Spawn) -> None:
    host = spawn(**{**FAST, "mean_tokens": 0})
    tokens = list(host.open(0, prompt(), Sampling(seed=7)).tokens)
    host.start(Quantum(1, {0: 20}))
    tokens += tokens_of(events_until_end(host, 1), 0)
    opened = host.restore(1, Prompt(tokens=tuple(tokens), prompt_tokens=3), Sampling(seed=7), host.dump(0))
    assert opened.shared_tokens == len(tokens) - 1
    host.start(Quantum(2, {0: 20, 1: 20}))
    events = events_until_end(host, 2)
    assert tokens_of(events, 0) == tokens_of(events, 1) != []


def tokens_of(events: list[StepEvent | QuantumEnd], seq: int) -> list[int]:
    steps = [step for event in events if isinstance(event, StepEvent) for step in event.sequences]
    return [step.token for step in steps if step.seq == seq and step.token is not None]


def test_commands_act_in_the_middle_of_a_quantum(spawn: Spawn) -> None:
    host = spawn(**SLOW)
    host.open(0, prompt(), Sampling())
    host.start(Quantum(1, {0: 2000, 1: 3}))
    assert isinstance(host.poll(PATIENCE_S), StepEvent)
    host.open(1, prompt(1), Sampling())  # the quantum already has a quota for its seat
    events: list[StepEvent | QuantumEnd] = []
    while not tokens_of(events, 1):
        event = host.poll(PATIENCE_S)
        assert isinstance(event, StepEvent)
        events.append(event)
    host.close(0)
    rest = events_until_end(host, 1)
    assert not tokens_of(rest, 0)
    assert tokens_of(events, 0)


def test_no_event_speaks_of_a_closed_sequence(spawn: Spawn) -> None:
    host = spawn(**{**FAST, "mean_tokens": 0})
    for seq in (0, 1):
        host.open(seq, prompt(), Sampling())
    host.start(Quantum(1, {0: 2000, 1: 2000}))
    time.sleep(0.02)  # events wait in the socket
    host.close(0)
    host.interrupt(1)
    events = events_until_end(host, 1)
    assert tokens_of(events, 1)
    assert not tokens_of(events, 0)


def test_no_event_speaks_of_the_sequence_that_had_the_seat_before(spawn: Spawn) -> None:
    host = spawn(**{**FAST, "mean_tokens": 0})
    host.open(0, prompt(), Sampling(seed=1))
    host.open(1, prompt(), Sampling(seed=1))
    host.start(Quantum(1, {0: 2000, 1: 2000}))
    time.sleep(0.02)  # events wait in the socket
    host.dump(1)  # and now in the queue
    host.close(0)
    fresh = host.open(0, Prompt(text="quite another"), Sampling(seed=2))
    host.interrupt(1)
    drawn = tokens_of(events_until_end(host, 1), 0)
    host.open(2, Prompt(text="quite another"), Sampling(seed=2))
    host.start(Quantum(2, {2: len(drawn) + 1}))
    assert len(fresh.tokens) == 2
    assert drawn == tokens_of(events_until_end(host, 2), 2)[: len(drawn)]


CHATTY_ENGINE = """
import time
from drivers.brake import Brake
from drivers.sim import SimEngine
from drivers.simmodel import SimModel

class Chatty(SimEngine):
    def open(self, seq, prompt, sampling):
        self.log("info", "opening")
        return super().open(seq, prompt, sampling)

def open_engine(path, options, abort_flag, progress, log):
    engine = Chatty(SimModel(base_s=0.0002, decode_s=0.0, mean_tokens=0), options, time.sleep)
    engine.log = log
    return engine
"""


def test_first_events_of_a_new_sequence_are_kept(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chatty_engine.py").write_text(CHATTY_ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    host = spawn("chatty_engine:open_engine", log=lambda level, line: time.sleep(0.1))
    host.open(0, prompt(1), Sampling(seed=1))
    host.start(Quantum(1, {0: 3000, 1: 500}))
    host.open(1, prompt(1), Sampling(seed=1))  # the parent sleeps: answer and steps come in one read
    events = events_until_end(host, 1)
    assert len(tokens_of(events, 1)) == 500


def test_interrupt_ends_every_quantum_up_to_its_id(spawn: Spawn) -> None:
    host = spawn(**SLOW)
    host.open(0, prompt(), Sampling())
    host.start(Quantum(1, {0: 1000}))
    host.start(Quantum(2, {0: 1000}))
    assert isinstance(host.poll(PATIENCE_S), StepEvent)
    threading.Thread(target=host.interrupt, args=(2,)).start()
    ends = [event for event in events_until_end(host, 2) if isinstance(event, QuantumEnd)]
    assert ends == [QuantumEnd(1, interrupted=True), QuantumEnd(2, interrupted=True)]
    host.start(Quantum(3, {0: 2}))
    assert len(events_until_end(host, 3)) == 3
    assert host.poll() is None


def test_hard_interrupt_ends_a_step_that_would_take_minutes(spawn: Spawn) -> None:
    host = spawn(base_s=300.0)
    host.open(0, prompt(), Sampling())
    host.start(Quantum(1, {0: 100}))
    assert host.poll(0.05) is None
    host.interrupt(1, hard=True)
    *_, end = events_until_end(host, 1)
    assert end == QuantumEnd(1, interrupted=True)


def test_late_hard_interrupt_costs_the_next_quantum_nothing(spawn: Spawn) -> None:
    host = spawn(**{**FAST, "mean_tokens": 0})
    host.open(0, prompt(1), Sampling())
    host.start(Quantum(1, {0: 5}))
    events_until_end(host, 1)
    host.interrupt(1, hard=True)
    host.start(Quantum(2, {0: 5}))
    assert len(tokens_of(events_until_end(host, 2), 0)) == 5


def test_steps_arrive_while_the_quantum_runs(spawn: Spawn) -> None:
    host = spawn(**SLOW, faults={"hang_at_step": 6})
    host.open(0, prompt(), Sampling())
    host.start(Quantum(1, {0: 100_000}))
    assert [type(host.poll(PATIENCE_S)) for _ in range(5)] == [StepEvent] * 5
    assert host.poll(0.0) is None
    assert host.poll(0.01) is None


def test_kill_from_outside_is_noticed_and_told(spawn: Spawn) -> None:
    host = spawn(**SLOW)
    host.open(0, prompt(), Sampling())
    host.start(Quantum(1, {0: 100_000}))
    os.kill(host.pid, signal.SIGKILL)
    assert wait_for_death(host).message == "worker of nano died: signal 9 (KILL)"
    assert not psutil.pid_exists(host.pid)
    for call in (
        host.poll,
        lambda: host.start(Quantum(2, {0: 1})),
        lambda: host.dump(0),
        lambda: host.close(0),
        lambda: host.open(0, prompt(), Sampling()),
    ):
        with pytest.raises(WorkerDied):
            call()
    host.interrupt(2)  # says nothing, breaks nothing
    host.shutdown()


def test_death_in_a_step_and_while_idle(spawn: Spawn) -> None:
    host = spawn(**FAST, faults={"die_at_step": 3})
    host.open(0, prompt(), Sampling())
    host.start(Quantum(1, {0: 100}))
    assert "signal 9" in wait_for_death(host).message
    idle = spawn(**FAST)
    os.kill(idle.pid, signal.SIGTERM)
    assert wait_for_death(idle).message == "worker of nano died: signal 15 (TERM)"


@pytest.mark.parametrize("during", ["quantum", "command"])
def test_hanging_worker_is_killed_at_its_deadline(spawn: Spawn, during: str) -> None:
    host = spawn(**FAST, deadline_s=1.5, faults={"hang_at_step": 2})
    host.open(0, prompt(), Sampling())
    host.start(Quantum(1, {0: 100}))
    with pytest.raises(WorkerDied, match="worker of nano hangs"):
        if during == "command":
            assert isinstance(host.poll(PATIENCE_S), StepEvent)
            time.sleep(0.05)
            host.dump(0)
        while True:
            host.poll()
    assert not psutil.pid_exists(host.pid)


def test_a_log_that_cannot_be_written_is_not_a_dead_worker() -> None:
    def log(_level: str, _line: str) -> None:
        raise BrokenPipeError("the terminal is gone")

    host = WorkerHost("m", log, 60.0, {})
    try:
        host._reader = cast(Any, SimpleNamespace(receive=lambda _: [Frame(Kind.LOG, ["warn", "x"])]))
        with pytest.raises(BrokenPipeError):
            host._read()
    finally:
        host.shutdown()


def test_idle_worker_is_not_taken_for_hanging(spawn: Spawn) -> None:
    host = spawn(**FAST, deadline_s=1.0)
    host.open(0, prompt(), Sampling())
    time.sleep(1.2)
    assert host.poll(0.1) is None
    host.start(Quantum(1, {0: 2}))
    assert isinstance(events_until_end(host, 1)[-1], QuantumEnd)


STRANGE_ENGINES = """
import os, sys, time
from drivers.brake import Brake
from drivers.sim import SimEngine
from drivers.simmodel import SimModel

class Strange(SimEngine):
    def feed(self, seq, prompt):
        os.write(int(sys.argv[1]), b"GET / HTTP/1.1 and so on")
        return super().feed(seq, prompt)
    def dump(self, seq):
        print("last", "words", flush=True)
        os.abort()
    def fork(self, source, target, sampling=None):
        raise ZeroDivisionError("by\\nzero")
    def borrowed_tokens(self):
        return {0: "all"}
    def step(self, quota):
        raise RuntimeError("decode said -3")

def open_engine(path, options, abort_flag, progress, log):
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and sys.stdin.read() == ""
    assert len(abort_flag) == 2 and bytes(abort_flag) == b"\\0\\0"
    log("warn", "a strange engine")
    return Strange(SimModel(), options, time.sleep)
"""


@pytest.fixture
def strange(spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerHost:
    (tmp_path / "strange_engines.py").write_text(STRANGE_ENGINES)
    monkeypatch.syspath_prepend(tmp_path)
    host = spawn("strange_engines:open_engine")
    host.open(0, prompt(), Sampling())
    return host


def test_nonsense_on_the_wire_ends_the_worker(strange: WorkerHost) -> None:
    with pytest.raises(WorkerDied, match="worker of nano talks nonsense"):
        strange.feed(0, prompt())
    assert not psutil.pid_exists(strange.pid)


def test_nonsense_in_an_answer_ends_it_too(strange: WorkerHost) -> None:
    with pytest.raises(WorkerDied, match="worker of nano talks nonsense"):
        strange.borrowed_tokens()


def test_last_words_go_to_the_log(strange: WorkerHost) -> None:
    with pytest.raises(WorkerDied, match=r"^worker of nano died: signal 6 \(ABRT\)$"):
        strange.dump(0)
    assert ("warn", "a strange engine") in logged
    assert ("error", "last words") in logged


def test_broken_step_ends_the_worker_and_says_why(strange: WorkerHost) -> None:
    strange.start(Quantum(1, {0: 1}))
    assert wait_for_death(strange).message == "worker of nano died: RuntimeError: decode said -3"
    assert any("Traceback" in line for _, line in logged)


def test_broken_command_is_one_line_and_the_worker_lives(strange: WorkerHost) -> None:
    for _ in range(2):
        with pytest.raises(KernelFault, match=r"^ZeroDivisionError: by zero$"):
            strange.fork(0, 1)


def test_engine_errors_arrive_as_they_were_raised(spawn: Spawn) -> None:
    host = spawn(**FAST, context_tokens=8, faults={"fail_dump_at": 1, "fail_with": "MemoryError"})
    with pytest.raises(ContextFull, match="8 tokens leave no room in a window of 8"):
        host.open(0, prompt(8), Sampling())
    host.open(0, prompt(2), Sampling())
    with pytest.raises(CheckpointInvalid, match="damaged"):
        host.restore(1, prompt(), Sampling(), b"not a KV state")
    with pytest.raises(KernelFault, match="MemoryError: dump 1 fails"):
        host.dump(0)
    assert host.dump(0)


def test_big_states_cross_while_a_quantum_runs(spawn: Spawn) -> None:
    host = spawn(**FAST, kv_bytes_per_token=16384, chunk_tokens=4096)
    tokens = tuple(range(2, 2002))
    host.open(0, Prompt(tokens=tokens, prompt_tokens=2000), Sampling(ignore_eos=True))
    host.open(1, prompt(), Sampling(ignore_eos=True))
    host.start(Quantum(1, {0: 2000}))
    events_until_end(host, 1)
    host.start(Quantum(2, {1: 4000}))  # enough events to fill the socket both ways
    kv = host.dump(0)
    assert len(kv) > 2000 * 16384
    for seq in (2, 3):
        assert host.restore(seq, Prompt(tokens=tokens, prompt_tokens=2000), Sampling(), kv).shared_tokens
    host.interrupt(2)
    assert tokens_of(events_until_end(host, 2), 1)


def test_load_reports_progress_and_can_be_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "nano.sim"
    path.write_text('{"load_s": 600.0}')
    before = set(psutil.Process().children())
    with pytest.raises(Interrupted, match="load of nano cancelled"):
        WorkerHost.spawn(SIM, path, EngineOptions(), lambda fraction: False, lambda level, line: None)
    path.write_text('{"load_s": 0.2}')
    told: list[float] = []
    host = WorkerHost.spawn(
        SIM, path, EngineOptions(), lambda f: told.append(f) is None, lambda level, line: None
    )
    host.shutdown()
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert set(psutil.Process().children()) == before


def test_refused_loads_raise_what_the_factory_raised(spawn: Spawn) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(ModelInvalid, match="the load is refused"):
        spawn(faults={"refuse_load": "ModelInvalid"})
    with pytest.raises(ModelInvalid, match="not a sim model"):
        spawn(colour="red")
    with pytest.raises(KernelFault, match="No module named 'nowhere'"):
        spawn("nowhere:open_engine")
    assert set(psutil.Process().children()) == before


def test_shutdown_ends_a_long_step_and_leaks_no_descriptor(spawn: Spawn) -> None:
    descriptors = psutil.Process().num_fds()
    host = spawn(**SLOW, faults={"slow_at_step": 1, "slow_s": 300.0})
    host.open(0, prompt(), Sampling())
    host.start(Quantum(1, {0: 5}))
    host.shutdown()
    host.shutdown()
    assert not psutil.pid_exists(host.pid)
    assert psutil.Process().num_fds() <= descriptors + 1  # the brake's page lives while the host does
    with pytest.raises(WorkerDied, match="was shut down"):
        host.poll()


PARENT = """
import sys, time
from pathlib import Path
from drivers.wire import Frame, Kind
from drivers.worker import WorkerHost
from drivers.worker_main import HOLD_S, Worker
from kernel.device import EngineOptions, Prompt, Quantum, Sampling
host = WorkerHost.spawn("drivers.sim:open_engine", Path(sys.argv[1]), EngineOptions(), lambda f: True, print)
host.open(0, Prompt(text="word"), Sampling())
host.start(Quantum(1, {0: 10}))
print("child", host.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["running", "hanging"])
def test_no_orphan_survives_the_parent(tmp_path: Path, state: str) -> None:
    path = tmp_path / "nano.sim"
    path.write_text(json.dumps({**SLOW, "faults": {"hang_at_step": 2 if state == "hanging" else 0}}))
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    pid = int(next(line for line in parent.stdout if line.startswith(b"child")).split()[1])
    child = psutil.Process(pid)
    assert os.getsid(pid) != os.getsid(parent.pid)  # ^C and ^Z of the terminal do not reach it
    time.sleep(0.1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(PATIENCE_S)
    assert not child.is_running()


class Script:
    """An engine of given steps, and the channel of a worker that runs it in one quantum."""

    def __init__(self, steps: list[StepEvent]) -> None:
        self.reports: list[tuple[list[tuple[int, StepEvent]], object]] = []
        self._steps = iter(steps)
        self._left = len(steps)
        self._commands = [[Frame(Kind.START, [7, [0], [self._left]])]]

    def step(self, quota_tokens: MutableMapping[int, int]) -> StepEvent | None:
        quota_tokens[0] -= 1
        return next(self._steps, None)

    def dump(self, _seq: int) -> bytes:
        self.sent_before_dump = len(self.reports)
        return b""

    def borrowed_tokens(self) -> dict[int, int]:
        return {}

    def receive(self, *, wait: bool) -> list[Frame]:
        if wait and not self._commands:
            raise EOFError
        return self._commands.pop() if self._commands else []

    def send(self, report: object) -> None:
        if isinstance(report, tuple):
            self.reports.append(report)


def test_held_steps_leave_before_a_command_that_may_take_long() -> None:
    script, brake = Script([drawn(0.0)] * 3), Brake.create()
    worker = Worker(cast(Any, script), cast(Any, script), brake)
    worker._advance(7, {0: 3})
    worker._obey(Frame(Kind.DUMP, [0]))
    os.close(brake.fd)
    assert script.sent_before_dump == 1


def reported(steps: list[StepEvent]) -> list[int]:
    """How many steps each frame has of a worker whose engine takes these; all come, in order, then an end."""
    script, brake = Script(steps), Brake.create()
    with contextlib.suppress(EOFError):
        Worker(cast(Any, script), cast(Any, script), brake).run()
    os.close(brake.fd)
    assert [step for held, _ in script.reports for step in held] == [(7, step) for step in steps]
    assert [end for _, end in script.reports] == [None] * (len(script.reports) - 1) + [[7, False, [[], []]]]
    return [len(held) for held, _ in script.reports]


def drawn(step_s: float, **fields: Any) -> StepEvent:
    return StepEvent(0, step_s, (SequenceStep(0, 0, 5, "x")._replace(**fields),))


def test_quick_steps_share_frames() -> None:
    assert len(reported([drawn(0.0)] * 200)) < 50


def test_slow_steps_do_not_wait_for_each_other() -> None:
    assert reported([drawn(HOLD_S)] * 4) == [1, 1, 1, 1]


def test_a_quick_step_after_a_slow_one_does_not_wait_for_the_next_slow_one() -> None:
    assert reported([drawn(HOLD_S), drawn(0.0)] * 3) == [1] * 6


@pytest.mark.parametrize("news", [{"prompt_tokens": 3}, {"finish": "stop"}, {"token": None, "stuck": True}])
def test_what_somebody_waits_for_leaves_at_once(news: dict[str, Any]) -> None:
    frames = reported([drawn(0.0), drawn(0.0, **news), drawn(0.0), drawn(0.0)])
    assert 2 in itertools.accumulate(frames)  # nothing after the news was waited for
