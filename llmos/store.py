"""Models on disk, by name: LLMOS's own folder, the folders of LLMOS_MODELS, other programs' stores, and the
model that LLMOS brings along; first come, first named.

Looking through them costs a `stat` per file; headers are read by the driver, when a model is loaded.

Owner: boot makes one `Store`; it holds no state but its folders, and what it has warned of. Not here: what
folders look like (folders, foreign), how the own one is written to (shelf), how bytes arrive (hub), what is
in a file (drivers).
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kernel.errors import ModelInvalid, ModelNotFound, NotPermitted, UsageError
from llmos.folders import SUFFIX, Look, StoredModel, part_names, stem
from llmos.foreign import OLLAMA, Source
from llmos.paths import Paths, expand
from llmos.shelf import Shelf, checked_name

if TYPE_CHECKING:
    from llmos.hub import Hub, Progress
    from llmos.repository import HubFile

NANO = (
    "built in, 1.1 M parameters: turns a plain English request into one LLMOS command line "
    "(318 of 400 held-out requests exactly right: a suggestion to check); knows nothing else"
)
OWN = "LLMOS's own folder"
NEEDS_TORCH = "safetensors: LLMOS has no engine for them yet"
MAX_METADATA = 300  # characters of a line of it
_BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_DESCRIPTIONS = {_BUILTIN_FOLDER / "nano.gguf": NANO}
_COPY_BYTES = 1 << 20
_METADATA = {
    "title": "general.name",
    "author": "general.author",
    "organization": "general.organization",
    "license": "general.license",
    "license_link": "general.license.link",
    "base_model": "general.base_model.0.name",
    "url": "general.url",
}


@dataclass(frozen=True, slots=True)
class Scan:
    """What the folders hold, and what could not be looked at: one line each, for the caller to show."""

    models: tuple[StoredModel, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says of itself. The text is from strangers."""

    name: str
    path: Path
    origin: str
    files: int
    size_bytes: int
    metadata: Mapping[str, str]
    chat_template: bool


