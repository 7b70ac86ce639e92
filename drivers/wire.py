"""The wire between a worker and its parent: frames, and the values of `kernel.device` inside them.

A frame is a fixed head (magic, kind, two lengths), a compact JSON header and a binary blob. Steps
are the hot path and travel packed in the blob; everything else is a JSON list, decoded by shape.
Nothing that arrives is trusted: what does not fit raises `Nonsense`.

Not here: who sends what when (worker, worker_main), processes (child), shared memory (brake).
"""

import json
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

from kernel import errors
from kernel.device import (
    EngineInfo,
    EngineOptions,
    Finish,
    Opened,
    Prompt,
    QuantumEnd,
    Sampling,
    SequenceStep,
    StepEvent,
)

MAX_HEADER_BYTES = 64 << 20  # a prompt of some million tokens
MAX_BLOB_BYTES = 64 << 30  # the KV state of one sequence
CHUNK_BYTES = 256 << 10

_HEAD = struct.Struct("<2sBxIQ")
_MAGIC = b"LM"
_STEP = struct.Struct("<qdHII")  # quantum, step_s, sequences, bytes of text, bytes of JSON
_SEQUENCE = struct.Struct("<HIiBI")  # seq, prompt_tokens, token or -1, finish, characters of text
_FINISHES: tuple[Finish | None, ...] = (None, "stop", "length", "context")
_FINISH_CODE = {finish: code for code, finish in enumerate(_FINISHES)}

_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_from_json = json.JSONDecoder().decode


class Nonsense(Exception):
    """Bytes that no worker of ours would send."""


class Kind(IntEnum):
    """What a frame is for. Commands go down; all from READY on goes up."""

    LOAD = 1
    START = 2
    OPEN = 3
    FEED = 4
    FORK = 5
    DUMP = 6
    RESTORE = 7
    CLOSE = 8
    QUEUE = 9
    BORROWED = 10
    READY = 16
    PROGRESS = 17
    LOG = 18
    REPLY = 19
    ERROR = 20
    CLOSED = 21
    STEPS = 22
    FATAL = 23


