"""Folders of models: what lies in them, found by `stat` alone.

A model is a GGUF file, the parts of one that was split, or a folder of safetensors. Whoever looks gets
what can be read, and a line about what cannot: dangling links, folders under lock, parts that are missing.
A look costs at most `MAX_ENTRIES` names.

Owner: the store makes one `Look` per scan. Not here: whose folders these are (foreign), names people
type (store), what is in a file (drivers).
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SUFFIX = ".gguf"
MAX_ENTRIES = 20_000
MAX_PARTS = 9_999
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model. `name` is what people type: the file's name without .gguf."""

    name: str
    path: Path  # of the first part, or of the folder
    description: str = ""
    origin: str = ""  # in words: whose folder it lies in
    format: Literal["gguf", "safetensors"] = "gguf"
    long_name: str = ""  # says more, for when another model has the short one
    parts: tuple[Path, ...] = ()  # every file, in order
    size_bytes: int = 0


@dataclass(slots=True)
class Look:
    """One look through folders: what may still be read, and what went wrong so far."""

    warnings: list[str] = field(default_factory=list)
    entries_left: int = MAX_ENTRIES
    _seen: dict[Path, list[os.DirEntry[str]]] = field(default_factory=dict)

    def renew(self) -> None:
        """Another source: it may take as many names."""
        self.entries_left = MAX_ENTRIES

    def entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder under a name fit to type and show, in order; hidden files are not.

        Raises FileNotFoundError. A folder that cannot be read is empty, and warned of, once.
        """
        if folder in self._seen:
            return self._seen[folder]
        found = self._seen[folder] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not self._may_read(folder):
                        break
                    if entry.name.isprintable() and not entry.name.startswith("."):
                        found.append(entry)
        except FileNotFoundError:
            del self._seen[folder]
            raise
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the folder's name
            reason = getattr(error, "strerror", None) or error
            self.warnings.append(f"{folder}: cannot look for models: {reason}")
        found.sort(key=lambda entry: entry.name)
        return found

    def _may_read(self, folder: Path) -> bool:
        if self.entries_left == 0:
            self.warnings.append(f"{folder}: stopped looking after {MAX_ENTRIES} names")
        self.entries_left -= 1
        return self.entries_left >= 0

    def folders(self, folder: Path) -> list[Path]:
        """The folders (or links to some) in a folder; none if it is not there."""
        try:
            return [folder / entry.name for entry in self.entries(folder) if _is_folder(entry)]
        except FileNotFoundError:
            return []

    def files(self, folder: Path, endings: tuple[str, ...]) -> dict[str, int]:
        """Regular files (or links to some) by name, with their bytes. Raises FileNotFoundError."""
        found = {}
        for entry in self.entries(folder):
            if entry.name.endswith(endings) and (size := self._size(entry)) is not None:
                found[entry.name] = size
        return found

    def _size(self, entry: os.DirEntry[str]) -> int | None:
        """Bytes of a regular file; None for anything else. A link may lead anywhere."""
        try:
            if entry.is_file():
                return entry.stat().st_size
            reason = "the link leads nowhere" if _is_dangling(entry) else None
        except OSError as error:  # a loop of links, or a locked folder behind one
            reason = error.strerror
        if reason:
            self.warnings.append(f"{entry.path}: skipped: {reason}")
        return None

    def models(self, folder: Path, origin: str, *, deep: int = 0, prefix: str = "") -> Iterator[StoredModel]:
        """The GGUF models in a folder and in `deep` levels of folders below. Raises FileNotFoundError."""
        sizes = self.files(folder, (SUFFIX,))
        for name, names in _grouped(sizes).items():
            if self._complete(folder, names):
                parts = tuple(folder / name for name in names)
                total = sum(sizes[name] for name in names)
                yield StoredModel(name, parts[0], "", origin, "gguf", prefix + name, parts, total)
        for below in self.folders(folder) if deep else ():
            yield from self.models(below, origin, deep=deep - 1, prefix=prefix)

    def _complete(self, folder: Path, names: list[str]) -> bool:
        wanted = part_names(names[0])
        if names == wanted:
            return True
        self.warnings.append(f"{folder / names[0]}: skipped: {len(names)} of {len(wanted)} parts are here")
        return False

    def safetensors(self, folder: Path, name: str, origin: str) -> StoredModel | None:
        """The folder as a model of its own, if it holds safetensors and the configuration they need."""
        try:
            sizes = self.files(folder, (".safetensors", "config.json"))
        except FileNotFoundError:
            return None
        weights = {file: size for file, size in sizes.items() if file.endswith(".safetensors")}
        if "config.json" not in sizes or not weights:
            return None
        parts = tuple(folder / file for file in weights)
        return StoredModel(name, folder, "", origin, "safetensors", name, parts, sum(weights.values()))


def part_names(name: str) -> list[str]:
    """The files that make up a model, given one of them: itself, or every part of a split one."""
    match = _PART.fullmatch(name)
    if match is None or not 0 < int(match[3]) <= MAX_PARTS:
        return [name]
    return [f"{match[1]}-{number:05}-of-{match[3]}{SUFFIX}" for number in range(1, int(match[3]) + 1)]


def stem(name: str) -> str:
    """A model's name from its file's: without .gguf, and without the number of its part."""
    match = _PART.fullmatch(name)
    return match[1] if match else name.removesuffix(SUFFIX)


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by model, parts in order. A whole file hides parts of the same name."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(stem(name), []).append(name)
    return {key: [key + SUFFIX] if key + SUFFIX in files else files for key, files in groups.items()}


def _is_dangling(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not Path(entry.path).exists()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
