"""The plugin contract and its loader.

A plugin is one command: a `CommandSpec`. It comes from an installed package (entry point group
`llmos.commands`, the entry point's name being the command's, its value `module:SPEC`), or from a file
NAME.py in the user's plugin folder that defines `SPEC`. Only names are read at boot; the code is imported
when the command is first used, and what it raises is contained there.
Not here: the registry (shell), what commands may do (`kernel.syscall`, through `Shell.system`).
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from kernel.errors import UsageError
from shell.registry import CommandSpec, Registry

GROUP = "llmos.commands"


def add_plugins(registry: Registry, folder: Path, environ: Mapping[str, str]) -> None:
    """Make plugin commands known; LLMOS_PLUGINS= (empty) or a list of names says which ones. A built-in
    command is never replaced, and the user's file wins over a package's command."""
    allowed = environ.get("LLMOS_PLUGINS")
    names = None if allowed is None else set(allowed.replace(",", " ").split())
    for name, loader in _found(folder).items():
        if name not in registry and (names is None or name in names):
            registry.add_lazy(name, None, loader)


def _found(folder: Path) -> dict[str, Callable[[], CommandSpec]]:
    loaders: dict[str, Callable[[], CommandSpec]] = {}
    for point in entry_points(group=GROUP):
        loaders[point.name] = _from_package(point)
    try:
        files = sorted(folder.glob("*.py"))
    except OSError:
        files = []
    loaders.update({file.stem: _from_file(file) for file in files if not file.stem.startswith("_")})
    return loaders


def _from_package(point: EntryPoint) -> Callable[[], CommandSpec]:
    return lambda: _checked(point.load(), point.value)


def _from_file(file: Path) -> Callable[[], CommandSpec]:
    def load() -> CommandSpec:
        name = f"llmos_plugin_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
        return _checked(getattr(module, "SPEC", None), str(file))

    return load


def _checked(found: object, where: str) -> CommandSpec:
    if not isinstance(found, CommandSpec):
        raise UsageError(f"{where} defines no SPEC", "SPEC = CommandSpec(...), from shell.registry")
    return found
