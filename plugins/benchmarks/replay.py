"""`bench fairness` and `bench latency`: a trace of requests through the production kernel.

Kernel, scheduler and dispatcher are those that `llmos` runs; the engine is the simulated one, and the
clock is fed by hand, so that minutes take seconds. Each request is a process; under `fairness` a client
is a group, whose weight its processes divide.
What the original system had is set: a KV pool of 10,000 tokens and 1,350 service units a second. The pool
is cut into seats as long as the longest request, as an engine reserves them without knowing how much a
request will say; service costs the same however many sequences share a step.
Not here: the traces and the measure (trace).
"""

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from drivers.sim import SimDriver
from drivers.simmodel import SimModel
from kernel.clock import ManualClock
from kernel.config import KernelConfig
from kernel.device import (
    DeviceInfo,
    Engine,
    EngineOptions,
    InlineHost,
    LogLine,
    ModelInfo,
    Opened,
    Progress,
    Prompt,
    Quantum,
    QuantumEnd,
    Sampling,
    StepEvent,
)
from kernel.errors import ModelNotFound, UsageError
from kernel.fairness import OUTPUT_UNITS, PROMPT_UNITS
from kernel.kernel import Kernel, Parts
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls
from plugins.benchmarks.trace import (
    WINDOW_S,
    Gap,
    Meter,
    Request,
    Served,
    check_writable,
    gap,
    read_trace,
    write_served,
)

POOL_TOKENS = 10_000
UNITS_PER_S = 1350.0
LOAD = 0.8
LATENCY_REQUESTS = 300
"""A prefix of a trace that takes seconds."""

Report = Callable[[int, int], None]
"""Told how many requests of how many have been answered."""


class Recorder(InlineHost):
    """An engine on the calling thread that notes when which request got what: its seed is its number."""

    def __init__(self, engine: Engine, clock: ManualClock, requests: Sequence[Request], meter: Meter) -> None:
        super().__init__(engine)
        self.clock = clock
        self.requests = requests
        self.meter = meter
        self.first_s: list[float] = [0.0] * len(requests)
        self.last_s: list[float] = [0.0] * len(requests)
        self.token_gaps_s = array("d")
        self.events = 0
        self._seats: dict[int, int] = {}

    def open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        self._seats[seq] = sampling.seed
        return super().open(seq, prompt, sampling)

    def restore(self, seq: int, prompt: Prompt, sampling: Sampling, kv: bytes) -> Opened:
        self._seats[seq] = sampling.seed
        return super().restore(seq, prompt, sampling, kv)

    def start(self, quantum: Quantum) -> None:
        self.events += len(quantum.quota_tokens)
        super().start(quantum)

    def poll(self, timeout_s: float | None = None) -> StepEvent | QuantumEnd | None:
        event = super().poll(timeout_s)
        self.events += 1
        if isinstance(event, StepEvent):
            self._note(event, self.clock.now_s())
        return event

    def _note(self, event: StepEvent, now_s: float) -> None:
        self.events += len(event.sequences)
        served: dict[str, float] = {}
        for step in event.sequences:
            number = self._seats[step.seq]
            units = step.prompt_tokens * PROMPT_UNITS
            if step.token is not None:
                units += OUTPUT_UNITS
                if self.first_s[number]:
                    self.token_gaps_s.append(now_s - self.last_s[number])
                else:
                    self.first_s[number] = now_s
                self.last_s[number] = now_s
            client = self.requests[number].client
            served[client] = served.get(client, 0.0) + units
        for client, units in served.items():
            self.meter.count(now_s, client, units)


class RecordingDriver(SimDriver):
    """Opens recorders."""

    def __init__(
        self, model: SimModel, clock: ManualClock, requests: Sequence[Request], meter: Meter
    ) -> None:
        device = DeviceInfo("sim0", "sim", "a simulated device", 1 << 50)
        super().__init__([device], sleep=clock.sleep, models={"trace.sim": model})
        self.clock, self.requests, self.meter = clock, requests, meter
        self.recorder: Recorder | None = None

    def open(
        self, model: ModelInfo, device: DeviceInfo, options: EngineOptions, progress: Progress, log: LogLine
    ) -> InlineHost:
        engine = super().open(model, device, options, progress, log).engine
        self.recorder = Recorder(engine, self.clock, self.requests, self.meter)
        return self.recorder


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str = "trace"
    path: Path = Path("trace.sim")
    description: str = "the simulated engine of a replay"


