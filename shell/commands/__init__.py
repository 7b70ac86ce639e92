"""The built-in commands, a file per subject."""

from shell.commands import builtins, chat, jobs, models, process, resume, run, sched, swap, system
from shell.commands.save import save_command
from shell.commands.store import ModelStore, store_commands
from shell.registry import Registry


def builtin_registry(store: ModelStore | None = None) -> Registry:
    """A registry with every built-in command; plugins are added to it."""
    registry = Registry()
    for module in (process, run, chat, swap, resume, jobs, models, sched, system, builtins):
        for spec in module.SPECS:
            registry.add(spec)
    for spec in (save_command(store), *store_commands(store)):
        registry.add(spec)
    return registry