class Store:
    """Finds models by name, unique prefix or path; keeps LLMOS's own."""

    def __init__(
        self,
        paths: Paths,
        extra_folders: Iterable[Path] = (),
        foreign: Iterable[Source] = (),
        hub: "Hub | None" = None,
        warn: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._shelf = Shelf(paths.models)
        self._extra_folders = tuple(extra_folders)
        self._foreign = tuple(foreign)
        self._hub = hub
        self._warn = warn
        self._warned: set[str] = set()

    # Finding

    def list(self) -> tuple[StoredModel, ...]:
        """Every model that has a name, in order of the names. Warnings are passed on once each."""
        scan = self.scan()
        for text in scan.warnings:
            if text not in self._warned:
                self._warned.add(text)
                self._warn(text)
        return scan.models

    def scan(self) -> Scan:
        """Look through the folders. A name found twice means the first; a foreign one has a long name too."""
        found: dict[str, StoredModel] = {}
        look = Look()
        for model in self._all(look):
            taken = model.name in found and model.path != found[model.name].path
            name = model.long_name if taken else model.name
            found.setdefault(name, replace(model, name=name))
        return Scan(tuple(found[name] for name in sorted(found)), tuple(look.warnings))

    def _all(self, look: Look) -> Iterator[StoredModel]:
        yield from self._in(look, self._shelf.folder, OWN)
        for folder in self._extra_folders:
            yield from self._in(look, folder, str(folder))
        yield from self._in(look, _BUILTIN_FOLDER, "LLMOS itself")
        for source in self._foreign:
            look.renew()
            for model in source(look):
                yield replace(model, description=_described(model))

    def _in(self, look: Look, folder: Path, origin: str) -> Iterator[StoredModel]:
        """The models right in a folder: GGUF files, and folders of safetensors."""
        look.renew()
        try:
            for model in look.models(folder, origin):
                yield replace(model, description=_DESCRIPTIONS.get(model.path, ""))
        except FileNotFoundError:
            if folder != self._shelf.folder:  # ours is made when it is first needed
                look.warnings.append(f"{folder}: no such folder of models")
            return
        for below in look.folders(folder):
            found = look.safetensors(below, below.name, origin)
            if found is not None:
                yield replace(found, description=_described(found))

    def resolve(self, name: str) -> StoredModel:
        """The model that a person means by a name, the beginning of one, or a path, to be opened.

        Raises UsageError (several match), ModelNotFound, ModelInvalid (a path to something else, or a
        format that no driver reads).
        """
        model = self.find(name)
        if model.format != "gguf":
            hint = f"`pull` a GGUF of it: look for {model.name.rpartition('/')[2]}-GGUF"
            raise ModelInvalid(f"{model.name} is {NEEDS_TORCH}", hint)
        return model

    def find(self, name: str) -> StoredModel:
        """As `resolve`, for any format that is listed."""
        if not name:
            raise UsageError("the model's name is empty")
        if name.endswith(SUFFIX) or name.startswith((os.sep, "." + os.sep, ".." + os.sep, "~")):
            return self._at_path(name)
        models = {model.name: model for model in self.list()}
        for whole in (name, f"{name}:latest"):  # as Ollama has it
            if whole in models:
                return models[whole]
        begun = [model for model in models.values() if model.name.startswith(name)]
        if len(begun) == 1:
            return begun[0]
        if begun:
            names = ", ".join(model.name for model in begun)
            raise UsageError(f"{name!r} may mean several models: {names}", "type more of the name")
        if os.sep in name:
            return self._at_path(name)
        raise ModelNotFound(f"no model named {name!r}", _hint(name, models))

    def _at_path(self, name: str) -> StoredModel:
        path = expand(name)
        try:
            status = path.stat()
        except PermissionError as error:
            raise ModelInvalid(f"{path}: permission denied") from error
        except (OSError, ValueError) as error:
            known = {model.name: model for model in self.list()}
            raise ModelNotFound(f"no such file: {name!r}", _hint(stem(Path(name).name), known)) from error
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ModelInvalid(f"{path}: {kind}, not a model file")
        parts = tuple(path.with_name(part) for part in part_names(path.name))
        description = _DESCRIPTIONS.get(path, "")
        size_bytes = sum(part.stat().st_size for part in parts if part.exists())
        return StoredModel(
            stem(path.name), path, description, str(path.parent), parts=parts, size_bytes=size_bytes
        )

    def facts(self, name: str) -> Facts:
        """What a model is and where it came from. Raises as `resolve`."""
        from drivers.llamacpp import header  # deferred: listing reads no headers

        model = self.resolve(name)
        keys = header.read(model.path).metadata
        texts = {label: keys.get(key) for label, key in _METADATA.items()}
        said = {label: text[:MAX_METADATA] for label, text in texts.items() if isinstance(text, str) and text}
        template = bool(keys.get("tokenizer.chat_template"))
        files = len(model.parts)
        return Facts(model.name, model.path, model.origin, files, model.size_bytes, said, template)

    # Keeping

    def owned(self, name: str) -> StoredModel:
        """The model of the own folder that has exactly this name. Raises NotPermitted, ModelNotFound."""
        models = {model.name: model for model in self.list()}
        model = models.get(name) or self._leftover(name)
        if model is None:
            raise ModelNotFound(f"no model has exactly the name {name!r}", _hint(name, models))
        if model.origin != OWN:
            hint = f"`ollama rm {name}` removes it" if model.origin == OLLAMA else f"it is {model.path}"
            raise NotPermitted(f"{name} is not in LLMOS's own folder, and LLMOS only reads it", hint)
        return model

    def _leftover(self, name: str) -> StoredModel | None:
        """What is no model any more but has the name of one: a link to nowhere, a part alone."""
        parts = [path for path in sorted(self._shelf.folder.glob("*" + SUFFIX)) if stem(path.name) == name]
        if not parts:
            return None
        return StoredModel(name, parts[0], "", OWN, parts=tuple(parts))

    def remove(self, name: str) -> int:
        """Delete a model of the own folder; returns the bytes freed. A link goes, what it leads to stays.

        Raises as `owned`, and LlmosError if the file system refuses.
        """
        model = self.owned(name)
        return self._shelf.remove([model.path] if model.format == "safetensors" else list(model.parts))

    def copy(self, source: str, name: str) -> str:
        """Keep a model in the own folder under a name: by a hard link where that can be, else by its bytes.

        Raises UsageError (a name that is none), NotPermitted (it is taken), AdmissionRefused (no room on
        the disk), ModelInvalid, ModelNotFound.
        """
        from drivers.llamacpp import header  # deferred, as in `facts`

        model, name = self.resolve(source), checked_name(name)
        header.read(model.path)
        targets = [self._shelf.place(file) for file in _renamed(len(model.parts), name)]
        for part, target in reversed(list(zip(model.parts, targets, strict=True))):  # the first names it
            self._bring(part, target)
        return name

    def _bring(self, part: Path, target: Path) -> None:
        with _readable(part) as file:
            if self._shelf.link(Path(os.path.realpath(part)), target):
                return

            def write(partial: BinaryIO) -> None:
                partial.truncate(0)
                shutil.copyfileobj(file, partial, _COPY_BYTES)

            self._shelf.fill(target, f"cp-{target.name}", os.fstat(file.fileno()).st_size, write, keep=False)

    def pull(self, source: str, progress: "Progress") -> str:
        """Fetch `hf:ORG/REPO[:FILE|:QUANT]` into the own folder; returns its name there.

        Raises what `Hub` raises, and as `copy`. What was received stays for the next time.
        """
        from llmos.hub import Hub  # deferred: seldom asked for
        from llmos.repository import choose, parse_source

        repository_name, choice = parse_source(source)
        hub = self._hub or Hub(os.environ.get("HF_ENDPOINT", ""))
        repository = hub.repository(repository_name)
        files = choose(repository, choice)
        missing = [(file, target) for file in files if (target := self._target(file)) is not None]
        for file, target in reversed(missing):  # the first part names the model, so it comes last

            def write(partial: BinaryIO, file: "HubFile" = file) -> None:
                hub.fetch(repository, file, partial, progress)

            self._shelf.fill(target, f"{file.digest}.part", file.size_bytes, write, keep=True)
        return stem(Path(files[0].path).name)

    def export(self, name: str, target: Path, progress: "Progress") -> None:
        """Copy a model of one file to a path outside. Raises as `resolve` and `export`; NotPermitted."""
        from llmos.export import export  # deferred: seldom asked for

        model = self.resolve(name)
        if len(model.parts) != 1:
            raise NotPermitted(
                f"{model.name} is made of {len(model.parts)} files", f"they lie in {model.path.parent}"
            )
        export(model.path, target, progress)

    def _target(self, file: "HubFile") -> Path | None:
        """Where a file of the hub goes; None if it is there already. Raises NotPermitted, UsageError."""
        name = Path(file.path).name
        checked_name(name)
        path = self._shelf.folder / name
        if path.is_file() and path.stat().st_size == file.size_bytes:
            digest = file.hasher()
            with _readable(path) as stream:
                while chunk := stream.read(_COPY_BYTES):
                    digest.update(chunk)
            if digest.hexdigest() == file.digest:
                return None
        return self._shelf.place(name)


def _renamed(parts: int, name: str) -> list[str]:
    return part_names(f"{name}-00001-of-{parts:05}{SUFFIX}" if parts > 1 else name + SUFFIX)


@contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise ModelInvalid(f"{path}: {error.strerror}") from error


def _described(model: StoredModel) -> str:
    place = f"{model.origin}: {model.long_name.rpartition('/')[0] or model.name}"
    return f"{NEEDS_TORCH} ({place})" if model.format == "safetensors" else place


def _hint(name: str, known: Iterable[str]) -> str:
    import difflib  # deferred: only a mistake needs it

    folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean {folded[near[0]]}?" if near else "`models` lists what there is"