_KINDS = {kind.value: kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. `header` is what JSON has made of it: lists, strings, numbers."""

    kind: Kind
    header: object = None
    blob: bytes = b""

    def encode(self) -> tuple[bytes, ...]:
        """What to send: a small frame in one piece, as each wakes the reader; a large blob without a copy."""
        header = b"" if self.header is None else _to_json(self.header).encode("ascii")
        if len(header) > MAX_HEADER_BYTES or len(self.blob) > MAX_BLOB_BYTES:
            raise errors.UsageError(f"{len(header) + len(self.blob)} bytes are too many for one message")
        head = _HEAD.pack(_MAGIC, self.kind, len(header), len(self.blob)) + header
        return (head, self.blob) if len(self.blob) > CHUNK_BYTES else (head + self.blob,)


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._chunk = memoryview(bytearray(CHUNK_BYTES))  # kept: a fresh one for each read costs page faults
        self._buffer = bytearray()
        self._needed_bytes = _HEAD.size

    @property
    def is_partial(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return bool(self._buffer)

    def receive(self, sock: socket.socket) -> list[Frame]:
        """One read from the socket, and the frames it completes. Raises EOFError, OSError, Nonsense."""
        count = sock.recv_into(self._chunk)
        if not count:
            raise EOFError
        return list(self.feed(self._chunk[:count]))

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """Yield the frames that `data` completes. Raises Nonsense."""
        self._buffer += data
        while len(self._buffer) >= self._needed_bytes:
            frame = self._cut()
            if frame is not None:
                yield frame

    def _cut(self) -> Frame | None:
        magic, kind, header_bytes, blob_bytes = _HEAD.unpack_from(self._buffer)
        if magic != _MAGIC or header_bytes > MAX_HEADER_BYTES or blob_bytes > MAX_BLOB_BYTES:
            raise Nonsense("not a frame")
        header_end = _HEAD.size + header_bytes
        frame_end = header_end + blob_bytes
        if len(self._buffer) < frame_end:
            self._needed_bytes = frame_end
            return None
        with memoryview(self._buffer) as view:
            frame = Frame(
                _kind_of(kind),
                _header_of(bytes(view[_HEAD.size : header_end])),
                bytes(view[header_end:frame_end]),
            )
        del self._buffer[:frame_end]
        self._needed_bytes = _HEAD.size
        return frame


def _kind_of(code: int) -> Kind:
    if kind := _KINDS.get(code):
        return kind
    raise Nonsense(f"frame of kind {code}")


def _header_of(data: bytes) -> object:
    if not data:
        return None
    try:
        return _from_json(data.decode("ascii"))
    except (ValueError, RecursionError):
        raise Nonsense("header is not JSON") from None


# -- steps: packed ------------------------------------------------------------------------------


def pack_step(quantum: int, event: StepEvent) -> bytes:
    """A step as bytes; `quantum` replaces the event's own. What is rare in it travels as JSON."""
    steps = event.sequences
    text = "".join([step.text for step in steps]).encode("utf-8", "surrogatepass")
    rows = []
    news: list[object] = []
    pack = _SEQUENCE.pack
    for step in steps:
        token = -1 if step.token is None else step.token
        rows.append(pack(step.seq, step.prompt_tokens, token, _FINISH_CODE[step.finish], len(step.text)))
        if step.opened is not None or step.error is not None or step.shared_tokens or step.stuck:
            opened = None if step.opened is None else encode_opened(step.opened)
            error = None if step.error is None else encode_error(step.error)
            news.append([len(rows) - 1, opened, error, step.shared_tokens, step.stuck])
    told = _to_json(news).encode("ascii") if news else b""
    return b"".join((_STEP.pack(quantum, event.step_s, len(steps), len(text), len(told)), *rows, text, told))


def unpack_steps(blob: bytes) -> Iterator[StepEvent]:
    """The steps of a STEPS frame, in order. Raises Nonsense."""
    offset = 0
    try:
        while offset < len(blob):
            event, offset = _unpack_step(blob, offset)
            yield event
    except (struct.error, IndexError, UnicodeDecodeError):
        raise Nonsense("broken step") from None


def _unpack_step(blob: bytes, offset: int) -> tuple[StepEvent, int]:
    quantum, step_s, sequences, text_bytes, news_bytes = _STEP.unpack_from(blob, offset)
    rows_at = offset + _STEP.size
    text_at = rows_at + sequences * _SEQUENCE.size
    news_at = text_at + text_bytes
    end = news_at + news_bytes
    if end > len(blob):
        raise Nonsense("step is cut short")
    text = blob[text_at:news_at].decode("utf-8", "surrogatepass")
    steps: list[SequenceStep] = []
    start = 0
    for seq, prompt_tokens, token, finish, characters in _SEQUENCE.iter_unpack(blob[rows_at:text_at]):
        stop = start + characters
        drawn = None if token < 0 else token
        steps.append(SequenceStep(seq, prompt_tokens, drawn, text[start:stop], _FINISHES[finish]))
        start = stop
    if news_bytes:
        _add_news(steps, _header_of(blob[news_at:end]))
    return StepEvent(quantum, step_s, tuple(steps)), end


def _add_news(steps: list[SequenceStep], news: object) -> None:
    """Put what is told beside tokens into the rows it belongs to."""
    for item in news if isinstance(news, list) else [news]:
        match item:
            case [int(row), opened, error, int(shared_tokens), bool(stuck)] if 0 <= row < len(steps):
                steps[row] = steps[row]._replace(
                    opened=None if opened is None else decode_opened(opened),
                    error=None if error is None else decode_error(error),
                    shared_tokens=shared_tokens,
                    stuck=stuck,
                )
            case _:
                raise Nonsense("news of a step")


# -- all else: JSON lists -----------------------------------------------------------------------


def encode_options(options: EngineOptions) -> list[object]:
    return [options.context_tokens, options.sequences, options.threads, options.kv_tokens]


def decode_options(header: object) -> EngineOptions:
    match header:
        case [int(context_tokens), int(sequences), int(threads), int(kv_tokens)]:
            return EngineOptions(context_tokens, sequences, threads, kv_tokens)
    raise Nonsense("options")


def encode_info(info: EngineInfo) -> list[object]:
    costs = [[sequences, cost_s] for sequences, cost_s in info.step_cost_s.items()]
    memory = [info.weights_bytes, info.kv_bytes_per_token, info.kv_bytes, info.compute_bytes]
    return [
        info.context_tokens,
        info.sequences,
        memory,
        costs,
        [info.prefill_token_s, info.copy_token_s],
        info.abortable,
    ]


def decode_info(header: object) -> EngineInfo:
    match header:
        case [
            int(context_tokens),
            int(sequences),
            [int(weights_bytes), int(kv_bytes_per_token), int(kv_bytes), int(compute_bytes)],
            list(costs),
            [float() | int() as prefill_token_s, float() | int() as copy_token_s],
            bool(abortable),
        ]:
            return EngineInfo(
                context_tokens=context_tokens,
                sequences=sequences,
                weights_bytes=weights_bytes,
                kv_bytes_per_token=kv_bytes_per_token,
                kv_bytes=kv_bytes,
                compute_bytes=compute_bytes,
                step_cost_s=dict(_cost_of(pair) for pair in costs),
                prefill_token_s=prefill_token_s,
                copy_token_s=copy_token_s,
                abortable=abortable,
            )
    raise Nonsense("engine info")


def _cost_of(pair: object) -> tuple[int, float]:
    match pair:
        case [int(sequences), float() | int() as cost_s]:
            return sequences, cost_s
    raise Nonsense("step cost")


def encode_prompt(prompt: Prompt) -> list[object]:
    counts = [prompt.prompt_tokens, prompt.max_tokens]
    return [prompt.text, prompt.messages, prompt.tokens, counts, prompt.reply_bounds]


def decode_prompt(header: object) -> Prompt:
    match header:
        case [str(text), list(messages), list(tokens), [int(prompt_tokens), int(max_tokens)], list(bounds)]:
            pairs = tuple(_message_of(message) for message in messages)
            return Prompt(text, pairs, ints_of(tokens), prompt_tokens, max_tokens, ints_of(bounds))
    raise Nonsense("prompt")


def _message_of(message: object) -> tuple[str, str]:
    match message:
        case [str(role), str(content)]:
            return role, content
    raise Nonsense("chat message")


def encode_sampling(sampling: Sampling) -> list[object]:
    cuts = [sampling.top_k, sampling.top_p, sampling.min_p]
    flags = [sampling.ignore_eos, sampling.exact]
    return [sampling.temperature, cuts, sampling.repeat_penalty, sampling.seed, flags]


def decode_sampling(header: object) -> Sampling:
    match header:
        case [
            float() | int() as temperature,
            [int(top_k), float() | int() as top_p, float() | int() as min_p],
            float() | int() as repeat_penalty,
            int(seed),
            [bool(ignore_eos), bool(exact)],
        ]:
            return Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed, ignore_eos, exact)
    raise Nonsense("sampling")


