"""The child process that hosts an engine: `python -m drivers.worker_main SOCKET BRAKE LIFELINE NAME`.

It loads the engine that the first frame names, then runs queued quanta, one step after another,
and looks for commands between two steps. It ends when its parent does, however that ended.

Owner: the main thread computes; one thread packs and sends, so that this happens during the next step.
Any thread may post: an engine's own threads, log lines.
Order: frames leave as they were posted: a reply after all events of the steps before it.
"""

import gc
import importlib
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Protocol

from drivers import wire
from drivers.brake import AbortFlag, Brake
from drivers.wire import Frame, Kind
from kernel.device import Engine, EngineOptions, LogLine, Progress, StepEvent
from kernel.errors import WorkerDied

HOLD_S = 0.005  # how long a step may wait for the next ones to share its frame: each wakes the parent
PROGRESS_STEP = 0.005  # of a load

Step = tuple[int, StepEvent]
"""The quantum it belongs to, and what it did."""

Report = tuple[list[Step], list[object] | None]
"""Steps, and the end of a quantum if it came with the last of them: as `wire.decode_end` wants it."""


class OpenEngine(Protocol):
    """What a factory "module:function" names: loads a model, and returns its engine."""

    def __call__(
        self, path: str, options: EngineOptions, abort_flag: AbortFlag, progress: Progress, log: LogLine
    ) -> Engine: ...


