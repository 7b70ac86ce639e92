"""Configuration: defaults, then the user's file, the project's file, the environment, and flags.

Each source overrides the ones before it, key by key. A file with an unknown key or a value of the wrong
type is refused by name: a setting that silently does nothing is worse than an error. Unknown LLMOS_*
variables are let be, since other parts (LLMOS_HOME, LLMOS_PLUGINS) and other versions own them.

Owner: boot loads one `Config`, which then never changes. Not here: limits of the kernel (kernel.config).
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kernel.errors import UsageError
from llmos.paths import expand

PROJECT_FILE = ".llmos.toml"
CONTEXT_TOKENS_MAX = 2**31 - 1  # positions are 32-bit in llama.cpp
SEQUENCES_MAX = 256  # llama_max_parallel_sequences()
THREADS_MAX = 512  # GGML_MAX_N_THREADS

Isolation: TypeAlias = Literal["worker", "none"]
Value: TypeAlias = str | int | tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """What a person can set. 0 lets the driver choose."""

    model: str = "nano"  # what `run` without a model means
    policy: str = "fair"  # of the scheduler
    isolation: Isolation = "worker"  # where engines run: a child process, or a thread of this one
    context_tokens: int = 0  # per sequence
    sequences: int = 0  # seats in an engine's KV cache
    threads: int = 0  # compute threads of an engine
    models: tuple[Path, ...] = ()  # more folders to look for models in


@dataclass(frozen=True, slots=True)
class Source:
    """Where values come from: as it is named in errors, and the folder that relative paths count from."""

    name: str
    folder: Path
    as_text: bool = False  # a variable or a flag: numbers and lists arrive as text

    def error(self, key: str, why: str) -> UsageError:
        return UsageError(f"{self.name}: {key} {why}")


Reader: TypeAlias = Callable[[Source, str, object], Value]


def load_config(
    user_file: Path,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> Config:
    """Merge every source. Raises UsageError naming the file (or variable, or flag) and the key.

    `user_file` is the platform's choice; the flag `config`, or LLMOS_CONFIG, names another, which must
    exist. `flags` holds what the command line set; a None in it was not set. `folder` is where the
    project's file is looked for: the current one.
    """
    here = folder or _current_folder()
    set_flags = {key: value for key, value in (flags or {}).items() if value is not None}
    named = set_flags.pop("config", None) or environ.get("LLMOS_CONFIG")
    merged: dict[str, Any] = {}
    if named:
        _merge_file(merged, expand(str(named), here), required=True)
    else:
        _merge_file(merged, user_file)
    _merge_file(merged, here / PROJECT_FILE)
    for key in _READERS:
        if text := environ.get(variable := f"LLMOS_{key.upper()}"):
            merged[key] = _read(Source(variable, here, as_text=True), key, text)
    for key, value in set_flags.items():
        flag = f"--{key.replace('_', '-')}"
        merged[key] = _read(Source(flag, here, as_text=True), key, value)
    return Config(**merged)


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UsageError("the current folder has been removed", "`cd` to another one") from None


def _merge_file(merged: dict[str, Any], path: Path, required: bool = False) -> None:
    source = Source(str(path), path.parent)
    for key, value in _read_toml(path, required).items():
        merged[key] = _read(source, key, value)


def _read_toml(path: Path, required: bool) -> dict[str, object]:
    """The table in a file. A file that need not be there, and is not or lies out of reach, is empty."""
    if not required and not _is_file(path):
        return {}
    import tomllib  # deferred: most people have no file

    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: not UTF-8 at byte {error.start}") from error


def _is_file(path: Path) -> bool:
    """Also false where a locked folder hides the answer."""
    try:
        return path.is_file()
    except OSError:
        return False


def _read(source: Source, key: str, value: object) -> Value:
    if key not in _READERS:
        raise _unknown(source, key)
    return _READERS[key](source, key, value)


def _unknown(source: Source, key: str) -> UsageError:
    import difflib  # deferred: only a mistake needs it

    near = difflib.get_close_matches(key, _READERS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(_READERS)}"
    return UsageError(f"{source.name}: unknown key {key!r}", hint)


def _read_name(source: Source, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise source.error(key, f"must be a string, not {_shown(value)}")
    if not value.strip():
        raise source.error(key, "must not be empty")
    return value


def _read_isolation(source: Source, key: str, value: object) -> str:
    if value not in ("worker", "none"):
        raise source.error(key, f'must be "worker" or "none", not {_shown(value)}')
    return str(value)


def _read_count(most: int) -> Reader:
    """A whole number from 0 to `most`; text of one from the environment or a flag."""

    def read(source: Source, key: str, value: object) -> int:
        number = _parse_int(value) if source.as_text else value
        if not isinstance(number, int) or isinstance(number, bool):
            raise source.error(key, f"must be a whole number, not {_shown(value)}")
        if not 0 <= number <= most:
            raise source.error(key, f"must be from 0 to {most}, not {_shown(value)}")
        return number

    return read


def _parse_int(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        return value


def _read_folders(source: Source, key: str, value: object) -> tuple[Path, ...]:
    """An array of folders; from the environment or a flag, a path list as in PATH."""
    parts = value
    if source.as_text and isinstance(value, str):
        parts = [part for part in value.split(os.pathsep) if part]
    if not isinstance(parts, list) or not all(isinstance(part, str) and part for part in parts):
        raise source.error(key, f"must be an array of folders, not {_shown(value)}")
    return tuple(expand(part, source.folder) for part in parts)


def _shown(value: object) -> str:
    """A value as an error shows it: short, on one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_READERS: dict[str, Reader] = {
    "model": _read_name,
    "policy": _read_name,
    "isolation": _read_isolation,
    "context_tokens": _read_count(CONTEXT_TOKENS_MAX),
    "sequences": _read_count(SEQUENCES_MAX),
    "threads": _read_count(THREADS_MAX),
    "models": _read_folders,
}