class _OneModel:
    """A catalog of the one simulated model."""

    def list(self) -> tuple[_Entry, ...]:
        return (_Entry(),)

    def resolve(self, name: str) -> _Entry:
        if name != "trace":
            raise ModelNotFound(f"no model {name}")
        return _Entry()


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay gives."""

    served: list[Served]
    ledger: Gap | None  # service as the engine computed it; None if there is one client
    token_gaps_s: "array[float]"
    shared_tokens: int  # of prompts, not computed because another seat had
    events: (
        int  # requests that arrive and end, threads' grants, steps, sequences' parts in them, quanta's ends
    )
    wall_s: float


class Replay:
    """A kernel with one simulated model, fed the arrivals of a trace."""

    def __init__(
        self,
        requests: Sequence[Request],
        engine: SimModel,
        policy: str,
        weights: Mapping[str, float] | None = None,
        window_s: tuple[float, float] = WINDOW_S,
    ) -> None:
        self.requests = requests
        self.clock = ManualClock()
        clients = weights or dict.fromkeys(sorted({r.client for r in requests}), 1.0)
        self.meter = Meter(clients, window_s)
        self.driver = RecordingDriver(engine, self.clock, requests, self.meter)
        config = KernelConfig(policy=policy)
        self.kernel = Kernel(
            Parts(self.clock, {".sim": self.driver}, _OneModel(), config=config, threaded=False)
        )
        self.system = Syscalls(self.kernel)
        self.grouped = weights is not None
        for client, weight in (weights or {}).items():
            self.system.set_group(_group(client), weight)
        self.system.load("trace")

    def run(self, report: Report | None = None) -> Replayed:
        began_s = time.perf_counter()
        dispatcher, clock, requests = self.kernel.dispatchers["sim0"], self.clock, self.requests
        pids: list[int] = []
        while True:
            while len(pids) < len(requests) and requests[len(pids)].arrival_s <= clock.now_s():
                pids.append(self._spawn(len(pids)))
                if report is not None:
                    report(len(pids), len(requests))
            if not dispatcher.advance():
                if len(pids) == len(requests):
                    break
                clock.sleep(max(0.0, requests[len(pids)].arrival_s - clock.now_s()))
        return self._result(pids, time.perf_counter() - began_s)

    def _spawn(self, number: int) -> int:
        request = self.requests[number]
        spec = ProcessSpec(
            "trace",
            (request.prompt(),),
            raw=True,
            sampling=Sampling(seed=number, ignore_eos=True),
            max_tokens=request.output_tokens,
            group=_group(request.client) if self.grouped else "",
        )
        return self.system.spawn(spec)

    def _result(self, pids: Sequence[int], wall_s: float) -> Replayed:
        recorder = self.driver.recorder
        assert recorder is not None
        shared_tokens = 0
        for number, pid in enumerate(pids):
            view = self.system.process(pid)
            shared_tokens += view.shared_tokens
            assert view.exit_code == 0, view.error
            assert view.output_tokens == self.requests[number].output_tokens, view
        served = list(map(Served, self.requests, recorder.first_s, recorder.last_s))
        ledger = self.meter.gap() if self.grouped else None
        events = recorder.events + 2 * len(pids)
        return Replayed(served, ledger, recorder.token_gaps_s, shared_tokens, events, wall_s)


def _group(client: str) -> str:
    return f"client {client}"


def overloaded_engine(requests: Sequence[Request]) -> SimModel:
    """The original system: its pool in seats for the longest request, its speed whatever the batch."""
    window_tokens = max(r.prompt_tokens + r.output_tokens for r in requests)
    return SimModel(
        mean_tokens=0,
        context_tokens=max(2, window_tokens),
        sequences=max(1, POOL_TOKENS // window_tokens),
        base_s=0.0,
        prompt_token_s=PROMPT_UNITS / UNITS_PER_S,
        decode_s=OUTPUT_UNITS / UNITS_PER_S,
    )


def loaded_engine(requests: Sequence[Request], shares_prefixes: bool = False) -> SimModel:
    """An accelerator with 32 seats, of a speed that the trace loads to 0.8 when half of them decode and
    no prompt is shared."""
    seats = 32
    prompts = sum(r.prompt_tokens for r in requests)
    outputs = sum(r.output_tokens for r in requests)
    base_s, decode_s, prompt_token_s = 0.010, 0.0002, 0.00005
    work_s = prompts * prompt_token_s + outputs * (base_s / (seats / 2) + decode_s)
    factor = LOAD * max(1e-9, requests[-1].arrival_s - requests[0].arrival_s) / work_s
    return SimModel(
        mean_tokens=0,
        context_tokens=max(2, *(r.prompt_tokens + r.output_tokens for r in requests)),
        sequences=seats,
        base_s=base_s * factor,
        decode_s=decode_s * factor,
        prompt_token_s=prompt_token_s * factor,
        shares_prefixes=shares_prefixes,
    )


def latency(
    trace: Path,
    policies: Sequence[str] = ("fair", "fifo", "rr"),
    limit: int = LATENCY_REQUESTS,
    shares_prefixes: bool = False,
    report: Report | None = None,
) -> dict[str, dict[str, float]]:
    """Time to first token, and between tokens, by policy, in simulated seconds. Raises as `fairness`."""
    requests = read_trace(trace, limit)
    if shares_prefixes and not any(request.blocks for request in requests):
        raise UsageError(f"{trace} does not say what prompts have in common", "Mooncake's traces do")
    if requests[0].arrival_s == requests[-1].arrival_s:
        raise UsageError(f"{trace}: all {len(requests)} requests arrive at once: no engine has that load")
    engine, table = loaded_engine(requests, shares_prefixes), {}
    prompt_tokens = sum(request.prompt_tokens for request in requests)
    for policy in policies:
        done = Replay(requests, engine, policy).run(report)
        ttft_s = sorted(each.first_token_s - each.request.arrival_s for each in done.served)
        gaps_s = sorted(done.token_gaps_s)
        table[policy] = {
            "ttft_p50_s": percentile(ttft_s, 0.50),
            "ttft_p99_s": percentile(ttft_s, 0.99),
            "itl_p50_s": percentile(gaps_s, 0.50),
            "itl_p99_s": percentile(gaps_s, 0.99),
            "shared": done.shared_tokens / prompt_tokens,
            "finished_s": max(each.finish_s for each in done.served),
            "events_per_s": done.events / done.wall_s,
        }
    return table


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Nearest rank; 0 of nothing."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else 0.0


def fairness(
    trace: Path,
    weights: Sequence[float] = (),
    policy: str = "fair",
    served: Path | None = None,
    limit: int = 0,
    report: Report | None = None,
) -> dict[str, float]:
    """How evenly clients of a trace are served. Raises UsageError, LlmosError."""
    requests = read_trace(trace, limit)
    clients = sorted({request.client for request in requests})
    if weights and len(weights) != len(clients):
        raise UsageError(f"{len(weights)} weights for {len(clients)} clients")
    by_client = dict(zip(clients, weights or [1.0] * len(clients), strict=True))
    if served is not None:
        if served.exists() and served.samefile(trace):
            raise UsageError(f"--served {served} would replace the trace", "name another file")
        check_writable(served)
    done = Replay(requests, overloaded_engine(requests), policy, by_client).run(report)
    if served is not None:
        write_served(served, done.served)
    seen, ledger = gap(done.served, by_client), done.ledger
    assert ledger is not None
    return asdict(seen) | {"ledger_gap": ledger.max_gap, "events_per_s": done.events / done.wall_s}
