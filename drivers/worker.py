"""An engine in a supervised child process, seen as an `EngineHost`.

Owner of the child and of its end of the socket: the dispatcher's thread that spawned it.
Not here: what runs inside the child (worker_main), how it is started and ended (child).
"""

import math
import select
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from drivers import wire
from drivers.child import Child
from drivers.wire import Frame, Kind
from kernel.device import (
    EngineInfo,
    EngineOptions,
    LogLine,
    Opened,
    Progress,
    Prompt,
    Quantum,
    QuantumEnd,
    Sampling,
    StepEvent,
)
from kernel.errors import Interrupted, UsageError, WorkerDied

DEADLINE_S = 60.0  # without a word from a worker that has work, it hangs
EXIT_S = 2.0  # from hanging up to the exit status
LOAD_TICK_S = 0.1  # how often a load that says nothing may be cancelled
ALL_QUANTA = 2**63 - 1


class WorkerHost:
    """An engine behind a queue of quanta, in a process of its own.

    Owner: one thread (the dispatcher); any thread may call `interrupt`.
    Lock: none but the brake's, held for two stores.
    Order: events come as they happened. After `close` returns, and after a seat is taken by `open`,
    `restore` or `fork`, no event speaks of the sequence that was there before. Steps that a `dump`
    includes are in the queue when it returns.
    """

    info: EngineInfo

    def __init__(self, name: str, log: LogLine, deadline_s: float, environment: Mapping[str, str]) -> None:
        self._name = name
        self._log = log
        self._deadline_s = deadline_s
        self._gone = ""  # why, once the child is
        self._last_words = ""  # what the child said broke it
        self._heard_s = 0.0  # when the child last spoke, or got work
        self._events: deque[StepEvent | QuantumEnd] = deque()
        self._queued = 0  # quanta started and not ended
        self._closing: deque[int] = deque()  # seats whose CLOSED is on its way
        self._asked = 0
        self._answered = 0
        self._answer = Frame(Kind.READY)  # the last one
        self._vacates: int | None = None  # the seat that the command under way is to vacate
        self._fraction = 0.0  # of the load
        self._reader = wire.FrameReader()
        self._child = Child(name, environment)
        self._poller = select.poll()
        self._poller.register(self._child.sock, select.POLLIN)

    @classmethod
    def spawn(
        cls,
        factory: str,
        path: Path,
        options: EngineOptions,
        progress: Progress,
        log: LogLine,
        *,
        deadline_s: float = DEADLINE_S,
        environment: Mapping[str, str] | None = None,
    ) -> "WorkerHost":
        """Start a child and load a model in it, with the engine factory "module:function".

        `environment` is added to ours.

        Raises what the factory raises, Interrupted (progress said False), WorkerDied.
        """
        host = cls(path.stem, log, deadline_s, environment or {})
        try:
            host._load(factory, path, options, progress)
        except BaseException:
            host._abandon()
            raise
        return host

    @property
    def pid(self) -> int:
        return self._child.pid

    # -- quanta ---------------------------------------------------------------------------------

    def start(self, quantum: Quantum) -> None:
        if not self._queued:
            self._heard_s = time.monotonic()
        quota = quantum.quota_tokens
        self._send(Frame(Kind.START, [quantum.id, list(quota), list(quota.values())]))
        self._queued += 1

    def poll(self, timeout_s: float | None = None) -> StepEvent | QuantumEnd | None:
        if self._gone:
            raise WorkerDied(self._gone)
        end_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._events:
            wait_s = max(0.0, end_s - time.monotonic()) if self._queued else 0.0
            if not self._receive(wait_s) and not wait_s:
                return None
        return self._events.popleft()

    def interrupt(self, quantum: int, *, hard: bool = False) -> None:
        self._child.brake.stop(quantum, hard=hard)

    # -- commands -------------------------------------------------------------------------------

    def open(self, seq: int, prompt: Prompt, sampling: Sampling) -> Opened:
        header = [seq, wire.encode_prompt(prompt), wire.encode_sampling(sampling)]
        return self._opened(self._call(Frame(Kind.OPEN, header), vacates=seq))

    def queue(self, seq: int, prompt: Prompt, sampling: Sampling) -> None:
        if not 0 <= seq < self.info.sequences:  # nobody answers, so what could be refused is refused here
            raise UsageError(f"sequence {seq}; this engine has 0 to {self.info.sequences - 1}")
        header = [seq, wire.encode_prompt(prompt), wire.encode_sampling(sampling)]
        self._send(Frame(Kind.QUEUE, header))

    def feed(self, seq: int, prompt: Prompt) -> Opened:
        return self._opened(self._call(Frame(Kind.FEED, [seq, wire.encode_prompt(prompt)])))

    def fork(self, source: int, target: int, sampling: Sampling | None = None) -> None:
        drawn = None if sampling is None else wire.encode_sampling(sampling)
        self._call(Frame(Kind.FORK, [source, target, drawn]), vacates=target)

    def borrowed_tokens(self) -> dict[int, int]:
        answer = self._call(Frame(Kind.BORROWED))
        with self._making_sense():
            return wire.decode_borrowed(answer.header)

    def dump(self, seq: int) -> bytes:
        return self._call(Frame(Kind.DUMP, [seq])).blob

    def restore(self, seq: int, prompt: Prompt, sampling: Sampling, kv: bytes) -> Opened:
        header = [seq, wire.encode_prompt(prompt), wire.encode_sampling(sampling)]
        return self._opened(self._call(Frame(Kind.RESTORE, header, kv), vacates=seq))

    def close(self, seq: int) -> None:
        self._send(Frame(Kind.CLOSE, seq))
        self._forget(seq)
        self._closing.append(seq)

    def shutdown(self) -> None:
        """End the child: politely, then not. Doing it twice does nothing."""
        if not self._gone:
            self._gone = f"worker of {self._name} was shut down"
            self._child.brake.stop(ALL_QUANTA, hard=True)
            self._child.end()

    # -- the load -------------------------------------------------------------------------------

    def _load(self, factory: str, path: Path, options: EngineOptions, progress: Progress) -> None:
        self._ask(Frame(Kind.LOAD, [factory, str(path), wire.encode_options(options)]))
        while self._answered < self._asked:
            self._receive(LOAD_TICK_S)
            if not progress(self._fraction):
                raise Interrupted(f"load of {self._name} cancelled")
        with self._making_sense():
            self.info = wire.decode_info(self._answer_or_raise().header)

    def _abandon(self) -> None:
        """Kill a child whose load came to nothing."""
        if not self._gone:
            self._gone = f"worker of {self._name} was never ready"
            self._child.kill()

    # -- asking ---------------------------------------------------------------------------------

    def _call(self, command: Frame, *, vacates: int | None = None) -> Frame:
        """Send a command and wait for its answer; events that come meanwhile are queued.

        A command that succeeds `vacates` a seat of who sat there.
        """
        self._vacates = vacates
        self._ask(command)
        while self._answered < self._asked:
            self._receive(math.inf)
        return self._answer_or_raise()

    def _ask(self, command: Frame) -> None:
        """Answers come in the order of the questions, so that counting them tells whose they are."""
        self._send(command)
        self._asked += 1
        self._heard_s = time.monotonic()

    def _answer_or_raise(self) -> Frame:
        if self._answer.kind is Kind.ERROR:
            with self._making_sense():
                raise wire.decode_error(self._answer.header)
        return self._answer

    def _opened(self, answer: Frame) -> Opened:
        with self._making_sense():
            return wire.decode_opened(answer.header)

    def _forget(self, seq: int) -> None:
        """Take a sequence that is over out of the events that wait."""
        self._events = deque(_without(event, (seq,)) for event in self._events)

    # -- the wire -------------------------------------------------------------------------------

    def _send(self, frame: Frame) -> None:
        """All of a frame; takes in what the child says meanwhile, so that neither waits for ever."""
        if self._gone:
            raise WorkerDied(self._gone)
        for part in frame.encode():
            rest = memoryview(part)
            while rest:
                rest = rest[self._send_some(rest) :]

    def _send_some(self, data: memoryview) -> int:
        try:
            sent_bytes = self._child.sock.send(data)
        except BlockingIOError:
            self._wait_for_room()
            return 0
        except OSError:
            self._die()
        self._heard_s = time.monotonic() if sent_bytes < len(data) else self._heard_s
        return sent_bytes

    def _wait_for_room(self) -> None:
        self._poller.modify(self._child.sock, select.POLLIN | select.POLLOUT)
        self._receive(math.inf)
        self._poller.modify(self._child.sock, select.POLLIN)

    def _receive(self, wait_s: float) -> bool:
        """Take in what the child sent, waiting for it up to `wait_s` and the deadline."""
        now_s = time.monotonic()
        is_due = self._queued or wait_s == math.inf
        hangs_at_s = self._heard_s + self._deadline_s if is_due else math.inf
        ready = self._poller.poll(max(0.0, min(wait_s, hangs_at_s - now_s)) * 1000)
        if ready and ready[0][1] != select.POLLOUT:
            self._read()
        elif not ready and time.monotonic() >= hangs_at_s:
            self._die("hangs")
        return bool(ready)

    def _read(self) -> None:
        with self._making_sense():
            try:
                frames = self._reader.receive(self._child.sock)
            except (EOFError, OSError):
                self._die()
            self._heard_s = time.monotonic()
            for frame in frames:
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        match frame:
            case Frame(Kind.STEPS, end) if self._queued:
                events = wire.unpack_steps(frame.blob)
                self._events += (_without(e, self._closing) for e in events) if self._closing else events
                if end is not None:
                    self._queued -= 1
                    self._events.append(wire.decode_end(end))
            case Frame(Kind.READY | Kind.REPLY | Kind.ERROR) if self._answered < self._asked:
                self._answered += 1
                self._answer = frame
                if frame.kind is Kind.REPLY and self._vacates is not None:
                    self._forget(self._vacates)  # now: steps of the new sequence may follow at once
            case Frame(Kind.CLOSED) if self._closing:
                self._closing.popleft()
            case Frame(Kind.LOG, [str(level), str(text)]):
                self._log(level, text)
            case Frame(Kind.PROGRESS, float() | int() as fraction):
                self._fraction = fraction
            case Frame(Kind.FATAL, header):
                self._last_words = wire.decode_error(header).message
            case _:
                raise wire.Nonsense(f"{frame.kind.name} out of place")

    # -- the end --------------------------------------------------------------------------------

    @contextmanager
    def _making_sense(self) -> Iterator[None]:
        try:
            yield
        except wire.Nonsense:
            self._die("talks nonsense")

    def _die(self, what: str = "") -> NoReturn:
        """Reap the child, tell its last lines to the log, and say what happened; without `what`: it ended."""
        status, last_lines = self._child.kill(grace_s=0.0 if what else EXIT_S)
        self._gone = f"worker of {self._name} {what or 'died: ' + (self._last_words or status)}"
        for line in last_lines:
            self._log("error", line)
        raise WorkerDied(self._gone)


def _without(event: StepEvent | QuantumEnd, seqs: Collection[int]) -> StepEvent | QuantumEnd:
    """The event, less what it says of these sequences."""
    if isinstance(event, QuantumEnd) or not any(step.seq in seqs for step in event.sequences):
        return event
    return event._replace(sequences=tuple(step for step in event.sequences if step.seq not in seqs))
