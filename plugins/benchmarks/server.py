"""llama.cpp's own server: the other system that is measured, in a process of its own on localhost.

Started and ended here, whatever happens in between. Clients are plain sockets that only note what came and
when; it is parsed when the clock has stopped, so that being measured costs the server little.
Owner: whoever enters it. Not here: what is asked of it.
"""

import json
import os
import selectors
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from kernel.device import EngineOptions
from kernel.errors import KernelFault, TimedOut, UsageError, WorkerDied
from shell.registry import Arguments

BINARY = "llama-server"
LOAD_S = 60.0  # to load and answer
PATIENCE_S = 120.0  # with no answer at all
POLITE_S = 5.0  # to end by itself
LOCALHOST = "127.0.0.1"
HOW_TO_BUILD = (
    "`pip download --no-binary :all: --no-deps llama-cpp-python`, unpack it, then in vendor/llama.cpp "
    "`cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF` and "
    "`cmake --build build --target llama-server`"
)

# What it answers with, at the least cost: it would repeat the prompt and all settings.
_FIELDS = ("stop", "tokens_predicted", "tokens_evaluated")
_EVENT = b"\ndata: "  # JSON has no line breaks, so no text can look like this
_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, as text or tokens, to be continued greedily by so many tokens."""

    prompt: str | tuple[int, ...]
    output_tokens: int
    slot: int = -1  # any
    cached: bool = False  # whether what the slot has computed before may be used

    def body(self) -> bytes:
        wanted = {
            "prompt": self.prompt,
            "n_predict": self.output_tokens,
            "id_slot": self.slot,
            "cache_prompt": self.cached,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0.0,
            "samplers": ["top_k"],  # an arg max, like the other sides; the chain's draw is of one token
            "top_k": 1,
            "response_fields": _FIELDS,
        }
        return json.dumps(wanted).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and when; monotonic seconds."""

    prompt_tokens: int
    output_tokens: int
    begin_s: float
    arrivals_s: tuple[float, ...]  # of each piece of text
    end_s: float


class Exchange:
    """One request under way."""

    def __init__(self, port: int, request: Request) -> None:
        body = request.body()
        head = f"POST /completion HTTP/1.1\r\nHost: {LOCALHOST}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._begin_s = time.monotonic()
        self.socket = socket.create_connection((LOCALHOST, port), timeout=PATIENCE_S)
        self.socket.sendall(head.encode() + body)
        self._pieces: list[tuple[float, bytes]] = []

    def receive(self) -> int | None:
        """Read what is there: how many pieces of text it was; None at the end."""
        data = self.socket.recv(1 << 16)
        if not data:
            self.socket.close()
            return None
        self._pieces.append((time.monotonic(), data))
        return data.count(_EVENT)

    @property
    def pieces(self) -> int:
        """Of text, so far; the end has come with the last one."""
        return sum(data.count(_EVENT) for _, data in self._pieces)

    def answer(self) -> Answer:
        """Parse it all. Raises KernelFault if it is not a whole answer."""
        raw = b"".join(data for _, data in self._pieces)
        head, _, body = raw.partition(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise KernelFault(f"{BINARY} refuses: {body.decode('utf-8', 'replace')[:200]}")
        events = (b"\n" + body).split(_EVENT)[1:]
        try:
            last = json.loads(events[-1].partition(b"\n\n")[0])
            counts = int(last["tokens_evaluated"]), int(last["tokens_predicted"])
        except (IndexError, KeyError, TypeError, ValueError):
            raise KernelFault(f"{BINARY} broke off in the middle of an answer") from None
        arrivals = [at_s for at_s, data in self._pieces for _ in range(data.count(_EVENT))]
        return Answer(*counts, self._begin_s, tuple(arrivals[:-1]), self._pieces[-1][0])


class Server:
    """The process, as who measures it sees it."""

    def __init__(
        self, binary: Path, model: Path, options: EngineOptions, on_gpu: bool, words: Sequence[str] = ()
    ) -> None:
        self.port = _free_port()
        self._model, self._slots = model, options.sequences
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        # Where it can be had: should LLMOS be killed, it would go on computing for nobody.
        leash = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        command = [*leash, str(binary), "-m", str(model), "--host", LOCALHOST, "--port", str(self.port)]
        command += ["-np", str(options.sequences), "-c", str(options.sequences * options.context_tokens)]
        command += ["-t", str(options.threads), "-ngl", "999" if on_gpu else "0", "--offline", *words]
        settings = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**settings, "OMP_WAIT_POLICY": "PASSIVE", "GGML_NO_BACKTRACE": "1"},  # as LLMOS's worker
                start_new_session=True,  # ^C is for the parent
            )
        except OSError as error:
            self._log.close()
            raise UsageError(f"{binary} does not start: {error.strerror}") from None

    def __enter__(self) -> Self:
        try:
            self._wait_ready(time.monotonic() + LOAD_S)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """All at once; answers in order. Raises KernelFault, WorkerDied, TimedOut."""
        try:
            exchanges = [Exchange(self.port, request) for request in requests]
            with selectors.DefaultSelector() as selector:
                for exchange in exchanges:
                    selector.register(exchange.socket, selectors.EVENT_READ, exchange)
                while selector.get_map():
                    self._receive(selector)
        except OSError as error:
            raise self.lost(error) from None
        return [exchange.answer() for exchange in exchanges]

    @staticmethod
    def _receive(selector: selectors.BaseSelector) -> None:
        ready = selector.select(PATIENCE_S)
        if not ready:
            raise TimedOut(f"{BINARY} has not answered for {PATIENCE_S:g} s")
        for key, _ in ready:
            if key.data.receive() is None:
                selector.unregister(key.fileobj)

    def lost(self, error: OSError) -> WorkerDied:
        """What to say when a connection broke."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return WorkerDied(f"{BINARY} hung up: {error.strerror or error}")
        return WorkerDied(f"{BINARY} ended with status {code}: {self._last_line()}")

    def _wait_ready(self, deadline_s: float) -> None:
        """Until it answers, and is ours: another program may have taken the port meanwhile."""
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise WorkerDied(
                    f"{BINARY} ended with status {self._process.returncode}: {self._last_line()}"
                )
            if self._get("/health") is not None:
                props = self._get("/props") or {}
                if (props.get("model_path"), props.get("total_slots")) != (str(self._model), self._slots):
                    raise KernelFault(f"another server answers on port {self.port}")
                return
            time.sleep(0.05)
        raise TimedOut(f"{BINARY} was not ready after {LOAD_S:g} s: {self._last_line()}")

    def _get(self, path: str) -> dict[str, Any] | None:
        """The answer to a GET; None while there is none."""
        import http.client  # deferred: it imports `email`

        connection = http.client.HTTPConnection(LOCALHOST, self.port, timeout=PATIENCE_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            answer = json.loads(body) if response.status == 200 else None
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()
        return answer if isinstance(answer, dict) else None

    def _last_line(self) -> str:
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - _TAIL_BYTES))
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(POLITE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])


def server_argument(parser: Arguments) -> None:
    """`--server`, as every benchmark that compares with it takes it."""
    parser.add("--server", metavar="PATH", completes=("file",), help=f"{BINARY} to compare with; from PATH")


def server_path(name: str | None) -> Path | None:
    """The binary that is named, or one on PATH, or None. Raises UsageError."""
    if name is None:
        found = shutil.which(BINARY)
        return Path(found) if found else None
    path = Path(name).expanduser()
    path = path / BINARY if path.is_dir() else path
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise UsageError(f"no server {path}", f"to build one: {HOW_TO_BUILD}")
    return path.resolve()