def encode_opened(opened: Opened) -> list[object]:
    return [opened.tokens, opened.shared_tokens]


def decode_opened(header: object) -> Opened:
    match header:
        case [list(tokens), int(shared_tokens)]:
            return Opened(ints_of(tokens), shared_tokens)
    raise Nonsense("opened")


def encode_borrowed(borrowed: Mapping[int, int]) -> list[object]:
    return [list(borrowed), list(borrowed.values())]


def decode_borrowed(header: object) -> dict[int, int]:
    match header:
        case [list(seqs), list(tokens)] if len(seqs) == len(tokens):
            return dict(zip(ints_of(seqs), ints_of(tokens), strict=True))
    raise Nonsense("borrowed tokens")


def decode_end(header: object) -> QuantumEnd:
    match header:
        case [int(quantum), bool(interrupted), borrowed]:
            return QuantumEnd(quantum, interrupted, decode_borrowed(borrowed))
    raise Nonsense("end of a quantum")


def encode_error(error: Exception) -> list[object]:
    """Class, message and hint; what is not of our tree becomes a KernelFault of one line."""
    if isinstance(error, errors.LlmosError):
        return [type(error).__name__, error.message, error.hint]
    line = " ".join(str(error).split())
    return ["KernelFault", f"{type(error).__name__}: {line}" if line else type(error).__name__, ""]


def decode_error(header: object) -> errors.LlmosError:
    """The error as the worker raised it; of a class unknown here: KernelFault."""
    match header:
        case [str(name), str(message), str(hint)]:
            kind = getattr(errors, name, None)
            if isinstance(kind, type) and issubclass(kind, errors.LlmosError):
                return kind(message, hint)
            return errors.KernelFault(message, hint)
    raise Nonsense("error")


def ints_of(values: object) -> tuple[int, ...]:
    """A JSON list of whole numbers as a tuple. Raises Nonsense."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise Nonsense("not a list of whole numbers")
    return tuple(values)
