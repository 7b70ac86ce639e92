"""One GGUF file loaded: its weights and its vocabulary.

Owner: the engine; freed after every context on it. Tokens in, bytes out; each argument is checked
here, because some wrong ones abort the process.
Not here: chat templates (chat.py), contexts (slab.py).
"""

import ctypes
from functools import cached_property
from hashlib import blake2b
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from drivers.llamacpp import native, parts
from drivers.llamacpp.header import Header
from drivers.llamacpp.native import lib
from kernel.device import Progress
from kernel.errors import Interrupted, ModelInvalid

_LOAD_MMAP = 1
_ALL_LAYERS = 999


class Weights:
    """Weights and vocabulary. Read-only after the load, so contexts may share it."""

    def __init__(self, path: str | PathLike[str], on_gpu: bool, progress: Progress) -> None:
        self.path = fspath(path)
        self._model: Any = _load(self.path, on_gpu, progress)
        self._vocabulary = lib.llama_model_get_vocab(self._model)
        self.vocabulary_tokens = int(lib.llama_vocab_n_tokens(self._vocabulary))
        self.bytes = int(lib.llama_model_size(self._model))
        self.on_gpu = on_gpu
        self._pieces: dict[int, bytes] = {}
        if lib.llama_model_has_encoder(self._model) or not lib.llama_model_has_decoder(self._model):
            self.free()
            raise ModelInvalid(f"{self.path}: not a text generation model (no decoder, or an encoder too)")

    @property
    def handle(self) -> int:
        return self._model  # type: ignore[no-any-return]

    @cached_property
    def can_roll_back(self) -> bool:
        """Whether the last positions of a sequence can be dropped; recurrent state cannot go back."""
        return not (lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a generation."""
        is_end, vocabulary = native.token_is_eog, self._vocabulary
        return frozenset(token for token in range(self.vocabulary_tokens) if is_end(vocabulary, token))

    @cached_property
    def bos(self) -> int:
        """The token a text begins with, or -1."""
        return int(lib.llama_vocab_bos(self._vocabulary))

    @cached_property
    def chat_template(self) -> str:
        raw = lib.llama_model_chat_template(self._model, None)
        return raw.decode("utf-8", "replace") if raw else ""

    def tokenize(self, text: str, *, begins: bool, specials: bool) -> list[int]:
        """Text to tokens. `begins`: add what the model wants at a start; `specials`: control tokens count."""
        raw = encode(text)
        room = len(raw) + 8
        tokens = (ctypes.c_int32 * room)()
        count = lib.llama_tokenize(self._vocabulary, raw, len(raw), tokens, room, begins, specials)
        if count < 0:
            tokens = (ctypes.c_int32 * -count)()
            count = lib.llama_tokenize(self._vocabulary, raw, len(raw), tokens, -count, begins, specials)
        return tokens[: max(count, 0)]

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for control tokens."""
        known = self._pieces.get(token)
        return self._look_up(token) if known is None else known

    def _look_up(self, token: int) -> bytes:
        if not 0 <= token < self.vocabulary_tokens:
            return b""
        room = 64
        buffer = ctypes.create_string_buffer(room)
        size = native.token_to_piece(self._vocabulary, token, buffer, room, 0, False)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = native.token_to_piece(self._vocabulary, token, buffer, -size, 0, False)
        piece = self._pieces[token] = buffer.raw[:size]
        return piece

    def free(self) -> None:
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None


def encode(text: str) -> bytes:
    """Valid UTF-8: what never was becomes U+FFFD here, since some invalid bytes abort llama.cpp."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass" if _has_lone_surrogates(text) else "surrogateescape")
        return raw.decode("utf-8", "replace").encode("utf-8")


def _has_lone_surrogates(text: str) -> bool:
    """Surrogates that do not stand for an undecodable byte (U+DC80 to U+DCFF)."""
    return any(0xD800 <= ord(char) < 0xDC80 or 0xDCFF < ord(char) <= 0xDFFF for char in text)


def _load(path: str, on_gpu: bool, progress: Progress) -> int:
    params = lib.llama_model_default_params()
    params.n_gpu_layers = _ALL_LAYERS if on_gpu else 0
    params.load_mode = _LOAD_MMAP
    told = _Told(progress)
    params.progress_callback = callback = lib.llama_progress_callback(told)
    model = lib.llama_model_load_from_file(path.encode("utf-8", "surrogateescape"), params)
    del callback
    if told.failure is not None:
        raise told.failure
    if told.cancelled:
        raise Interrupted("the load was cancelled")
    if not model:
        parts.read(Path(path))  # it was whole a moment ago: if it is no longer, this says so
        raise ModelInvalid(f"{path}: llama.cpp cannot load it", "`dmesg` has its reasons")
    return model  # type: ignore[no-any-return]


class _Told:
    """The progress callback. Nothing may be raised into native code: it is kept, and the load cancelled."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.cancelled = False
        self.failure: BaseException | None = None

    def __call__(self, fraction: float, _data: object) -> bool:
        try:
            self.cancelled = not self._progress(fraction)
        except BaseException as failure:
            self.failure = failure
        return not self.cancelled and self.failure is None


def fingerprint(header: Header) -> bytes:
    """16 bytes that tell one model from another: the headers of its files and samples of their weights.

    Raises ModelInvalid: a file has gone since it was loaded.
    """
    digest = blake2b(digest_size=16)
    for part in header.parts or (header,):
        try:
            _sample(part, digest)
        except OSError as error:
            raise ModelInvalid(f"{part.path}: {error.strerror}: it went while it was loaded") from error
    return digest.digest()


def _sample(part: Header, digest: blake2b) -> None:
    with Path(part.path).open("rb") as file:
        left = part.data_offset
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        for sample in range(16):
            file.seek(part.data_offset + (part.file_bytes - part.data_offset) * sample // 16)
            digest.update(file.read(4096))
