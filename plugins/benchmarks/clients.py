"""Those who ask: a client that waits for each answer, and batch jobs that never end, on either side.

Owner: `bench interactive`. Lock: a server's batch is counted by a thread of its own, which alone writes the
count; readers see whole numbers.
"""

import selectors
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Protocol

from kernel.errors import KernelFault, LlmosError
from kernel.syscall import Signal
from plugins.benchmarks.machine import Machine, random_text
from plugins.benchmarks.server import Exchange, Request, Server

INTERACTIVE_NICE = -10
BATCH_NICE = 10
PATIENCE_S = 120.0
PROMPTS = 400  # of a batch job of LLMOS: more than anybody waits for


@dataclass(frozen=True, slots=True)
class Reply:
    """How an answer came: seconds from the request to the first text, then from text to text."""

    first_token_s: float
    gaps_s: tuple[float, ...]

    @classmethod
    def of(cls, begin_s: float, arrivals_s: Sequence[float]) -> "Reply":
        """Raises KernelFault if nothing came."""
        if not arrivals_s:
            raise KernelFault("an answer without text")
        return cls(arrivals_s[0] - begin_s, tuple(later - before for before, later in pairwise(arrivals_s)))


class Batch(Protocol):
    """Batch jobs at work."""

    def tokens(self) -> int:
        """Output tokens of all jobs so far."""

    def end(self) -> None:
        """Drop what they do."""


class Client(Protocol):
    """Somebody who uses one of the sides."""

    name: str

    def ask(self, text: str, output_tokens: int) -> Reply:
        """Send a prompt and read the answer to its end."""

    def batch(self, jobs: int, characters: int, output_tokens: int, seed: str) -> Batch:
        """Begin so many jobs that send prompt after prompt."""


class LlmosClient:
    """Of LLMOS: a process for each prompt."""

    name = "LLMOS"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def ask(self, text: str, output_tokens: int) -> Reply:
        system, offset, arrivals_s = self._machine.system, 0, []
        begin_s = time.monotonic()
        pid = system.spawn(self._machine.spec(text, output_tokens, nice=INTERACTIVE_NICE))
        while True:
            piece = system.read(pid, offset, PATIENCE_S)
            if piece.text:
                arrivals_s.append(time.monotonic())
            if piece.eof:
                break
            if not piece.text:
                raise KernelFault(f"a process says nothing for {PATIENCE_S:g} s")
            offset = piece.next_offset
        view = system.wait(pid, PATIENCE_S)
        if view is None or view.exit_code != 0 or view.output_tokens != output_tokens:
            raise KernelFault(f"a process ended badly: {view.error if view else 'no answer'}")
        system.reap(pid)
        return Reply.of(begin_s, arrivals_s)

    def batch(self, jobs: int, characters: int, output_tokens: int, seed: str) -> Batch:
        return LlmosBatch(self._machine, jobs, characters, output_tokens, seed)


class LlmosBatch:
    """Processes of many prompts each."""

    def __init__(self, machine: Machine, jobs: int, characters: int, output_tokens: int, seed: str) -> None:
        self._system = machine.system
        plain = machine.spec("x", output_tokens, nice=BATCH_NICE)
        self._pids = [
            self._system.spawn(replace(plain, prompts=_texts(characters, f"{seed} {job}")))
            for job in range(jobs)
        ]

    def tokens(self) -> int:
        views = [self._system.process(pid) for pid in self._pids]
        if ended := [view for view in views if view.exit_code is not None]:
            raise KernelFault(f"a batch job ended: {ended[0].error or ended[0].exit_code}")
        return sum(view.output_tokens for view in views)

    def end(self) -> None:
        for pid in self._pids:
            with suppress(LlmosError):  # it has ended by itself
                self._system.signal(pid, Signal.KILL)
            self._system.wait(pid, PATIENCE_S)
            self._system.reap(pid)


def _texts(characters: int, seed: str) -> tuple[str, ...]:
    return tuple(random_text(characters, f"{seed} {number}") for number in range(PROMPTS))


class ServerClient:
    """Of llama.cpp's server: a request for each prompt."""

    name = "server"

    def __init__(self, server: Server) -> None:
        self._server = server

    def ask(self, text: str, output_tokens: int) -> Reply:
        answer = self._server.ask([Request(text, output_tokens)])[0]
        if answer.output_tokens != output_tokens:
            raise KernelFault(f"the server drew {answer.output_tokens} tokens, not {output_tokens}")
        return Reply.of(answer.begin_s, answer.arrivals_s)

    def batch(self, jobs: int, characters: int, output_tokens: int, seed: str) -> Batch:
        return ServerBatch(self._server, jobs, characters, output_tokens, seed)


class ServerBatch:
    """Connections that ask again as soon as they are answered, all on one thread."""

    def __init__(self, server: Server, jobs: int, characters: int, output_tokens: int, seed: str) -> None:
        self._server = server
        self._job = (characters, output_tokens, seed)
        self._numbers = count()
        self._tokens = 0  # written by the thread alone
        self._ending = False
        self._error: LlmosError | None = None
        self._thread = threading.Thread(target=self._run, args=(jobs,), name="batch", daemon=True)
        self._thread.start()

    def tokens(self) -> int:
        if self._error is not None:
            raise self._error
        return self._tokens

    def end(self) -> None:
        self._ending = True
        self._thread.join()

    def _run(self, jobs: int) -> None:
        with selectors.DefaultSelector() as selector:
            try:
                for _ in range(jobs):
                    self._begin(selector)
                while not self._ending:
                    for key, _ in selector.select(0.05):
                        self._receive(selector, key.data)
            except OSError as error:
                self._error = self._server.lost(error)
            except LlmosError as error:
                self._error = error
            finally:
                for key in list(selector.get_map().values()):
                    key.data.socket.close()  # the server drops what nobody waits for

    def _begin(self, selector: selectors.BaseSelector) -> None:
        characters, output_tokens, seed = self._job
        text = random_text(characters, f"{seed} {next(self._numbers)}")
        exchange = Exchange(self._server.port, Request(text, output_tokens))
        selector.register(exchange.socket, selectors.EVENT_READ, exchange)

    def _receive(self, selector: selectors.BaseSelector, exchange: Exchange) -> None:
        pieces = exchange.receive()
        if pieces is not None:
            self._tokens += pieces
            return
        selector.unregister(exchange.socket)
        # An event told the end, and bytes that are no character yet come with the next event.
        seen, answer = exchange.pieces, exchange.answer()
        self._tokens += answer.output_tokens - seen
        self._begin(selector)
