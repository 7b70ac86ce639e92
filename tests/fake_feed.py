"""A system for the monitor's tests: frozen views that a test moves by hand, and a record of the calls."""

from dataclasses import replace
from pathlib import Path

from kernel.device import DeviceInfo
from kernel.errors import NotPermitted, ProcessNotFound
from kernel.snapshot import ClaimView, DeviceView, OutputView, PoolView, ProcessView, SystemView
from kernel.syscall import Signal

GIB = 1 << 30
START_S = 1_800_000_000.0


def process(pid: int, state: str = "RUNNING", **fields: object) -> ProcessView:
    """A process that looks like one in the middle of its work."""
    view = ProcessView(
        pid=pid,
        ppid=1,
        nice=0,
        state=state,
        program="generate",
        model="qwen3-8b",
        device="gpu0",
        threads=1,
        prompt_tokens=120,
        output_tokens=512,
        shared_tokens=0,
        tokens_per_s=40.0,
        context_tokens=2048,
        context_limit_tokens=8192,
        kv_bytes=128 << 20,
        device_s=3.5,
        started_s=START_S - 100,
        elapsed_s=100.0,
        first_token_s=0.2,
        items_done=0,
        items_total=1,
        share_due=100.0,
        share_received=100.0,
        waits_for="",
        exit_code=None,
        error="",
        hint="",
        command=f"run qwen3-8b job {pid}",
    )
    return replace(view, **fields)  # type: ignore[arg-type]


def device(name: str = "gpu0", **fields: object) -> DeviceView:
    info = DeviceInfo(name, "sim", "RTX 4090", 24 * GIB)
    view = DeviceView(info, 0.93, 114.0, 2100.0, running=3, runnable=1, batch=3.0)
    return replace(view, **fields)  # type: ignore[arg-type]


GPU_POOL = PoolView(
    "gpu0",
    24 * GIB,
    12 * GIB,
    11 * GIB,
    (
        ClaimView("qwen3-8b", "weights", 5 * GIB),
        ClaimView("qwen3-8b", "kv", 2 * GIB),
        ClaimView("qwen3-8b", "compute", GIB // 4),
        ClaimView("21", "training", 3 * GIB),
        ClaimView("other programs", "other", 7 * GIB // 4),
    ),
)
RAM_POOL = PoolView("ram", 64 * GIB, 14 * GIB, 48 * GIB, (ClaimView("bge-small", "weights", 14 * GIB),))

PROCESSES = (
    process(14, program="chat", nice=-5, tokens_per_s=48.2, context_tokens=4669, kv_bytes=612 << 20),
    process(15, tokens_per_s=44.9, items_done=12, items_total=100),
    process(16, nice=10, tokens_per_s=21.3, elapsed_s=4364.0),
    process(21, program="train", nice=5, tokens_per_s=9100.0, model="smollm2-135m+lora"),
    process(22, "RUNNABLE", program="embed", model="bge-small-en", device="cpu", tokens_per_s=0.0),
    process(23, "STOPPED", tokens_per_s=0.0, device=""),
    process(19, "ZOMBIE", tokens_per_s=0.0, kv_bytes=0, exit_code=137, error="out of memory", hint="why 19"),
    process(25, "NEW", tokens_per_s=0.0, waits_for="2.1 GiB on gpu0", context_limit_tokens=0),
)


def system_view(processes: tuple[ProcessView, ...] = PROCESSES) -> SystemView:
    return SystemView(
        time_s=START_S,
        uptime_s=4364.0,
        policy="fair",
        processes=processes,
        models=(),
        devices=(device(),),
        pools=(GPU_POOL, RAM_POOL),
    )


def many(count: int, tick: int = 0) -> SystemView:
    """`count` processes whose every rate and time changes with the tick."""
    rows = (process(pid, tokens_per_s=10.0 + (pid + tick) % 7, elapsed_s=tick) for pid in range(2, count + 2))
    return replace(system_view(tuple(rows)), time_s=START_S + tick)


class FakeSystem:
    """The part of the system call table that the monitor uses."""

    def __init__(self, view: SystemView | None = None) -> None:
        self.view = view or system_view()
        self.output: dict[int, str] = {}
        self.signals: list[tuple[int, Signal]] = []
        self.nices: list[tuple[int, int]] = []

    def snapshot(self) -> SystemView:
        return self.view

    def process(self, pid: int) -> ProcessView:
        for view in self.view.processes:
            if view.pid == pid:
                return view
        raise ProcessNotFound(f"no process {pid}")

    def signal(self, pid: int, signal: Signal) -> None:
        if self.process(pid).exit_code is not None:
            raise NotPermitted(f"process {pid} has ended")
        self.signals.append((pid, signal))
        states = {Signal.STOP: "STOPPED", Signal.CONT: "RUNNING"}
        if signal in states:
            self.change(pid, state=states[signal])

    def renice(self, pid: int, nice: int) -> int:
        old = self.process(pid).nice
        self.nices.append((pid, nice))
        self.change(pid, nice=nice)
        return old

    def read(self, pid: int, offset: int, timeout_s: float | None = 0.0) -> OutputView:
        assert timeout_s == 0.0, "the monitor must never wait"
        ended = self.process(pid).exit_code is not None
        text = self.output.get(pid, "")
        return OutputView(text[offset:], len(text), ended)

    # For tests

    def change(self, pid: int, **fields: object) -> None:
        rows = (replace(p, **fields) if p.pid == pid else p for p in self.view.processes)  # type: ignore[arg-type]
        self.view = replace(self.view, processes=tuple(rows))

    def remove(self, *pids: int) -> None:
        rows = tuple(p for p in self.view.processes if p.pid not in pids)
        self.view = replace(self.view, processes=rows)


GOLDEN = Path(__file__).parent / "golden"
