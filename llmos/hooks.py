"""The plugin contract and its loader.

A plugin is one command: a `CommandSpec` named `SPEC`. It comes from an installed package (entry point
group `llmos.commands`, the entry point's name being the command's, its value `module:SPEC`), or from a
file NAME.py in the user's plugin folder. The command, the file and the entry point have one name. A whole
plugin, `~/.config/llmos/plugins/words.py`:

    from shell.registry import CommandSpec

    def run(shell, args):
        for process in shell.system.snapshot().processes:
            words = shell.system.read(process.pid, 0).text.split()
            shell.out.line(f"{process.pid} {len(words)}")
        return 0

    SPEC = CommandSpec("words", "count the words that each process has said", run)

Only names are read at boot; the code is imported when the command is first used, and what it raises is
contained there. LLMOS_PLUGINS (empty, or a list of names) says which are wanted; LLMOS_DEBUG=1 shows
tracebacks.
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
    for name, (where, loader) in _found(folder).items():
        if names is not None and name not in names:
            continue
        if name in registry:
            registry.warnings.append(f"plugin {where} is not used: `{name}` is a built-in command")
        else:
            registry.add_lazy(name, None, loader)


def _found(folder: Path) -> dict[str, tuple[str, Callable[[], CommandSpec]]]:
    """By name: where it is, and what imports it."""
    found: dict[str, tuple[str, Callable[[], CommandSpec]]] = {}
    for point in entry_points(group=GROUP):
        found[point.name] = point.value, _from_package(point)
    try:
        files = sorted(folder.glob("*.py"))
    except OSError:
        files = []
    found.update({file.stem: (str(file), _from_file(file)) for file in files if file.stem[0] not in "._"})
    return found


def _from_package(point: EntryPoint) -> Callable[[], CommandSpec]:
    return lambda: _checked(point.load(), point.name, point.value)


def _from_file(file: Path) -> Callable[[], CommandSpec]:
    def load() -> CommandSpec:
        name = f"llmos_plugin_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
        return _checked(getattr(module, "SPEC", None), file.stem, str(file))

    return load


def _checked(found: object, name: str, where: str) -> CommandSpec:
    if not isinstance(found, CommandSpec):
        raise UsageError(f"{where} defines no SPEC", "SPEC = CommandSpec(...), from shell.registry")
    if found.name != name:
        raise UsageError(f"{where} defines the command `{found.name}`", f"its name must be `{name}`, too")
    return found
