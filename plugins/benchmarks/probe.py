"""A probe inside the worker: when each engine step began and ended, and when each seat was freed.

`ProbedDriver` opens the llama.cpp engine with a thin wrapper around it, in the same worker process. The
wrapper keeps its notes to itself and sends them as log lines when a sequence is closed, so that taking
them does not disturb what is measured. Both ends read CLOCK_MONOTONIC: their times compare.
Owner: the kill benchmark. Lock: none; notes are appended by the dispatcher's thread only.
"""

import json
import queue
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from drivers.llamacpp.driver import LlamaCppDriver
from kernel.device import (
    DeviceInfo,
    Engine,
    EngineHost,
    EngineInfo,
    EngineOptions,
    LogLine,
    ModelInfo,
    Opened,
    Progress,
    Prompt,
    Sampling,
    StepEvent,
)

_LEVEL = "probe"
_STEPS_PER_LINE = 100


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass; `tokens` are those computed of each sequence, prompt and output alike."""

    begin_s: float
    end_s: float
    tokens: dict[int, int]


@dataclass(frozen=True, slots=True)
class Freed:
    """A sequence was closed: its KV is free from then on."""

    seq: int
    at_s: float


class ProbedDriver(LlamaCppDriver):
    """The driver, with a probe in its worker. One engine at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.freed: queue.Queue[Freed] = queue.Queue()

    def open(
        self,
        model: ModelInfo,
        device: DeviceInfo,
        options: EngineOptions,
        progress: Progress,
        log: LogLine,
    ) -> EngineHost:
        from drivers.worker import WorkerHost

        def hear(level: str, text: str) -> None:
            if level == _LEVEL:
                self._note(json.loads(text))
            else:
                log(level, text)

        factory = f"{__name__}:open_engine"
        return WorkerHost.spawn(factory, model.path, options, progress, hear)

    def _note(self, body: Any) -> None:
        for begin_s, end_s, tokens in body.get("steps", ()):
            self.steps.append(Step(begin_s, end_s, {int(seq): count for seq, count in tokens.items()}))
        if "freed" in body:
            self.freed.put(Freed(*body["freed"]))


def open_engine(
    path: str, options: EngineOptions, abort_flag: Any, progress: Progress, log: LogLine
) -> Engine:
    """The factory that the worker imports."""
    from drivers.llamacpp import engine

    return _Probed(engine.open_engine(path, options, abort_flag, progress, log), log)


class _Probed:
    """Fills `kernel.device.Engine`, by another engine."""

    def __init__(self, engine: Engine, log: LogLine) -> None:
        self.info: EngineInfo = engine.info
        self._engine = engine
        self._log = log
        self._steps: list[tuple[float, float, dict[int, int]]] = []

    def step(self, quota_tokens: MutableMapping[int, int]) -> StepEvent | None:
        begin_s = time.monotonic()
        event = self._engine.step(quota_tokens)
        if event is not None:
            done = {each.seq: each.prompt_tokens + (each.token is not None) for each in event.sequences}
            self._steps.append((begin_s, time.monotonic(), done))
        return event

    def close(self, seq: int) -> None:
        self._engine.close(seq)
        freed_s = time.monotonic()
        while self._steps:
            self._log(_LEVEL, json.dumps({"steps": self._steps[:_STEPS_PER_LINE]}))
            del self._steps[:_STEPS_PER_LINE]
        self._log(_LEVEL, json.dumps({"freed": [seq, freed_s]}))

    def open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        return self._engine.open(seq, prompt, sampling)

    def queue(self, seq: int, prompt: Prompt, sampling: Sampling) -> None:
        self._engine.queue(seq, prompt, sampling)

    def feed(self, seq: int, prompt: Prompt) -> Opened:
        return self._engine.feed(seq, prompt)

    def fork(self, source: int, target: int, sampling: Sampling | None = None) -> None:
        self._engine.fork(source, target, sampling)

    def borrowed_tokens(self) -> Mapping[int, int]:
        return self._engine.borrowed_tokens()

    def dump(self, seq: int) -> bytes:
        return self._engine.dump(seq)

    def restore(self, seq: int, prompt: Prompt, sampling: Sampling, kv: bytes) -> Opened:
        return self._engine.restore(seq, prompt, sampling, kv)

    def shutdown(self) -> None:
        self._engine.shutdown()
