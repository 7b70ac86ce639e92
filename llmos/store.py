"""Models on disk, by name.

A model is a GGUF file in one of these folders, first come first named: LLMOS's own models folder, the
folders of LLMOS_MODELS, and the one that LLMOS brings along. Looking through them costs a `stat` per
file; headers are read by the driver, when a model is loaded.

Owner: boot makes one `Store`; it holds no state but its folders. Not here: what is in a file, downloads.
"""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kernel.errors import ModelInvalid, ModelNotFound, UsageError
from llmos.paths import Paths, expand

SUFFIX = ".gguf"
NANO = (
    "built in, 1.1 M parameters: turns a plain English request into one LLMOS command line "
    "(318 of 400 held-out requests exactly right: a suggestion to check); knows nothing else"
)
_BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_DESCRIPTIONS = {_BUILTIN_FOLDER / "nano.gguf": NANO}


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model file. `name` is what people type: the file's name without .gguf."""

    name: str
    path: Path
    description: str = ""


@dataclass(frozen=True, slots=True)
class Scan:
    """What the folders hold, and what could not be looked at: one line each, for the caller to show."""

    models: tuple[StoredModel, ...]
    warnings: tuple[str, ...]


class Store:
    """Finds models by name, unique prefix or path."""

    def __init__(self, paths: Paths, extra_folders: Iterable[Path] = ()) -> None:
        self._own_folder = paths.models
        self._extra_folders = tuple(extra_folders)

    def list(self) -> tuple[StoredModel, ...]:
        """Every model that has a name, in order of the names."""
        return self.scan().models

    def scan(self) -> Scan:
        """Look through the folders. A name found twice means the first file."""
        found: dict[str, StoredModel] = {}
        warnings: list[str] = []
        for folder in (self._own_folder, *self._extra_folders, _BUILTIN_FOLDER):
            try:
                paths = _model_files(folder)
            except FileNotFoundError:
                if folder != self._own_folder:  # ours is made when it is first needed
                    warnings.append(f"{folder}: no such folder of models")
                continue
            except (OSError, ValueError) as error:  # ValueError: a zero byte in the folder's name
                warnings.append(f"{folder}: cannot look for models: {getattr(error, 'strerror', error)}")
                continue
            for path in paths:
                model = _stored(path)
                found.setdefault(model.name, model)
        return Scan(tuple(found[name] for name in sorted(found)), tuple(warnings))

    def resolve(self, name: str) -> StoredModel:
        """The model that a person means by a name, the beginning of one, or a path.

        Raises UsageError (several match), ModelNotFound, ModelInvalid (a path to something else).
        """
        if not name:
            raise UsageError("the model's name is empty")
        if os.sep in name or name.endswith(SUFFIX):
            return self._at_path(name)
        models = {model.name: model for model in self.list()}
        if name in models:
            return models[name]
        begun = [model for model in models.values() if model.name.startswith(name)]
        if len(begun) == 1:
            return begun[0]
        if begun:
            names = ", ".join(model.name for model in begun)
            raise UsageError(f"{name!r} may mean several models: {names}", "type more of the name")
        raise ModelNotFound(f"no model named {name!r}", _hint(name, models))

    def _at_path(self, name: str) -> StoredModel:
        path = expand(name)
        try:
            mode = path.stat().st_mode
        except PermissionError as error:
            raise ModelInvalid(f"{path}: permission denied") from error
        except (OSError, ValueError) as error:
            known = {model.name: model for model in self.list()}
            raise ModelNotFound(f"no such file: {name!r}", _hint(_stem(name), known)) from error
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ModelInvalid(f"{path}: {kind}, not a model file")
        return _stored(path)


def _stored(path: Path) -> StoredModel:
    return StoredModel(_stem(path.name), path, _DESCRIPTIONS.get(path, ""))


def _model_files(folder: Path) -> list[Path]:
    """Model files right in a folder. A link may lead anywhere; pipes and devices are passed by."""
    with os.scandir(folder) as entries:
        return [folder / entry.name for entry in entries if _is_model(entry)]


def _is_model(entry: os.DirEntry[str]) -> bool:
    """A regular file (or a link to one) whose name can be typed and shown."""
    name = entry.name
    if name.startswith(".") or not name.endswith(SUFFIX) or not name.isprintable():
        return False
    try:
        return entry.is_file()
    except OSError:
        return False


def _stem(name: str) -> str:
    return Path(name).name.removesuffix(SUFFIX)


def _hint(name: str, known: Iterable[str]) -> str:
    import difflib  # deferred: only a mistake needs it

    folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean {folded[near[0]]}?" if near else "`models` lists what there is"
