"""A process as a file: its specification, its tokens, its replies, and its KV state.

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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kernel.errors import CheckpointInvalid, LlmosError, NotPermitted, UsageError
from kernel.process import ProcessSpec, spec_from

MAGIC = b"LLMOSCKP"
VERSION = 1
_FRAME = struct.Struct("<8sIQQ")
_SUM_BYTES = 32
HEADER_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `save` writes. `kv` is None where there is none to trust."""

    spec: ProcessSpec
    model_digest: str
    tokens: tuple[int, ...]
    prompt_length: int
    replies: tuple[str, ...]
    reply: str
    prompt_tokens: int
    output_tokens: int
    kv: bytes | None


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
    blob = encode(checkpoint, key)
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
        blob = path.read_bytes()
    except OSError as error:
        raise LlmosError(f"cannot read {path}: {error.strerror}") from error
    try:
        return decode(blob, key)
    except CheckpointInvalid as error:
        raise CheckpointInvalid(f"{path}: {error.message}", error.hint) from None


def encode(checkpoint: Checkpoint, key: bytes) -> bytes:
    header = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.name not in ("spec", "kv")}
    header["spec"] = asdict(checkpoint.spec)
    text = json.dumps(header, ensure_ascii=True).encode()
    kv = checkpoint.kv or b""
    body = _FRAME.pack(MAGIC, VERSION, len(text), len(kv)) + text + kv
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
        kv = body[_FRAME.size + header_bytes :] if ours and kv_bytes else None
        return _checkpoint(header, kv)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointInvalid("the checkpoint is damaged: its header makes no sense") from error


def _checkpoint(header: dict[str, Any], kv: bytes | None) -> Checkpoint:
    """A checkpoint from its header; every type is checked, as the file may be anybody's."""
    checkpoint = Checkpoint(
        spec=spec_from(header.pop("spec")),
        kv=kv,
        tokens=tuple(header.pop("tokens")),
        replies=tuple(header.pop("replies")),
        **header,
    )
    texts = (*checkpoint.replies, checkpoint.reply, checkpoint.model_digest)
    counts = (checkpoint.prompt_length, checkpoint.prompt_tokens, checkpoint.output_tokens)
    if not all(type(t) is str for t in texts) or not all(type(n) is int for n in counts + checkpoint.tokens):
        raise TypeError("field of the wrong type")
    if not 0 <= checkpoint.prompt_length <= len(checkpoint.tokens):
        raise ValueError("prompt longer than the sequence")
    if len(checkpoint.replies) >= len(checkpoint.spec.prompts):
        raise ValueError("nothing left to answer")
    return checkpoint
