"""A model's header, whole: of one file, or of all the files that it was split into.

llama.cpp opens the first part and finds the rest by name (NAME-00001-of-00003.gguf), so this does as well.
Not here: reading one file (header.py).
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from drivers.llamacpp import header
from drivers.llamacpp.header import Header
from kernel.errors import ModelInvalid, ModelNotFound

_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def read(path: Path, strings: frozenset[str] = frozenset()) -> Header:
    """As `header.read`, with the tensors and bytes of all parts. Raises ModelInvalid if one is missing."""
    first = header.read(path, strings)
    count, number = _number(first, "split.count"), _number(first, "split.no")
    if count < 2:
        return first
    named = _PART.fullmatch(path.name)
    stem = named[1] if named else "NAME"
    if number or path.name != f"{stem}-00001-of-{count:05}.gguf":
        raise ModelInvalid(
            f"{path}: part {number + 1} of a model in {count} files",
            f"the first one stands for the model, under this name: {stem}-00001-of-{count:05}.gguf",
        )
    parts = (first, *(_part(path, stem, each, count) for each in range(1, count)))
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    wanted = _number(first, "split.tensors.count", len(tensors))
    if len({tensor.name for tensor in tensors}) != wanted or len(tensors) != wanted:
        raise ModelInvalid(f"{path}: its {count} parts do not hold {wanted} different tensors")
    return replace(first, tensors=tensors, file_bytes=sum(part.file_bytes for part in parts), parts=parts)


def _part(first: Path, stem: str, number: int, count: int) -> Header:
    path = first.with_name(f"{stem}-{number + 1:05}-of-{count:05}.gguf")
    try:
        part = header.read(path)
    except ModelNotFound:
        raise ModelInvalid(
            f"{first}: part {number + 1} of {count} is missing: {path.name}", "`pull` the model again"
        ) from None
    if _number(part, "split.no") != number:
        raise ModelInvalid(f"{path}: not part {number + 1} of a model, as its name says")
    return part


def _number(part: Header, key: str, default: int = 0) -> int:
    value = part.metadata.get(key, default)
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise ModelInvalid(f"{part.path}: {key} is {value!r}")
    return value
