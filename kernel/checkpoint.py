"""A process as a file: its specification, its threads' tokens, its replies, and its KV states.

Layout (little-endian): magic, u32 version, u64 header length, u64 KV length, header (JSON), KV bytes,
SHA-256 of all before it, and an HMAC of that under this LLMOS's key. The checksum tells damage; the MAC
tells whose file it is: KV state goes into a native parser, so it is used only when the MAC is ours and the
model file is the same; otherwise tokens are computed again.
Not here: engines (the dispatcher dumps and restores), the journal.
"""

import contextlib
import hashlib
import hmac
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernel.errors import AdmissionRefused, CheckpointInvalid, LlmosError, NotPermitted, UsageError
from kernel.spec import ProcessSpec, spec_from

MAGIC = b"LLMOSCKP"
VERSION = 3
_FRAME = struct.Struct("<8sIQQ")
_SUM_BYTES = 32
HEADER_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SavedThread:
    """The item that a thread is at. `kv` is None where there is none to trust."""

    item: int
    begun: bool  # `tokens` has its prompt; if not, they are a chat's of before
    prompt_length: int
    tokens: tuple[int, ...]
    reply: str
    kv: bytes | None = None
    reply_bounds: tuple[int, ...] = ()  # where a chat's earlier replies begin and end, in turn


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `save` writes. `replies` are of finished items, by number; `turns` is what a chat's user said."""

    spec: ProcessSpec
    model_digest: str
    replies: dict[int, str]
    threads: tuple[SavedThread, ...]
    prompt_tokens: int
    output_tokens: int
    turns: tuple[str, ...] = ()
    hung_up: bool = False  # nothing more will be said to a chat

    @property
    def items(self) -> int:
        return self.spec.items + len(self.turns)


def model_digest(path: Path) -> str:
    """Tells two model files apart: by size and the first mebibyte. Raises LlmosError (not readable)."""
    try:
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(1 << 20))
        head.update(path.stat().st_size.to_bytes(8, "little"))
    except OSError as error:
        raise LlmosError(f"cannot read the model file {path}: {error.strerror}") from error
    return head.hexdigest()


def write(checkpoint: Checkpoint, path: Path, key: bytes) -> int:
    """Write atomically, mode 0600: a temporary file, fsync, rename. Returns bytes.

    Raises UsageError (no name), NotPermitted (it would replace something that is no checkpoint), LlmosError.
    """
    _check_target(path)
    try:
        blob = encode(checkpoint, key)
    except MemoryError:
        raise AdmissionRefused(f"cannot write {path}: not enough memory to put it together") from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise LlmosError(f"cannot write {path}: {error.strerror}") from error
    return len(blob)


def _check_target(path: Path) -> None:
    """The rename would replace a device, a link or somebody's notes as readily as an old checkpoint."""
    if not path.name:
        raise UsageError("a checkpoint needs a file name")
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise NotPermitted(f"{path} exists and is not a regular file")
        if status.st_size:
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise NotPermitted(f"{path} exists and is not a checkpoint", "choose another name")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LlmosError(f"cannot write {path}: {error.strerror}") from error


def read(path: Path, key: bytes) -> Checkpoint:
    """Raises CheckpointInvalid, or LlmosError if the file cannot be read."""
    try:
        return decode(path.read_bytes(), key)
    except OSError as error:
        raise LlmosError(f"cannot read {path}: {error.strerror}") from error
    except MemoryError:
        raise AdmissionRefused(f"cannot read {path}: not enough memory") from None
    except CheckpointInvalid as error:
        raise CheckpointInvalid(f"{path}: {error.message}", error.hint) from None


def encode(checkpoint: Checkpoint, key: bytes) -> bytes:
    states = [thread.kv or b"" for thread in checkpoint.threads]
    header = {
        "spec": asdict(checkpoint.spec),
        "model_digest": checkpoint.model_digest,
        "replies": list(checkpoint.replies.items()),
        "threads": [
            [t.item, t.begun, t.prompt_length, t.reply_bounds, t.tokens, t.reply, len(t.kv or b"")]
            for t in checkpoint.threads
        ],
        "turns": checkpoint.turns,
        "hung_up": checkpoint.hung_up,
        "counts": [checkpoint.prompt_tokens, checkpoint.output_tokens],
    }
    text = json.dumps(header, ensure_ascii=True).encode()
    frame = _FRAME.pack(MAGIC, VERSION, len(text), sum(map(len, states)))
    body = b"".join((frame, text, *states))
    checksum = hashlib.sha256(body).digest()
    return body + checksum + hmac.digest(key, checksum, "sha256")


