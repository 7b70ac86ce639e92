"""What a repository on the hub has, and which of it a person means. Pure.

Not here: asking the hub (hub).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kernel.errors import ModelInvalid, ModelNotFound, UsageError
from llmos.folders import SUFFIX, part_names, stem

SHOWN_CHOICES = 12
_SOURCE = re.compile(r"hf:(\w([\w.-]*\w)?/\w([\w.-]*\w)?)(?::(.+))?", re.ASCII)
_MAX_NAME = 96


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file in a repository. Large files have a SHA-256, small ones only git's checksum."""

    path: str
    size_bytes: int
    sha256: str
    git_sha1: str

    @property
    def digest(self) -> str:
        return self.sha256 or self.git_sha1

    def hasher(self) -> hashlib._Hash:
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Repository:
    """One commit of a repository."""

    name: str
    commit: str
    files: tuple[HubFile, ...]


def read_repository(name: str, commit: object, siblings: object) -> Repository:
    """The hub's answer, its sizes and checksums checked. Raises ValueError, TypeError, AttributeError."""
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise ValueError("no commit")
    files = []
    for sibling in siblings or ():  # type: ignore[attr-defined]
        lfs = sibling.lfs
        size = lfs.size if lfs else sibling.size
        sha256, sha1 = (lfs.sha256 if lfs else ""), (sibling.blob_id or "")
        if not isinstance(size, int) or size < 0 or not re.fullmatch(r"([0-9a-f]{40})?", sha1):
            raise ValueError(f"{sibling.rfilename!r} without a size")
        if lfs and not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"{sibling.rfilename!r} without a checksum")
        files.append(HubFile(str(sibling.rfilename), size, sha256, sha1))
    return Repository(name, commit, tuple(files))


def parse_source(text: str) -> tuple[str, str]:
    """`hf:ORG/REPO[:FILE|:QUANT]` as repository and choice. Raises UsageError."""
    match = _SOURCE.fullmatch(text)
    name = match[1] if match else ""
    if match is None or ".." in name or "--" in name or name.endswith(".git") or len(name) > _MAX_NAME:
        raise UsageError(f"{text[:80]!r} names no repository", "pull hf:ORG/REPO, or hf:ORG/REPO:Q4_K_M")
    return name, match[4] or ""


def choose(repository: Repository, choice: str) -> tuple[HubFile, ...]:
    """The one model that a choice means, as all its parts in order.

    Raises UsageError (several match: they are named), ModelNotFound, ModelInvalid (no GGUF at all).
    """
    files = {file.path: file for file in repository.files}
    models = [path for path in files if path.endswith(SUFFIX) and part_names(path)[0] == path]
    if not models:
        raise ModelInvalid(f"{repository.name} has no GGUF file", _other_formats(repository))
    chosen = [path for path in models if _is_named(path, choice)] or [
        path for path in models if _is_of(path, choice) and not path.rsplit("/", 1)[-1].startswith("mmproj")
    ]
    if not chosen:
        raise ModelNotFound(f"{repository.name} has no {choice!r}", f"it has {_listed(models, files)}")
    if len(chosen) > 1:
        hint = f"pull hf:{repository.name}:CHOICE with one of {_listed(chosen, files)}"
        raise UsageError(f"{repository.name} has {len(chosen)} models", hint)
    return _parts(repository, chosen[0], files)


def _is_named(path: str, choice: str) -> bool:
    return choice in (path, path.removesuffix(SUFFIX), stem(path))


def _is_of(path: str, quantization: str) -> bool:
    """Whether a quantisation is a word of its name: Q4_K is none of x-Q4_K_M.gguf."""
    word = rf"(^|[-._/]){re.escape(quantization)}($|[-./])"
    return not quantization or re.search(word, stem(path), re.IGNORECASE) is not None


def _listed(paths: list[str], files: Mapping[str, HubFile]) -> str:
    shown = [f"{path} ({_all_bytes(path, files) / 1e9:.1f} GB)" for path in sorted(paths)[:SHOWN_CHOICES]]
    more = len(paths) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _all_bytes(path: str, files: Mapping[str, HubFile]) -> int:
    return sum(files[part].size_bytes for part in part_names(path) if part in files)


def _other_formats(repository: Repository) -> str:
    if any(file.path.endswith(".safetensors") for file in repository.files):
        return "it has safetensors, which LLMOS cannot run yet; look for a repository with GGUF in its name"
    return "LLMOS pulls GGUF files"


def _parts(repository: Repository, path: str, files: Mapping[str, HubFile]) -> tuple[HubFile, ...]:
    names = part_names(path)
    missing = [name for name in names if name not in files]
    if missing:
        raise ModelInvalid(f"{repository.name} lacks {len(missing)} of {len(names)} parts: {missing[0]}, …")
    for name in names:
        if not files[name].digest:
            raise ModelInvalid(f"the hub gives no checksum for {name}")
    return tuple(files[name] for name in names)