class Channel:
    """The worker's end of the socket: blocking, and gone when the parent is."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._posted: queue.SimpleQueue[Frame | Report | None] = queue.SimpleQueue()
        self._reader = wire.FrameReader()
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)
        self._sender = threading.Thread(target=self._send_all, name="sender", daemon=True)
        self._sender.start()

    def send(self, frame: Frame | Report) -> None:
        """Post a frame, or what becomes one."""
        self._posted.put(frame)

    def close(self) -> None:
        """Wait until all is sent."""
        self._posted.put(None)
        self._sender.join()

    def _send_all(self) -> None:
        try:
            while (frame := self._posted.get()) is not None:
                if isinstance(frame, tuple):
                    steps, end = frame
                    frame = Frame(Kind.STEPS, end, b"".join([wire.pack_step(*step) for step in steps]))
                for part in frame.encode():
                    self._sock.sendall(part)
        except ConnectionError:
            pass  # the parent is gone, as the main thread will find

    def receive(self, *, wait: bool) -> list[Frame]:
        """All frames that are there; one that has begun is read to its end. Raises EOFError."""
        frames: list[Frame] = []
        while wait or self._reader.is_partial or self._poller.poll(0):
            frames += self._reader.receive(self._sock)
            wait = False
        return frames


class Worker:
    """Runs quanta on one engine, and does what the parent asks between two steps."""

    def __init__(self, channel: Channel, engine: Engine, brake: Brake) -> None:
        self._channel = channel
        self._engine = engine
        self._brake = brake
        self._quanta: deque[tuple[int, dict[int, int]]] = deque()
        self._unsent: list[Step] = []
        self._held_since_s = 0.0  # the first of `_unsent`
        self._step_s = 0.0  # the last one
        self._longest_s = 0.0  # of the last two
        self._operations: dict[Kind, Callable[[Frame], Frame]] = {
            Kind.OPEN: self._open,
            Kind.FEED: self._feed,
            Kind.FORK: self._fork,
            Kind.BORROWED: self._borrowed,
            Kind.DUMP: self._dump,
            Kind.RESTORE: self._restore,
        }

    def run(self) -> None:
        """Until the parent hangs up (EOFError)."""
        while True:
            for frame in self._channel.receive(wait=not self._quanta):
                self._obey(frame)
            if self._quanta:
                self._advance(*self._quanta[0])

    def _advance(self, quantum: int, quota_tokens: dict[int, int]) -> None:
        """One step of a quantum, or its end. Where nobody has quota left, the last step tells the end."""
        interrupted = self._brake.stops(quantum)
        event = None if interrupted else self._engine.step(quota_tokens)
        if event is not None:
            if not self._unsent:
                self._held_since_s = time.monotonic()
            self._unsent.append((quantum, event))
            self._longest_s, self._step_s = max(event.step_s, self._step_s), event.step_s
        if event is None or not any(quota_tokens.values()):
            self._quanta.popleft()
            borrowed = wire.encode_borrowed(self._engine.borrowed_tokens())
            self._flush([quantum, interrupted, borrowed])
        elif self._is_due(event):
            self._flush()

    def _is_due(self, event: StepEvent) -> bool:
        """Whether somebody waits for what the step told, or the next step may end too late to join it.

        It may be as long as either of the last two: passes over prompts and those that draw take turns.
        """
        if any(step.token is None or step.prompt_tokens or step.finish for step in event.sequences):
            return True
        return time.monotonic() + self._longest_s - self._held_since_s >= HOLD_S

    def _flush(self, end: list[object] | None = None) -> None:
        if self._unsent or end:
            self._channel.send((self._unsent, end))
            self._unsent = []

    def _obey(self, frame: Frame) -> None:
        match frame:
            case Frame(Kind.START, [int(quantum), list(seqs), list(tokens)]):
                self._quanta.append((quantum, dict(zip(seqs, tokens, strict=True))))
            case Frame(Kind.QUEUE, [int(seq), prompt, sampling]):
                self._engine.queue(seq, wire.decode_prompt(prompt), wire.decode_sampling(sampling))
            case Frame(Kind.CLOSE, int(seq)):
                self._flush()
                self._engine.close(seq)
                self._channel.send(Frame(Kind.CLOSED))
            case _:
                self._reply(frame)

    def _reply(self, frame: Frame) -> None:
        """Answer with a result or an error. An engine that says WorkerDied is beyond repair."""
        self._flush()  # now: the operation may take seconds
        try:
            answer = self._operations[frame.kind](frame)
        except WorkerDied:
            raise
        except Exception as error:
            answer = Frame(Kind.ERROR, wire.encode_error(error))
        self._channel.send(answer)

    def _open(self, frame: Frame) -> Frame:
        seq, prompt, sampling = _items(frame, 3)
        opened = self._engine.open(_int(seq), wire.decode_prompt(prompt), wire.decode_sampling(sampling))
        return Frame(Kind.REPLY, wire.encode_opened(opened))

    def _feed(self, frame: Frame) -> Frame:
        seq, prompt = _items(frame, 2)
        opened = self._engine.feed(_int(seq), wire.decode_prompt(prompt))
        return Frame(Kind.REPLY, wire.encode_opened(opened))

    def _fork(self, frame: Frame) -> Frame:
        source, target, drawn = _items(frame, 3)
        sampling = None if drawn is None else wire.decode_sampling(drawn)
        self._engine.fork(_int(source), _int(target), sampling)
        return Frame(Kind.REPLY)

    def _borrowed(self, _frame: Frame) -> Frame:
        return Frame(Kind.REPLY, wire.encode_borrowed(self._engine.borrowed_tokens()))

    def _dump(self, frame: Frame) -> Frame:
        (seq,) = _items(frame, 1)
        return Frame(Kind.REPLY, blob=self._engine.dump(_int(seq)))

    def _restore(self, frame: Frame) -> Frame:
        seq, prompt, sampling = _items(frame, 3)
        opened = self._engine.restore(
            _int(seq), wire.decode_prompt(prompt), wire.decode_sampling(sampling), frame.blob
        )
        return Frame(Kind.REPLY, wire.encode_opened(opened))


def _items(frame: Frame, count: int) -> list[object]:
    if not isinstance(frame.header, list) or len(frame.header) != count:
        raise wire.Nonsense(f"{frame.kind.name} takes {count} values")
    return frame.header


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise wire.Nonsense("not a sequence number")
    return value


def load(channel: Channel, brake: Brake) -> Engine:
    """Open the engine that the first frame names, telling how far it is. Raises what the factory does."""
    frame = channel.receive(wait=True)[0]
    match frame:
        case Frame(Kind.LOAD, [str(factory), str(path), options]):
            module, _, function = factory.partition(":")
            open_engine: OpenEngine = getattr(importlib.import_module(module), function)
            return open_engine(
                path, wire.decode_options(options), brake.abort_flag, _progress(channel), _log(channel)
            )
    raise wire.Nonsense("the first frame is not LOAD")


def _progress(channel: Channel) -> Progress:
    told = 0.0

    def progress(fraction: float) -> bool:
        nonlocal told
        if fraction >= told + PROGRESS_STEP:
            told = fraction
            channel.send(Frame(Kind.PROGRESS, fraction))
        return True  # the parent cancels a load by ending this process

    return progress


def _log(channel: Channel) -> LogLine:
    return lambda level, text: channel.send(Frame(Kind.LOG, [level, text]))


def main() -> int:
    """Host an engine until the parent hangs up. Exit status: 0 then, 1 if the engine broke."""
    sock_fd, brake_fd, lifeline_fd = map(int, sys.argv[1:4])
    _leave_terminal()
    threading.Thread(target=_die_with_parent, args=(lifeline_fd,), daemon=True).start()
    channel = Channel(socket.socket(fileno=sock_fd))
    brake = Brake(brake_fd)
    try:
        return _serve(channel, brake)
    except (EOFError, ConnectionError):
        return 0


def _serve(channel: Channel, brake: Brake) -> int:
    try:
        engine = load(channel, brake)
        gc.collect()
        gc.freeze()  # what a load leaves stays: to look through it again costs a pass's time, or several
        channel.send(Frame(Kind.READY, wire.encode_info(engine.info)))
    except (EOFError, ConnectionError):
        raise
    except Exception as error:
        channel.send(Frame(Kind.ERROR, wire.encode_error(error)))
        channel.close()
        return 1
    try:
        Worker(channel, engine, brake).run()
    except (EOFError, ConnectionError):
        engine.shutdown()
        raise
    except Exception as error:
        traceback.print_exc()
        channel.send(Frame(Kind.FATAL, wire.encode_error(error)))
        channel.close()
    return 1


def _leave_terminal() -> None:
    """The parent has made this process a session of its own; ^C and ^Z are not for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # a core would hold the weights


def _die_with_parent(lifeline_fd: int) -> None:
    """Exit when the parent's end of a pipe is gone, also in the middle of a step or a load.

    Not prctl(PR_SET_PDEATHSIG): it fires when the parent's *thread* that started us ends.
    """
    os.read(lifeline_fd, 1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
