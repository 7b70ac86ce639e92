"""Models on disk, by name: LLMOS's own folder, the folders of LLMOS_MODELS, other programs' stores, and the
model that LLMOS brings along; first come, first named.

Looking through them costs a `stat` per file; headers are read by the driver, when a model is loaded. Only
the own folder is ever written to, under names without folders in them, and no link in it is followed then.
A file gets its name when it is whole: until then it lies in `.incoming`, where a pull goes on later.

Owner: boot makes one `Store`; it holds no state but its folders. Not here: what folders look like (folders,
foreign), how bytes arrive (hub), what is in a file (drivers).
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from kernel.errors import AdmissionRefused, LlmosError, ModelInvalid, ModelNotFound, NotPermitted, UsageError
from kernel.memory import human_bytes
from llmos.folders import SUFFIX, Look, StoredModel, part_names, stem
from llmos.foreign import Source
from llmos.hub import Hub, HubFile, Progress, choose, parse_source
from llmos.paths import Paths, expand, writable

NANO = (
    "built in, 1.1 M parameters: turns a plain English request into one LLMOS command line "
    "(318 of 400 held-out requests exactly right: a suggestion to check); knows nothing else"
)
OWN = "LLMOS's own folder"
NEEDS_TORCH = "safetensors: LLMOS has no engine for them yet"
SPARE_BYTES = 64 << 20  # disk that a pull or a copy leaves to others
MAX_NAME_BYTES = 200
MAX_METADATA = 300  # characters of a line of it
_BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_DESCRIPTIONS = {_BUILTIN_FOLDER / "nano.gguf": NANO}
_INCOMING = ".incoming"
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
        hub: Hub | None = None,
    ) -> None:
        self._own_folder = paths.models
        self._extra_folders = tuple(extra_folders)
        self._foreign = tuple(foreign)
        self._hub = hub or Hub(os.environ.get("HF_ENDPOINT", ""))

    # Finding

    def list(self) -> tuple[StoredModel, ...]:
        """Every model that has a name, in order of the names."""
        return self.scan().models

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
        yield from self._in(look, self._own_folder, OWN)
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
            if folder != self._own_folder:  # ours is made when it is first needed
                look.warnings.append(f"{folder}: no such folder of models")
            return
        for below in look.folders(folder):
            if model := look.safetensors(below, below.name, origin):
                yield replace(model, description=_described(model))

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
        return StoredModel(
            stem(path.name), path, description, str(path.parent), parts=parts, size_bytes=status.st_size
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
        model = models.get(name) or self._broken_link(name)
        if model is None:
            raise ModelNotFound(f"no model has exactly the name {name!r}", _hint(name, models))
        if model.origin != OWN:
            hint = "`ollama rm` removes it" if model.origin == "Ollama" else f"it is {model.path}"
            raise NotPermitted(f"{name} lies in {model.origin}, which LLMOS only reads", hint)
        return model

    def _broken_link(self, name: str) -> StoredModel | None:
        path = self._own_folder / (name + SUFFIX)
        if _is_plain(name) and path.is_symlink():
            return StoredModel(name, path, "", OWN, parts=(path,))
        return None

    def remove(self, name: str) -> int:
        """Delete a model of the own folder; returns the bytes freed. A link goes, what it leads to stays.

        Raises as `owned`, and LlmosError if the file system refuses.
        """
        model = self.owned(name)
        paths = [model.path] if model.format == "safetensors" else model.parts
        with _told(f"cannot remove {name}"):
            return sum(_remove(path) for path in paths)

    def copy(self, source: str, name: str) -> StoredModel:
        """Keep a model in the own folder under a name: by a hard link where that can be, else by its bytes.

        Raises UsageError (a name that is none), NotPermitted (it is taken), AdmissionRefused (no room on
        the disk), ModelInvalid, ModelNotFound.
        """
        from drivers.llamacpp import header

        model, name = self.resolve(source), _checked_name(name)
        header.read(model.path)
        targets = [self._free(part_name) for part_name in _renamed_parts(model, name)]
        for part, target in reversed(list(zip(model.parts, targets, strict=True))):  # the first names it
            with _told(f"cannot copy {model.name}"):
                self._bring(part, target)
        return self.owned(name)

    def _bring(self, part: Path, target: Path) -> None:
        part = part.resolve(strict=True)
        try:
            target.hardlink_to(part)
        except FileExistsError:
            raise NotPermitted(f"{target.name} has just been made by someone else") from None
        except OSError:  # another disk, another owner, a file system without hard links
            with self._incoming(f"cp-{target.name}", part.stat().st_size, keep=False) as partial:
                partial.truncate()
                with part.open("rb") as file:
                    shutil.copyfileobj(file, partial, 1 << 20)
                self._publish(partial, target)

    def pull(self, source: str, progress: Progress) -> StoredModel:
        """Fetch `hf:ORG/REPO[:FILE|:QUANT]` into the own folder.

        Raises what `Hub` raises, and as `copy`. Partial files stay for the next time.
        """
        repository_name, choice = parse_source(source)
        repository = self._hub.repository(repository_name)
        files = choose(repository, choice)
        targets = [(file, self._target(file)) for file in files]
        for file, target in reversed(targets):  # the first part names the model, so it comes last
            if target is not None:
                with (
                    _told(f"cannot keep {file.path}"),
                    self._incoming(f"{file.digest}.part", file.size_bytes) as partial,
                ):
                    self._hub.fetch(repository, file, partial, progress)
                    self._publish(partial, target)
        return self.owned(stem(Path(files[0].path).name))

    def _target(self, file: HubFile) -> Path | None:
        """Where a file of the hub goes; None if it is there already. Raises NotPermitted."""
        name = Path(file.path).name
        _checked_name(name.removesuffix(SUFFIX))
        path = self._own_folder / name
        if path.is_file() and path.stat().st_size == file.size_bytes:
            digest = file.hasher()
            with path.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            if digest.hexdigest() == file.digest:
                return None
        return self._free(name)

    def _free(self, file_name: str) -> Path:
        """A path in the own folder, which is made if need be, that nothing has. Raises NotPermitted."""
        if writable(self._own_folder) is None:
            raise NotPermitted(f"{self._own_folder} cannot be written to", "LLMOS_HOME names another place")
        path = self._own_folder / file_name
        if os.path.lexists(path):
            name = stem(file_name)
            raise NotPermitted(f"there is another {name} already", f"`rm {name}` first")
        return path

    @contextmanager
    def _incoming(self, name: str, size_bytes: int, *, keep: bool = True) -> Iterator[BinaryIO]:
        """A file to fill, which nobody else fills now, with room on the disk for `size_bytes`.

        It stays for another time if `keep`, and if it was not published.
        """
        folder = self._own_folder / _INCOMING
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink():
            raise NotPermitted(f"{folder} is a link, and LLMOS writes through none")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        path = folder / name
        with os.fdopen(os.open(path, flags, 0o644), "r+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise NotPermitted("another LLMOS fetches this very file now") from None
            self._make_sure_of(size_bytes - os.fstat(stream.fileno()).st_size)
            try:
                yield stream
            finally:
                if not keep or not os.fstat(stream.fileno()).st_size:
                    path.unlink(missing_ok=True)

    def _make_sure_of(self, size_bytes: int) -> None:
        short = size_bytes + SPARE_BYTES - shutil.disk_usage(self._own_folder).free
        if size_bytes > 0 and short > 0:
            raise AdmissionRefused(
                f"the disk of {self._own_folder} lacks {human_bytes(short)} of the {human_bytes(size_bytes)}",
                "`rm` models you do not need, or set LLMOS_HOME to a folder on another disk",
            )

    def _publish(self, partial: BinaryIO, target: Path) -> None:
        """Give a whole file its name, unless something has it by now."""
        partial.flush()
        os.fsync(partial.fileno())
        source = Path(str(partial.name))
        try:
            target.hardlink_to(source)
        except FileExistsError:
            raise NotPermitted(f"{target.name} has just been made by someone else") from None
        except OSError:  # a file system without hard links
            source.rename(target)
        source.unlink(missing_ok=True)