def decode(blob: bytes, key: bytes) -> Checkpoint:
    """Raises CheckpointInvalid. With a foreign key the checkpoint is good, without its KV state."""
    if len(blob) < _FRAME.size or not blob.startswith(MAGIC):
        raise CheckpointInvalid("not a checkpoint")
    _, version, header_bytes, kv_bytes = _FRAME.unpack_from(blob)
    if version != VERSION:
        raise CheckpointInvalid(f"checkpoint version {version}; this LLMOS reads version {VERSION}")
    end = _FRAME.size + header_bytes + kv_bytes
    if header_bytes > HEADER_MAX_BYTES or len(blob) != end + 2 * _SUM_BYTES:
        raise CheckpointInvalid("the checkpoint is damaged: its length is wrong")
    body, checksum, mac = blob[:end], blob[end:-_SUM_BYTES], blob[-_SUM_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
        raise CheckpointInvalid("the checkpoint is damaged: its checksum is wrong")
    ours = hmac.compare_digest(hmac.digest(key, checksum, "sha256"), mac)
    try:
        header = json.loads(body[_FRAME.size : _FRAME.size + header_bytes])
        return _checkpoint(header, body[_FRAME.size + header_bytes :], ours)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointInvalid("the checkpoint is damaged: its header makes no sense") from error


def _checkpoint(header: dict[str, Any], kv: bytes, ours: bool) -> Checkpoint:
    """A checkpoint from its header; every type is checked, as the file may be anybody's."""
    prompt_tokens, output_tokens = header["counts"]
    checkpoint = Checkpoint(
        spec=spec_from(header["spec"]),
        model_digest=header["model_digest"],
        replies=dict(header["replies"]),
        threads=tuple(_threads(header["threads"], kv, ours)),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        turns=tuple(header["turns"]),
        hung_up=header["hung_up"],
    )
    check(checkpoint)
    return checkpoint


def _threads(rows: list[Any], kv: bytes, ours: bool) -> Iterator[SavedThread]:
    begin = 0
    for item, begun, prompt_length, bounds, tokens, reply, kv_bytes in rows:
        if type(kv_bytes) is not int or not 0 <= kv_bytes <= len(kv) - begin:
            raise ValueError("KV state out of bounds")
        state = kv[begin : begin + kv_bytes] if ours and kv_bytes else None
        begin += kv_bytes
        yield SavedThread(item, begun, prompt_length, tuple(tokens), reply, state, tuple(bounds))


def check(checkpoint: Checkpoint) -> None:
    """Raises TypeError, ValueError for what no process can have been."""
    threads, replies = checkpoint.threads, checkpoint.replies
    texts = (*checkpoint.turns, *replies.values(), *(t.reply for t in threads), checkpoint.model_digest)
    numbers = [checkpoint.prompt_tokens, checkpoint.output_tokens, *replies]
    for thread in threads:
        bounds = [0, *thread.reply_bounds, thread.prompt_length, len(thread.tokens)]
        numbers += [thread.item, *bounds, *thread.tokens]
        if type(thread.begun) is not bool:
            raise TypeError("begun")
        if len(bounds) % 2 == 0 or sorted(bounds) != bounds:
            raise ValueError("prompt or replies beyond the sequence")
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        raise TypeError("field of the wrong type")
    if type(checkpoint.hung_up) is not bool:
        raise TypeError("hung_up")
    items = [*replies, *(thread.item for thread in threads)]
    if len(threads) > checkpoint.spec.threads:
        raise ValueError("more threads than it was given")
    if checkpoint.turns and checkpoint.spec.program != "chat":
        raise ValueError("turns of what is no chat")
    last = checkpoint.items - (checkpoint.spec.program != "chat")  # an idle chat is at its next one
    if len(set(items)) < len(items) or not all(0 <= item <= last for item in items):
        raise ValueError("items that there are not")
