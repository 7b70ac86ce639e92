"""The header of a GGUF file, read in pure Python: metadata and tensor table, checked against the file.

Nothing is loaded: a few megabytes at most are read, and arrays of strings (the vocabulary) are
stepped over. What is refused here never reaches the native loader, which can abort the process.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
Not here: models in several files (parts.py), what the metadata mean (shape.py).
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, error
from typing import Final

from kernel.errors import ModelInvalid, ModelNotFound

MAX_ITEMS: Final = 1 << 16  # metadata entries, tensors
MAX_KEY_BYTES: Final = (1 << 16) - 1
MAX_NAME_BYTES: Final = 63  # of a tensor
MAX_KEPT_BYTES: Final = 1 << 24  # of text in all; the largest chat templates have some 50,000
MAX_LIST: Final = 1024  # longer arrays of numbers are stepped over; per-layer lists are shorter
MAX_KEPT_NUMBERS: Final = 1 << 17  # in all lists
MAX_KEPT_STRINGS: Final = 1 << 20  # of an array that is asked for
MAX_STRINGS: Final = 1 << 23  # in all arrays that are stepped over; vocabularies have some 300,000
MAX_STRINGS_BYTES: Final = 1 << 28
WINDOW_BYTES: Final = 1 << 20

GGML_TYPES: Final[dict[int, tuple[str, int, int]]] = {  # number: name, weights and bytes in a block
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}


def type_number(name: str) -> int:
    """How files and llama.cpp call a type."""
    return next(number for number, (known, _, _) in GGML_TYPES.items() if known == name)


_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_U32 = Struct("<I")
_U64 = Struct("<Q")


@dataclass(frozen=True, slots=True)
class Skipped:
    """An array that was stepped over, and where it is."""

    items: int
    offset: int
    size_bytes: int
    is_text: bool


Value = int | float | bool | str | tuple[int | float, ...] | tuple[str, ...] | Skipped


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table. `dims` are innermost first; `offset` counts from the data's start."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    size_bytes: int

    @property
    def weights(self) -> int:
        block, block_bytes = GGML_TYPES[self.type][1:]
        return self.size_bytes // block_bytes * block


@dataclass(frozen=True, slots=True)
class Header:
    """All that a GGUF file says before its weights."""

    path: Path
    file_bytes: int
    metadata: dict[str, Value]
    tensors: tuple[Tensor, ...]
    data_offset: int  # where the weights begin
    parts: tuple["Header", ...] = ()  # of a model in several files: each one's own, in order

    @property
    def weights_bytes(self) -> int:
        return sum(t.size_bytes for t in self.tensors)


class _Reader:
    """Forward reads through a window on the file. Every length is checked before a byte is read."""

    def __init__(self, fd: int, file_bytes: int) -> None:
        self.at = 0
        self._fd = fd
        self._file_bytes = file_bytes
        self._window = b""
        self._window_at = 0
        self._room_bytes = MAX_KEPT_BYTES
        self._numbers = MAX_KEPT_NUMBERS  # that may still be kept
        self._strings = MAX_STRINGS  # that may still be stepped over
        self._strings_bytes = MAX_STRINGS_BYTES

    def _show(self, size: int) -> int:
        """Have `size` bytes from `at` on in the window; returns where they begin in it."""
        begin = self.at - self._window_at
        if begin + size > len(self._window):
            if self.at + size > self._file_bytes:
                raise ModelInvalid("the file ends within its header")
            self._window = os.pread(self._fd, max(size, WINDOW_BYTES), self.at)
            self._window_at, begin = self.at, 0
            if len(self._window) < size:
                raise ModelInvalid("the file shrank while it was read")
        return begin

    def take(self, size: int) -> bytes:
        begin = self._show(size)
        self.at += size
        return self._window[begin : begin + size]

    def number(self, layout: Struct) -> int | float | bool:
        (value,) = layout.unpack(self.take(layout.size))
        return value  # type: ignore[no-any-return]

    def count(self, what: str, limit: int) -> int:
        (value,) = _U64.unpack(self.take(8))
        if value > limit:
            raise ModelInvalid(f"{value} {what} are too many")
        return int(value)

    def text(self, what: str, limit: int = MAX_KEPT_BYTES) -> str:
        """A string that is kept: there is a limit to all of them together."""
        raw = self.take(self.count(f"bytes in {what}", min(limit, self._room_bytes)))
        self._room_bytes -= len(raw)
        return raw.decode("utf-8", "replace")

    def texts(self, count: int) -> tuple[str, ...]:
        if count > MAX_KEPT_STRINGS:
            raise ModelInvalid(f"{count} strings are too many")
        return tuple(self.text("a text") for _ in range(count))

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > self._file_bytes:
            raise ModelInvalid("the file ends within its header")

    def numbers(self, kind: str, count: int) -> tuple[int | float, ...] | None:
        """An array of numbers; None if it is stepped over, being long."""
        layout = Struct(f"<{count}{kind}") if count <= min(MAX_LIST, self._numbers) else None
        if layout is None:
            self.skip(count * Struct("<" + kind).size)
            return None
        self._numbers -= count
        return layout.unpack(self.take(layout.size))

    def skip_strings(self, count: int) -> None:
        """Step over `count` strings, a window at a time. The inner loop is all a large vocabulary costs."""
        length = _U64.unpack_from
        self._strings -= count
        while count and self._strings >= 0 and self._strings_bytes >= 0:
            at = self._show(8)
            window, done = self._window, 0
            try:
                for done in range(count):  # noqa: B007 (the loop counts how far it came)
                    at += 8 + length(window, at)[0]
                done = count
            except (error, OverflowError):
                pass  # the next string begins beyond the window, or beyond any file
            count -= done
            size = self._window_at + at - self.at
            self._strings_bytes -= size
            self.skip(size)
        if self._strings < 0 or self._strings_bytes < 0:
            raise ModelInvalid("too many strings")


def read(path: Path, strings: frozenset[str] = frozenset()) -> Header:
    """Read and check the header of `path`. Arrays of strings are kept only if named in `strings`.

    Raises ModelNotFound, and ModelInvalid naming what is wrong.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: no such file") from None
    except (OSError, ValueError) as reason:
        raise ModelInvalid(f"{path}: {getattr(reason, 'strerror', None) or reason}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ModelInvalid("not a regular file")
        return _read(path, _Reader(fd, status.st_size), status.st_size, strings)
    except ModelInvalid as reason:
        raise ModelInvalid(f"{path}: {reason.message}", reason.hint) from None
    except OSError as reason:
        raise ModelInvalid(f"{path}: {reason.strerror}") from None
    finally:
        os.close(fd)


def _read(path: Path, reader: _Reader, file_bytes: int, strings: frozenset[str]) -> Header:
    if file_bytes < 24 or reader.take(4) != b"GGUF":
        raise ModelInvalid("not a GGUF file")
    version = reader.number(_U32)
    if version not in (2, 3):
        raise ModelInvalid(f"GGUF version {version}; only 2 and 3 are known")
    tensors, entries = reader.count("tensors", MAX_ITEMS), reader.count("metadata entries", MAX_ITEMS)
    metadata: dict[str, Value] = {}
    for _ in range(entries):
        key = reader.text("a metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise ModelInvalid(f"metadata key {key[:64]!r} occurs twice")
        metadata[key] = _value(reader, int(reader.number(_U32)), key in strings)
    table = tuple(_tensor(reader) for _ in range(tensors))
    data_offset = _aligned(reader.at, metadata)
    _check_table(table, file_bytes - data_offset)
    return Header(path, file_bytes, metadata, table, data_offset)


def _value(reader: _Reader, kind: int, keep_strings: bool) -> Value:
    if kind == _STRING:
        return reader.text("a text")
    if kind in _SCALARS:
        return reader.number(Struct("<" + _SCALARS[kind]))
    if kind != _ARRAY:
        raise ModelInvalid(f"unknown metadata type {kind}")
    item, count = int(reader.number(_U32)), reader.count("array items", 1 << 32)
    begin = reader.at
    if item == _STRING:
        if keep_strings:
            return reader.texts(count)
        reader.skip_strings(count)
    elif item not in _SCALARS:
        raise ModelInvalid(f"unknown array type {item}")
    elif (numbers := reader.numbers(_SCALARS[item], count)) is not None:
        return numbers
    return Skipped(count, begin, reader.at - begin, item == _STRING)


def _tensor(reader: _Reader) -> Tensor:
    name = reader.text("a tensor's name", MAX_NAME_BYTES)
    n_dims = int(reader.number(_U32))
    if not 1 <= n_dims <= 4:
        raise ModelInvalid(f"tensor {name!r} has {n_dims} dimensions")
    dims = tuple(_U64.unpack(reader.take(8))[0] for _ in range(n_dims))
    kind, offset = int(reader.number(_U32)), int(_U64.unpack(reader.take(8))[0])
    if kind not in GGML_TYPES:
        raise ModelInvalid(f"tensor {name!r} has the unknown type {kind}")
    _, block, block_bytes = GGML_TYPES[kind]
    weights = 1
    for dim in dims:
        weights *= dim
    if not 0 < weights < 1 << 62 or dims[0] % block:
        raise ModelInvalid(f"tensor {name!r} has the impossible shape {'x'.join(map(str, dims))}")
    return Tensor(name, dims, kind, offset, weights // block * block_bytes)


def _aligned(at: int, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ModelInvalid(f"impossible alignment {alignment}")
    return -(-at // alignment) * alignment


def _check_table(tensors: tuple[Tensor, ...], data_bytes: int) -> None:
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ModelInvalid("two tensors have the same name")
    for tensor in tensors:
        end = tensor.offset + tensor.size_bytes
        if end > data_bytes:
            raise ModelInvalid(
                f"truncated: tensor {tensor.name!r} ends {end - data_bytes} bytes after the file"
            )
